"""Slot-attention modules as published: the layers' names, signatures, formulas and random draws of each implementation.

Rebuilt from what they compute, in PyTorch's own operations; every class has the published class's name. Here are the
ports of Slot Attention and SLATE's descendants, in `published_frameworks` those that share no layer names with them.
Nothing here comes from spot_kernels.
"""

import torch
import torch.nn.functional as F
from torch import nn

WIDTH, SLOT_WIDTH, SLOTS, HIDDEN = 12, 16, 5, 20


def published_as(name):
    """The class is called as the published one; pickle still finds it here."""

    def rename(cls):
        cls.__name__ = name
        return cls

    return rename


def mlp(width, hidden):
    return nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, width))


def weighted_mean(attn, v, eps):
    """attn [..., N, K], v [..., N, d] → [..., K, d], weights attn + eps"""
    weights = attn + eps
    return (weights / weights.sum(-2, keepdim=True)).transpose(-1, -2) @ v


def mean_over_sum(attn, v, eps):
    return (attn / (attn.sum(-2, keepdim=True) + eps)).transpose(-1, -2) @ v


def heads_of(tokens, heads):
    return tokens.unflatten(-1, (heads, -1)).transpose(1, 2)


def joint_softmax(logits):
    """[B, H, N, K], over heads and slots together"""
    batch, heads, tokens, slots = logits.shape
    joint = F.softmax(logits.transpose(1, 2).reshape(batch, tokens, heads * slots), dim=-1)
    return joint.view(batch, tokens, heads, slots).transpose(1, 2)


def gru_step(gru, updates, slots):
    return gru(updates.reshape(-1, gru.input_size), slots.reshape(-1, gru.hidden_size)).view(*slots.shape)


class DropPath(nn.Module):
    """timm's: in training a sample's branch is left out with probability p, the others are scaled up."""

    def __init__(self, p):
        super().__init__()
        self.p = p

    def forward(self, x):
        if not self.training:
            return x
        keep = 1 - self.p
        return x * x.new_empty(x.shape[0], *[1] * (x.dim() - 1)).bernoulli_(keep).div_(keep)


class Lucidrains(nn.Module):
    """What the descendants of the port share: inputs as wide as slots, slots drawn inside."""

    def __init__(self, dim=SLOT_WIDTH, inner=SLOT_WIDTH, bias=True, norm_eps=1e-5):
        super().__init__()
        self.dim, self.num_slots, self.iters, self.eps, self.scale = dim, SLOTS, 3, 1e-8, dim**-0.5
        self.slots_mu = nn.Parameter(torch.randn(1, 1, dim))
        self.add_sigma(nn.Parameter(torch.rand(1, 1, dim) * 0.1))
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, inner, bias=bias) for _ in range(3))
        self.gru = nn.GRUCell(dim, dim)
        self.norm_input, self.norm_slots, self.norm_pre_ff = (nn.LayerNorm(dim, eps=norm_eps) for _ in range(3))
        self.add_mlp(dim)

    def add_sigma(self, sigma):
        self.slots_logsigma = sigma

    def log_sigma(self):
        return self.slots_logsigma

    def add_mlp(self, dim):
        self.mlp = nn.Sequential(nn.Linear(dim, HIDDEN), nn.ReLU(inplace=True), nn.Linear(HIDDEN, dim))

    def initial(self, inputs, num_slots):
        count = self.num_slots if num_slots is None else num_slots
        mu = self.slots_mu.expand(inputs.shape[0], count, -1)
        sigma = self.log_sigma().exp().expand(inputs.shape[0], count, -1)
        return mu + sigma * torch.randn(mu.shape, device=inputs.device, dtype=inputs.dtype)

    def updates(self, q, k, v):
        attn = (torch.einsum("bid,bjd->bij", q, k) * self.scale).softmax(dim=1) + self.eps
        return torch.einsum("bjd,bij->bid", v, attn / attn.sum(dim=-1, keepdim=True))

    def feed(self, x):
        return self.mlp(x)

    def refined(self, inputs, num_slots):
        slots = self.initial(inputs, num_slots)
        x = self.norm_input(inputs)
        k, v = self.to_k(x), self.to_v(x)
        for _ in range(self.iters):
            updates = self.updates(self.to_q(self.norm_slots(slots)), k, v)
            slots = gru_step(self.gru, updates, slots)
            slots = slots + self.feed(self.norm_pre_ff(slots))
        return slots


