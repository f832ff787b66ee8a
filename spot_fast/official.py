"""Reads checkpoints of the authors' implementation (gkakogeorgiou/spot, `.pt.tar`) into this package's models.

A checkpoint is a pickle: it is read with PyTorch's restricted unpickler and a short list of NumPy names that the
authors' optimiser state needs, so that no code in the file runs. Decoder keys start with `dec.` or, in older files,
`tf_dec.`; the state dict stands alone or under `model`. In stage 2 `encoder.` is the student's and `second_encoder.`
the frozen one.
"""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .config import Config
from .encoder import Encoder
from .errors import UserError
from .model import Spot
from .timm_import import import_timm

# timm names of the DINO ViTs by (width, patch size): a label, the weights come from the file.
_ENCODERS = {
    (384, 16): "vit_small_patch16_224.dino",
    (384, 8): "vit_small_patch8_224.dino",
    (768, 16): "vit_base_patch16_224.dino",
    (768, 8): "vit_base_patch8_224.dino",
    (384, 14): "vit_small_patch14_dinov2",
    (768, 14): "vit_base_patch14_dinov2",
}
_SLOTS = {
    "layer_norm": "norm",
    "mlp": "mlp",
    "slot_attention": "attention",
    "slot_mu": "slot_mean",
    "slot_log_sigma": "slot_log_scale",
    "slots_init": "slot_embedding",
}
_BLOCK = {
    "self_attn_layer_norm": "norm_self",
    "encoder_decoder_attn_layer_norm": "norm_cross",
    "ffn_layer_norm": "norm_ffn",
    "encoder_decoder_attn": "cross_attention",
    "ffn": "ffn",
}
_TOP = {"bos_tokens": "bos", "mask_token": "mask_token", "pos_embed": "positions"}


def spot_name(name: str) -> tuple[str, int | None] | None:
    """Official parameter name → name in `Spot`, and which third of it (q, k, v) or None for the whole.

    None for what `Spot` does not keep: causal masks, and the mask token of a DINOv2 encoder. Names of the student's
    encoder (beside `second_encoder.`) are not known here: they follow from the number of trained blocks.
    """
    head, _, rest = name.partition(".")
    if name in _TOP:
        return f"decoder.{_TOP[name]}", None
    if head in ("input_proj", "slot_proj"):
        return f"decoder.{name}", None
    if head == "encoder":
        return None if rest == "mask_token" else (f"encoder.vit.{_vit_name(rest)}", None)
    if head == "slot_attn":
        part, _, rest = rest.partition(".")
        if part in _SLOTS:
            return ".".join(filter(None, ["slot_encoder", _SLOTS[part], "" if part == "slots_init" else rest])), None
    if head in ("dec", "tf_dec"):
        return _decoder_name(rest)
    raise UserError(f"the checkpoint has {name}, which the authors' models do not: it is of another method")


def _vit_name(name: str) -> str:
    return "reg_token" if name == "register_tokens" else name


def _decoder_name(name: str) -> tuple[str, int | None] | None:
    if name == "pos_embed":
        return "decoder.positions", None
    if name.startswith("decoder."):
        return f"decoder.mlp.{name.removeprefix('decoder.')}", None
    if name.startswith("layer_norm."):
        return f"decoder.transformer.norm.{name.removeprefix('layer_norm.')}", None
    match = re.fullmatch(r"blocks\.(\d+)\.(\w+)(?:\.(.+))?", name)
    if match:
        block, part, rest = match.groups()
        prefix = f"decoder.transformer.blocks.{block}"
        if part == "self_attn_mask":
            return None
        if part == "self_attn":
            third = {"proj_q.weight": 0, "proj_k.weight": 1, "proj_v.weight": 2, "proj_o.weight": None}[rest]
            return f"{prefix}.self_attention.{'project_o' if third is None else 'project_qkv'}.weight", third
        if part in _BLOCK:
            return f"{prefix}.{_BLOCK[part]}.{rest.replace('proj_', 'project_')}", None
    raise UserError(f"the checkpoint has dec.{name}, which the authors' decoders do not: it is of another method")


