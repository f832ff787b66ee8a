"""The frozen ViT (SPOT, section 3.1) as a trunk and last blocks, through timm, and where its weights come from.

Features are the last block's output without the final LayerNorm and without class and register tokens. The trunk runs
once for everyone who needs it: student, teacher and reconstruction target differ only in the last blocks.
"""

from __future__ import annotations

import copy
import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from importlib import resources
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spot_fast.checkpoints.encoder_weights import read_weights, require_filled, unneeded, unused
from spot_fast.checkpoints.hub import hub_answers
from spot_fast.checkpoints.tensor_checks import require_finite
from spot_fast.config import Config, preset
from spot_fast.errors import UserError
from spot_fast.model.timm_import import import_timm
from spot_fast.recipes import ENCODERS, timm_name
from spot_fast.system.optional import required, said

SCENES_ENCODER = "spot_scenes"
_SCENES_VIT = dict(patch_size=8, embed_dim=128, depth=4, num_heads=4, num_classes=0)
# timm's names of ViTs by (width, patch size, registers): labels for weights that come from elsewhere.
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
# Those with rotary positions, by width: patches of 16, four registers.
_ROTARY_NAMES = {384: "vit_small_patch16_dinov3", 768: "vit_base_patch16_dinov3", 1024: "vit_large_patch16_dinov3"}
# Those with a tensor that others do not have.
_SIGNED_NAMES = {
    "dist_token": "deit_{size}_distilled_patch{patch}_224",
    "norm_pre.weight": "vit_{size}_patch{patch}_clip_224",
}
_SIZES = {192: "tiny", 384: "small", 768: "base", 1024: "large"}
# A ViT that timm has no name for: vit:patch=16,width=96,depth=12,heads=3,hidden=384, and registers=N, scale=1
# (LayerScale).
_OWN_VIT = re.compile(r"vit:\w+=\d+(,\w+=\d+)*")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet, of values in [0, 1]
# Encoders of `recipes` that timm has no weights for, and so no name: the ViT that their file fits.
_ARCHITECTURES = {"moco_vitb16": "vit_base_patch16_224"}


def normalise(images: Tensor) -> Tensor:
    """uint8 [B, 3, S, S] → float32 with ImageNet's mean and standard deviation removed."""
    mean, std = (_channels(values, images.device) * 255 for values in (MEAN, STD))
    return (images.float() - mean) / std


def _channels(values: Sequence[float], device: torch.device) -> Tensor:
    """[3, 1, 1], written on the device: a copy from the host would wait for it."""
    return torch.cat([torch.full((1, 1, 1), value, dtype=torch.float32, device=device) for value in values])


