"""Weights of the frozen encoder: finds them (file, hub, package), reads, checks and loads them.

A file may hold the tensors alone, or below `model`, `state_dict`, `teacher` and the like beside an optimiser and
settings, with names that begin with the modules around the ViT. Its patch embedding shows where the ViT is.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spot_fast.checkpoints.hub import hub_answers
from spot_fast.checkpoints.official_names import frozen_vit
from spot_fast.checkpoints.unpickle import read_checkpoint
from spot_fast.config import Config, preset
from spot_fast.errors import UserError, one_line
from spot_fast.model.encoder import Encoder, resample_positions
from spot_fast.model.tensor_checks import require_filled, require_finite, require_plain
from spot_fast.model.timm_import import import_timm
from spot_fast.model.vits import FILE_ONLY, SCENES_ENCODER, build_vit, possible_names
from spot_fast.random_streams import Stream, seed_of
from spot_fast.recipes import ENCODERS, timm_name
from spot_fast.system.optional import required

_PATCHES = "patch_embed.proj.weight"
_SPOT = "slot_attn.slot_attention.project_q.weight"
# Modules with the ViT that its authors evaluate, if a file has several.
_EVALUATED = (
    "teacher",  # DINO, iBOT, DINOv2
    "target_encoder",  # I-JEPA
    "base_encoder",  # MoCo-v3
    "ema",  # timm, as in model_ema and state_dict_ema
)
# Modules that only wrap others: DDP, torch.compile, FSDP, activation checkpointing.
_WRAPPERS = re.compile(r"(?<![^.])(module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# Tensors that show whose names a file has.
_OTHER_NAMES = {
    "embeddings.patch_embeddings.projection.weight": "Hugging Face transformers",
    "conv_proj.weight": "torchvision",
    "visual.conv1.weight": "CLIP",
}
# Tensors on which no feature depends: heads, losses, decoders and their like.
_HEAD = re.compile(
    r"(head|heads|\w+_head|head_dist|aux_head|fc|fc_norm|classifier|pre_logits|attn_pool|projector|projection|predictor"
    r"|prototypes|last_layer|decoder|decoder_\w+|mask_token|masked_embed|center|\w+_loss|queue|queue_ptr)(\..*)?"
)
_BUFFER = re.compile(r"(.*\.)?(num_batches_tracked|relative_position_index)")
_ROPE_TABLE = re.compile(r"rope(_embed)?\..*")
# Parts of a ViT, and the modules that may have such parts of their own: decoders, heads, an optimiser's named state.
_PART = re.compile(r"(.*\.)?(blocks\.\d+\.|reg_token|register_tokens|cls_token|pos_embed|dist_token|norm_pre\.).*")
_OWN_BLOCKS = re.compile(
    r"(.*[._])?(dec|decoder|decode|predictor|head|projector|student|teacher|last_blocks|optim\w*|opt)[._].*"
)
# Features are taken before the final LayerNorm.
_FINAL_NORM = re.compile(r"(norm|fc_norm)\.(weight|bias)")

_announced: set[Path] = set()  # files whose choice of a ViT has been printed


def frozen_encoder(config: Config) -> Encoder:
    """The encoder of `config`, with weights from a file, the hub or the package.

    Random weights (`--encoder-weights none`) are the same every time; the global random state does not advance.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(Stream.RANDOM_ENCODER, 0))
        vit = build_vit(config)
    if (weights := stored_weights(config)) is not None:
        load_vit_weights(vit, weights, pos_resize=config.pos_resize, source=config.encoder_weights or config.encoder)
    return Encoder(vit, last_blocks=config.train_blocks, feature_norm=config.feature_norm)


def encoder_metadata(encoder: Encoder, config: Config) -> dict[str, str]:
    """Name and sha256 of the frozen weights, as a model file's metadata has them."""
    return {"encoder": config.encoder, "encoder_sha256": encoder.weights_hash()}


def stored_weights(config: Config) -> dict[str, Tensor] | None:
    """The weights of `config` as stored, positions not resampled; None for random ones."""
    if config.encoder_weights == "none":
        return None
    if config.encoder_weights not in (None, "hub"):
        return read_weights(Path(config.encoder_weights))
    if config.encoder == SCENES_ENCODER:
        return read_weights(packaged_weights())
    return _hub_weights(timm_name(config.encoder))


def packaged_weights() -> Path:
    """The scenes ViT, written by `python -m spot_fast.pretrain`."""
    return Path(str(resources.files("spot_fast") / "weights" / "scenes_vit.safetensors"))


