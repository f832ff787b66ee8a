"""Weights of a ViT from files as their authors save them: which of the tensors are the encoder's, under which names.

A file may hold the tensors alone, or below `model`, `state_dict`, `teacher` and the like beside an optimiser and the
settings of the training; names may begin with the names of the modules around the ViT. The ViT is found by its patch
embedding, wherever that is.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from spot_fast.checkpoints.official_names import frozen_vit
from spot_fast.checkpoints.tensor_checks import require_plain
from spot_fast.checkpoints.unpickle import read_checkpoint
from spot_fast.errors import UserError

_PATCHES = "patch_embed.proj.weight"
_SPOT = "slot_attn.slot_attention.project_q.weight"
# Of several ViTs in a file: the one that their authors evaluate, by the word in front of its tensors.
_EVALUATED = (
    "teacher",  # DINO, iBOT, DINOv2
    "target_encoder",  # I-JEPA
    "base_encoder",  # MoCo-v3
    "ema",  # timm, as in model_ema and state_dict_ema
)
_WRAPPERS = re.compile(r"(?<![^.])(module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# How other libraries name a ViT's tensors.
_OTHER_NAMES = {
    "embeddings.patch_embeddings.projection.weight": "Hugging Face transformers",
    "conv_proj.weight": "torchvision",
    "visual.conv1.weight": "CLIP",
}
# What lies beside or behind the blocks and no feature depends on: heads, losses, decoders and their like.
_HEAD = re.compile(
    r"(head|heads|\w+_head|head_dist|aux_head|fc|fc_norm|classifier|pre_logits|attn_pool|projector|projection|predictor"
    r"|prototypes|last_layer|decoder|decoder_\w+|mask_token|masked_embed|center|\w+_loss|queue|queue_ptr)(\..*)?"
)
_BUFFER = re.compile(r"(.*\.)?(num_batches_tracked|relative_position_index)")
# Parts of a ViT, and what may have such parts of its own: decoders, heads, an optimiser that keeps names.
_PART = re.compile(r"(.*\.)?(blocks\.\d+\.|reg_token|register_tokens|cls_token|pos_embed|dist_token|norm_pre\.).*")
_OWN_BLOCKS = re.compile(
    r"(.*[._])?(dec|decoder|decode|predictor|head|projector|student|teacher|last_blocks|optim\w*|opt)[._].*"
)
# A final LayerNorm: features are taken in front of it.
_FINAL_NORM = re.compile(r"(norm|fc_norm)\.(weight|bias)")

_told: set[Path] = set()  # files of which it has been said which ViT is taken


def read_weights(path: Path) -> dict[str, Tensor]:
    """The ViT's tensors in `path`, float32 where they are numbers, in timm's names; heads below the ViT are among them.

    Of a file with several ViTs the one that its authors evaluate, which is said. UserError where there is none, where
    it cannot be told which is meant, or where tensors are no plain numbers.
    """
    try:
        contents = read_checkpoint(path)
    except UserError as error:
        raise UserError(f"--encoder-weights: {error}") from None
    tensors = {unwrapped(name): value for name, value in _tensors(contents)}
    if spot := next((name for name in tensors if name == _SPOT or name.endswith("." + _SPOT)), None):
        weights = frozen_vit(_below(tensors, spot.removesuffix(_SPOT)))  # a whole SPOT of the authors
    else:
        weights = _below(tensors, _prefix(path, tensors))
    source = f"--encoder-weights {path}"
    require_plain(weights, source)
    return _timm_names({name: value.float() if value.is_floating_point() else value for name, value in weights.items()})


def unwrapped(name: str) -> str:
    """A tensor's name without modules that only wrap others: DDP, torch.compile, FSDP, activation checkpointing."""
    return _WRAPPERS.sub("", name)