class Encoder(nn.Module):
    """A timm ViT that never trains, cut in front of its `last_blocks` last blocks.

    feature_norm adds a LayerNorm without parameters to the features. Always in eval mode, without gradients for its
    own parameters; `copy_last_blocks` gives blocks that train.
    """

    def __init__(self, vit: nn.Module, *, last_blocks: int, feature_norm: bool = False) -> None:
        super().__init__()
        depth = len(vit.blocks)
        if not 0 <= last_blocks <= depth:
            raise UserError(f"--train-blocks is {last_blocks} but the encoder has {depth} blocks: use 0 to {depth}")
        self.vit = vit.eval().requires_grad_(False)
        self.feature_norm = feature_norm
        self.first_last_block = depth - last_blocks
        self.num_prefix = vit.num_prefix_tokens
        height, width = vit.patch_embed.grid_size
        if height != width:
            raise UserError(f"the encoder's patch grid is {height} x {width}: use a square --image-size")
        self.grid, self.num_tokens, self.dim = height, height * width, vit.embed_dim
        self.image_size, self.patch_size = vit.patch_embed.img_size[0], vit.patch_embed.patch_size[0]
        self.image_shape = self.image_size, self.image_size
        self.register_buffer(
            "_rope", self._embed(torch.zeros(1, 3, self.image_size, self.image_size))[1], persistent=False
        )

    def train(self, mode: bool = True) -> Encoder:
        return super().train(False)

    @torch.no_grad()
    def set_grid(self, height: int, width: int, pos_resize: str) -> None:
        """From now on images have height × width patches, which need not be as many: positions are resampled.

        From the table as it is, which has to be square; going to a coarser grid and back is not exact. `grid` and
        `image_size` are those of the rows. UserError where the ViT's positions cannot be moved.
        """
        embed, vit = self.vit.patch_embed, self.vit
        embed.set_input_size(img_size=(height * self.patch_size, width * self.patch_size))
        if vit.pos_embed is not None:
            prefix = 0 if getattr(vit, "no_embed_class", False) else vit.num_prefix_tokens
            table = resample_positions(vit.pos_embed, (height, width), prefix, pos_resize)
            vit.pos_embed = nn.Parameter(table, requires_grad=False)
        rope = getattr(vit, "rope", None)
        if rope is not None:
            if not hasattr(rope, "update_feat_shape"):
                raise UserError(
                    f"this ViT's positions ({type(rope).__name__}) belong to its own grid: use --fit stretch"
                )
            rope.update_feat_shape([height, width])
        self.grid, self.num_tokens = height, height * width
        self.image_shape = embed.img_size
        self.image_size = embed.img_size[0]
        device = next(vit.parameters()).device
        self._rope = self._embed(torch.zeros(1, 3, *self.image_shape, device=device))[1]

    @torch.no_grad()
    def _embed(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Patch embedding with positions [B, prefix + N, D], and the rotary table of ViTs that have one (DINOv3)."""
        tokens = self.vit._pos_embed(self.vit.patch_embed(images))
        tokens, rope = tokens if isinstance(tokens, tuple) else (tokens, None)
        return self.vit.norm_pre(tokens), rope

    def _run(self, blocks, tokens: Tensor) -> Tensor:
        for block in blocks:
            tokens = block(tokens) if self._rope is None else block(tokens, rope=self._rope)
        return tokens

    @torch.no_grad()
    def trunk(self, images: Tensor) -> Tensor:
        """Normalised images [B, 3, S, S] → hidden [B, prefix + N, D], the input of the last blocks."""
        height, width = self.image_shape
        if images.shape[1:] != (3, height, width):
            raise UserError(
                f"images have shape {list(images.shape)} but the encoder was built for "
                f"[B, 3, {height}, {width}]: resize them"
            )
        return self._run(self.vit.blocks[: self.first_last_block], self._embed(images)[0])

    def finish(self, hidden: Tensor, blocks: nn.ModuleList | None = None) -> Tensor:
        """hidden [B, prefix + N, D] → features [B, N, D] through `blocks`, by default the frozen ones."""
        if blocks is None:
            with torch.no_grad():
                tokens = self._run(self.vit.blocks[self.first_last_block :], hidden)
        else:
            tokens = self._run(blocks, hidden)
        tokens = tokens[:, self.num_prefix :]
        return F.layer_norm(tokens, (self.dim,)) if self.feature_norm else tokens

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images [B, 3, S, S] → frozen features [B, N, D]."""
        return self.finish(self.trunk(images))

    def copy_last_blocks(self) -> nn.ModuleList:
        """The last blocks again, with their pretrained weights, ready to train."""
        blocks = copy.deepcopy(nn.ModuleList(self.vit.blocks[self.first_last_block :])).requires_grad_(True)
        if next(self.vit.parameters()).device.type == "cpu":
            use_plain_attention(blocks)
        return blocks

    def weights_hash(self) -> str:
        """sha256 of names, shapes and values of the ViT's weights."""
        digest = hashlib.sha256()
        for name, value in sorted(self.vit.state_dict().items()):
            digest.update(f"{name} {tuple(value.shape)} {value.dtype};".encode())
            digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().data)
        return digest.hexdigest()


def use_plain_attention(blocks) -> None:
    """Has timm blocks that train on a CPU attend by matrix products.

    PyTorch's fused attention takes three to ten times as long in its bfloat16 backward there (measured: 41 against
    8 ms for 64 images of 64 tokens, 4 heads of 32).
    """
    for block in blocks:
        block.attn.fused_attn = False


