"""Launches of linear_relu's backward pass: SPOT's FFN and a narrow layer in every dtype, and one with few rows."""

from functools import partial

import torch

from spot_kernels.gpu import linear_relu as kernels
from spot_kernels.linear_relu import empty_gradients


def _backward(rows, columns, dtype):
    grad, out = torch.empty(rows, columns, dtype=dtype), torch.empty(rows, columns, dtype=dtype)
    kernels.backward(grad, out, *empty_gradients(out))


def cases():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for rows, columns in ((12544, 3072), (448, 100)):
            name = f"backward_{rows}_{columns}_{str(dtype).removeprefix('torch.')}"
            yield name, partial(_backward, rows, columns, dtype)
    yield "backward_448_1024_bfloat16", partial(_backward, 448, 1024, torch.bfloat16)
