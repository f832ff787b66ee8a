"""The rest of `published_modules`: slot attention of OCLF and its descendants, VideoSAUR, OCBench and SlotFormer."""

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


class VideosaurMlp(nn.Module):
    """Residual as well."""

    def __init__(self, width):
        super().__init__()
        self.layers = norm_mlp(width)

    def forward(self, inputs):
        return inputs + self.layers(inputs)


def norm_mlp(width):
    return nn.Sequential(nn.LayerNorm(width), *mlp(width, HIDDEN))


class OclfLayers(nn.Module):
    """What OCLF's descendants have by the same names."""

    def __init__(self, n_heads=1, kvq_dim=SLOT_WIDTH, with_mlp=True, bias=False):
        super().__init__()
        self.dim, self.kvq_dim, self.n_heads, self.iters, self.eps = SLOT_WIDTH, kvq_dim, n_heads, 3, 1e-8
        self.dims_per_head = kvq_dim // n_heads
        self.scale = self.dims_per_head**-0.5
        self.to_q = nn.Linear(SLOT_WIDTH, kvq_dim, bias=bias)
        self.to_k, self.to_v = (nn.Linear(WIDTH, kvq_dim, bias=bias) for _ in range(2))
        self.gru = nn.GRUCell(kvq_dim, SLOT_WIDTH)
        self.norm_input, self.norm_slots = nn.LayerNorm(WIDTH), nn.LayerNorm(SLOT_WIDTH)
        self.ff_mlp = Residual(norm_mlp(SLOT_WIDTH)) if with_mlp else None

    def keys_values(self, inputs):
        x = self.norm_input(inputs)
        return (to(x).unflatten(-1, (self.n_heads, self.dims_per_head)) for to in (self.to_k, self.to_v))

    def attention(self, slots, k, masks=None):
        """Over slots and heads together, [B, K, H, N]."""
        batch, count, _ = slots.shape
        q = self.to_q(self.norm_slots(slots)).unflatten(-1, (self.n_heads, self.dims_per_head))
        logits = torch.einsum("bihd,bjhd->bihj", q, k) * self.scale
        if masks is not None:
            logits = logits.masked_fill(masks.bool().view(batch, count, 1, 1), -torch.inf)
        return logits.flatten(1, 2).softmax(dim=1).view(batch, count, self.n_heads, -1)

    def updated(self, slots, weights, v):
        slots = gru_step(self.gru, torch.einsum("bjhd,bihj->bihd", v, weights), slots)
        return self.ff_mlp(slots) if self.ff_mlp else slots


class OclfSteps(OclfLayers):
    def __init__(self, implicit=False, **layers):
        super().__init__(**layers)
        self.use_implicit_differentiation = implicit

    def step(self, slots, k, v, masks=None):
        attn = self.attention(slots, k, masks)
        weights = attn + self.eps
        return self.updated(slots, weights / weights.sum(-1, keepdim=True), v), attn.mean(dim=2)

    def iterate(self, slots, k, v, masks=None):
        for _ in range(self.iters):
            slots, attn = self.step(slots, k, v, masks)
        return slots, attn

    def grouped(self, conditioning, k, v, masks):
        slots, attn = self.iterate(conditioning, k, v, masks)
        if self.use_implicit_differentiation:
            slots, attn = self.step(slots.detach(), k, v, masks)
        return slots, attn


@published_as("SlotAttention")
class Oclf(OclfSteps):
    def forward(self, inputs, conditioning, masks=None):
        return self.grouped(conditioning, *self.keys_values(inputs), masks)


@published_as("SlotAttention")
class Mot(OclfSteps):
    """The values are a third result."""

    def forward(self, inputs, conditioning, masks=None):
        k, v = self.keys_values(inputs)
        return *self.grouped(conditioning, k, v, masks), v


def more_slots(keep, least):
    """For samples that keep fewer than `least` slots: 1 at as many others, drawn at random."""
    added = torch.zeros_like(keep)
    for sample, kept in zip(added, keep, strict=True):
        dropped = (kept == 0).nonzero().flatten()
        lacking = least - (len(kept) - len(dropped))
        if lacking > 0:
            sample[dropped[torch.randperm(len(dropped))[:lacking]]] += 1
    return added


@published_as("SlotAttentionGumbelV1")
class AdaSlot(OclfSteps):
    """A network scores the slots; a Gumbel softmax keeps some of them."""

    def __init__(self, low_bound=0, **options):
        super().__init__(**options)
        self.single_gumbel_score_network = nn.Sequential(
            nn.LayerNorm(SLOT_WIDTH), nn.Linear(SLOT_WIDTH, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 2)
        )
        self.low_bound, self.temporature_function = low_bound, None

    def forward(self, inputs, conditioning, masks=None, global_step=None):
        slots, attn = self.grouped(conditioning, *self.keys_values(inputs), masks)
        scores = self.single_gumbel_score_network(slots)
        tau = 1 if global_step is None else self.temporature_function(global_step)
        keep = F.gumbel_softmax(scores, hard=True, tau=tau)[..., 1]
        if self.low_bound > 0:
            keep = keep + more_slots(keep, self.low_bound)
        return slots, attn, scores.softmax(-1)[..., 1], keep


