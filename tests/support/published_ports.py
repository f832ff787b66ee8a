"""More of `published_modules`: ports of Slot Attention inside other projects, rebuilt from formulas."""

import torch
from torch import nn

from published_modules import HIDDEN, SLOT_WIDTH, SLOTS, WIDTH, Lucidrains, gru_step, mlp, published_as, weighted_mean


@published_as("SlotAttentionModule")
class ObjectCentricLibrary(Lucidrains):
    """Without biases; LayerNorms have Keras's eps."""

    def __init__(self):
        super().__init__(bias=False, norm_eps=1e-3)

    def add_sigma(self, sigma):
        self.slots_log_sigma = sigma

    def initial(self, inputs, num_slots):
        count = self.num_slots if num_slots is None else num_slots
        sigma = self.slots_log_sigma.expand(len(inputs), count, -1).exp()
        return self.slots_mu.expand(len(inputs), count, -1) + sigma * torch.randn_like(sigma)

    def forward(self, inputs, num_slots=None):
        return self.refined(inputs, num_slots)


@published_as("SlotAttention")
class Osrt(nn.Module):
    """Learned slots."""

    def __init__(self):
        super().__init__()
        self.num_slots, self.iters, self.eps, self.slot_dim = SLOTS, 3, 1e-8, SLOT_WIDTH
        self.scale, self.randomize_initial_slots = SLOT_WIDTH**-0.5, False
        self.initial_slots = nn.Parameter(torch.randn(SLOTS, SLOT_WIDTH))
        self.to_q = nn.Linear(SLOT_WIDTH, SLOT_WIDTH, bias=False)
        self.to_k, self.to_v = (nn.Linear(WIDTH, SLOT_WIDTH, bias=False) for _ in range(2))
        self.gru, self.mlp = nn.GRUCell(SLOT_WIDTH, SLOT_WIDTH), mlp(SLOT_WIDTH, HIDDEN)
        self.norm_input = nn.LayerNorm(WIDTH)
        self.norm_slots, self.norm_pre_mlp = nn.LayerNorm(SLOT_WIDTH), nn.LayerNorm(SLOT_WIDTH)

    def forward(self, inputs):
        x = self.norm_input(inputs)
        if self.randomize_initial_slots:
            raise AttributeError("it has no embedding_stdev")
        slots, k, v = self.initial_slots.expand(len(inputs), -1, -1), self.to_k(x), self.to_v(x)
        for _ in range(self.iters):
            attn = (k @ self.to_q(self.norm_slots(slots)).mT * self.scale).softmax(-1)
            slots = gru_step(self.gru, weighted_mean(attn, v, self.eps), slots)
            slots = slots.reshape(len(inputs), self.num_slots, self.slot_dim)
            slots = slots + self.mlp(self.norm_pre_mlp(slots))
        return slots


@published_as("SlotAttention")
class MotionGrouping(nn.Module):
    """Learned slots, all layers as wide as these; the slots' indices are made on a device of its own."""

    def __init__(self, slots=2):
        super().__init__()
        self.num_slots, self.iters, self.eps, self.scale, self.device = slots, 3, 1e-8, SLOT_WIDTH**-0.5, "cpu"
        self.slots_embedding = nn.Embedding(slots, SLOT_WIDTH)
        self.project_q, self.project_k, self.project_v = (nn.Linear(SLOT_WIDTH, SLOT_WIDTH) for _ in range(3))
        self.gru, self.mlp = nn.GRUCell(SLOT_WIDTH, SLOT_WIDTH), mlp(SLOT_WIDTH, HIDDEN)
        self.norm_input, self.norm_slots, self.norm_pre_ff = (nn.LayerNorm(SLOT_WIDTH) for _ in range(3))

    def forward(self, inputs, num_slots=None):
        count = self.num_slots if num_slots is None else num_slots
        x, batch = self.norm_input(inputs), len(inputs)
        k, v = self.project_k(x), self.project_v(x)
        slots = self.slots_embedding(torch.arange(count).expand(batch, count).to(self.device))
        for _ in range(self.iters):
            attn = (k @ self.project_q(self.norm_slots(slots)).mT * self.scale).softmax(-1)
            slots = gru_step(self.gru, weighted_mean(attn, v, self.eps), slots)
            slots = slots + self.mlp(self.norm_pre_ff(slots))
        return slots
