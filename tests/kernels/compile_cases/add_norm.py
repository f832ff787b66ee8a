"""Launches of add_norm: every number of warps, the dtypes and lows that modules mix, each gradient alone."""

from functools import partial

import torch

from spot_kernels.add_norm import empty_gradients, empty_results
from spot_kernels.gpu import add_norm as kernels

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
# x, delta, normed, whether x has a low, of what a low is returned: one dtype throughout, streams of 24 bits and of
# float32 under autocast, what begins such a stream, and a LayerNorm alone
KINDS = {
    "float32": (F32, F32, F32, False, None),
    "bfloat16": (BF16, BF16, BF16, False, None),
    "stream": (BF16, BF16, BF16, True, "sum"),
    "last": (BF16, BF16, F32, True, "sum"),
    "encoder": (F32, BF16, BF16, False, "sum"),
    "begin": (BF16, None, BF16, False, "normed"),
    "alone": (BF16, None, BF16, False, None),
    "float16": (F32, F16, F16, False, None),
}
WIDTHS = (128, 768, 1536)


def _forward(x, low, delta, weight, low_of, dtype):
    kernels.forward(x, low, delta, weight, weight, 1e-5, low_of, *empty_results(x, delta, low_of, dtype))


def _backward(grad_sum, grad_normed, total, weight, for_x, for_delta, for_weight):
    rows = torch.empty(total.shape[0])
    results = empty_gradients(total, weight, for_x, for_delta, for_weight)
    kernels.backward(grad_sum, grad_normed, total, rows, rows, weight, *results)


def cases():
    for name, (x, delta, normed, with_low, low_of) in KINDS.items():
        for width in WIDTHS if name in ("float32", "stream") else WIDTHS[1:2]:
            shape, weight = (1024, width), torch.empty(width)
            tensors = [None if dtype is None else torch.empty(shape, dtype=dtype) for dtype in (x, delta, normed)]
            low = torch.empty(shape, dtype=torch.int8) if with_low else None
            yield f"forward_{name}_{width}", partial(_forward, tensors[0], low, tensors[1], weight, low_of, normed)
            total = torch.empty(shape, dtype=BF16 if low_of == "sum" else x)
            grad_sum = None if delta is None or name == "last" else total
            for_delta = delta if delta != x else None
            yield (
                f"backward_{name}_{width}",
                partial(_backward, grad_sum, tensors[2], total, weight, x, for_delta, True),
            )
    x = torch.empty(1024, 768, dtype=BF16)
    yield "forward_without_weight", partial(_forward, x, None, None, None, None, F32)
    yield "backward_without_weight", partial(_backward, None, x, x, None, BF16, None, False)
    yield "backward_of_weight", partial(_backward, None, x, x, torch.empty(768), None, None, True)
