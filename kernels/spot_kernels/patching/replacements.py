"""Forward passes of published slot-attention modules on our operators, for `spot_kernels.patch`.

Each function replaces a method of a published class: the same arguments, layers, random draws and results, in the same
dtypes and layouts. `spot_kernels.patching.implementations` says which class gets which. All of them compute

    logits = q kᵀ, q scaled (it has fewer rows than k);  attention = softmax over slots (and heads);
    updates = the mean of v over tokens, weighted with attention + eps, or with attention / (Σ attention + eps);
    slots = GRU(updates, slots), + MLP(LayerNorm(slots))

and write the attention of the last iteration only. If the published gradient goes through that iteration alone, those
before it build no graph.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from spot_kernels import checks
from spot_kernels.modules.layers import TINY, eps_in_sum, gru_and_norm, gru_step, is_exactly, merge_heads, split_heads
from spot_kernels.slot_attention import slot_attention_step

# OCBench has its eps in the code, not in the module.
_OCBENCH_EPS = 1e-5


def _attend(
    q: Tensor, k: Tensor, v: Tensor, eps: float, *, in_sum: bool = False, attn: bool = True, logits: bool = False
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """q (scaled) [B, H, K, d], k and v [B, H, N, d] → updates [B, K, H·d]; and if asked for, attention [B, N, K],
    summed over heads, and logits [B, H, N, K], in the dtypes of PyTorch's softmax and products (under autocast, too).

    in_sum: eps is added to the sum of the weights, with one head, instead of to the weights.
    """
    updates, weights, products = slot_attention_step(
        q, k, v, eps=TINY if in_sum else eps, return_attn=attn or in_sum, return_logits=logits
    )
    if in_sum:
        updates = eps_in_sum(updates, weights.sum(1)[:, None, :, None], eps)
    return (
        merge_heads(updates),
        weights.to(q.new_empty(0).softmax(0).dtype) if attn else None,
        products.to(q.dtype) if logits else None,
    )


def _refine(
    slots: Tensor,
    iterations: int,
    attend: Callable[[Tensor, bool], tuple[Tensor, Tensor | None, Tensor | None]],
    update: Callable[[Tensor, Tensor, bool], Tensor],
    *,
    truncation: str | None = "none",
    through: Tensor | None = None,
    every: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """All iterations: slots [B, K, U] → slots, and attention and logits of the last iteration.

    attend(slots, last) gives updates, attention and logits; update(updates, slots, last) new slots. truncation:
    `fixed-point` (the last iteration's input is a constant), `bi-level` (and its gradient goes to `through`); any other
    value truncates nothing, as in the published code. every: whether gradients also reach earlier iterations by another
    way (attention that is returned).
    """
    attn = logits = None
    truncated = truncation in ("fixed-point", "bi-level")
    for last in _lasts(iterations):
        if last and truncated:
            slots = slots.detach()
            if truncation == "bi-level":
                slots = slots + (through - through.detach())
        with torch.set_grad_enabled(torch.is_grad_enabled() and (last or every or not truncated)):
            updates, attn, logits = attend(slots, last)
            slots = update(updates, slots, last)
    return slots, attn, logits


def _lasts(iterations: int) -> list[bool]:
    """For each iteration, whether it is the last.

    Plain booleans: under torch.compile with a varying number of iterations, comparing a loop counter with it would be
    symbolic and could not set the grad mode.
    """
    return [False] * (iterations - 1) + [True] * (iterations > 0)


def _gru_and_norm(gru: nn.GRUCell, norm: nn.LayerNorm, updates: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
    """New slots and their LayerNorm."""
    if slots.is_cuda:
        # On CUDA, not on CPUs, autocast casts the state of PyTorch's GRU cell, too, and with it the new slots.
        (slots,) = checks.autocast(slots)
    return gru_and_norm(gru, norm, updates, slots)


def _single(tokens: Tensor) -> Tensor:
    """[B, N, d] → [B, 1, N, d]: one head."""
    return tokens.unsqueeze(1)


def _noise(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
    """A standard-normal draw on the device of `like`, in its dtype or in the default one."""
    dtype = None if self._published_default_noise else like.dtype
    return torch.randn(shape, device=like.device, dtype=dtype)


def evelinehong(self, inputs, num_slots=None):
    size = inputs.shape[0], num_slots if num_slots is not None else self.num_slots, -1
    spread = torch.exp(self.slots_log_sigma.expand(size))
    slots = self.slots_mu.expand(size) + spread * _noise(self, spread.shape, spread)
    return _lucidrains_iterations(self, inputs, slots, lambda normed: self.fc2(self.fc1(normed).relu()))


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
    return mean + self.slots_logsigma.exp() * _noise(self, mean.shape, inputs)


def _lucidrains_iterations(self, inputs, slots, mlp):
    inputs = self.norm_input(inputs)
    k, v = _single(self.to_k(inputs)), _single(self.to_v(inputs))

    def attend(slots, last):
        return _attend(_single(self.to_q(self.norm_slots(slots)) * self.scale), k, v, self.eps, attn=False)

    def update(updates, slots, last):
        slots, normed = _gru_and_norm(self.gru, self.norm_pre_ff, updates, slots)
        return slots + mlp(normed)

    return _refine(slots, self.iters, attend, update)[0]


def lucidrains_heads(self, inputs, num_slots=None):
    """Every head has its own softmax: heads become samples."""
    slots = _gaussian_slots(self, inputs, num_slots)
    inputs = self.norm_input(inputs)
    k, v = (self.split_heads(tokens) for tokens in (self.to_k(inputs), self.to_v(inputs)))
    size = k.shape[:2]
    k, v = _single(k.flatten(0, 1)), _single(v.flatten(0, 1))

    def attend(slots, last):
        q = self.split_heads(self.to_q(self.norm_slots(slots)) * self.scale)
        updates, *rest = _attend(_single(q.flatten(0, 1)), k, v, self.eps, attn=False)
        return self.combine_heads(self.merge_heads(updates.unflatten(0, size))), *rest

    def update(updates, slots, last):
        slots, normed = _gru_and_norm(self.gru, self.norm_pre_ff, updates, slots)
        return slots + self.mlp(normed)

    return _refine(slots, self.iters, attend, update)[0]


def untitled(self, inputs):
    batch = inputs.shape[0]
    inputs = self.norm_inputs(inputs)
    k, v = _single(self.project_k(inputs)), _single(self.project_v(inputs))
    noise = torch.randn((batch, self.num_slots, self.slot_size)).type_as(inputs)
    slots = self.slots_mu + self.slots_log_sigma.exp() * noise

    def attend(slots, last):
        q = self.project_q(self.norm_slots(slots)) * self.slot_size**-0.5
        return _attend(_single(q), k, v, self.epsilon, attn=False)

    def update(updates, slots, last):
        slots, normed = _gru_and_norm(self.gru, self.norm_mlp, updates, slots)
        return slots + self.mlp(normed)

    return _refine(slots, self.num_iterations, attend, update)[0]


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
        return _attend(q, k, v, self.epsilon, attn=last, logits=logits and last)

    def update(updates, slots, last):
        slots, normed = _gru_and_norm(self.gru, self.norm_mlp, updates, slots)
        return slots + self.mlp(normed)

    return _refine(slots, iterations, attend, update, truncation=truncation, through=slots)


def steve(self, inputs):
    """Without an MLP after the last iteration of a frame; the predictor gives the next frame's initial slots."""
    slots = _noise(self, (inputs.shape[0], self.num_slots, self.slot_size), inputs)
    slots = self.slot_mu + torch.exp(self.slot_log_sigma) * slots
    inputs = self.norm_inputs(inputs)
    keys, values = self.project_k(inputs), self.project_v(inputs)
    scale = self.slot_size**-0.5

    def update(updates, slots, last):
        if last:
            return gru_step(self.gru, updates, slots)
        slots, normed = _gru_and_norm(self.gru, self.norm_mlp, updates, slots)
        return slots + self.mlp(normed)

    all_slots, all_attn = [], []
    for t in range(inputs.shape[1]):
        k, v = _single(keys[:, t]), _single(values[:, t])

        def attend(slots, last, k=k, v=v):
            q = self.project_q(self.norm_slots(slots)) * scale
            return _attend(_single(q), k, v, self.epsilon, attn=last)

        slots, attn, _ = _refine(slots, self.num_iterations, attend, update)
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
    k, v = _single(self.project_k(features)), _single(self.project_v(features))

    def attend(slots, last):
        q = self.project_q(self.norm_slots(slots)) * v.shape[-1] ** -0.5
        return _attend(_single(q), k, v, self.epsilon, in_sum=in_sum, attn=last)

    def update(updates, slots, last):
        slots, normed = _gru_and_norm(self.gru, self.norm_mlp, updates, slots)
        return slots + drop_path(self.mlp(normed))

    slots, attn, _ = _refine(slots, iterations, attend, update, truncation=truncation, through=slots)
    return slots, attn.mT.contiguous()


def oclf_forward(self, inputs, conditioning, masks=None):
    if masks is not None:
        return self._published_class.forward(self, inputs, conditioning, masks)
    batch, tokens = inputs.shape[:2]
    inputs = self.norm_input(inputs)
    k, v = (to(inputs).view(batch, tokens, self.n_heads, self.dims_per_head) for to in (self.to_k, self.to_v))
    if not self.use_implicit_differentiation:
        return self.iterate(conditioning, k, v)
    with torch.no_grad():
        slots, _ = self.iterate(conditioning, k, v)
    return self.step(slots.detach(), k, v)


def oclf_iterate(self, slots, k, v, masks=None):
    if masks is not None:
        return self._published_class.iterate(self, slots, k, v, masks)
    return _oclf_iterations(self, slots, k, v, self.iters)


def oclf_step(self, slots, k, v, masks=None):
    if masks is not None:
        return self._published_class.step(self, slots, k, v, masks)
    return _oclf_iterations(self, slots, k, v, 1)


def _oclf_iterations(self, slots, k, v, iterations):
    """k, v [B, N, H, d]; attention [B, K, N], the mean over heads."""
    k, v = k.transpose(1, 2), v.transpose(1, 2)

    def attend(slots, last):
        q = split_heads(self.to_q(self.norm_slots(slots)) * self.scale, self.n_heads)
        return _attend(q, k, v, self.eps, attn=last)

    def update(updates, slots, last):
        slots = gru_step(self.gru, updates, slots)
        return self.ff_mlp(slots) if self.ff_mlp else slots

    slots, attn, _ = _refine(slots, iterations, attend, update)
    return slots, attn.mT.contiguous() / self.n_heads


def videosaur_forward(self, slots, features, n_iters=None):
    features = self.norm_features(features)
    keys, values = self.to_k(features), self.to_v(features)
    iterations = self.n_iters if n_iters is None else n_iters
    slots, attn = _videosaur_iterations(self, slots, keys, values, iterations)
    return {"slots": slots, "masks": attn}


def videosaur_step(self, slots, keys, values):
    return _videosaur_iterations(self, slots, keys, values, 1)


def _videosaur_iterations(self, slots, keys, values, iterations):
    """The GRU's state, or what the updates are added to, are the slots after their LayerNorm."""
    k, v, attn = _single(keys), _single(values), None
    for last in _lasts(iterations):
        slots = self.norm_slots(slots)
        updates, attn, _ = _attend(_single(self.to_q(slots) * self.scale), k, v, self.eps, attn=last)
        slots = gru_step(self.gru, updates, slots) if self.gru else slots + updates
        slots = slots if self.mlp is None else self.mlp(slots)
    return slots, attn.mT.contiguous()


def ocbench(self, input, query, smask=None, num_iter=None):
    if smask is not None:
        return self._published_class.forward(self, input, query, smask, num_iter)
    slots, attn = _ocbench_iterations(self, input, query, num_iter or self.num_iter, every=False)
    return slots, attn[-1]


def ocbench_with_all_attention(self, input, query, smask=None, num_iter=None):
    """And the attention of every iteration, in a list."""
    if smask is not None:
        return self._published_class.forward(self, input, query, smask, num_iter)
    return _ocbench_iterations(self, input, query, num_iter or self.num_iter, every=True)


def _ocbench_iterations(self, inputs, query, iterations, *, every):
    """Slots, and a list of attention [B, K, N], of every iteration or of the last one."""
    kv = self.norm1kv(inputs)
    k, v = _single(self.proj_k(kv)), _single(self.proj_v(kv))
    attention = []

    def attend(slots, last):
        q = self.proj_q(self.norm1q(slots))
        found = _attend(_single(q * q.shape[2] ** -0.5), k, v, _OCBENCH_EPS, in_sum=True, attn=every or last)
        if every or last:
            attention.append(found[1].mT.contiguous())
        return found

    def update(updates, slots, last):
        slots, normed = _gru_and_norm(self.rnn, self.norm2, updates, slots)
        return slots + self.ffn(normed)

    truncation = "bi-level" if self.trunc_bp == "bi-level" else "none"
    slots, *_ = _refine(query, iterations, attend, update, truncation=truncation, through=query, every=every)
    return slots, attention


def lsd_forward_slots(self, inputs):
    """All heads scaled as one; attention of each head [B, T, H, N, K]."""
    inputs = self.pos(inputs).flatten(3).mT
    inputs = self.in_mlp(self.in_layer_norm(inputs))
    batch, heads = inputs.shape[0], self.num_heads
    if self.learnable_slot_init:
        slots = self.slot_mu.expand(batch, -1, -1)
    else:
        slots = _noise(self, (batch, self.num_slots, self.slot_size), inputs)
        slots = self.slot_mu + torch.exp(self.slot_log_sigma) * slots
    inputs = self.norm_inputs(inputs)
    keys, values = self.project_k(inputs), self.project_v(inputs)
    scale = self.slot_size**-0.5

    def update(updates, slots, last):
        slots, normed = _gru_and_norm(self.gru, self.norm_mlp, updates, slots)
        return slots + self.mlp(normed)

    all_slots, all_attn = [], []
    for t in range(inputs.shape[1]):
        k, v = split_heads(keys[:, t], heads), split_heads(values[:, t], heads)

        def attend(slots, last, k=k, v=v):
            q = split_heads(self.project_q(self.norm_slots(slots)) * scale, heads)
            return _attend(q, k, v, self.epsilon, attn=False, logits=last)

        slots, _, logits = _refine(
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


def slotformer(self, inputs, slots):
    return _slotformer_iterations(self, inputs, slots, attn=False)[0]


def slotformer_with_mask(self, inputs, slots):
    """And the last attention, without a gradient, as masks [B, K, N]."""
    slots, attn, _ = _slotformer_iterations(self, inputs, slots, attn=True)
    return slots, attn.detach().mT


def _slotformer_iterations(self, inputs, slots, *, attn):
    """LayerNorms are part of the query projection and of the MLP."""
    inputs = self.norm_inputs(inputs)
    k, v = _single(self.project_k(inputs)), _single(self.project_v(inputs))

    def attend(slots, last):
        return _attend(_single(self.project_q(slots) * self.attn_scale), k, v, self.eps, attn=attn and last)

    def update(updates, slots, last):
        if not is_exactly(self.mlp, nn.Sequential):
            slots = gru_step(self.gru, updates, slots)
            return slots + self.mlp(slots)
        norm, *layers = self.mlp
        slots, change = _gru_and_norm(self.gru, norm, updates, slots)
        for layer in layers:
            change = layer(change)
        return slots + change

    slots, *maps = _refine(slots, self.num_iterations, attend, update)
    return slots.view(inputs.shape[0], self.num_slots, self.slot_size), *maps