@published_as("SlotAttention")
class LucidrainsSlots(Lucidrains):
    def forward(self, inputs, num_slots=None):
        return self.refined(inputs, num_slots)


@published_as("SlotAttention")
class Evelinehong(Lucidrains):
    def add_sigma(self, sigma):
        self.slots_log_sigma = sigma

    def log_sigma(self):
        return self.slots_log_sigma

    def add_mlp(self, dim):
        self.fc1, self.fc2 = nn.Linear(dim, HIDDEN), nn.Linear(HIDDEN, dim)

    def feed(self, x):
        return self.fc2(F.relu(self.fc1(x)))

    def forward(self, inputs, num_slots=None):
        return self.refined(inputs, num_slots)


@published_as("SlotAttention")
class Evelinehong2021(Evelinehong):
    def add_sigma(self, sigma):
        self.slots_sigma = sigma

    def initial(self, inputs, num_slots):
        size = inputs.shape[0], self.num_slots if num_slots is None else num_slots, -1
        return torch.normal(self.slots_mu.expand(size), self.slots_sigma.expand(size))

    def forward(self, inputs, num_slots=None):
        return self.refined(inputs, num_slots)


class Rearrange(nn.Module):
    """einops' layer, of the two patterns that are needed."""

    def __init__(self, pattern, **sizes):
        super().__init__()
        self.pattern, self.sizes = pattern, sizes

    def forward(self, x):
        return heads_of(x, self.sizes["h"]) if self.sizes else x.transpose(1, 2).flatten(2)


@published_as("MultiHeadSlotAttention")
class LucidrainsHeads(Lucidrains):
    def __init__(self, heads=2, dim_head=6):
        super().__init__(inner=heads * dim_head)
        self.split_heads = Rearrange("b n (h d) -> b h n d", h=heads)
        self.merge_heads = Rearrange("b h n d -> b n (h d)")
        self.combine_heads = nn.Linear(heads * dim_head, self.dim)

    def updates(self, q, k, v):
        q, k, v = self.split_heads(q), self.split_heads(k), self.split_heads(v)
        attn = (torch.einsum("... i d, ... j d -> ... i j", q, k) * self.scale).softmax(dim=-2)
        attn = F.normalize(attn + self.eps, p=1, dim=-1)
        return self.combine_heads(self.merge_heads(torch.einsum("... j d, ... i j -> ... i d", v, attn)))

    def forward(self, inputs, num_slots=None):
        return self.refined(inputs, num_slots)


class Projected(nn.Module):
    """The layers that SLATE, STEVE, BO-QSA, SPOT, LSD and a port of Slot Attention have by the same names."""

    def __init__(self, input_size=WIDTH, slot_size=SLOT_WIDTH, epsilon=1e-8):
        super().__init__()
        self.slot_size, self.epsilon = slot_size, epsilon
        self.add_norm_of_inputs(nn.LayerNorm(input_size))
        self.norm_slots, self.norm_mlp = nn.LayerNorm(slot_size), nn.LayerNorm(slot_size)
        self.project_q = nn.Linear(slot_size, slot_size, bias=False)
        self.project_k = nn.Linear(input_size, slot_size, bias=False)
        self.project_v = nn.Linear(input_size, slot_size, bias=False)
        self.gru = nn.GRUCell(slot_size, slot_size)
        self.mlp = mlp(slot_size, HIDDEN)

    def add_norm_of_inputs(self, norm):
        self.norm_inputs = norm

    def normed_inputs(self, inputs):
        return self.norm_inputs(inputs)

    def keys_values(self, inputs):
        x = self.normed_inputs(inputs)
        return self.project_k(x), self.project_v(x)

    def queries(self, slots):
        return self.project_q(self.norm_slots(slots))

    def step(self, slots, k, v, *, mean=weighted_mean, with_mlp=True, drop=None):
        """One head; k is scaled."""
        attn = F.softmax(k @ self.queries(slots).transpose(-1, -2), dim=-1)
        slots = gru_step(self.gru, mean(attn, v, self.epsilon), slots)
        if with_mlp:
            change = self.mlp(self.norm_mlp(slots))
            slots = slots + (change if drop is None else drop(change))
        return slots, attn

    def step_with_heads(self, slots, k, v, heads):
        """k, v [B, H, N, d], k scaled → slots, attention [B, H, N, K], logits"""
        logits = k @ heads_of(self.queries(slots), heads).transpose(-1, -2)
        attn = joint_softmax(logits)
        updates = weighted_mean(attn, v, self.epsilon).transpose(1, 2).flatten(2)
        slots = gru_step(self.gru, updates, slots)
        return slots + self.mlp(self.norm_mlp(slots)), attn, logits


