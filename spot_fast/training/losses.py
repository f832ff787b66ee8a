"""Stage 2: what the student learns from its teacher (SPOT, section 3.2)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from spot_kernels import match_masks


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
    # -1, which only a broken matching gives, would be a device-side assertion: such tokens do not count
    return F.cross_entropy(logits.flatten(0, 1), renamed.flatten(), ignore_index=-1), renamed
