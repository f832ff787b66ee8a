"""The rest of `published_modules`: slot attention of OCLF, VideoSAUR, OCBench and SlotFormer, rebuilt from formulas."""

import torch
import torch.nn.functional as F
from torch import nn

from published_modules import HIDDEN, SLOT_WIDTH, SLOTS, WIDTH, gru_step, mlp, published_as, truncated, weighted_mean


class Residual(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, inputs):
        return inputs + self.module(inputs)


def norm_mlp(width):
    return nn.Sequential(nn.LayerNorm(width), *mlp(width, HIDDEN))


@published_as("SlotAttention")
class Oclf(nn.Module):
    def __init__(self, n_heads=1, kvq_dim=SLOT_WIDTH, implicit=False, with_mlp=True, bias=False):
        super().__init__()
        self.dim, self.kvq_dim, self.n_heads, self.iters, self.eps = SLOT_WIDTH, kvq_dim, n_heads, 3, 1e-8
        self.use_implicit_differentiation = implicit
        self.dims_per_head = kvq_dim // n_heads
        self.scale = self.dims_per_head**-0.5
        self.to_q = nn.Linear(SLOT_WIDTH, kvq_dim, bias=bias)
        self.to_k, self.to_v = (nn.Linear(WIDTH, kvq_dim, bias=bias) for _ in range(2))
        self.gru = nn.GRUCell(kvq_dim, SLOT_WIDTH)
        self.norm_input, self.norm_slots = nn.LayerNorm(WIDTH), nn.LayerNorm(SLOT_WIDTH)
        self.ff_mlp = Residual(norm_mlp(SLOT_WIDTH)) if with_mlp else None

    def step(self, slots, k, v, masks=None):
        batch, count, _ = slots.shape
        q = self.to_q(self.norm_slots(slots)).unflatten(-1, (self.n_heads, -1))
        logits = torch.einsum("bihd,bjhd->bihj", q, k) * self.scale
        if masks is not None:
            logits = logits.masked_fill(masks.bool().view(batch, count, 1, 1), -torch.inf)
        attn = logits.flatten(1, 2).softmax(dim=1).view(batch, count, self.n_heads, -1)
        weights = attn + self.eps
        updates = torch.einsum("bjhd,bihj->bihd", v, weights / weights.sum(-1, keepdim=True))
        slots = gru_step(self.gru, updates, slots)
        return self.ff_mlp(slots) if self.ff_mlp else slots, attn.mean(dim=2)

    def iterate(self, slots, k, v, masks=None):
        for _ in range(self.iters):
            slots, attn = self.step(slots, k, v, masks)
        return slots, attn

    def forward(self, inputs, conditioning, masks=None):
        x = self.norm_input(inputs)
        k, v = (to(x).unflatten(-1, (self.n_heads, -1)) for to in (self.to_k, self.to_v))
        slots, attn = self.iterate(conditioning, k, v, masks)
        if self.use_implicit_differentiation:
            slots, attn = self.step(slots.detach(), k, v, masks)
        return slots, attn


@published_as("SlotAttention")
class Videosaur(nn.Module):
    """The GRU sees the slots after their LayerNorm."""

    def __init__(self, kvq_dim=SLOT_WIDTH, use_gru=True, use_mlp=True):
        super().__init__()
        self.to_k, self.to_v = (nn.Linear(WIDTH, kvq_dim, bias=False) for _ in range(2))
        self.to_q = nn.Linear(SLOT_WIDTH, kvq_dim, bias=False)
        self.gru = nn.GRUCell(kvq_dim, SLOT_WIDTH) if use_gru else None
        self.mlp = Residual(norm_mlp(SLOT_WIDTH)) if use_mlp else None
        self.norm_features, self.norm_slots = nn.LayerNorm(WIDTH), nn.LayerNorm(SLOT_WIDTH)
        self.n_iters, self.eps, self.scale = 3, 1e-8, kvq_dim**-0.5

    def step(self, slots, keys, values):
        slots = self.norm_slots(slots)
        attn = torch.softmax(torch.einsum("bsd,bfd->bsf", self.to_q(slots), keys) * self.scale, dim=1)
        weights = attn + self.eps
        updates = torch.einsum("bsf,bfd->bsd", weights / weights.sum(-1, keepdim=True), values)
        slots = gru_step(self.gru, updates, slots) if self.gru else slots + updates
        return slots if self.mlp is None else self.mlp(slots), attn

    def forward(self, slots, features, n_iters=None):
        x = self.norm_features(features)
        keys, values = self.to_k(x), self.to_v(x)
        for _ in range(self.n_iters if n_iters is None else n_iters):
            slots, attn = self.step(slots, keys, values)
        return {"slots": slots, "masks": attn}