def read_checkpoint(path: str | os.PathLike) -> dict[str, Any]:
    """The file's contents as plain data; UserError when it is no checkpoint or would run code on loading."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"checkpoint {path} is not a file: pass the authors' .pt.tar")
    scalar = np.float64(0).__reduce__()[0]  # the function has moved between NumPy versions, and so has its pickled name
    allowed = [(scalar, "numpy.core.multiarray.scalar"), (scalar, "numpy._core.multiarray.scalar"), np.dtype]
    allowed += [type(np.dtype(name)) for name in ("float64", "float32", "int64")]
    with torch.serialization.safe_globals(allowed):
        try:
            contents = torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise UserError(_refusal(path, error)) from None
        except (RuntimeError, EOFError, OSError, KeyError, ValueError) as error:
            raise UserError(f"checkpoint {path} cannot be read ({_first_line(error)}): it is damaged or no checkpoint"
                            ) from None  # fmt: skip
    if not isinstance(contents, dict):
        kind = type(contents).__name__
        raise UserError(f"checkpoint {path} holds a {kind}, not a state dict: pass the authors' .pt.tar")
    return contents


def _refusal(path: Path, error: Exception) -> str:
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # not a zip archive: the name is only in the unpickler's message
        names = re.findall(r"GLOBAL ([\w.]+)", str(error))[:1]
    if not names:
        return f"checkpoint {path} cannot be read ({_first_line(error)}): it is damaged or no checkpoint"
    return (f"checkpoint {path} was not loaded: it calls {', '.join(sorted(names))}, which a file of weights has no "
            "need for; get the file from its authors again")  # fmt: skip


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:120] if text else type(error).__name__


def official_weights(source: str | os.PathLike | Mapping[str, Any]) -> dict[str, Tensor]:
    """State dict in the authors' names, float32, from a file, a loaded checkpoint or a state dict."""
    contents = source if isinstance(source, Mapping) else read_checkpoint(source)
    state = contents.get("model", contents)
    if not isinstance(state, Mapping):
        raise UserError("the checkpoint's `model` is not a state dict: pass the authors' .pt.tar")
    state = {name.removeprefix("module."): value for name, value in state.items() if isinstance(value, Tensor)}
    for needed in ("encoder.patch_embed.proj.weight", "slot_attn.slot_attention.project_q.weight"):
        if needed not in state:
            raise UserError(f"the checkpoint lacks {needed}: it is not a model of the authors' implementation")
    return {name: value.float() if value.is_floating_point() else value for name, value in state.items()}


def _depth(state: Mapping[str, Tensor], prefix: str) -> int:
    pattern = re.compile(rf"{re.escape(prefix)}blocks\.(\d+)\.")
    return 1 + max((int(m.group(1)) for name in state if (m := pattern.match(name))), default=-1)


def _trained_blocks(state: Mapping[str, Tensor]) -> int:
    """How many last blocks of the student's encoder differ from the frozen one; the authors train four."""
    depth = _depth(state, "encoder.")
    for name, value in state.items():
        if not name.startswith("second_encoder.") or torch.equal(value, state[name.removeprefix("second_")]):
            continue
        match = re.match(r"second_encoder\.blocks\.(\d+)\.", name)
        if match is None:
            if name.startswith("second_encoder.norm."):
                continue  # behind the features: never used
            raise UserError(f"the checkpoint's student and frozen encoder differ in {name.removeprefix('second_')}, in "
                            "front of the blocks: only last blocks can be trained here")  # fmt: skip
        if depth - int(match.group(1)) > 4:
            raise UserError(f"the checkpoint's student changed encoder block {match.group(1)} of {depth}: only the "
                            "last four train in the authors' recipe")  # fmt: skip
    return min(4, depth)


def infer_config(source: str | os.PathLike | Mapping[str, Any], **changes: Any) -> Config:
    """The Config that a checkpoint's tensors imply, with `changes` applied.

    Not visible in the tensors: number of heads (the defaults are the authors'), λ, the optimiser's settings. Cross-
    attention heads other than the authors' default, `dec_cross_heads`, have to be passed.
    """
    state = official_weights(source)
    slots = "slot_attn.slot_attention."
    stage = 2 if any(name.startswith("second_encoder.") for name in state) else 1
    learned = "slot_attn.slots_init.weight" in state
    dim, _, patch, _ = state["encoder.patch_embed.proj.weight"].shape
    mlp = any(name.startswith(("dec.decoder.", "tf_dec.decoder.")) for name in state)
    tokens = _tokens(state)
    values: dict[str, Any] = dict(
        preset="coco",
        stage=stage,
        encoder=_ENCODERS.get((dim, patch), f"vit_{dim}_patch{patch}"),
        image_size=round(tokens**0.5) * patch,
        train_blocks=_trained_blocks(state) if stage == 2 else min(4, _depth(state, "encoder.")),
        slot_dim=state[slots + "project_q.weight"].shape[0],
        slot_mlp=state[slots + "mlp.0.weight"].shape[0],
        slot_init="learned" if learned else "gaussian",
        truncation="bi_level" if learned else "none",
        orders="standard" if mlp or state["bos_tokens"].shape[0] == 1 else "spot9",
        decoder="mlp" if mlp else "transformer",
    )
    if learned:
        values["num_slots"] = state["slot_attn.slots_init.weight"].shape[0]
    if mlp:
        prefix = "dec." if "dec.pos_embed" in state else "tf_dec."
        width, projected = state[prefix + "pos_embed"].shape[-1], state.get("slot_proj.0.weight")
        values["dec_mlp_hidden"] = state[prefix + "decoder.0.weight"].shape[0]
        values["mlp_slot_proj"] = projected is not None and projected.shape[0] == width
    else:
        values["dec_blocks"] = max(_depth(state, "dec."), _depth(state, "tf_dec."))
        values["cappa"] = 0.25 if "mask_token" in state else 0.0
    return replace(Config(**values), **changes)


