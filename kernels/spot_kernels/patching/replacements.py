"""Forward passes of published slot-attention modules on our operators, for `spot_kernels.patch`.

Each function replaces a method of a published class: the same arguments, layers, random draws and results, in the same
dtypes and layouts. `spot_kernels.patching.implementations` says which class gets which. All of them compute

    logits = q kᵀ, q scaled (it has fewer rows than k);  attention = softmax over slots (and heads);
    updates = the mean of v over tokens, weighted with attention + eps, or with attention / (Σ attention + eps);
    slots = GRU(updates, slots), + MLP(LayerNorm(slots))

and write the attention of the last iteration only. If the published gradient goes through that iteration alone, those
before it build no graph. Here are the ports of Slot Attention and SLATE's descendants, in `framework_replacements`
those that share no layer names with them.
"""

from __future__ import annotations

import torch
from torch import nn

from spot_kernels.modules.layers import gru_step, split_heads
from spot_kernels.patching.iterations import attention_step, gru_with_norm, noise_like, refine, single


def evelinehong(self, inputs, num_slots=None):
    slots = _log_sigma_slots(self, inputs, num_slots)
    return _lucidrains_iterations(self, inputs, slots, lambda normed: self.fc2(self.fc1(normed).relu()))


def object_centric_library(self, inputs, num_slots=None):
    return _lucidrains_iterations(self, inputs, _log_sigma_slots(self, inputs, num_slots), self.mlp)


def _log_sigma_slots(self, inputs, num_slots):
    size = inputs.shape[0], num_slots if num_slots is not None else self.num_slots, -1
    spread = torch.exp(self.slots_log_sigma.expand(size))
    return self.slots_mu.expand(size) + spread * noise_like(self, spread.shape, spread)


def evelinehong_2021(self, inputs, num_slots=None):
    """No gradient goes to the mean and the spread of the initial slots."""
    size = inputs.shape[0], num_slots if num_slots is not None else self.num_slots, -1
    slots = torch.normal(self.slots_mu.expand(size), self.slots_sigma.expand(size))
    return _lucidrains_iterations(self, inputs, slots, lambda normed: self.fc2(self.fc1(normed).relu()))


def lucidrains(self, inputs, num_slots=None):
    slots = _gaussian_slots(self, inputs, num_slots)
    return _lucidrains_iterations(self, inputs, slots, self.mlp)


def _gaussian_slots(self, inputs, num_slots):
    count = num_slots if num_slots is not None else self.num_slots
    mean = self.slots_mu.expand(inputs.shape[0], count, -1)
    return mean + self.slots_logsigma.exp() * noise_like(self, mean.shape, inputs)


def osrt(self, inputs):
    if self.randomize_initial_slots:
        return self._published_class.forward(self, inputs)
    slots = self.initial_slots.expand(inputs.shape[0], -1, -1)
    projections = self.to_q, self.to_k, self.to_v
    slots = _port_iterations(self, inputs, slots, projections, self.norm_pre_mlp, self.mlp)
    return slots.view(inputs.shape[0], self.num_slots, self.slot_dim)


def motion_grouping(self, inputs, num_slots=None):
    count = num_slots if num_slots is not None else self.num_slots
    slots = self.slots_embedding(torch.arange(count).expand(inputs.shape[0], count).to(self.device))
    projections = self.project_q, self.project_k, self.project_v
    return _port_iterations(self, inputs, slots, projections, self.norm_pre_ff, self.mlp)


def _lucidrains_iterations(self, inputs, slots, mlp):
    return _port_iterations(self, inputs, slots, (self.to_q, self.to_k, self.to_v), self.norm_pre_ff, mlp)


def _port_iterations(self, inputs, slots, projections, norm, mlp):
    """projections: the layers to q, k and v; norm: the layer before the MLP."""
    inputs = self.norm_input(inputs)
    to_q, to_k, to_v = projections
    k, v = single(to_k(inputs)), single(to_v(inputs))

    def attend(slots, last):
        return attention_step(single(to_q(self.norm_slots(slots)) * self.scale), k, v, self.eps, attn=False)

    def update(updates, slots, last):
        slots, normed = gru_with_norm(self.gru, norm, updates, slots)
        return slots + mlp(normed)

    return refine(slots, self.iters, attend, update)[0]


def lucidrains_heads(self, inputs, num_slots=None):
    """Every head has its own softmax: heads become samples."""
    slots = _gaussian_slots(self, inputs, num_slots)
    inputs = self.norm_input(inputs)
    k, v = (self.split_heads(tokens) for tokens in (self.to_k(inputs), self.to_v(inputs)))
    size = k.shape[:2]
    k, v = single(k.flatten(0, 1)), single(v.flatten(0, 1))

    def attend(slots, last):
        q = self.split_heads(self.to_q(self.norm_slots(slots)) * self.scale)
        updates, *rest = attention_step(single(q.flatten(0, 1)), k, v, self.eps, attn=False)
        return self.combine_heads(self.merge_heads(updates.unflatten(0, size))), *rest

    def update(updates, slots, last):
        slots, normed = gru_with_norm(self.gru, self.norm_pre_ff, updates, slots)
        return slots + self.mlp(normed)

    return refine(slots, self.iters, attend, update)[0]


def untitled(self, inputs):
    batch = inputs.shape[0]
    inputs = self.norm_inputs(inputs)
    k, v = single(self.project_k(inputs)), single(self.project_v(inputs))
    noise = torch.randn((batch, self.num_slots, self.slot_size)).type_as(inputs)
    slots = self.slots_mu + self.slots_log_sigma.exp() * noise

    def attend(slots, last):
        q = self.project_q(self.norm_slots(slots)) * self.slot_size**-0.5
        return attention_step(single(q), k, v, self.epsilon, attn=False)

    def update(updates, slots, last):
        slots, normed = gru_with_norm(self.gru, self.norm_mlp, updates, slots)
        return slots + self.mlp(normed)

    return refine(slots, self.num_iterations, attend, update)[0]


