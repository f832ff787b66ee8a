"""The grids of 336, 448, 512 and 518 pixels: up to 37 × 37 = 1,369 tokens, a number that no tile divides."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import operator_calls
from kernel_tier import GRADIENT, NATIVE, TRITON, assert_as_exact, needs_triton
from spot_fast.model.patch_orders import patch_orders
from spot_kernels import permuted_causal_attention, use_backend

GRIDS = (21, 24, 28, 32, 37)
TOKENS = 37 * 37
# Under the interpreter the attention kernels take up to a minute and a half.
SLOWLY = pytest.param("triton", marks=[needs_triton, pytest.mark.slow])
CASES = [
    ("permuted_causal_attention", SLOWLY),
    ("slot_attention_step", SLOWLY),
    ("slot_cross_attention", SLOWLY),
    ("slot_cross_map", SLOWLY),
    ("folded_cross_attention", SLOWLY),
    ("folded_cross_map", SLOWLY),
    *((name, TRITON) for name in ("shift_by_order", "assign_masks", "match_masks", "overlap_counts")),
    *((name, NATIVE) for name in ("assign_masks", "match_masks", "overlap_counts", "mask_labels")),
]


def attend_by_moving(q, k, v, order):
    """Gather into the sequence, PyTorch's causal attention, scatter back."""
    out = F.scaled_dot_product_attention(*(x.index_select(2, order) for x in (q, k, v)), is_causal=True)
    return torch.zeros_like(out).index_copy(2, order, out)


def results(function, tensors, grad, order):
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    out = function(*leaves, order)
    return out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype))


@pytest.mark.parametrize("grid", GRIDS)
def test_all_nine_orders_equal_moving_the_tokens(grid):
    """Forward and backward in float64, where another formula would show."""
    *tensors, grad = torch.randn(4, 1, 1, grid * grid, 4, dtype=torch.float64, generator=seeded(grid))
    for order in patch_orders(grid):
        ours = results(permuted_causal_attention, tensors, grad, order)
        for one, expected in zip(ours, results(attend_by_moving, tensors, grad, order), strict=True):
            torch.testing.assert_close(one, expected)


@pytest.mark.parametrize(
    "name, backend",
    [pytest.param(name, *backend.values, marks=backend.marks) for name, backend in CASES],
)
def test_every_operator_at_1369_tokens(name, backend):
    """Results and gradients of each backend against PyTorch in float64; integers are equal."""
    function, tensors = operator_calls.calls(batch=1, tokens=TOKENS)[name]
    wide = tuple(x.double() if x.is_floating_point() else x for x in tensors)
    with use_backend("torch"):
        exact, plain = (operator_calls.with_gradients(function, each) for each in (wide, tensors))
    with use_backend(backend):
        ours = operator_calls.with_gradients(function, tensors)
    assert len(ours) == len(exact) > 0
    for one, true, baseline in zip(ours, exact, plain, strict=True):
        if one.is_floating_point():
            assert_as_exact(name, one, true.double(), baseline, GRADIENT)
        else:
            assert torch.equal(one, baseline)


def seeded(number: int) -> torch.Generator:
    return torch.Generator().manual_seed(number)
