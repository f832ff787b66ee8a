"""Launches of clipped_adam and infinity_norm: dtypes of gradients and copies, with and without each option."""

from functools import partial

import torch

from spot_kernels.clipped_adam import UNIT
from spot_kernels.gpu import clipped_adam as kernels

DTYPES = ((torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float32,), (torch.bfloat16,))
DTYPES += ((torch.float16, torch.float32),)


def _update(dtypes, copy, options):
    size = 3 * UNIT
    weights, scalar, count = torch.empty(size), torch.empty(()), torch.empty(2)
    gradients = [torch.empty(part, dtype=dtype) for part, dtype in zip((2 * UNIT, UNIT), dtypes, strict=False)]
    gradients = gradients if len(dtypes) > 1 else [torch.empty(size, dtype=dtypes[0])]
    copied = None if copy is None else torch.empty(2 * UNIT, dtype=copy)
    owners, table = torch.empty(3, dtype=torch.int32), torch.empty(2, 18000)
    given = (scalar, scalar, count) if options else (scalar, scalar, None)
    limit = 0.3 if options else 0.0
    places = torch.empty(3, dtype=torch.int64) if options and len(dtypes) == 1 else None
    fixed = (owners, table, copied, *given, places, limit, (0.9, 0.999), 1e-8)
    kernels.clipped_adam(weights, gradients, weights, weights, count, scalar, *fixed)


def _norm(dtypes):
    kernels.infinity_norm([torch.empty(5000, dtype=dtype) for dtype in dtypes], torch.empty(()))


def cases():
    for dtypes in DTYPES:
        name = "_".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        yield f"norm_{name}", partial(_norm, dtypes)
        for copy in (torch.bfloat16, None):
            for options in (True, False):
                yield f"update_{name}_{copy}_{options}", partial(_update, dtypes, copy, options)
