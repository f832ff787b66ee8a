"""Launches of gru_norm: every number of warps, dtypes as modules mix them, each gradient alone."""

from functools import partial

import torch

from spot_kernels.gpu import gru_norm as kernels
from spot_kernels.gru_norm import empty_gradients, empty_results

# gates, hidden, weight: one dtype throughout, and what autocast makes of float32 slots and parameters
DTYPES = (
    (torch.float32, torch.float32, torch.float32),
    (torch.bfloat16, torch.float32, torch.float32),
    (torch.float16, torch.float16, torch.float16),
)
UNITS = (64, 256, 600)


def _inputs(gates, hidden, weight, units, rows=448):
    wide, row = (rows, 3 * units), (rows, units)
    return (
        torch.empty(wide, dtype=gates),
        torch.empty(wide, dtype=gates),
        torch.empty(row, dtype=hidden),
        torch.empty(units, dtype=weight),
        torch.empty(row, dtype=gates),
    )


def _forward(i, g, h, w):
    kernels.forward(i, g, h, w, w, 1e-5, *empty_results(i, h))


def _backward(grad_new, grad_normed, i, g, h, w):
    kernels.backward(grad_new, grad_normed, i, g, h, w, 1e-5, *empty_gradients(i, g, h, w))


def cases():
    for units in UNITS:
        for dtypes in DTYPES:
            name = "_".join(str(part).removeprefix("torch.") for part in (*dtypes, units))
            i, g, h, w, normed = _inputs(*dtypes, units)
            yield f"forward_{name}", partial(_forward, i, g, h, w)
            yield f"backward_{name}", partial(_backward, h, normed, i, g, h, w)
    i, g, h, w, normed = _inputs(*DTYPES[1], 256)
    yield "backward_of_new", partial(_backward, h, None, i, g, h, w)
    yield "backward_of_normed", partial(_backward, None, normed, i, g, h, w)
