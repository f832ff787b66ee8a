"""The rest of `replacements`: the methods of OCLF and what was built on it, VideoSAUR, OCBench and SlotFormer."""

from __future__ import annotations

import torch
from torch import nn

from spot_kernels.modules.layers import gru_step, is_exactly
from spot_kernels.patching.iterations import attention_step, gru_with_norm, lasts, refine, single

# OCBench has its eps in the code, not in the module.
_OCBENCH_EPS = 1e-5


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


def ftdinosaur_forward(self, inputs, slots):
    inputs = self.norm_input(inputs)
    k, v = (to(inputs).unflatten(-1, (self.n_heads, self.dims_per_head)) for to in (self.to_k, self.to_v))
    return _oclf_iterations(self, slots, k, v, self.iters, in_sum=True)


def ftdinosaur_step(self, slots, k, v):
    return _oclf_iterations(self, slots, k, v, 1, in_sum=True)


def _oclf_iterations(self, slots, k, v, iterations, *, in_sum=False):
    """k, v [B, N, H, d]; attention [B, K, N], the mean over heads."""
    k, v = k.transpose(1, 2), v.transpose(1, 2)

    def attend(slots, last):
        q = self.to_q(self.norm_slots(slots)) * self.scale
        q = q.unflatten(-1, (self.n_heads, self.dims_per_head)).transpose(1, 2)
        return attention_step(q, k, v, self.eps, in_sum=in_sum, attn=last)

    def update(updates, slots, last):
        slots = gru_step(self.gru, updates, slots)
        return self.ff_mlp(slots) if self.ff_mlp else slots

    slots, attn, _ = refine(slots, iterations, attend, update)
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
    k, v, attn = single(keys), single(values), None
    for last in lasts(iterations):
        slots = self.norm_slots(slots)
        updates, attn, _ = attention_step(single(self.to_q(slots) * self.scale), k, v, self.eps, attn=last)
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


def metaslot_step(self, q, k, v, smask=None):
    """One iteration from projected tokens; its forward adds noise to them, and codes the slots between its rounds."""
    if smask is not None:
        return self._published_class.step(self, q, k, v, smask)
    updates, attn, _ = _ocbench_attend(self, q, single(k), single(v))
    return _ocbench_update(self, updates, q), attn.mT.contiguous()


def _ocbench_iterations(self, inputs, query, iterations, *, every):
    """Slots, and a list of attention [B, K, N], of every iteration or of the last one."""
    kv = self.norm1kv(inputs)
    k, v = single(self.proj_k(kv)), single(self.proj_v(kv))
    attention = []

    def attend(slots, last):
        found = _ocbench_attend(self, slots, k, v, attn=every or last)
        if every or last:
            attention.append(found[1].mT.contiguous())
        return found

    def update(updates, slots, last):
        return _ocbench_update(self, updates, slots)

    truncation = "bi-level" if self.trunc_bp == "bi-level" else "none"
    slots, *_ = refine(query, iterations, attend, update, truncation=truncation, through=query, every=every)
    return slots, attention


def _ocbench_attend(self, slots, k, v, *, attn=True):
    q = self.proj_q(self.norm1q(slots))
    return attention_step(single(q * q.shape[2] ** -0.5), k, v, _OCBENCH_EPS, in_sum=True, attn=attn)


def _ocbench_update(self, updates, slots):
    slots, normed = gru_with_norm(self.rnn, self.norm2, updates, slots)
    return slots + self.ffn(normed)


def slotformer(self, inputs, slots):
    return _slotformer_iterations(self, inputs, slots, attn=False)[0]


def slotformer_with_mask(self, inputs, slots):
    """And the last attention, without a gradient, as masks [B, K, N]."""
    slots, attn, _ = _slotformer_iterations(self, inputs, slots, attn=True)
    return slots, attn.detach().mT


def _slotformer_iterations(self, inputs, slots, *, attn):
    """LayerNorms are part of the query projection and of the MLP."""
    inputs = self.norm_inputs(inputs)
    k, v = single(self.project_k(inputs)), single(self.project_v(inputs))

    def attend(slots, last):
        return attention_step(single(self.project_q(slots) * self.attn_scale), k, v, self.eps, attn=attn and last)

    def update(updates, slots, last):
        if not is_exactly(self.mlp, nn.Sequential):
            slots = gru_step(self.gru, updates, slots)
            return slots + self.mlp(slots)
        norm, *layers = self.mlp
        slots, change = gru_with_norm(self.gru, norm, updates, slots)
        for layer in layers:
            change = layer(change)
        return slots + change

    slots, *maps = refine(slots, self.num_iterations, attend, update)
    return slots.view(inputs.shape[0], self.num_slots, self.slot_size), *maps