def _hub_weights(name: str) -> dict[str, Tensor]:
    """The hub's weights of a timm model; fails within seconds if neither cache nor hub has them."""
    if name in FILE_ONLY:
        raise UserError(
            f"neither timm nor the hub has the weights of --encoder {name}: download "
            f"{ENCODERS[name].weights} and pass it as --encoder-weights FILE"
        )
    timm = import_timm()
    cfg = timm.get_pretrained_cfg(name)
    if cfg is None or not cfg.has_weights:
        raise UserError(f"timm has no weights for --encoder {name}: pass --encoder-weights FILE or use a tagged name")
    hub = required("huggingface_hub", f"--encoder {name}", "huggingface_hub")
    cached = cfg.hf_hub_id and any(
        isinstance(hub.try_to_load_from_cache(cfg.hf_hub_id, file), str)
        for file in ("model.safetensors", "pytorch_model.bin")
    )
    if not cached and not hub_answers():
        raise UserError(
            f"the weights of --encoder {name} are not on this machine and the hub does not answer: pass "
            f"--encoder-weights FILE (from huggingface.co/{cfg.hf_hub_id}, model.safetensors)"
        )
    try:
        return timm.create_model(name, pretrained=True, num_classes=0).state_dict()
    except Exception as error:
        raise UserError(
            f"the hub does not give the weights of --encoder {name} ({one_line(error)}): try again, or pass "
            f"--encoder-weights FILE (from huggingface.co/{cfg.hf_hub_id}, model.safetensors)"
        ) from error


def read_weights(path: str | os.PathLike) -> dict[str, Tensor]:
    """The ViT's tensors (with its heads') in the file `path`, by timm's names, float32.

    Of several ViTs it is the one that its authors evaluate, which is printed. UserError if the file has no ViT, several
    without a hint which is meant, or tensors that are no plain numbers.
    """
    path = Path(path)
    try:
        contents = read_checkpoint(path)
    except UserError as error:
        raise UserError(f"--encoder-weights: {error}") from None
    tensors = {unwrapped(name): value for name, value in _tensors(contents)}
    if spot := next((name for name in tensors if name == _SPOT or name.endswith("." + _SPOT)), None):
        weights = frozen_vit(_below(tensors, spot.removesuffix(_SPOT)))  # a whole SPOT of the authors
    else:
        weights = _below(tensors, _prefix(path, tensors))
    require_plain(weights, f"--encoder-weights {path}")
    return _timm_names({name: value.float() if value.is_floating_point() else value for name, value in weights.items()})


def unwrapped(name: str) -> str:
    """A tensor's name without modules that only wrap others."""
    return _WRAPPERS.sub("", name)


