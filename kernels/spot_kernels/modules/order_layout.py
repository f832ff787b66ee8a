"""Order layout: tokens lie in the sequence in which they are decoded, so that plain causal attention serves.

In raster layout row i of [B, N, D] is patch i; in order layout row t is patch order[t]. All of a decoder but its
self-attention works token by token, so tokens have to be moved at its ends only.
"""

from __future__ import annotations

from typing import Final, Literal

import torch

from spot_kernels import checks, dispatch
from spot_kernels.reference.permuted_attention import order_rank

# Instead of an order: the tokens lie in it.
SEQUENCE: Final = "sequence"
Order = torch.Tensor | Literal["sequence"] | None


def prefers_order_layout(tokens: torch.Tensor, *, gathered: bool = False) -> bool:
    """Whether a decoder moves its tokens into the order rather than to gather them in every self-attention.

    On a GPU, where PyTorch's causal attention is faster than the kernels of `permuted_causal_attention`. A CPU masks
    the matrix of weights in any order at the same speed; but without a backward pass PyTorch's attention, which never
    writes that matrix, is faster there in float32. gathered: the tokens are gathered in any case, so
    that their layout costs nothing.
    """
    if not dispatch.uses("order_layout"):
        return False
    if tokens.device.type == "cpu":
        exact = tokens.dtype is torch.float32 and not torch.is_autocast_enabled("cpu")
        return gathered and exact and not torch.is_grad_enabled()
    if tokens.device.type != "cuda":
        return False
    # not under backend torch, nor in transforms, which PyTorch's fused attention does not know
    return dispatch.choose("permuted_causal_attention", tokens) == "triton"


def take_rows(tokens: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """tokens [B, N, D], index int64 [M] or [B, M] → rows [B, M, D].

    For tokens without gradients: backward would add rows up, which `to_sequence` does not need.
    """
    if index.dim() == 1:
        return tokens.index_select(1, index)
    return tokens.gather(1, index.unsqueeze(-1).expand(-1, -1, tokens.shape[2]))


def put_rows(tokens: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """tokens [B, N, D] → [B, N, D] whose row index[t] is row t; index: a permutation, int64 [N] or [B, N].

    A gather in backward, where that of `take_rows` would have to add to zeros.
    """
    moved = torch.empty_like(tokens)
    if index.dim() == 1:
        return moved.index_copy_(1, index, tokens)
    return moved.scatter_(1, index.unsqueeze(-1).expand_as(tokens), tokens)


def to_sequence(tokens: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """[B, N, D] from raster into order layout."""
    if checks.CHECK_ORDERS:
        checks.permutation("order layout", order)
    return put_rows(tokens, order_rank(order)) if tokens.requires_grad else take_rows(tokens, order)


def from_sequence(tokens: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """[B, N, D] from order into raster layout."""
    return put_rows(tokens, order) if tokens.requires_grad else take_rows(tokens, order_rank(order))