@published_as("SlotAttention")
class Untitled(Projected):
    def __init__(self):
        super().__init__(SLOT_WIDTH)
        self.num_iterations, self.num_slots = 3, SLOTS
        self.register_buffer("slots_mu", torch.randn(1, 1, SLOT_WIDTH))
        self.register_buffer("slots_log_sigma", torch.randn(1, 1, SLOT_WIDTH) * 0.1)

    def forward(self, inputs):
        k, v = self.keys_values(inputs)
        noise = torch.randn((len(inputs), self.num_slots, self.slot_size)).type_as(k)
        slots = self.slots_mu + self.slots_log_sigma.exp() * noise
        for _ in range(self.num_iterations):
            slots, _ = self.step(slots, k * self.slot_size**-0.5, v)
        return slots


@published_as("SlotAttention")
class Slate(Projected):
    def __init__(self, heads=1):
        super().__init__()
        self.num_iterations, self.num_slots, self.num_heads, self.input_size = 3, SLOTS, heads, WIDTH

    def forward(self, inputs, slots):
        k, v = (heads_of(x, self.num_heads) for x in self.keys_values(inputs))
        k = (self.slot_size // self.num_heads) ** -0.5 * k
        for _ in range(self.num_iterations):
            slots, attn, _ = self.step_with_heads(slots, k, v, self.num_heads)
        return slots, attn.sum(1)


@published_as("SlotAttentionVideo")
class Steve(Projected):
    def __init__(self):
        super().__init__()
        self.num_iterations, self.num_slots = 2, SLOTS
        self.slot_mu = nn.Parameter(torch.randn(1, 1, SLOT_WIDTH))
        self.slot_log_sigma = nn.Parameter(torch.randn(1, 1, SLOT_WIDTH) * 0.1)
        self.predictor = nn.TransformerEncoderLayer(SLOT_WIDTH, 2, HIDDEN, dropout=0.1, batch_first=True)

    def forward(self, inputs):
        slots = inputs.new_empty(len(inputs), self.num_slots, self.slot_size).normal_()
        slots = self.slot_mu + torch.exp(self.slot_log_sigma) * slots
        k, v = self.keys_values(inputs)
        k = self.slot_size**-0.5 * k
        all_slots, all_attn = [], []
        for t in range(inputs.shape[1]):
            for i in range(self.num_iterations):
                slots, attn = self.step(slots, k[:, t], v[:, t], with_mlp=i < self.num_iterations - 1)
            all_slots.append(slots)
            all_attn.append(attn)
            slots = self.predictor(slots)
        return torch.stack(all_slots, 1), torch.stack(all_attn, 1)


def truncated(slots, initial, how):
    if how == "bi-level":
        return slots.detach() + initial - initial.detach()
    return slots.detach() if how == "fixed-point" else slots


class NormedFeatures(Projected):
    """BO-QSA's name for a layer."""

    def add_norm_of_inputs(self, norm):
        self.norm_feature = norm

    def normed_inputs(self, inputs):
        return self.norm_feature(inputs)


@published_as("SlotAttention")
class BoQsa(NormedFeatures):
    def __init__(self, truncate="bi-level", drop_path=0.2, width=SLOT_WIDTH):
        super().__init__(width, width, epsilon=1.0)
        self.truncate = truncate
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, features, slots_init, num_iter=3):
        k, v = self.keys_values(features)
        slots = slots_init
        for i in range(num_iter):
            if i == num_iter - 1:
                slots = truncated(slots, slots_init, self.truncate)
            slots, attn = self.step(slots, k * v.shape[-1] ** -0.5, v, mean=mean_over_sum, drop=self.drop_path)
        return slots, attn.mT.contiguous()


