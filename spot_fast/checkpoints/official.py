"""Checkpoints of the authors' implementation (gkakogeorgiou/spot, `.pt.tar`) → `Spot`, and back.

The state dict is the file itself or its entry `model`. Tensors show most of the Config; `assumptions` lists the rest,
which has defaults.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from spot_fast.checkpoints.converted import Converted
from spot_fast.checkpoints.encoder_weights import unwrapped
from spot_fast.checkpoints.official_names import frozen_vit, official_tensors, spot_name
from spot_fast.checkpoints.unpickle import read_checkpoint
from spot_fast.config import Config, preset
from spot_fast.errors import UserError
from spot_fast.model.spot import Spot
from spot_fast.model.tensor_checks import require_plain
from spot_fast.model.vits import vit_name

# The data set by the number of learned slots.
_PRESETS = {7: "coco", 6: "voc", 11: "movi_c", 24: "movi_e"}
# Tensors whose shapes show settings.
_NEEDED = (
    "encoder.patch_embed.proj.weight",
    "encoder.pos_embed",
    "encoder.blocks.0.mlp.fc1.weight",
    "slot_attn.slot_attention.project_q.weight",
    "slot_attn.slot_attention.mlp.0.weight",
)
# Defaults of the authors' training code.
_DEFAULTS = dict(
    feature_norm=False, encoder_weights=None, slot_heads=1, slot_iterations=3, dec_heads=6, dec_cross_heads=0
)


def official_weights(source: str | os.PathLike | Mapping[str, Any]) -> dict[str, Tensor]:
    """State dict in the authors' names, float32, from a file, a loaded checkpoint or a state dict."""
    contents = source if isinstance(source, Mapping) else read_checkpoint(source)
    state = contents.get("model", contents)
    if not isinstance(state, Mapping):
        raise UserError("the checkpoint's `model` is not a state dict: pass the authors' .pt.tar")
    state = {
        unwrapped(name): value for name, value in state.items() if isinstance(name, str) and isinstance(value, Tensor)
    }
    for needed in (*_NEEDED, *(() if _has_mlp_decoder(state) else ("bos_tokens",))):
        if needed not in state:
            raise UserError(f"the checkpoint lacks {needed}: it is not a model of the authors' implementation")
    require_plain(state, "the checkpoint")
    return {name: value.float() if value.is_floating_point() else value for name, value in state.items()}


def _has_mlp_decoder(state: Mapping[str, Tensor]) -> bool:
    return any(name.startswith(("dec.decoder.", "tf_dec.decoder.")) for name in state)


def _depth(state: Mapping[str, Tensor], prefix: str) -> int:
    pattern = re.compile(rf"{re.escape(prefix)}blocks\.(\d+)\.")
    return 1 + max((int(m.group(1)) for name in state if (m := pattern.match(name))), default=-1)


def _trained_blocks(state: Mapping[str, Tensor]) -> int:
    """The number of last blocks that train, at most the authors' four.

    UserError if the student's encoder differs elsewhere, which would be lost: `Spot` keeps the last blocks alone.
    """
    depth = _depth(state, "encoder.")
    for name, value in state.items():
        if name.startswith("encoder.") and f"second_{name}" not in state:
            raise UserError(
                f"the checkpoint's frozen encoder lacks {name.removeprefix('encoder.')}, which its student "
                "has: it is damaged"
            )
        if not name.startswith("second_encoder."):
            continue
        if (own := state.get(name.removeprefix("second_"))) is None:
            raise UserError(f"the checkpoint lacks {name.removeprefix('second_')}: it is damaged")
        if torch.equal(value, own):
            continue
        match = re.match(r"second_encoder\.blocks\.(\d+)\.", name)
        if match is None:
            if name.startswith("second_encoder.norm."):
                continue  # features are taken before it
            raise UserError(
                f"the checkpoint's student and frozen encoder differ in {name.removeprefix('second_')}, before the "
                "blocks: spot_fast trains the last blocks only"
            )
        if depth - int(match.group(1)) > 4:
            raise UserError(
                f"the checkpoint's student changed encoder block {match.group(1)} of {depth}: only the "
                "last four train in the authors' recipe"
            )
    return min(4, depth)


