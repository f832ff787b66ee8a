"""Launches of slot_cross_attention: dtypes, widths and slots in every branch of the configuration, all flags."""

import torch

from spot_kernels.gpu import slot_cross_attention as kernels

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


def cases():
    for shape in SHAPES:
        name = "_".join(str(part).removeprefix("torch.") for part in shape)
        q, k, v = _inputs(*shape)
        grad_map = torch.empty(shape[1], 196, shape[3])
        yield f"forward_{name}", lambda q=q, k=k, v=v: kernels.forward(q, k, v, True)
        yield f"backward_{name}", lambda q=q, k=k, v=v, g=grad_map: kernels.backward(q, g, q, k, v)
    q, k, v = _inputs(*SHAPES[0])
    grad_map = torch.empty(64, 196, 7)
    yield "forward_without_map", lambda: kernels.forward(q, k, v, False)
    yield "backward_of_out", lambda: kernels.backward(q, None, q, k, v)
    yield "backward_of_map", lambda: kernels.backward(None, grad_map, q, k, v)