def _tokens(state: Mapping[str, Tensor]) -> int:
    """Patch tokens N: the side of the causal mask or the decoder's own positions say it without prefix tokens."""
    for name, axis in (
        ("dec.blocks.0.self_attn_mask", 0), ("tf_dec.blocks.0.self_attn_mask", 0), ("dec.pos_embed", 1),
        ("tf_dec.pos_embed", 1), ("pos_embed", 1),
    ):  # fmt: skip
        if name in state:
            return state[name].shape[axis]
    return state["encoder.pos_embed"].shape[1] - 1


def official_state_dict(
    source: str | os.PathLike | Mapping[str, Any], config: Config | None = None
) -> dict[str, Tensor]:
    """State dict in `Spot`'s names: `encoder.vit.` the frozen encoder in timm's names, `last_blocks.` the student's.

    Args:
        source: a `.pt.tar` file, its loaded contents, or a state dict in the authors' names.
        config: what to convert for, by default `infer_config(source)`.

    Raises:
        UserError: for a file that is unsafe, damaged or of another method.
    """
    state = official_weights(source)
    config = config or infer_config(state)
    if config.stage == 2:
        first = _depth(state, "encoder.") - config.train_blocks
        renamed = {}
        for name, value in state.items():
            match = re.match(r"encoder\.blocks\.(\d+)\.", name)
            if match and int(match.group(1)) >= first:
                renamed[f"last_blocks.{int(match.group(1)) - first}.{name[match.end() :]}"] = value
            elif not name.startswith("encoder."):
                renamed[name.removeprefix("second_")] = value
        state = renamed
    result: dict[str, Tensor] = {}
    thirds: dict[str, list[Tensor | None]] = {}
    for name, value in state.items():
        if name.startswith("last_blocks."):
            result[name] = value
            continue
        place = spot_name(name)
        if place is None or (config.decoder == "mlp" and _transformer_only(place[0], config)):
            continue
        target, third = place
        if third is None:
            result[target] = _reshape(target, value)
        else:
            thirds.setdefault(target, [None] * 3)[third] = value
    for target, parts in thirds.items():
        if any(part is None for part in parts):
            raise UserError(f"the checkpoint lacks a part of {target}: it is damaged")
        result[target] = torch.cat(parts)
    return result


def _transformer_only(name: str, config: Config) -> bool:
    """Parameters that the authors' models carry along without the MLP decoder using them."""
    unused = ("decoder.input_proj.", "decoder.bos") + (() if config.mlp_slot_proj else ("decoder.slot_proj.",))
    return name.startswith(unused)


def _reshape(name: str, value: Tensor) -> Tensor:
    """The authors keep axes of length 1 for broadcasting where `Spot` has none."""
    if name in ("decoder.bos", "decoder.positions"):
        return value.reshape(-1, value.shape[-1])
    return value.reshape(-1) if name == "decoder.mask_token" else value


def load_official(
    source: str | os.PathLike | Mapping[str, Any], *, num_slots: int, encoder_heads: int | None = None, **changes: Any
) -> Spot:
    """A Spot in eval mode with a checkpoint's weights, encoder included.

    Args:
        source: as in `official_state_dict`.
        num_slots: slots K (gaussian slots share their parameters: the file does not say how many there are).
        encoder_heads: attention heads of the ViT, by default one per 64 channels.
        changes: Config fields that the file does not show, such as dec_heads or dec_cross_heads.
    """
    state = official_weights(source)
    config = infer_config(state, num_slots=num_slots, **changes)
    weights = official_state_dict(state, config)
    vit, learned = {}, {}
    for name, value in weights.items():
        (vit if name.startswith("encoder.") else learned)[name.removeprefix("encoder.vit.")] = value
    model = Spot(config, Encoder(_vit(vit, config, encoder_heads), last_blocks=config.train_blocks))
    model.load_learned_state_dict(learned)
    return model.eval()


def _vit(weights: Mapping[str, Tensor], config: Config, heads: int | None) -> torch.nn.Module:
    """timm's ViT of the shape that the weights (timm names) have."""
    dim, _, patch, _ = weights["patch_embed.proj.weight"].shape
    registers = weights["reg_token"].shape[1] if "reg_token" in weights else 0
    vit = import_timm().models.vision_transformer.VisionTransformer(
        img_size=config.image_size, patch_size=patch, embed_dim=dim, depth=_depth(weights, ""),
        num_heads=heads or max(dim // 64, 1), mlp_ratio=weights["blocks.0.mlp.fc1.weight"].shape[0] / dim,
        num_classes=0, init_values=1.0 if "blocks.0.ls1.gamma" in weights else None, reg_tokens=registers,
    )  # fmt: skip
    try:
        vit.load_state_dict(dict(weights))
    except RuntimeError as error:
        raise UserError(f"the checkpoint's encoder is not a ViT of this package ({_first_line(error)})") from None
    return vit