def infer_config(
    source: str | os.PathLike | Mapping[str, Any], *, encoder_heads: int | None = None, **changes: Any
) -> Config:
    """The Config that a checkpoint's tensors imply, with `changes` applied; `assumptions` lists the rest."""
    state = official_weights(source)
    slots = "slot_attn.slot_attention."
    stage = 2 if any(name.startswith("second_encoder.") for name in state) else 1
    learned = state.get("slot_attn.slots_init.weight")
    patch = state["encoder.patch_embed.proj.weight"].shape[-1]
    mlp = _has_mlp_decoder(state)
    values: dict[str, Any] = dict(
        _DEFAULTS,
        encoder=vit_name(frozen_vit(state), encoder_heads),
        image_size=round(_tokens(state) ** 0.5) * patch,
        train_blocks=_trained_blocks(state) if stage == 2 else min(4, _depth(state, "encoder.")),
        slot_dim=state[slots + "project_q.weight"].shape[0],
        slot_mlp=state[slots + "mlp.0.weight"].shape[0],
        slot_init="gaussian" if learned is None else "learned",
        truncation="none" if learned is None else "bi_level",
        orders="standard" if mlp or state["bos_tokens"].shape[0] == 1 else "spot9",
        decoder="mlp" if mlp else "transformer",
    )
    name = changes.pop("preset", None)
    if learned is not None:
        values["num_slots"] = learned.shape[0]
        name = name or _PRESETS.get(learned.shape[0])
    if mlp:
        prefix = "dec." if "dec.pos_embed" in state else "tf_dec."
        width, projected = state[prefix + "pos_embed"].shape[-1], state.get("slot_proj.0.weight")
        values["dec_mlp_hidden"] = state[prefix + "decoder.0.weight"].shape[0]
        values["mlp_slot_proj"] = projected is not None and projected.shape[0] == width
    else:
        values["dec_blocks"] = max(_depth(state, "dec."), _depth(state, "tf_dec."))
        values["cappa"] = 0.25 if "mask_token" in state else 0.0
    return preset(name or "coco", stage, **values | changes)


def assumptions(config: Config) -> list[str]:
    """The values of an inferred `config` that no tensor shows, as options of spot_fast.convert."""
    if config.slot_init == "gaussian":
        lines = [f"--preset {config.preset}", f"--num-slots {config.num_slots}"]
    else:
        lines = [f"--preset {config.preset} ({config.num_slots} slots)"]
    lines.append(f"--slot-iterations {config.slot_iterations}")
    if config.decoder == "transformer":
        lines.append(f"--dec-heads {config.dec_heads}")
        lines.append(f"--dec-cross-heads {config.dec_cross_heads or config.dec_heads}")
        lines += [f"--cappa {config.cappa}"] if config.cappa else []
    return [*lines, f"--encoder {config.encoder}"]


def _tokens(state: Mapping[str, Tensor]) -> int:
    """Patch tokens N, from the causal mask or the decoder's positions: these do not count prefix tokens."""
    for name, axis in (
        ("dec.blocks.0.self_attn_mask", 0),
        ("tf_dec.blocks.0.self_attn_mask", 0),
        ("dec.pos_embed", 1),
        ("tf_dec.pos_embed", 1),
        ("pos_embed", 1),
    ):
        if name in state:
            return state[name].shape[axis]
    return state["encoder.pos_embed"].shape[1] - 1


def official_state_dict(
    source: str | os.PathLike | Mapping[str, Any], config: Config | None = None
) -> dict[str, Tensor]:
    """State dict in `Spot`'s names: `encoder.vit.` the frozen encoder in timm's names, `last_blocks.` the student's.

    source: a `.pt.tar` file, its loaded contents, or a state dict in the authors' names. config: by default
    `infer_config(source)`. UserError for a file that is unsafe, damaged or from another method.
    """
    state = official_weights(source)
    config = config or infer_config(state)
    if config.stage == 2:
        # `encoder.` is the student's: its last blocks are kept, the rest equals the frozen `second_encoder.`.
        first = _depth(state, "encoder.") - config.train_blocks
        renamed = {}
        for name, value in state.items():
            match = re.match(r"encoder\.blocks\.(\d+)\.", name)
            if match and int(match.group(1)) >= first:
                renamed[f"last_blocks.{int(match.group(1)) - first}.{name[match.end() :]}"] = value
            elif not name.startswith("encoder."):
                renamed[name.removeprefix("second_")] = value
        state = renamed
    # The authors' projections of q, k and v are thirds of one matrix in `Spot`.
    result: dict[str, Tensor] = {}
    thirds: dict[str, list[Tensor | None]] = {}
    for name, value in state.items():
        if name.startswith("last_blocks."):
            result[name] = value
            continue
        renamed_to = spot_name(name)
        if renamed_to is None or (config.decoder == "mlp" and _transformer_only(renamed_to[0], config)):
            continue
        target, third = renamed_to
        if third is None:
            result[target] = _reshape(target, value)
        else:
            thirds.setdefault(target, [None] * 3)[third] = value
    # In the order q, k, v, whatever the file's.
    for target, parts in thirds.items():
        if any(part is None for part in parts):
            raise UserError(f"the checkpoint lacks a part of {target}: it is damaged")
        result[target] = torch.cat(parts)
    return result


