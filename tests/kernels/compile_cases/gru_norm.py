"""Launches of gru_norm: every number of warps, dtypes as modules mix them, each gradient alone."""

import torch

from spot_kernels.gpu import gru_norm as kernels

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


def cases():
    for units in UNITS:
        for dtypes in DTYPES:
            name = "_".join(str(part).removeprefix("torch.") for part in (*dtypes, units))
            i, g, h, w, normed = _inputs(*dtypes, units)
            yield f"forward_{name}", lambda i=i, g=g, h=h, w=w: kernels.forward(i, g, h, w, w, 1e-5)
            yield f"backward_{name}", lambda i=i, g=g, h=h, w=w, n=normed: kernels.backward(h, n, i, g, h, w, 1e-5)
    i, g, h, w, normed = _inputs(*DTYPES[1], 256)
    yield "backward_of_new", lambda: kernels.backward(h, None, i, g, h, w, 1e-5)
    yield "backward_of_normed", lambda: kernels.backward(None, normed, i, g, h, w, 1e-5)