@published_as("SlotAttention")
class BoQsaPlain(NormedFeatures):
    def __init__(self):
        super().__init__(SLOT_WIDTH)

    def forward(self, features, slots_init, num_iter=3):
        k, v = self.keys_values(features)
        slots = slots_init
        for _ in range(num_iter):
            slots, attn = self.step(slots, k * v.shape[-1] ** -0.5, v)
        return slots, attn.mT.contiguous() + self.epsilon


@published_as("SlotAttention")
class Spot(Projected):
    def __init__(self, truncate="none", heads=1):
        super().__init__()
        self.num_iter, self.num_heads, self.truncate, self.input_size = 3, heads, truncate, WIDTH
        self.drop_path = nn.Identity()

    def forward(self, inputs, slots_init):
        slots = slots_init
        k, v = (heads_of(x, self.num_heads) for x in self.keys_values(inputs))
        k = (self.slot_size // self.num_heads) ** -0.5 * k
        for i in range(self.num_iter):
            if i == self.num_iter - 1:
                slots = truncated(slots, slots_init, self.truncate)
            slots, attn, logits = self.step_with_heads(slots, k, v, self.num_heads)
        return slots, attn.sum(1), logits


class Positions(nn.Module):
    def __init__(self, width, size):
        super().__init__()
        self.projection = nn.Conv2d(4, width, 1)
        self.pe = nn.Parameter(torch.rand(1, 4, size, size), requires_grad=False)

    def forward(self, inputs):
        return inputs + self.projection(self.pe)


@published_as("MultiHeadSTEVESA")
class Lsd(Projected):
    def __init__(self, heads=1, learned=False):
        super().__init__()
        self.pos, self.in_layer_norm = Positions(WIDTH, 4), nn.LayerNorm(WIDTH)
        self.in_mlp = mlp(WIDTH, WIDTH)
        self.num_iterations, self.num_slots, self.num_heads = 3, SLOTS, heads
        self.learnable_slot_init = self.bi_level = learned
        self.slot_mu = nn.Parameter(torch.randn(1, SLOTS if learned else 1, SLOT_WIDTH))
        if not learned:
            self.slot_log_sigma = nn.Parameter(torch.randn(1, 1, SLOT_WIDTH) * 0.1)
        self.out_layer_norm, self.out_linear = nn.LayerNorm(SLOT_WIDTH), nn.Linear(SLOT_WIDTH, 8)

    def forward(self, inputs):
        slots, attn = self.forward_slots(inputs)
        return self.out_linear(self.out_layer_norm(slots)), attn

    def forward_slots(self, inputs):
        return self.frames(inputs, None)

    def frames(self, inputs, noise):
        x = self.in_mlp(self.in_layer_norm(self.pos(inputs).flatten(3).transpose(2, 3)))
        slots = self.slot_mu.expand(len(inputs), -1, -1)
        if not self.learnable_slot_init:
            if noise is None:
                noise = x.new_empty(len(inputs), self.num_slots, self.slot_size).normal_()
            slots = self.slot_mu + torch.exp(self.slot_log_sigma) * noise
        k, v = self.keys_values(x)
        k = self.slot_size**-0.5 * k
        all_slots, all_attn = [], []
        for t in range(inputs.shape[1]):
            for i in range(self.num_iterations):
                if self.bi_level and i == self.num_iterations - 1:
                    slots = slots.detach() + self.slot_mu - self.slot_mu.detach()
                frame = (heads_of(x[:, t], self.num_heads) for x in (k, v))
                slots, attn, _ = self.step_with_heads(slots, *frame, self.num_heads)
            all_slots.append(slots)
            all_attn.append(attn)
        return torch.stack(all_slots, 1), torch.stack(all_attn, 1)


@published_as("SlotAttn")
class Coda(Lsd):
    """LSD's, to which the noise of the initial slots may be given."""

    def forward(self, inputs, eps=None):
        slots, attn = self.forward_slots(inputs, eps)
        return self.out_linear(self.out_layer_norm(slots)), attn

    def forward_slots(self, inputs, eps=None):
        return self.frames(inputs, eps)
