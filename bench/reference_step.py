"""The baseline of the ladder: a SPOT training step as the authors' implementation takes it, in plain eager PyTorch.

What it does and a fast step need not do:

- the whole ViT at every step; in stage 2 three times, for student, teacher and target;
- attention with its matrices written out, in the ViT, in slot attention and in the decoder;
- patch orders by gathering tokens, decoding them under a causal mask, and putting the results back;
- in stage 2 the teacher's decoder with all its outputs, and the Hungarian matching on the host, image by image;
- Adam and clipping as PyTorch offers them, and losses read by the host at every step.

It computes with the parameters of a `Spot`, so losses and gradients can be compared with those of the modules
themselves, and in the parameters' dtype. Nothing of `spot_kernels` runs. Formulas: the paper's sections 3 and 4.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from spot_fast.model.decoders import AutoregressiveDecoder
from spot_fast.model.slot_encoder import SlotEncoder
from spot_fast.model.spot import Spot

# Cost of a teacher mask without a pixel, more than that of any other.
_EMPTY = 1e3


@dataclass(frozen=True)
class Values:
    """What the host reads after a step: losses (loss_att unweighted, 0 in stage 1), infinity norm before clipping."""

    loss: float
    loss_rec: float
    loss_att: float
    norm: float


class ReferenceStep:
    """Training steps of `model`, in stage 2 taught by `teacher`.

    Args:
        model: trains; its dtype and device are those of the step.
        teacher: a stage-1 model in stage 2, None in stage 1.
        att_weight: lambda, the weight of L_ATT.
        clip: largest infinity norm of the gradient.

    ValueError where a model has what SPOT's published runs have not: an MLP decoder, CapPa, several slot-attention
    heads, an encoder with rotary positions.
    """

    def __init__(
        self, model: Spot, teacher: Spot | None = None, *, att_weight: float = 0.005, clip: float = 0.3
    ) -> None:
        for one in (model,) if teacher is None else (model, teacher):
            _check(one)
        self.model, self.teacher, self.att_weight, self.clip = model, teacher, att_weight, clip
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimiser = torch.optim.Adam(self.parameters, lr=0.0)

    def losses(
        self,
        images: Tensor,
        order: int,
        noise: Tensor | None,
        teacher_order: int = 0,
        teacher_noise: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Normalised images [B, 3, S, S], patch orders, slot noise [B, K, U] → loss, L_REC, L_ATT (0 in stage 1)."""
        teacher_masks = None
        if self.teacher is not None:
            with torch.no_grad():
                _, _, _, teacher_masks = forward(self.teacher, images, teacher_order, teacher_noise)
        loss_rec, attn, logits, _ = forward(self.model, images, order, noise)
        if teacher_masks is None:
            return loss_rec, loss_rec, torch.zeros_like(loss_rec)
        loss_att = attention_loss(attn, logits, teacher_masks)
        return loss_rec + self.att_weight * loss_att, loss_rec, loss_att

    def step(
        self,
        images: Tensor,
        order: int,
        noise: Tensor | None,
        teacher_order: int = 0,
        teacher_noise: Tensor | None = None,
        *,
        rate: float,
    ) -> Values:
        """Forward, backward, clipping and Adam with learning rate `rate`; arguments as `losses`."""
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        loss, loss_rec, loss_att = self.losses(images, order, noise, teacher_order, teacher_noise)
        self.optimiser.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.parameters, self.clip, float("inf"))
        self.optimiser.step()
        return Values(loss.item(), loss_rec.item(), loss_att.item(), norm.item())


def _check(model: Spot) -> None:
    if not isinstance(model.decoder, AutoregressiveDecoder) or model.decoder.cappa > 0:
        raise ValueError("the reference step decodes with the autoregressive transformer only, without CapPa")
    if model.slot_encoder.attention.heads != 1:
        raise ValueError(f"the reference step has one slot-attention head, not {model.slot_encoder.attention.heads}")
    if model.encoder._rope is not None:
        raise ValueError("the reference step has no rotary positions: use another encoder")


