"""The frozen ViT (SPOT, section 3.1), split into a trunk and its last blocks.

Features are the last block's output without the final LayerNorm and without class and register tokens. Student, teacher
and reconstruction target differ only in the last blocks, so the trunk runs once for all of them.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spot_fast.config import IMAGENET_MEAN, IMAGENET_STD
from spot_fast.errors import UserError
from spot_kernels.modules.layers import Stream, is_exactly, residual_norm


def normalise(images: Tensor) -> Tensor:
    """uint8 [B, 3, S, S] → float32 with ImageNet's mean and standard deviation removed."""
    mean, std = (_channels(values, images.device) * 255 for values in (IMAGENET_MEAN, IMAGENET_STD))
    return (images.float() - mean) / std


def _channels(values: Sequence[float], device: torch.device) -> Tensor:
    """[3, 1, 1]. Filled on the device, because a copy from the host would synchronise with it."""
    return torch.cat([torch.full((1, 1, 1), value, dtype=torch.float32, device=device) for value in values])


class Encoder(nn.Module):
    """A timm ViT that never trains, split in front of its `last_blocks` last blocks.

    It stays in eval mode and its parameters get no gradients; `copy_last_blocks` returns blocks that train.
    feature_norm: apply a LayerNorm without parameters to the features.
    """

    def __init__(self, vit: nn.Module, *, last_blocks: int, feature_norm: bool = False) -> None:
        super().__init__()
        depth = len(vit.blocks)
        if not 0 <= last_blocks <= depth:
            raise UserError(f"--train-blocks is {last_blocks} but the encoder has {depth} blocks: use 0 to {depth}")
        self.vit = vit.eval().requires_grad_(False)
        self.feature_norm = feature_norm
        self.norm = nn.LayerNorm(vit.embed_dim, elementwise_affine=False)
        self.first_last_block = depth - last_blocks
        self.num_prefix = vit.num_prefix_tokens
        height, width = vit.patch_embed.grid_size
        if height != width:
            raise UserError(f"the encoder's patch grid is {height} x {width}: use a square --image-size")
        self.grid, self.num_tokens, self.dim = height, height * width, vit.embed_dim
        self.image_size, self.patch_size = vit.patch_embed.img_size[0], vit.patch_embed.patch_size[0]
        self.image_shape = self.image_size, self.image_size
        # The rotary table depends on the grid alone: computed once here and after each change of the grid.
        self.register_buffer(
            "_rope", self._embed(torch.zeros(1, 3, self.image_size, self.image_size))[1], persistent=False
        )

    def train(self, mode: bool = True) -> Encoder:
        return super().train(False)

    @torch.no_grad()
    def set_grid(self, height: int, width: int, pos_resize: str) -> None:
        """Takes images of height × width patches from now on; positions are resampled from the current square table.

        Going to a coarser grid and back is therefore not exact. `grid` and `image_size` become those of the rows.
        UserError for a ViT whose positions cannot be resampled.
        """
        embed, vit = self.vit.patch_embed, self.vit
        embed.set_input_size(img_size=(height * self.patch_size, width * self.patch_size))
        if vit.pos_embed is not None:
            # Prefix tokens come first in the table, unless the ViT gives positions to patches alone.
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
        """Patch embedding with positions [B, prefix + N, D], and the rotary table of a ViT that has one (DINOv3)."""
        tokens = self.vit._pos_embed(self.vit.patch_embed(images))
        tokens, rope = tokens if isinstance(tokens, tuple) else (tokens, None)
        return self.vit.norm_pre(tokens), rope

    def _run(self, blocks: Iterable[nn.Module], tokens: Tensor) -> Stream:
        stream = Stream(tokens)
        for block in blocks:
            if self._rope is None and is_plain_block(block):
                # as the block does it, but each addition waits for the next LayerNorm
                kind = type(block.norm1)
                stream, normed = residual_norm(block.norm1, stream, kind=kind)
                stream = stream._replace(delta=block.drop_path1(block.ls1(block.attn(normed))))
                stream, normed = residual_norm(block.norm2, stream, kind=kind)
                stream = stream._replace(delta=block.drop_path2(block.ls2(block.mlp(normed))))
                continue
            tokens = stream.total()
            stream = Stream(block(tokens) if self._rope is None else block(tokens, rope=self._rope))
        return stream

    @torch.no_grad()
    def trunk(self, images: Tensor) -> Tensor:
        """Normalised images [B, 3, S, S] → hidden [B, prefix + N, D], the input of the last blocks."""
        height, width = self.image_shape
        if images.shape[1:] != (3, height, width):
            raise UserError(
                f"images have shape {list(images.shape)} but the encoder was built for "
                f"[B, 3, {height}, {width}]: resize them"
            )
        return self._run(self.vit.blocks[: self.first_last_block], self._embed(images)[0]).total()

    def finish(self, hidden: Tensor, blocks: nn.ModuleList | None = None) -> Tensor:
        """hidden [B, prefix + N, D] → features [B, N, D] through `blocks`, by default the frozen ones."""
        if blocks is None:
            with torch.no_grad():
                stream = self._run(self.vit.blocks[self.first_last_block :], hidden)
        else:
            stream = self._run(blocks, hidden)
        patches = Stream(*(None if part is None else part[:, self.num_prefix :] for part in stream))
        return residual_norm(self.norm, patches, for_product=False)[1] if self.feature_norm else patches.total()

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images [B, 3, S, S] → frozen features [B, N, D]."""
        return self.finish(self.trunk(images))

    def copy_last_blocks(self) -> nn.ModuleList:
        """A trainable copy of the last blocks with their pretrained weights."""
        # The originals stay frozen: they still make the target features.
        blocks = copy.deepcopy(nn.ModuleList(self.vit.blocks[self.first_last_block :])).requires_grad_(True)
        if next(self.vit.parameters()).device.type == "cpu":
            use_plain_attention(blocks)
        return blocks

    def weights_hash(self) -> str:
        """sha256 of names, shapes and values of the ViT's weights."""
        digest = hashlib.sha256()
        # Names, shapes and types are hashed too: the same bytes in another tensor are other weights.
        for name, value in sorted(self.vit.state_dict().items()):
            digest.update(f"{name} {tuple(value.shape)} {value.dtype};".encode())
            digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().data)
        return digest.hexdigest()


