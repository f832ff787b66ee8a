"""Launches of shift_by_order: dtypes of tokens and bos, a bos and an order for all samples or one for each."""

from functools import partial

import torch

from spot_kernels.gpu import shift_by_order


def _both_ways(dtype, bos_dtype, shared):
    tokens = torch.empty((64, 196, 768), dtype=dtype)
    bos = torch.empty((768,) if shared else (64, 768), dtype=bos_dtype)
    order = torch.empty((196,) if shared else (64, 196), dtype=torch.int64)
    out = torch.empty_like(tokens)
    shift_by_order.forward(tokens, bos, order, out)
    shift_by_order.backward(out, order, torch.empty_like(tokens), torch.empty_like(bos))


def cases():
    yield "bfloat16", partial(_both_ways, torch.bfloat16, torch.float32, True)
    yield "float32", partial(_both_ways, torch.float32, torch.float32, False)