def forward(model: Spot, images: Tensor, order: int, noise: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Normalised images [B, 3, S, S] → L_REC, slot attention [B, N, K], its logits [B, N, K], masks [B, N, K].

    A model with trainable last blocks runs the encoder twice: once with them, once without for the target.
    """
    blocks = list(model.encoder.vit.blocks)
    if model.last_blocks is None:
        features = encode(model, blocks, images)
        target = features.clone().detach()
    else:
        features = encode(model, blocks[: model.encoder.first_last_block] + list(model.last_blocks), images)
        with torch.no_grad():
            target = encode(model, blocks, images)
    slots, attn, logits = attend(model.slot_encoder, features, noise)
    prediction, masks = decode(model.decoder, slots, target, order)
    return ((target - prediction) ** 2).sum() / target.numel(), attn, logits, masks


# ---- encoder


def encode(model: Spot, blocks: list[nn.Module], images: Tensor) -> Tensor:
    """Features [B, N, D] of the last of `blocks`, without prefix tokens."""
    encoder = model.encoder
    vit = encoder.vit
    tokens = vit.norm_pre(vit._pos_embed(vit.patch_embed(images)))
    for block in blocks:
        tokens = tokens + block.ls1(_vit_attention(block.attn, block.norm1(tokens)))
        tokens = tokens + block.ls2(block.mlp(block.norm2(tokens)))
    tokens = tokens[:, encoder.num_prefix :]
    return F.layer_norm(tokens, (encoder.dim,)) if encoder.feature_norm else tokens


def _vit_attention(attn: nn.Module, tokens: Tensor) -> Tensor:
    batch, count, width = tokens.shape
    q, k, v = attn.qkv(tokens).reshape(batch, count, 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
    q, k = attn.q_norm(q), attn.k_norm(k)
    weights = ((q @ k.transpose(-2, -1)) * attn.scale).softmax(-1)
    return attn.proj((weights @ v).transpose(1, 2).reshape(batch, count, width))


# ---- slots


def attend(encoder: SlotEncoder, features: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """features [B, N, D], noise [B, K, U] → slots [B, K, U]; attention and logits [B, N, K] of the last iteration."""
    module, batch = encoder.attention, features.shape[0]
    if encoder.init == "learned":
        initial = encoder.slot_embedding.expand(batch, -1, -1)
    else:
        initial = encoder.slot_mean + encoder.slot_log_scale.exp() * noise
    inputs = module.norm_inputs(encoder.mlp(encoder.norm(features)))
    k, v = module.project_k(inputs) * module.scale, module.project_v(inputs)
    slots = initial
    for iteration in range(module.iterations):
        if iteration == module.iterations - 1 and module.truncation != "none":
            slots = slots.detach()
            if module.truncation == "bi_level":
                slots = slots + initial - initial.detach()
        logits = k @ module.project_q(module.norm_slots(slots)).transpose(1, 2)
        attn = logits.softmax(-1)
        weights = attn + module.eps
        weights = weights / weights.sum(1, keepdim=True)
        updates = weights.transpose(1, 2) @ v
        slots = module.gru(updates.flatten(0, 1), slots.flatten(0, 1)).view_as(slots)
        slots = slots + module.mlp(module.norm_mlp(slots))
    return slots, attn, logits


# ---- decoder


def decode(decoder: AutoregressiveDecoder, slots: Tensor, target: Tensor, order: int) -> tuple[Tensor, Tensor]:
    """slots [B, K, U], target [B, N, D], number of the patch order → prediction [B, N, D], masks [B, N, K]."""
    batch, count, _ = target.shape
    sequence = decoder.orders[order]
    back = sequence.argsort()
    bos = decoder.bos[order].expand(batch, 1, -1)
    tokens = decoder.input_proj(torch.cat([bos, target[:, sequence][:, :-1]], 1))
    slots = decoder.slot_proj(slots)
    later = torch.triu(torch.ones(count, count, dtype=torch.bool, device=target.device), 1)
    for block in decoder.transformer.blocks:
        normed = block.norm_self(tokens)
        tokens = normed if block.first else tokens
        layer = block.self_attention
        q, k, v = (F.linear(normed, weight) for weight in layer.project_qkv.weight.chunk(3))
        out, _ = _attention(q, k, v, layer.heads, later)
        tokens = tokens + layer.project_o(out)
        layer = block.cross_attention
        q = layer.project_q(block.norm_cross(tokens))
        out, weights = _attention(q, layer.project_k(slots), layer.project_v(slots), layer.heads)
        tokens = tokens + layer.project_o(out)
        tokens = tokens + block.ffn(block.norm_ffn(tokens))
    masks = weights.sum(1)
    masks = masks / masks.sum(-1, keepdim=True)
    return decoder.transformer.norm(tokens)[:, back], masks[:, back]


def _attention(q: Tensor, k: Tensor, v: Tensor, heads: int, hidden: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """q [B, N, D], k and v [B, M, D]; hidden [N, M]: what a query may not see → out [B, N, D], weights [B, H, N, M]."""
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if hidden is not None:
        logits = logits.masked_fill(hidden, float("-inf"))
    weights = logits.softmax(-1)
    return (weights @ v).transpose(1, 2).flatten(2), weights


# ---- self-training


def match(student: Tensor, teacher: Tensor, slots: int) -> Tensor:
    """Label maps [B, N] → for each teacher slot the student slot [B, K] that is its own, by IoU, on the host."""
    students, teachers = (F.one_hot(labels, slots).float() for labels in (student, teacher))
    common = teachers.transpose(1, 2) @ students
    sizes = teachers.sum(1)
    union = sizes.unsqueeze(2) + students.sum(1).unsqueeze(1) - common
    cost = 1 - common / union.clamp(min=1)
    cost = cost.masked_fill((sizes == 0).unsqueeze(2), _EMPTY).cpu().numpy()
    columns = [linear_sum_assignment(one)[1] for one in cost]
    return torch.stack([torch.from_numpy(one) for one in columns]).to(student.device)


def attention_loss(attn: Tensor, logits: Tensor, teacher_masks: Tensor) -> Tensor:
    """L_ATT of the student's attention and logits [B, N, K] and the teacher's decoder masks [B, N, K]."""
    labels = teacher_masks.argmax(-1)
    columns = match(attn.detach().argmax(-1), labels, attn.shape[-1])
    permuted = logits.gather(2, columns.unsqueeze(1).expand_as(logits))
    return F.cross_entropy(permuted.transpose(1, 2).to(torch.promote_types(logits.dtype, torch.float32)), labels)
