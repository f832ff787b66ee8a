"""A small DINOSAUR with an MLP decoder (Seitzer et al., 2023), on generated scenes.

A frozen self-supervised ViT turns an image of 128 × 128 into 16 × 16 features; slot attention groups them; an MLP
decodes every slot at every position to a feature and a weight; the loss compares the weighted sum over slots with the
features.

`SlotAttention` is written as in the paper's framework; `spot_kernels.patch` makes it run on our operators.

    python examples/dinosaur_mlp.py [--steps N] [--batch-size B] [--no-patch]
"""

from __future__ import annotations

import sys
from dataclasses import replace

import side_by_side
import torch
from torch import Tensor, nn

from spot_fast.checkpoints.encoder_weights import frozen_encoder
from spot_fast.config import preset
from spot_fast.model.encoder import normalise

IMAGE_SIZE, SLOTS, SLOT_WIDTH, HIDDEN = 128, 6, 128, 256


class Residual(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs + self.module(inputs)


def mlp(inputs: int, hidden: int, outputs: int, layers: int = 1) -> list[nn.Module]:
    widths = [inputs, *[hidden] * layers]
    modules: list[nn.Module] = []
    for before, after in zip(widths, widths[1:], strict=False):
        modules += [nn.Linear(before, after), nn.ReLU(inplace=True)]
    return [*modules, nn.Linear(hidden, outputs)]


class SlotAttention(nn.Module):
    def __init__(self, dim: int, feature_dim: int, n_heads: int = 1, iters: int = 3) -> None:
        super().__init__()
        self.dim, self.n_heads, self.iters, self.eps, self.dims_per_head = dim, n_heads, iters, 1e-8, dim // n_heads
        self.scale, self.use_implicit_differentiation = self.dims_per_head**-0.5, False
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_k, self.to_v = (nn.Linear(feature_dim, dim, bias=False) for _ in range(2))
        self.gru = nn.GRUCell(dim, dim)
        self.norm_input, self.norm_slots = nn.LayerNorm(feature_dim), nn.LayerNorm(dim)
        self.ff_mlp = Residual(nn.Sequential(nn.LayerNorm(dim), *mlp(dim, 4 * dim, dim)))

    def step(self, slots: Tensor, k: Tensor, v: Tensor, masks: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """One iteration: slots [B, K, U], k and v [B, N, H, d] → slots, attention [B, K, N]."""
        q = self.to_q(self.norm_slots(slots)).unflatten(-1, (self.n_heads, -1))
        logits = torch.einsum("bihd,bjhd->bihj", q, k) * self.scale
        if masks is not None:
            logits = logits.masked_fill(masks[:, :, None, None], -torch.inf)
        attn = logits.flatten(1, 2).softmax(1).view_as(logits)
        weights = attn + self.eps
        updates = torch.einsum("bjhd,bihj->bihd", v, weights / weights.sum(-1, keepdim=True))
        slots = self.gru(updates.reshape(-1, self.dim), slots.reshape(-1, self.dim)).view_as(slots)
        return self.ff_mlp(slots), attn.mean(2)

    def iterate(self, slots: Tensor, k: Tensor, v: Tensor, masks: Tensor | None = None) -> tuple[Tensor, Tensor]:
        for _ in range(self.iters):
            slots, attn = self.step(slots, k, v, masks)
        return slots, attn

    def forward(self, inputs: Tensor, conditioning: Tensor, masks: Tensor | None = None) -> tuple[Tensor, Tensor]:
        inputs = self.norm_input(inputs)
        k, v = (to(inputs).unflatten(-1, (self.n_heads, -1)) for to in (self.to_k, self.to_v))
        return self.iterate(conditioning, k, v, masks)


class DinosaurMlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = frozen_encoder(replace(preset("scenes", stage=1), image_size=IMAGE_SIZE, mask_size=IMAGE_SIZE))
        width, tokens = self.encoder.dim, self.encoder.num_tokens
        self.features = nn.Sequential(nn.LayerNorm(width), *mlp(width, width, SLOT_WIDTH))
        self.slot_mean, self.slot_log_sigma = (nn.Parameter(torch.empty(1, 1, SLOT_WIDTH)) for _ in range(2))
        nn.init.xavier_uniform_(self.slot_mean)
        nn.init.xavier_uniform_(self.slot_log_sigma)
        self.slot_attention = SlotAttention(SLOT_WIDTH, SLOT_WIDTH)
        self.positions = nn.Parameter(torch.randn(1, 1, tokens, SLOT_WIDTH) * SLOT_WIDTH**-0.5)
        self.decoder = nn.Sequential(*mlp(SLOT_WIDTH, HIDDEN, width + 1, layers=3))

    def forward(self, images: Tensor) -> Tensor:
        """uint8 [B, 3, S, S] → mean squared error of the features."""
        target = self.encoder(normalise(images).to(self.positions.dtype))
        noise = torch.randn(len(images), SLOTS, SLOT_WIDTH, device=images.device)
        initial = self.slot_mean + self.slot_log_sigma.exp() * noise
        slots, _ = self.slot_attention(self.features(target), initial)
        decoded = self.decoder(slots.unsqueeze(2) + self.positions)
        rebuilt = (decoded[..., :-1] * decoded[..., -1:].softmax(1)).sum(1)
        return (rebuilt - target).square().mean()


if __name__ == "__main__":
    sys.exit(side_by_side.main(DinosaurMlp, IMAGE_SIZE, "A small DINOSAUR-MLP, before and after spot_kernels.patch"))