def slate(self, inputs, slots):
    slots, attn, _ = _slate_iterations(self, inputs, slots, self.num_iterations)
    return slots.view(-1, self.num_slots, self.slot_size), attn


def spot(self, inputs, slots_init):
    return _slate_iterations(self, inputs, slots_init, self.num_iter, truncation=self.truncate, logits=True)


def _slate_iterations(self, inputs, slots, iterations, *, truncation="none", logits=False):
    inputs = self.norm_inputs(inputs)
    k, v = (split_heads(project(inputs), self.num_heads) for project in (self.project_k, self.project_v))
    scale = (self.slot_size // self.num_heads) ** -0.5

    def attend(slots, last):
        q = split_heads(self.project_q(self.norm_slots(slots)) * scale, self.num_heads)
        return attention_step(q, k, v, self.epsilon, attn=last, logits=logits and last)

    def update(updates, slots, last):
        slots, normed = gru_with_norm(self.gru, self.norm_mlp, updates, slots)
        return slots + self.mlp(normed)

    return refine(slots, iterations, attend, update, truncation=truncation, through=slots)


def steve(self, inputs):
    """Without an MLP after the last iteration of a frame; the predictor gives the next frame's initial slots."""
    slots = noise_like(self, (inputs.shape[0], self.num_slots, self.slot_size), inputs)
    slots = self.slot_mu + torch.exp(self.slot_log_sigma) * slots
    inputs = self.norm_inputs(inputs)
    keys, values = self.project_k(inputs), self.project_v(inputs)
    scale = self.slot_size**-0.5

    def update(updates, slots, last):
        if last:
            return gru_step(self.gru, updates, slots)
        slots, normed = gru_with_norm(self.gru, self.norm_mlp, updates, slots)
        return slots + self.mlp(normed)

    all_slots, all_attn = [], []
    for t in range(inputs.shape[1]):
        k, v = single(keys[:, t]), single(values[:, t])

        def attend(slots, last, k=k, v=v):
            q = self.project_q(self.norm_slots(slots)) * scale
            return attention_step(single(q), k, v, self.epsilon, attn=last)

        slots, attn, _ = refine(slots, self.num_iterations, attend, update)
        all_slots.append(slots)
        all_attn.append(attn)
        slots = self.predictor(slots)
    return torch.stack(all_slots, dim=1), torch.stack(all_attn, dim=1)


def bo_qsa(self, features, slots_init, num_iter=3):
    return _bo_qsa_iterations(
        self, features, slots_init, num_iter, self.drop_path, in_sum=True, truncation=self.truncate
    )


def bo_qsa_plain(self, features, slots_init, num_iter=3):
    """Its attention is returned with eps."""
    slots, attn = _bo_qsa_iterations(self, features, slots_init, num_iter, nn.Identity())
    return slots, attn + self.epsilon


def _bo_qsa_iterations(self, features, slots, iterations, drop_path, *, in_sum=False, truncation="none"):
    features = self.norm_feature(features)
    k, v = single(self.project_k(features)), single(self.project_v(features))

    def attend(slots, last):
        q = self.project_q(self.norm_slots(slots)) * v.shape[-1] ** -0.5
        return attention_step(single(q), k, v, self.epsilon, in_sum=in_sum, attn=last)

    def update(updates, slots, last):
        slots, normed = gru_with_norm(self.gru, self.norm_mlp, updates, slots)
        return slots + drop_path(self.mlp(normed))

    slots, attn, _ = refine(slots, iterations, attend, update, truncation=truncation, through=slots)
    return slots, attn.mT.contiguous()


def lsd_forward_slots(self, inputs):
    return _lsd_frames(self, inputs)


def coda_forward_slots(self, inputs, eps=None):
    return _lsd_frames(self, inputs, eps)


def _lsd_frames(self, inputs, noise=None):
    """All heads scaled as one; attention of each head [B, T, H, N, K]. noise: that of the initial slots."""
    inputs = self.pos(inputs).flatten(3).mT
    inputs = self.in_mlp(self.in_layer_norm(inputs))
    batch, heads = inputs.shape[0], self.num_heads
    if self.learnable_slot_init:
        slots = self.slot_mu.expand(batch, -1, -1)
    else:
        if noise is None:
            noise = noise_like(self, (batch, self.num_slots, self.slot_size), inputs)
        slots = self.slot_mu + torch.exp(self.slot_log_sigma) * noise
    inputs = self.norm_inputs(inputs)
    keys, values = self.project_k(inputs), self.project_v(inputs)
    scale = self.slot_size**-0.5

    def update(updates, slots, last):
        slots, normed = gru_with_norm(self.gru, self.norm_mlp, updates, slots)
        return slots + self.mlp(normed)

    all_slots, all_attn = [], []
    for t in range(inputs.shape[1]):
        k, v = split_heads(keys[:, t], heads), split_heads(values[:, t], heads)

        def attend(slots, last, k=k, v=v):
            q = split_heads(self.project_q(self.norm_slots(slots)) * scale, heads)
            return attention_step(q, k, v, self.epsilon, attn=False, logits=last)

        slots, _, logits = refine(
            slots,
            self.num_iterations,
            attend,
            update,
            truncation="bi-level" if self.bi_level else "none",
            through=self.slot_mu,
        )
        attn = logits.transpose(1, 2).flatten(2).softmax(-1)
        all_slots.append(slots)
        all_attn.append(attn.unflatten(2, (heads, -1)).transpose(1, 2))
    return torch.stack(all_slots, dim=1), torch.stack(all_attn, dim=1)
