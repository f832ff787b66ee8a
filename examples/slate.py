"""A small SLATE (Singh et al., 2021), on generated scenes.

A dVAE turns an image of 64 × 64 into 16 × 16 discrete tokens; slot attention groups their embeddings; an autoregressive
transformer predicts each next token from the slots and the tokens before it. Both parts train together: squared error
of the dVAE's reconstruction, cross-entropy of the tokens.

`SlotAttention` is written as in that model; `spot_kernels.patch` makes it run on our operators.

    python examples/slate.py [--steps N] [--batch-size B] [--no-patch]
"""

from __future__ import annotations

import sys

import side_by_side
import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCABULARY, WIDTH, SLOTS, TOKENS = 128, 64, 6, 256
TEMPERATURE = 1.0


def block(inputs: int, outputs: int, size: int, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, size, stride, padding=0 if stride > 1 else size // 2)
    return nn.Sequential(conv, nn.GroupNorm(1, outputs), nn.ReLU())


class DVae(nn.Module):
    """Patches of 4 × 4 pixels to logits over the vocabulary, and one-hot tokens back to pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            block(3, 64, 4, 4), *(block(64, 64, 1) for _ in range(6)), nn.Conv2d(64, VOCABULARY, 1)
        )
        self.decoder = nn.Sequential(
            block(VOCABULARY, 64, 1),
            block(64, 64, 3),
            block(64, 256, 1),
            nn.PixelShuffle(2),
            block(64, 64, 3),
            block(64, 256, 1),
            nn.PixelShuffle(2),
            nn.Conv2d(64, 3, 1),
        )


class SlotAttention(nn.Module):
    def __init__(self, num_iterations: int, num_slots: int, input_size: int, slot_size: int, heads: int) -> None:
        super().__init__()
        self.num_iterations, self.num_slots, self.num_heads = num_iterations, num_slots, heads
        self.slot_size, self.epsilon = slot_size, 1e-8
        self.norm_inputs = nn.LayerNorm(input_size)
        self.norm_slots, self.norm_mlp = nn.LayerNorm(slot_size), nn.LayerNorm(slot_size)
        self.project_q = nn.Linear(slot_size, slot_size, bias=False)
        self.project_k = nn.Linear(input_size, slot_size, bias=False)
        self.project_v = nn.Linear(input_size, slot_size, bias=False)
        self.gru = nn.GRUCell(slot_size, slot_size)
        self.mlp = nn.Sequential(nn.Linear(slot_size, slot_size), nn.ReLU(), nn.Linear(slot_size, slot_size))

    def forward(self, inputs: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
        """inputs [B, N, D], slots [B, K, U] → slots, attention [B, N, K]."""

        def heads(x: Tensor) -> Tensor:
            return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

        inputs = self.norm_inputs(inputs)
        k, v = heads(self.project_k(inputs)), heads(self.project_v(inputs))
        k = k * k.shape[-1] ** -0.5
        for _ in range(self.num_iterations):
            q = heads(self.project_q(self.norm_slots(slots)))
            logits = (k @ q.mT).transpose(1, 2)
            attn = logits.flatten(2).softmax(-1).view_as(logits).transpose(1, 2)
            weights = attn + self.epsilon
            weights = weights / weights.sum(-2, keepdim=True)
            updates = (weights.mT @ v).transpose(1, 2).flatten(2)
            slots = self.gru(updates.flatten(0, 1), slots.flatten(0, 1)).view_as(slots)
            slots = slots + self.mlp(self.norm_mlp(slots))
        return slots, attn.sum(1)


class Slate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dvae = DVae()
        self.dictionary = nn.Embedding(VOCABULARY, WIDTH)
        self.bos = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.positions = nn.Parameter(torch.zeros(1, 1 + TOKENS, WIDTH))
        nn.init.trunc_normal_(self.positions)
        self.features = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH))
        self.slot_mean, self.slot_log_sigma = (nn.Parameter(torch.zeros(1, 1, WIDTH)) for _ in range(2))
        nn.init.xavier_uniform_(self.slot_mean)
        self.slot_attention = SlotAttention(3, SLOTS, WIDTH, WIDTH, heads=1)
        layer = nn.TransformerDecoderLayer(WIDTH, 4, 4 * WIDTH, dropout=0.1, batch_first=True, norm_first=True)
        self.decoder = nn.TransformerDecoder(layer, 2, nn.LayerNorm(WIDTH))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.register_buffer("future", nn.Transformer.generate_square_subsequent_mask(TOKENS), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """uint8 [B, 3, 64, 64] → loss per image: squared error and cross-entropy of its tokens."""
        images = images.to(self.positions.dtype) / 255
        logits = F.log_softmax(self.dvae.encoder(images), dim=1)
        soft = F.gumbel_softmax(logits, TEMPERATURE, dim=1)
        error = (self.dvae.decoder(soft) - images).square().sum() / len(images)
        tokens = F.gumbel_softmax(logits.detach(), TEMPERATURE, dim=1).argmax(1).flatten(1)
        embedded = torch.cat([self.bos.expand(len(images), -1, -1), self.dictionary(tokens)], 1) + self.positions
        noise = torch.randn(len(images), SLOTS, WIDTH, device=images.device)
        initial = self.slot_mean + self.slot_log_sigma.exp() * noise
        slots, _ = self.slot_attention(self.features(embedded[:, 1:]), initial)
        predicted = self.head(self.decoder(embedded[:, :-1], slots, tgt_mask=self.future, tgt_is_causal=True))
        return error + F.cross_entropy(predicted.flatten(0, 1), tokens.flatten(), reduction="sum") / len(images)


if __name__ == "__main__":
    sys.exit(side_by_side.main(Slate, 64, "A small SLATE, before and after spot_kernels.patch"))
