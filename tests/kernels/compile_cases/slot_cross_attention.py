"""Launches of slot_cross_attention: dtypes, widths and slots in every branch of the configuration, all flags."""

from functools import partial

import torch

from spot_kernels.gpu import slot_cross_attention as kernels
from spot_kernels.slot_cross_attention import empty_gradients, empty_results

# dtype, batch, heads, slots, width; 196 tokens
SHAPES = (
    (torch.bfloat16, 64, 6, 7, 128),  # SPOT's decoder
    (torch.float16, 64, 6, 24, 128),
    (torch.bfloat16, 64, 6, 64, 128),
    (torch.bfloat16, 64, 4, 33, 64),
    (torch.bfloat16, 64, 4, 7, 32),
    (torch.bfloat16, 64, 1, 11, 768),  # one head: more channels than a tile
    (torch.float16, 64, 3, 64, 256),
    (torch.bfloat16, 2, 6, 7, 128),  # few heads for the chip: tokens split over programs
    (torch.float32, 64, 4, 7, 16),
    (torch.float32, 64, 6, 7, 128),
    (torch.float32, 2, 4, 64, 256),
)


def _inputs(dtype, batch, heads, slots, width):
    # as the module makes them: heads side by side in a row
    shapes = ((batch, rows, heads, width) for rows in (196, slots, slots))
    return [torch.empty(shape, dtype=dtype).transpose(1, 2) for shape in shapes]


def _forward(q, k, v, out, mean_map):
    kernels.forward(q, k, v, out, mean_map)


def _backward(grad_out, grad_map, q, k, v):
    gradients = empty_gradients(q, k) if v is None else empty_gradients(q, k, v)
    kernels.backward(grad_out, grad_map, q, k, v, *gradients, *[None] * (v is None))


def cases():
    for shape in SHAPES:
        name = "_".join(str(part).removeprefix("torch.") for part in shape)
        q, k, v = _inputs(*shape)
        both = empty_results(q, k, True)
        yield f"forward_{name}", partial(_forward, q, k, v, *both)
        yield f"backward_{name}", partial(_backward, q, both[1], q, k, v)
        yield f"map_{name}", partial(_forward, q, k, None, None, both[1])
    q, k, v = _inputs(*SHAPES[0])
    grad_map = torch.empty(64, 196, 7)
    yield "forward_without_map", partial(_forward, q, k, v, q, None)
    yield "backward_of_out", partial(_backward, q, None, q, k, v)
    yield "backward_of_map", partial(_backward, None, grad_map, q, k, None)
