"""Launches of folded_cross_attention: dtypes, widths and columns in every branch of the configuration, all flags."""

from functools import partial

import torch

from spot_kernels.folded_cross_attention import empty_gradients, empty_results
from spot_kernels.gpu import folded_cross_attention as kernels

# dtype, batch, heads, slots, width; 196 tokens
SHAPES = (
    (torch.bfloat16, 64, 6, 7, 768),  # SPOT's decoder: 64 columns
    (torch.float16, 64, 6, 11, 768),  # 128
    (torch.bfloat16, 64, 4, 24, 384),  # 128
    (torch.bfloat16, 64, 1, 7, 768),  # 16
    (torch.bfloat16, 64, 4, 6, 128),  # 32
    (torch.float32, 64, 4, 6, 128),
    (torch.float32, 64, 6, 7, 768),
    (torch.float32, 64, 3, 7, 384),
)


def _inputs(dtype, batch, heads, slots, width):
    # as the module makes them: products of each head
    a, v = (torch.empty(heads, batch, slots, width, dtype=dtype).transpose(0, 1) for _ in "av")
    return torch.empty(batch, 196, width, dtype=dtype), a, v


def _forward(x, a, v, out, mean_map, saved):
    kernels.forward(x, a, v, 0.1, out, mean_map, saved)


def _backward(grad_out, grad_map, x, a, v, saved):
    gradients = empty_gradients(x, a) if v is None else empty_gradients(x, a, v)
    kernels.backward(grad_out, grad_map, x, a, v, saved, 0.1, *gradients, *[None] * (v is None))


def cases():
    for shape in SHAPES:
        name = "_".join(str(part).removeprefix("torch.") for part in shape)
        x, a, v = _inputs(*shape)
        out, mean_map, saved = empty_results(x, a, True, True)
        yield f"forward_{name}", partial(_forward, x, a, v, out, None, saved)
        yield f"forward_and_map_{name}", partial(_forward, x, a, v, out, mean_map, saved)
        yield f"backward_{name}", partial(_backward, out, None, x, a, v, saved)
        yield f"backward_of_both_{name}", partial(_backward, out, mean_map, x, a, v, saved)
        yield f"map_{name}", partial(_forward, x, a, None, None, mean_map, None)
    x, a, v = _inputs(*SHAPES[0])
    out, mean_map, saved = empty_results(x, a, True, True)
    yield "forward_without_gradients", partial(_forward, x, a, v, out, mean_map, None)
    yield "map_saved", partial(_forward, x, a, None, None, mean_map, saved)
    yield "backward_of_map", partial(_backward, None, mean_map, x, a, None, saved)