def build_vit(config: Config) -> nn.Module:
    """The ViT that `config` names, at its image size, with random weights; UserError where timm does not know it."""
    timm = import_timm()
    if config.encoder == SCENES_ENCODER:
        patch = _SCENES_VIT["patch_size"]
        _require_multiple(config.image_size, patch)
        return timm.models.vision_transformer.VisionTransformer(img_size=config.image_size, **_SCENES_VIT)
    if _OWN_VIT.fullmatch(config.encoder):
        return _own_vit(config)
    name = timm_name(config.encoder)
    name = _ARCHITECTURES.get(name, name)
    if not timm.is_model(name):
        close = get_close_matches(name, ENCODERS, n=1) or timm.list_models(f"*{name.split('.')[0][:12]}*")[:4]
        hint = f"did you mean {', '.join(close)}?" if close else "python -c 'import timm; print(timm.list_models())'"
        raise UserError(f"--encoder {config.encoder} is not a model timm knows: {hint}")
    try:
        vit = timm.create_model(name, pretrained=False, num_classes=0, img_size=config.image_size)
    except TypeError:  # not a model with an image size
        vit = None
    if not hasattr(vit, "blocks") or not hasattr(vit, "num_prefix_tokens"):
        raise UserError(
            f"--encoder {config.encoder} is not a plain ViT: use one with a sequence of blocks, "
            "such as vit_base_patch16_224.dino"
        )
    _require_multiple(config.image_size, vit.patch_embed.patch_size[0])
    return vit


def _own_vit(config: Config) -> nn.Module:
    shape = {name: int(value) for name, value in (part.split("=") for part in config.encoder[4:].split(","))}
    needed, known = {"patch", "width", "depth", "heads", "hidden"}, {"registers", "scale"}
    if not needed <= shape.keys() <= needed | known or min(shape[name] for name in needed) < 1:
        raise UserError(
            f"--encoder {config.encoder} describes no ViT: give {', '.join(sorted(needed))}, and registers "
            "or scale where it has them, each as name=number"
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
    """What --encoder calls the ViT of these weights (timm's parameter names): timm's name where there is one.

    heads: attention heads, which tensors do not show; by default one per 64 channels. Tensors do not show either how
    the ViT was trained: the name is that of DINO's or DINOv2's, or of MAE's where positions are fixed sines.
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
        fixed = patch == 16 and width == 768 and not weights["pos_embed"][:, 0].any()
        return "vit_base_patch16_224.mae" if fixed else name
    own = f"vit:patch={patch},width={width},depth={depth},heads={heads or plain},hidden={hidden}"
    return own + (f",registers={registers}" if registers else "") + (",scale=1" if scale else "")


def _require_multiple(image_size: int, patch: int) -> None:
    if image_size % patch:
        raise UserError(
            f"--image-size {image_size} is not a multiple of the encoder's patch size {patch}: "
            f"use {image_size // patch * patch or patch} or {(image_size // patch + 1) * patch}"
        )


def build_encoder(config: Config) -> Encoder:
    """The encoder that `config` describes, with its weights (file, hub, packaged or random)."""
    vit = build_vit(config)
    if config.encoder_weights != "none":
        weights = _find_weights(config)
        load_vit_weights(vit, weights, pos_resize=config.pos_resize, source=config.encoder_weights or config.encoder)
    return Encoder(vit, last_blocks=config.train_blocks, feature_norm=config.feature_norm)


def raw_weights(config: Config) -> dict[str, Tensor] | None:
    """The weights that `config` names as they are stored, positions not resampled; None for random ones."""
    return None if config.encoder_weights == "none" else _find_weights(config)


def encoder_identity(encoder: Encoder, config: Config) -> dict[str, str]:
    """What to write beside a trained model instead of the frozen weights."""
    return {"name": config.encoder, "sha256": encoder.weights_hash()}


def packaged_weights() -> Path:
    """The scenes ViT's file, as `python -m spot_fast.pretrain` wrote it."""
    return Path(str(resources.files("spot_fast") / "weights" / "scenes_vit.safetensors"))


def _find_weights(config: Config) -> dict[str, Tensor]:
    if config.encoder_weights not in (None, "hub"):
        return read_weights(Path(config.encoder_weights))
    if config.encoder == SCENES_ENCODER:
        return read_weights(packaged_weights())
    return _hub_weights(timm_name(config.encoder))


def _hub_weights(name: str) -> dict[str, Tensor]:
    """The hub's weights of a timm model; fails within seconds when neither a cached copy nor the hub is there."""
    if name in _ARCHITECTURES:
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
        isinstance(hub.try_to_load_from_cache(cfg.hf_hub_id, f), str)
        for f in ("model.safetensors", "pytorch_model.bin")
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
            f"the hub does not give the weights of --encoder {name} ({said(error)}): try again, or pass "
            f"--encoder-weights FILE (from huggingface.co/{cfg.hf_hub_id}, model.safetensors)"
        ) from error