@published_as("SlotAttention")
class FtDinosaur(OclfLayers):
    """OCLF's with eps in the sum of the weights."""

    def __init__(self, with_mlp=True, **layers):
        super().__init__(with_mlp=with_mlp, **layers)
        if not with_mlp:
            self.ff_mlp = nn.Identity()

    def step(self, slots, k, v):
        attn = self.attention(slots, k)
        return self.updated(slots, attn / (attn.sum(-1, keepdim=True) + self.eps), v), attn.mean(dim=2)

    def forward(self, inputs, slots):
        k, v = self.keys_values(inputs)
        for _ in range(self.iters):
            slots, attn = self.step(slots, k, v)
        return slots, attn


@published_as("SlotAttention")
class Videosaur(nn.Module):
    """The GRU sees the slots after their LayerNorm."""

    def __init__(self, kvq_dim=SLOT_WIDTH, use_gru=True, use_mlp=True):
        super().__init__()
        self.to_k, self.to_v = (nn.Linear(WIDTH, kvq_dim, bias=False) for _ in range(2))
        self.to_q = nn.Linear(SLOT_WIDTH, kvq_dim, bias=False)
        self.gru = nn.GRUCell(kvq_dim, SLOT_WIDTH) if use_gru else None
        self.mlp = VideosaurMlp(SLOT_WIDTH) if use_mlp else None
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

    def iteration(self, slots, k, v, smask):
        q = self.proj_q(self.norm1q(slots))
        logits = torch.einsum("bqc,bkc->bqk", q * q.size(2) ** -0.5, k)
        if smask is not None:
            logits = logits.where(smask[:, :, None], -torch.inf)
        attn = logits.softmax(1)
        weights = attn / (attn.sum(2, keepdim=True) + 1e-5)
        slots = gru_step(self.rnn, torch.einsum("bqv,bvc->bqc", weights, v), slots)
        return slots + self.ffn(self.norm2(slots)), attn

    def refined(self, input, query, smask, iterations):
        """Slots, and the attention of every iteration."""
        x, slots, attention = self.norm1kv(input), query, []
        k, v = self.proj_k(x), self.proj_v(x)
        for i in range(iterations):
            if i == iterations - 1:
                slots = truncated(slots, query, self.trunc_bp)
            slots, attn = self.iteration(slots, k, v, smask)
            attention.append(attn)
        return slots, attention

    def forward(self, input, query, smask=None, num_iter=None):
        slots, attention = self.refined(input, query, smask, num_iter or self.num_iter)
        return slots, attention[-1]


@published_as("SlotAttentionWithAllAttent")
class OcBenchWithAllAttention(OcBench):
    def forward(self, input, query, smask=None, num_iter=None):
        return self.refined(input, query, smask, num_iter or self.num_iter)


class Codebook(nn.Module):
    def __init__(self, codes):
        super().__init__()
        self.templat = nn.Embedding(codes, SLOT_WIDTH)

    def forward(self, slots):
        """The nearest codes and their indices; in training by a Gumbel softmax of the distances."""
        logits = -torch.cdist(slots, self.templat.weight)
        if self.training:
            logits = F.gumbel_softmax(logits, hard=True)
        index = logits.argmax(-1)
        return self.templat(index), index


class Quantiser(nn.Module):
    def __init__(self, codes):
        super().__init__()
        self.codebook = Codebook(codes)


@published_as("MetaSlot")
class MetaSlot(OcBench):
    """Two rounds; the second one begins with the codes of the first one's slots, where a code counts once.

    In training tokens are noisy, all codes count, and the codebook, which is not trained here, is.
    """

    def __init__(self, codes=4, **options):
        super().__init__(**options)
        self.vq = Quantiser(codes)
        self.register_buffer("clust_prob", torch.tensor(0.02))

    def step(self, q, k, v, smask=None):
        return self.iteration(q, k, v, smask)

    def round(self, x, slots, smask, iterations, query=None):
        for i in range(iterations):
            if query is not None and i == iterations - 1:
                slots = slots.detach() + query - query.detach()
            noise = torch.randn_like(x) * 0.5 * (1 - i / max(iterations - 1, 1)) if self.training else 0.0
            slots, attn = self.step(slots, self.proj_k(x + noise), self.proj_v(x + noise), smask)
        return slots, attn

    def forward(self, input, query, smask=None, num_iter=None):
        x, iterations = self.norm1kv(input), num_iter or self.num_iter
        slots, _ = self.round(x, query.detach(), smask, iterations)
        codes, index = self.vq.codebook(slots.detach())
        if not self.training:
            smask = ~(index[:, :, None] == index[:, None, :]).tril(-1).any(-1)
            codes = codes * smask[:, :, None]
        return self.round(x, codes, smask, iterations, query)


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
