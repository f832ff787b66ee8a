"""Builds the ViT that an encoder's name means, with random weights, and names the ViT that given weights belong to."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from difflib import get_close_matches

from torch import Tensor, nn

from spot_fast.config import Config
from spot_fast.errors import UserError
from spot_fast.model.timm_import import import_timm
from spot_fast.recipes import ENCODERS, timm_name

SCENES_ENCODER = "spot_scenes"
_SCENES_VIT = dict(patch_size=8, embed_dim=128, depth=6, num_heads=4, num_classes=0)
# Encoders of `recipes` whose weights neither timm nor the hub has: timm's name of the architecture.
FILE_ONLY = {"moco_vitb16": "vit_base_patch16_224"}
# timm's names of ViTs by (width, patch size, registers), for weights without a name.
_VIT_NAMES = {
    (384, 16, 0): "vit_small_patch16_224.dino",
    (768, 16, 0): "vit_base_patch16_224.dino",
    (384, 8, 0): "vit_small_patch8_224.dino",
    (768, 8, 0): "vit_base_patch8_224.dino",
    (384, 14, 0): "vit_small_patch14_dinov2",
    (768, 14, 0): "vit_base_patch14_dinov2",
    (384, 14, 4): "vit_small_patch14_reg4_dinov2",
    (768, 14, 4): "vit_base_patch14_reg4_dinov2",
}
# ViTs with rotary positions by width; all have patches of 16 and four registers.
_ROTARY_NAMES = {384: "vit_small_patch16_dinov3", 768: "vit_base_patch16_dinov3", 1024: "vit_large_patch16_dinov3"}
# ViTs with a tensor that no other has.
_NAMES_BY_TENSOR = {
    "dist_token": "deit_{size}_distilled_patch{patch}_224",
    "norm_pre.weight": "vit_{size}_patch{patch}_clip_224",
}
_SIZES = {192: "tiny", 384: "small", 768: "base", 1024: "large"}
# A ViT that timm has no name for, described by its shape: vit:patch=16,width=96,depth=12,heads=3,hidden=384, with
# registers=N and scale=1 (LayerScale) if it has them.
_DESCRIBED_VIT = re.compile(r"vit:\w+=\d+(,\w+=\d+)*")


def build_vit(config: Config) -> nn.Module:
    """The ViT that `config` names, at its image size, with random weights; UserError if timm does not know it."""
    timm = import_timm()
    if config.encoder == SCENES_ENCODER:
        patch = _SCENES_VIT["patch_size"]
        _require_multiple(config.image_size, patch)
        return timm.models.vision_transformer.VisionTransformer(img_size=config.image_size, **_SCENES_VIT)
    if _DESCRIBED_VIT.fullmatch(config.encoder):
        return _described_vit(config)
    name = timm_name(config.encoder)
    name = FILE_ONLY.get(name, name)
    if not timm.is_model(name):
        close = get_close_matches(name, ENCODERS, n=1) or timm.list_models(f"*{name.split('.')[0][:12]}*")[:4]
        hint = f"did you mean {', '.join(close)}?" if close else "python -c 'import timm; print(timm.list_models())'"
        raise UserError(f"--encoder {config.encoder} is not a model timm knows: {hint}")
    try:
        vit = timm.create_model(name, pretrained=False, num_classes=0, img_size=config.image_size)
    except TypeError:  # a model without an image size, such as a ResNet
        vit = None
    if not hasattr(vit, "blocks") or not hasattr(vit, "num_prefix_tokens"):
        raise UserError(
            f"--encoder {config.encoder} is not a plain ViT: use one with a sequence of blocks, "
            "such as vit_base_patch16_224.dino"
        )
    _require_multiple(config.image_size, vit.patch_embed.patch_size[0])
    return vit


def _described_vit(config: Config) -> nn.Module:
    shape = {name: int(value) for name, value in (part.split("=") for part in config.encoder[4:].split(","))}
    needed, known = {"patch", "width", "depth", "heads", "hidden"}, {"registers", "scale"}
    if not needed <= shape.keys() <= needed | known or min(shape[name] for name in needed) < 1:
        raise UserError(
            f"--encoder {config.encoder} describes no ViT: give {', '.join(sorted(needed))}, and registers "
            "or scale if it has them, each as name=number"
        )
    if shape["width"] % shape["heads"]:
        raise UserError(f"--encoder {config.encoder}: heads={shape['heads']} does not divide width={shape['width']}")
    _require_multiple(config.image_size, shape["patch"])
    registers = shape.get("registers", 0)
    return import_timm().models.vision_transformer.VisionTransformer(
        img_size=config.image_size,
        patch_size=shape["patch"],
        embed_dim=shape["width"],
        depth=shape["depth"],
        num_heads=shape["heads"],
        mlp_ratio=shape["hidden"] / shape["width"],
        num_classes=0,
        init_values=1.0 if shape.get("scale") else None,
        reg_tokens=registers,
        no_embed_class=registers > 0,
    )


def vit_name(weights: Mapping[str, Tensor], heads: int | None = None) -> str:
    """The --encoder of these weights (timm's parameter names): timm's name, or a description if timm has none.

    heads: attention heads, by default one per 64 channels. Tensors show neither heads nor how the ViT was trained: the
    name is that of DINO's or DINOv2's ViT, or of MAE's if positions are fixed sines.
    """
    width, _, patch, _ = weights["patch_embed.proj.weight"].shape
    numbers = [int(match[1]) for name in weights if (match := re.match(r"blocks\.(\d+)\.", name))]
    depth, hidden = max(numbers) + 1, weights["blocks.0.mlp.fc1.weight"].shape[0]
    registers = weights["reg_token"].shape[1] if "reg_token" in weights else 0
    if "pos_embed" not in weights and (patch, registers) == (16, 4) and width in _ROTARY_NAMES:
        return _ROTARY_NAMES[width]
    scale, plain = "blocks.0.ls1.gamma" in weights, max(width // 64, 1)
    name = _VIT_NAMES.get((width, patch, registers))
    if name and (depth, hidden, heads or plain, scale) == (12, 4 * width, plain, patch == 14):
        # MAE's fixed sines leave the class token's position at zero.
        fixed = patch == 16 and width == 768 and not weights["pos_embed"][:, 0].any()
        return "vit_base_patch16_224.mae" if fixed else name
    own = f"vit:patch={patch},width={width},depth={depth},heads={heads or plain},hidden={hidden}"
    return own + (f",registers={registers}" if registers else "") + (",scale=1" if scale else "")


def possible_names(weights: Mapping[str, Tensor], heads: int | None = None) -> Iterator[str]:
    """Names that the ViT of `weights` may have, likeliest first; none if it is not a plain ViT."""
    try:
        width, _, patch, _ = weights["patch_embed.proj.weight"].shape
        for tensor, name in _NAMES_BY_TENSOR.items():
            if tensor in weights and width in _SIZES:
                yield name.format(size=_SIZES[width], patch=patch)
        yield vit_name(weights, heads)
    except (KeyError, ValueError):
        return


def _require_multiple(image_size: int, patch: int) -> None:
    if image_size % patch:
        raise UserError(
            f"--image-size {image_size} is not a multiple of the encoder's patch size {patch}: "
            f"use {image_size // patch * patch or patch} or {(image_size // patch + 1) * patch}"
        )