def _transformer_only(name: str, config: Config) -> bool:
    """Whether the authors' models with the MLP decoder hold the parameter but do not use it."""
    unused = ("decoder.input_proj.", "decoder.bos") + (() if config.mlp_slot_proj else ("decoder.slot_proj.",))
    return name.startswith(unused)


def _reshape(name: str, value: Tensor) -> Tensor:
    """`value` without the authors' axes of length 1."""
    if name in ("decoder.bos", "decoder.positions"):
        return value.reshape(-1, value.shape[-1])
    return value.reshape(-1) if name == "decoder.mask_token" else value


def convert(
    source: str | os.PathLike | Mapping[str, Any], *, encoder_heads: int | None = None, **changes: Any
) -> Converted:
    """Converts a checkpoint of the authors; source as in `official_state_dict`.

    encoder_heads: attention heads of the ViT, by default one per 64 channels. changes: Config fields that the file does
    not show, such as num_slots (gaussian slots share their parameters).
    """
    state = official_weights(source)
    config = infer_config(state, encoder_heads=encoder_heads, **changes)
    learned, vit = learned_tensors(state, config), frozen_vit(state)
    tokens = (config.image_size // state["encoder.patch_embed.proj.weight"].shape[-1]) ** 2
    back = official_tensors(learned, vit, tokens=tokens, mlp=config.decoder == "mlp")
    # Converting back shows which tensors `Spot` does not keep.
    unused = {}
    for name, value in state.items():
        name = re.sub(r"^tf_dec\.", "dec.", name)
        if name not in back or not torch.equal(back[name].to(value.dtype), value):
            unused[name] = value
    return Converted(config, learned, vit, unused)


def learned_tensors(source: str | os.PathLike | Mapping[str, Any], config: Config) -> dict[str, Tensor]:
    """For `Spot.load_learned_state_dict`: a checkpoint's tensors without the frozen encoder's."""
    state = official_state_dict(source, config)
    return {name: value for name, value in state.items() if not name.startswith("encoder.")}


def authors_state_dict(model: Spot, vit: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """A model's state dict in the authors' names and shapes, complete for their strict loading.

    vit: the frozen encoder's weights before positions were resampled; by default the model's own. UserError for a model
    that the authors' code cannot build.
    """
    config = model.config
    rope = getattr(model.encoder.vit, "rope", None) is not None
    for wrong, why in (
        (config.decoder not in ("transformer", "mlp"), f"its decoder is {config.decoder}"),
        (config.decoder == "mlp" and config.mlp_top_k > 0, f"it decodes the top {config.mlp_top_k} slots of a token"),
        (config.implementation != "spot", f"implementation is {config.implementation}"),
        (config.feature_norm, "its features are normalised (feature_norm)"),
        (config.slot_heads != 1, f"slot attention has {config.slot_heads} heads"),
        (rope, f"its encoder {config.encoder} has rotary positions"),
    ):
        if wrong:
            raise UserError(
                f"this model cannot become a checkpoint of the authors' implementation: {why}, which their code does "
                "not have; save it as a folder instead"
            )
    learned = {name: value.detach().cpu() for name, value in model.learned_state_dict().items()}
    vit = {name: value.detach().cpu() for name, value in (vit or model.encoder.vit.state_dict()).items()}
    return official_tensors(learned, vit, tokens=model.encoder.num_tokens, mlp=config.decoder == "mlp")