def is_plain_block(block: nn.Module) -> bool:
    """Whether `block` is timm's own pre-norm block with LayerNorms, whose layers may be called one by one."""
    if _name(block) != "timm.models.vision_transformer.Block" or not is_exactly(block, type(block)):
        return False
    norms = block.norm1, block.norm2
    return all(_name(norm) == "timm.layers.norm.LayerNorm" and not norm._fast_norm for norm in norms)


def _name(layer: nn.Module) -> str:
    return f"{type(layer).__module__}.{type(layer).__qualname__}"


def use_plain_attention(blocks: Iterable[nn.Module]) -> None:
    """Makes timm blocks that train on a CPU compute attention by matrix products.

    The bfloat16 backward of PyTorch's fused attention takes three to ten times as long there (measured: 41 against
    8 ms for 64 images of 64 tokens, 4 heads of 32).
    """
    for block in blocks:
        block.attn.fused_attn = False


def resample_positions(table: Tensor, grid: int | tuple[int, int], prefix: int, how: str) -> Tensor:
    """Position table [1, prefix + g·g, D] → [1, prefix + grid·grid, D], bicubic; grid may be (height, width).

    how: "dino" as in DINO's source, which SPOT's authors use: no antialiasing and a scale of (grid + 0.1) / g; "timm"
    antialiases. Cosine between the two on DINOv2's patch features is 0.9988.
    """
    patches = table.shape[1] - prefix if table.ndim == 3 else 0
    old = round(max(patches, 0) ** 0.5)
    if old < 1 or old * old != patches:
        others = f" after {prefix} other token{'s' * (prefix > 1)}" if prefix else ""
        raise UserError(
            f"the position table of shape {list(table.shape)} has no square grid of patches{others}: it "
            "belongs to another ViT"
        )
    height, width = (grid, grid) if isinstance(grid, int) else grid
    if (old, old) == (height, width):
        return table
    patches = table[:, prefix:].float().reshape(1, old, old, -1).permute(0, 3, 1, 2)
    if how == "dino":
        # DINO adds 0.1 so that rounding the scaled size down never loses a row.
        patches = F.interpolate(patches, scale_factor=((height + 0.1) / old, (width + 0.1) / old), mode="bicubic")
    else:
        patches = F.interpolate(patches, size=(height, width), mode="bicubic", antialias=True)
    patches = patches.permute(0, 2, 3, 1).reshape(1, height * width, -1)
    return torch.cat([table[:, :prefix], patches.to(table.dtype)], 1)