def load_vit_weights(vit: nn.Module, weights: Mapping[str, Tensor], *, pos_resize: str, source: str) -> None:
    """Loads timm-named weights, resampling the position table to the ViT's grid.

    UserError names what does not fit: a tensor that is missing, of another shape, not finite, or that the ViT has no
    place for. Heads may be left over, and the final LayerNorm may be missing: no feature depends on them.
    """
    wanted = vit.state_dict()
    weights = dict(weights)
    if "reg_token" in wanted and "pos_embed" in weights and vit.no_embed_class:
        weights |= _class_token_with_position(weights)
    left = unused(weights, wanted, rope=getattr(vit, "rope", None) is not None)
    missing = sorted(name for name in set(wanted) - set(weights) if not unneeded(name))
    if missing:
        more = f" and have {len(left)} that it does not take, such as {left[0]}" if left else ""
        raise UserError(
            f"the weights of {source} lack {len(missing)} tensors of the ViT, such as {missing[0]}{more}: "
            + _remedy(vit, weights)
        )
    if left:
        names = ", ".join(left[:3]) + (", …" if len(left) > 3 else "")
        raise UserError(
            f"the weights of {source} have {len(left)} tensors that the ViT of this --encoder does not "
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


def _remedy(vit: nn.Module, weights: Mapping[str, Tensor]) -> str:
    """The --encoder that takes all of `weights`, where tensors show it; heads as those of `vit` where it is as wide."""
    for name in _names(weights, vit):
        try:
            with torch.device("meta"):
                patch = weights["patch_embed.proj.weight"].shape[-1]
                wanted = build_vit(preset("coco", encoder=name, image_size=4 * patch)).state_dict()
        except UserError:
            continue
        if not unused(weights, wanted, rope="pos_embed" not in wanted) and all(
            unneeded(name) or name == "pos_embed" or (name in weights and weights[name].shape == own.shape)
            for name, own in wanted.items()
        ):
            return f"use --encoder {name}"
    return "pass weights in timm's names for this --encoder, or name the --encoder that they are of"


def _names(weights: Mapping[str, Tensor], vit: nn.Module) -> Iterator[str]:
    """What the ViT of `weights` may be called; nothing where it is not a plain one."""
    try:
        width, _, patch, _ = weights["patch_embed.proj.weight"].shape
        for sign, name in _SIGNED_NAMES.items():
            if sign in weights and width in _SIZES:
                yield name.format(size=_SIZES[width], patch=patch)
        yield vit_name(weights, vit.blocks[0].attn.num_heads if width == vit.embed_dim else None)
    except (KeyError, ValueError):
        return


def _class_token_with_position(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """DINOv2's source keeps a position for the class token, timm its sum with the token where there are registers."""
    table = weights["pos_embed"]
    if "cls_token" not in weights or round((table.shape[1] - 1) ** 0.5) ** 2 != table.shape[1] - 1:
        return {}
    return {"cls_token": weights["cls_token"] + table[:, :1], "pos_embed": table[:, 1:]}


def resample_positions(table: Tensor, grid: int | tuple[int, int], prefix: int, how: str) -> Tensor:
    """Position table [1, prefix + g·g, D] → [1, prefix + grid·grid, D], bicubic; grid may be (height, width).

    how="dino" as the authors' encoder source: no antialiasing and a scale of (grid + 0.1) / g; "timm" antialiases.
    Cosine between the two on DINOv2's patch features is 0.9988 (SPOT's authors use the first).
    """
    patches = table.shape[1] - prefix if table.ndim == 3 else 0
    old = round(max(patches, 0) ** 0.5)
    if old < 1 or old * old != patches:
        behind = f" behind {prefix} other token{'s' * (prefix > 1)}" if prefix else ""
        raise UserError(
            f"the position table of shape {list(table.shape)} has no square grid of patches{behind}: it "
            "belongs to another ViT"
        )
    height, width = (grid, grid) if isinstance(grid, int) else grid
    if (old, old) == (height, width):
        return table
    patches = table[:, prefix:].float().reshape(1, old, old, -1).permute(0, 3, 1, 2)
    if how == "dino":
        patches = F.interpolate(patches, scale_factor=((height + 0.1) / old, (width + 0.1) / old), mode="bicubic")
    else:
        patches = F.interpolate(patches, size=(height, width), mode="bicubic", antialias=True)
    patches = patches.permute(0, 2, 3, 1).reshape(1, height * width, -1)
    return torch.cat([table[:, :prefix], patches.to(table.dtype)], 1)