def _tensors(contents: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor below names, with its path."""
    for name, value in contents.items():
        if isinstance(name, str) and isinstance(value, Tensor):
            yield prefix + name, value
        elif isinstance(name, str) and isinstance(value, Mapping):
            yield from _tensors(value, f"{prefix}{name}.")


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _prefix(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """What the names of the ViT's tensors begin with."""
    found = [name.removesuffix(_PATCHES) for name in tensors if name == _PATCHES or name.endswith("." + _PATCHES)]
    if not found:
        raise UserError(f"--encoder-weights {path} {_what_instead(tensors)}")
    if len(found) == 1:
        _refuse_scattered(path, tensors, found)
        return found[0]
    for word in _EVALUATED:
        chosen = [prefix for prefix in found if re.search(rf"(^|[._]){word}(_model)?\.", prefix)]
        if len(chosen) == 1:
            _refuse_scattered(path, tensors, found)
            if path not in _told:
                _told.add(path)
                others = ", ".join(f"{prefix}*" for prefix in found if prefix not in chosen)
                print(f"note: {path} holds {len(found)} ViTs: {chosen[0]}* is taken, not {others}", file=sys.stderr)
            return chosen[0]
    names = ", ".join(f"{prefix}*" for prefix in found)
    raise UserError(
        f"--encoder-weights {path} holds {len(found)} ViTs ({names}): save the tensors of one in a file of its own"
    )


def _refuse_scattered(path: Path, tensors: Mapping[str, Tensor], prefixes: list[str]) -> None:
    """UserError where parts of a ViT lie beside the modules with a patch embedding, whose blocks these may be."""
    beside = [
        name
        for name in tensors
        if not name.startswith(tuple(prefixes)) and _PART.fullmatch(name) and not _OWN_BLOCKS.fullmatch(name)
    ]
    if beside:
        raise UserError(
            f"--encoder-weights {path} has its ViT in {', '.join(f'{prefix}*' for prefix in prefixes)} and "
            f"{len(beside)} tensors that look like parts of it elsewhere, such as {beside[0]}: save the "
            "ViT's tensors in a file of their own"
        )


def _what_instead(tensors: Mapping[str, Tensor]) -> str:
    """The end of a sentence about a file without a ViT in timm's names."""
    if not tensors:
        return "holds no tensors: pass a .safetensors or .pth file of the ViT"
    for theirs, library in _OTHER_NAMES.items():
        if any(name == theirs or name.endswith("." + theirs) for name in tensors):
            return f"names its tensors as {library} does: pass the model's weights in timm's names"
    begins = list(dict.fromkeys(".".join(name.split(".")[:2]) + "*" * (name.count(".") > 1) for name in tensors))
    shown = ", ".join(begins[:6]) + (", …" if len(begins) > 6 else "")
    return (
        f"lacks all tensors of a ViT in timm's names, such as {_PATCHES}; what it has begins with {shown}: pass "
        "the file of a ViT"
    )


def _timm_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """DINOv2's name of register tokens, and the numbers of its blocks where training has them in chunks."""
    chunk = re.compile(r"blocks\.\d+\.(?=\d+\.)")
    return {
        chunk.sub("blocks.", "reg_token" if name == "register_tokens" else name, count=1): value
        for name, value in weights.items()
    }


def unused(names: Mapping[str, Any], wanted: Mapping[str, Any], *, rope: bool = False) -> list[str]:
    """What of `names` a ViT with parameters `wanted` has no place for, though its features would need it.

    rope: the ViT has rotary positions, whose table it makes itself.
    """
    own = re.compile(r"rope(_embed)?\..*")
    return [
        name
        for name in names
        if name not in wanted
        and not _HEAD.fullmatch(name)
        and not _BUFFER.fullmatch(name)
        and not _FINAL_NORM.fullmatch(name)
        and not (rope and own.fullmatch(name))
    ]


def unneeded(name: str) -> bool:
    """Whether features do without the ViT's own tensor `name`."""
    return _FINAL_NORM.fullmatch(name) is not None


def require_filled(weights: Mapping[str, Tensor], source: str) -> None:
    """UserError that names a matrix of nothing but zeros, which no training leaves: its memory was never filled."""
    for name, value in weights.items():
        if value.ndim > 1 and name.endswith(".weight") and not value.any():
            raise UserError(
                f"{source}: tensor {name} holds nothing but zeros: the file was not written or downloaded "
                "to its end, get it again"
            )
