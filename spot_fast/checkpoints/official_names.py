"""Parameter names of the authors' implementation (gkakogeorgiou/spot) ↔ those of `Spot`.

Decoder keys start with `dec.` or, in the authors' older files, `tf_dec.`. In stage 2 `encoder.` is the student's ViT
and `second_encoder.` the frozen one. `Spot` projects q, k and v with one matrix, the authors with three.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from spot_fast.errors import UserError

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
_THIRDS = {"proj_q.weight": 0, "proj_k.weight": 1, "proj_v.weight": 2, "proj_o.weight": None}
_TOP = {"bos_tokens": "bos", "mask_token": "mask_token", "pos_embed": "positions"}


def spot_name(name: str) -> tuple[str, int | None] | None:
    """The authors' parameter name → (name in `Spot`, its third (q, k, v) or None for all of it).

    None for tensors that `Spot` does not keep: causal masks, and the mask token of a DINOv2 encoder. The caller renames
    the student's encoder, whose names depend on the number of trained blocks.
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
    raise UserError(f"the checkpoint has {name}, which the authors' models do not: it belongs to another method")


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
        if part == "self_attn" and rest in _THIRDS:
            third = _THIRDS[rest]
            return f"{prefix}.self_attention.{'project_o' if third is None else 'project_qkv'}.weight", third
        if part in _BLOCK and rest:
            return f"{prefix}.{_BLOCK[part]}.{rest.replace('proj_', 'project_')}", None
    raise UserError(f"the checkpoint has dec.{name}, which the authors' decoders do not: it belongs to another method")


def frozen_vit(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The frozen encoder's weights in an official state dict, in timm's names and as stored."""
    prefix = "second_encoder." if any(name.startswith("second_encoder.") for name in state) else "encoder."
    return {_vit_name(name.removeprefix(prefix)): value for name, value in state.items() if name.startswith(prefix)}


def official_tensors(
    learned: Mapping[str, Tensor], vit: Mapping[str, Tensor], *, tokens: int, mlp: bool
) -> dict[str, Tensor]:
    """The authors' state dict of a Spot's learned tensors and its frozen encoder's (`vit`, timm's names).

    tokens: patch tokens N, the size of the causal masks in the authors' blocks.
    mlp: whether the decoder is the MLP. Strict loading then needs parameters that the authors' model does not use: they
    are zeros and ones.
    """
    blocks = {name: value for name, value in learned.items() if name.startswith("last_blocks.")}
    result = _official_vit(vit, "second_encoder." if blocks else "encoder.")
    if blocks:
        result.update(_official_vit(vit, "encoder."))
        depth = 1 + max(_numbers(vit, r"blocks\.(\d+)\."))
        first = depth - 1 - max(_numbers(blocks, r"last_blocks\.(\d+)\."))
        for name, value in blocks.items():
            _, number, rest = name.split(".", 2)
            result[f"encoder.blocks.{first + int(number)}.{rest}"] = value
    for name, value in learned.items():
        if name not in blocks:
            result.update(_official(name, value, mlp))
    for number in sorted(set(_numbers(learned, r"decoder\.transformer\.blocks\.(\d+)\."))):
        result[f"dec.blocks.{number}.self_attn_mask"] = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
    if mlp:
        width = learned["slot_encoder.norm.weight"].shape[0]
        result |= {
            "bos_tokens": torch.zeros(1, 1, 1, width),
            "input_proj.0.weight": torch.zeros(width, width),
            "input_proj.1.weight": torch.ones(width),
            "input_proj.1.bias": torch.zeros(width),
        }
    return result


def _official(name: str, value: Tensor, mlp: bool) -> dict[str, Tensor]:
    """The authors' tensors, one or three, of a learned tensor outside the last encoder blocks."""
    head, _, rest = name.partition(".")
    if head == "slot_encoder":
        part, _, rest = rest.partition(".")
        theirs = {ours: theirs for theirs, ours in _SLOTS.items()}[part]
        return {".".join(filter(None, ["slot_attn", theirs, "weight" if theirs == "slots_init" else rest])): value}
    part, _, inner = rest.partition(".")
    if part == "bos":
        return {"bos_tokens": value[:, None, None]}
    if part == "mask_token":
        return {"mask_token": value[None, None]}
    if part == "positions":
        return {"dec.pos_embed" if mlp else "pos_embed": value[None]}
    if part == "mlp":
        return {f"dec.decoder.{inner}": value}
    if part != "transformer":
        return {rest: value}  # input_proj, slot_proj
    if inner.startswith("norm."):
        return {f"dec.layer_norm.{inner.removeprefix('norm.')}": value}
    _, block, part, rest = inner.split(".", 3)
    prefix = f"dec.blocks.{block}"
    if part == "self_attention":
        if rest == "project_o.weight":
            return {f"{prefix}.self_attn.proj_o.weight": value}
        return {
            f"{prefix}.self_attn.proj_{letter}.weight": third
            for letter, third in zip("qkv", value.chunk(3), strict=True)
        }
    theirs = {ours: theirs for theirs, ours in _BLOCK.items()}[part]
    return {f"{prefix}.{theirs}.{rest.replace('project_', 'proj_')}": value}


def _official_vit(vit: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    named = {f"{prefix}{'register_tokens' if name == 'reg_token' else name}": value for name, value in vit.items()}
    if "reg_token" in vit and not _square(vit["pos_embed"].shape[1] - 1):
        # With registers timm stores the sum of the class token and its position, so the position becomes zero.
        table = vit["pos_embed"]
        named[f"{prefix}pos_embed"] = torch.cat([torch.zeros_like(table[:, :1]), table], 1)
    return named


def _square(number: int) -> bool:
    return round(number**0.5) ** 2 == number


def _numbers(names: Iterable[str], pattern: str) -> list[int]:
    return [int(match[1]) for name in names if (match := re.match(pattern, name))]