def _tensors(contents: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor in nested mappings, with its dotted path."""
    for name, value in contents.items():
        if isinstance(name, str) and isinstance(value, Tensor):
            yield prefix + name, value
        elif isinstance(name, str) and isinstance(value, Mapping):
            yield from _tensors(value, f"{prefix}{name}.")


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _prefix(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """The prefix of the names of the ViT's tensors."""
    prefixes = [name.removesuffix(_PATCHES) for name in tensors if name == _PATCHES or name.endswith("." + _PATCHES)]
    if not prefixes:
        raise UserError(f"--encoder-weights {path} {_without_vit(tensors)}")
    names = ", ".join(f"{prefix}*" for prefix in prefixes)
    evaluated = ([p for p in prefixes if re.search(rf"(^|[._]){word}(_model)?\.", p)] for word in _EVALUATED)
    chosen = next((each[0] for each in [prefixes, *evaluated] if len(each) == 1), None)
    if chosen is None:
        raise UserError(
            f"--encoder-weights {path} holds {len(prefixes)} ViTs ({names}): save the tensors of one in a file of its "
            "own"
        )
    # Parts of a ViT outside the modules with a patch embedding: these may lack them.
    outside = [
        name
        for name in tensors
        if not name.startswith(tuple(prefixes)) and _PART.fullmatch(name) and not _OWN_BLOCKS.fullmatch(name)
    ]
    if outside:
        raise UserError(
            f"--encoder-weights {path} has its ViT in {names} and {len(outside)} tensors that look like parts of it "
            f"elsewhere, such as {outside[0]}: save the ViT's tensors in a file of their own"
        )
    if len(prefixes) > 1 and path not in _announced:
        _announced.add(path)
        others = ", ".join(f"{prefix}*" for prefix in prefixes if prefix != chosen)
        print(f"note: {path} holds {len(prefixes)} ViTs: {chosen}* is taken, not {others}", file=sys.stderr)
    return chosen


def _without_vit(tensors: Mapping[str, Tensor]) -> str:
    """An error's predicate about a file without a ViT in timm's names."""
    if not tensors:
        return "holds no tensors: pass a .safetensors or .pth file of the ViT"
    for theirs, library in _OTHER_NAMES.items():
        if any(name == theirs or name.endswith("." + theirs) for name in tensors):
            return f"names its tensors as {library} does: pass the model's weights in timm's names"
    begins = list(dict.fromkeys(".".join(name.split(".")[:2]) + "*" * (name.count(".") > 1) for name in tensors))
    shown = ", ".join(begins[:6]) + (", …" if len(begins) > 6 else "")
    return (
        f"lacks all tensors of a ViT in timm's names, such as {_PATCHES}; its names begin with {shown}: pass "
        "the file of a ViT"
    )


def _timm_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Renames DINOv2's register tokens, and its blocks, which its training numbers in chunks."""
    chunk = re.compile(r"blocks\.\d+\.(?=\d+\.)")
    return {
        chunk.sub("blocks.", "reg_token" if name == "register_tokens" else name, count=1): value
        for name, value in weights.items()
    }


def load_vit_weights(vit: nn.Module, weights: Mapping[str, Tensor], *, pos_resize: str, source: str) -> None:
    """Loads timm-named weights, with the position table resampled to the ViT's grid.

    Heads may be left over and the final LayerNorm may be missing, because no feature depends on them. UserError names
    any other tensor that is missing, unexpected, not finite or of another shape.
    """
    wanted, weights = vit.state_dict(), dict(weights)
    if "reg_token" in wanted and "pos_embed" in weights and vit.no_embed_class:
        weights |= _class_token_with_position(weights)
    unexpected = _unexpected(weights, wanted, rope=getattr(vit, "rope", None) is not None)
    missing = sorted(name for name in wanted if name not in weights and not _FINAL_NORM.fullmatch(name))
    if missing:
        more = f" and have {len(unexpected)} that it does not take, such as {unexpected[0]}" if unexpected else ""
        raise UserError(
            f"the weights of {source} lack {len(missing)} tensors of the ViT, such as {missing[0]}{more}: "
            + _remedy(vit, weights)
        )
    if unexpected:
        names = ", ".join(unexpected[:3]) + (", …" if len(unexpected) > 3 else "")
        raise UserError(
            f"the weights of {source} have {len(unexpected)} tensors that the ViT of this --encoder does not "
            f"take, {names}, and without them its features would be wrong: {_remedy(vit, weights)}"
        )
    if "pos_embed" in wanted:
        prefix = 0 if getattr(vit, "no_embed_class", False) else vit.num_prefix_tokens
        weights["pos_embed"] = resample_positions(
            weights["pos_embed"], vit.patch_embed.grid_size[0], prefix, pos_resize
        )
    for name, own in wanted.items():
        value = weights.setdefault(name, own)
        if value.shape != own.shape:
            raise UserError(
                f"the weights of {source} have {name} of shape {list(value.shape)} but this --encoder "
                f"needs {list(own.shape)}: they belong to another ViT, {_remedy(vit, weights)}"
            )
        if not value.is_floating_point():
            raise UserError(
                f"the weights of {source} have {name} in {value.dtype}: pass weights in float32, float16 or bfloat16"
            )
    used = {name: weights[name] for name in wanted}
    require_finite(used, f"the weights of {source}")
    require_filled(used, f"the weights of {source}")
    vit.load_state_dict(used)


def _class_token_with_position(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """DINOv2's source has a position for the class token; timm, with registers, adds it to the token."""
    table = weights["pos_embed"]
    if "cls_token" not in weights or round((table.shape[1] - 1) ** 0.5) ** 2 != table.shape[1] - 1:
        return {}
    return {"cls_token": weights["cls_token"] + table[:, :1], "pos_embed": table[:, 1:]}


def _unexpected(names: Mapping[str, Any], wanted: Mapping[str, Any], *, rope: bool = False) -> list[str]:
    """Those `names` that a ViT with parameters `wanted` lacks although its features would depend on them.

    rope: the ViT has rotary positions, whose table it computes itself.
    """
    harmless = (_HEAD, _BUFFER, _FINAL_NORM, *[_ROPE_TABLE] * rope)
    return [name for name in names if name not in wanted and not any(p.fullmatch(name) for p in harmless)]


def _remedy(vit: nn.Module, weights: Mapping[str, Tensor]) -> str:
    """Advice to use the --encoder that takes all of `weights`, if their shapes show it."""
    # Tensors do not show the number of heads: a ViT of the same width is assumed to have as many.
    same_width = _PATCHES in weights and weights[_PATCHES].shape[0] == vit.embed_dim
    for name in possible_names(weights, vit.blocks[0].attn.num_heads if same_width else None):
        try:
            with torch.device("meta"):
                patch = weights[_PATCHES].shape[-1]
                wanted = build_vit(preset("coco", encoder=name, image_size=4 * patch)).state_dict()
        except UserError:
            continue
        if not _unexpected(weights, wanted, rope="pos_embed" not in wanted) and all(
            _FINAL_NORM.fullmatch(name) or name == "pos_embed" or (name in weights and weights[name].shape == own.shape)
            for name, own in wanted.items()
        ):
            return f"use --encoder {name}"
    return "pass weights in timm's names for this --encoder, or name the --encoder that they belong to"