@published_as("SlotAttention")
class OcBench(nn.Module):
    def __init__(self, trunc_bp=None, dropout=0.1):
        super().__init__()
        self.num_iter, self.trunc_bp = 3, trunc_bp
        self.norm1q, self.norm1kv, self.norm2 = nn.LayerNorm(SLOT_WIDTH), nn.LayerNorm(WIDTH), nn.LayerNorm(SLOT_WIDTH)
        self.proj_q = nn.Linear(SLOT_WIDTH, SLOT_WIDTH, bias=False)
        self.proj_k, self.proj_v = (nn.Linear(WIDTH, SLOT_WIDTH, bias=False) for _ in range(2))
        self.rnn = nn.GRUCell(SLOT_WIDTH, SLOT_WIDTH)
        self.ffn = nn.Sequential(
            nn.Linear(SLOT_WIDTH, HIDDEN), nn.GELU(), nn.Dropout(dropout), nn.Linear(HIDDEN, SLOT_WIDTH)
        )

    def refined(self, input, query, smask, iterations):
        """Slots, and the attention of every iteration."""
        x, slots, attention = self.norm1kv(input), query, []
        k, v = self.proj_k(x), self.proj_v(x)
        for i in range(iterations):
            if i == iterations - 1:
                slots = truncated(slots, query, self.trunc_bp)
            q = self.proj_q(self.norm1q(slots))
            logits = torch.einsum("bqc,bkc->bqk", q * q.size(2) ** -0.5, k)
            if smask is not None:
                logits = logits.where(smask[:, :, None], -torch.inf)
            attention.append(logits.softmax(1))
            weights = attention[-1] / (attention[-1].sum(2, keepdim=True) + 1e-5)
            slots = gru_step(self.rnn, torch.einsum("bqv,bvc->bqc", weights, v), slots)
            slots = slots + self.ffn(self.norm2(slots))
        return slots, attention

    def forward(self, input, query, smask=None, num_iter=None):
        slots, attention = self.refined(input, query, smask, num_iter or self.num_iter)
        return slots, attention[-1]


@published_as("SlotAttentionWithAllAttent")
class OcBenchWithAllAttention(OcBench):
    def forward(self, input, query, smask=None, num_iter=None):
        return self.refined(input, query, smask, num_iter or self.num_iter)


@published_as("SlotAttention")
class SlotFormer(nn.Module):
    def __init__(self):
        super().__init__()
        self.num_iterations, self.num_slots, self.slot_size, self.eps = 2, SLOTS, SLOT_WIDTH, 1e-6
        self.attn_scale = SLOT_WIDTH**-0.5
        self.norm_inputs = nn.LayerNorm(WIDTH)
        self.project_q = nn.Sequential(nn.LayerNorm(SLOT_WIDTH), nn.Linear(SLOT_WIDTH, SLOT_WIDTH, bias=False))
        self.project_k, self.project_v = (nn.Linear(WIDTH, SLOT_WIDTH, bias=False) for _ in range(2))
        self.gru = nn.GRUCell(SLOT_WIDTH, SLOT_WIDTH)
        self.mlp = norm_mlp(SLOT_WIDTH)

    def refined(self, inputs, slots):
        x = self.norm_inputs(inputs)
        k, v = self.project_k(x), self.project_v(x)
        for _ in range(self.num_iterations):
            attn = F.softmax(self.attn_scale * torch.einsum("bnc,bmc->bnm", k, self.project_q(slots)), dim=-1)
            slots = gru_step(self.gru, weighted_mean(attn, v, self.eps), slots)
            slots = slots + self.mlp(slots)
        return slots, attn

    def forward(self, inputs, slots):
        return self.refined(inputs, slots)[0]


@published_as("SlotAttentionWMask")
class SlotFormerWithMask(SlotFormer):
    def forward(self, inputs, slots):
        slots, attn = self.refined(inputs, slots)
        return slots, attn.detach().clone().permute(0, 2, 1)
