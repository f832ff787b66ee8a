"""The loss of a training step: its terms by name, their weights, their sum (SPOT, sections 3.1 and 3.2).

A further term is an entry in `loss_terms`, and in `loss_weights` where its weight is not 1. Log, console and report
take the names from here.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from spot_fast.config import Config
from spot_fast.model.spot import SpotOutput, reconstruction_loss
from spot_fast.training.schedule import attention_weight
from spot_kernels import match_masks


def loss_terms(output: SpotOutput, target: Tensor, labels: Tensor | None) -> dict[str, Tensor]:
    """Unweighted terms, scalars in float32 at least.

    rec: L_REC. att: L_ATT, where there are the teacher's labels [B, N], which is in stage 2.
    """
    terms = {"rec": reconstruction_loss(output.prediction, target)}
    if labels is not None:
        terms["att"], _ = attention_loss(output.slot_logits, output.slot_attn, labels)
    return terms


def loss_weights(config: Config, step: int, total_steps: int, device: torch.device) -> dict[str, Tensor]:
    """Weights of a step, float32 [] on `device`; a term that is not in it has weight 1."""
    weights = {"att": attention_weight(config, step, total_steps)} if config.stage == 2 else {}
    # torch.full fills on the device. torch.tensor would copy from the host and wait for it.
    return {name: torch.full((), value, dtype=torch.float32, device=device) for name, value in weights.items()}


def weighted_sum(terms: dict[str, Tensor], weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """`loss`, the sum in the order of `terms`, and of several terms each as `loss_<name>`, unweighted."""
    weighted = [weights[name] * term if name in weights else term for name, term in terms.items()]
    total = weighted[0]
    for term in weighted[1:]:
        total = total + term
    single = {f"loss_{name}": term for name, term in terms.items()} if len(terms) > 1 else {}
    return {"loss": total, **single}


def teacher_labels(masks: Tensor) -> Tensor:
    """Teacher's decoder masks [B, N, K] → hard labels int64 [B, N]; the lower slot wins a tie."""
    return masks.argmax(-1)


def attention_loss(student_logits: Tensor, student_attn: Tensor, teacher_labels: Tensor) -> tuple[Tensor, Tensor]:
    """L_ATT and the teacher's labels in the student's numbering.

    Student and teacher masks are matched one to one per image by IoU (Hungarian); L_ATT is the cross-entropy of the
    student's slot-attention logits against the matched labels, mean over tokens, unweighted. Renaming the labels
    equals permuting the logits' slots.

    Args:
        student_logits: slot-attention logits of the last iteration [B, 1, N, K].
        student_attn: their softmax [B, N, K]; its argmax is the student's hard mask.
        teacher_labels: int64 [B, N], as from `teacher_labels`.

    Returns:
        loss, a scalar in float32 at least; renamed labels int64 [B, N].
    """
    batch, tokens, slots = student_attn.shape
    if tuple(student_logits.shape) != (batch, 1, tokens, slots):
        raise ValueError(
            f"student_logits {tuple(student_logits.shape)} must be [{batch}, 1, {tokens}, {slots}]: "
            "self-training needs one head of slot attention"
        )
    renamed = match_masks(student_attn.detach().argmax(-1), teacher_labels, slots)
    logits = student_logits.squeeze(1).to(torch.promote_types(student_logits.dtype, torch.float32))
    # A broken matching labels tokens -1. Without ignore_index that is an assertion on the device, which ends the
    # process without saying where.
    return F.cross_entropy(logits.flatten(0, 1), renamed.flatten(), ignore_index=-1), renamed
