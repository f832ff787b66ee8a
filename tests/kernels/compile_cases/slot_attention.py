"""Launches of the slot-attention step: SPOT, image-level and several heads; every dtype, flag and kind of tile."""

from functools import partial
from unittest.mock import patch

import torch

from spot_kernels.gpu import launch, slot_attention, slot_attention_backward
from spot_kernels.slot_attention import empty_gradients, empty_results

DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# B, H, N, K, d
SPOT, IMAGE = (64, 1, 196, 7, 256), (8, 1, 16384, 11, 64)
LARGEST, FOUR_HEADS, JOINT = (64, 1, 196, 64, 256), (64, 4, 196, 11, 64), (64, 4, 196, 33, 64)


def has_tf32():
    return launch.architecture(torch.device("cpu")) != "gfx942"


def both_ways(shape, dtype, attn=False, logits=False, updates=True, tf32=False):
    batch, heads, tokens, slots, width = shape

    def rows(count, dtype=dtype):
        return torch.empty((batch, count, heads, width), dtype=dtype).transpose(1, 2)

    q, k, v = rows(slots), rows(tokens), rows(tokens)
    new, a, line, exact, sums = empty_results(q, k, v, True, True)
    a, line = a if attn else None, line if logits else None
    with patch.object(launch, "float32_precision", lambda device: "tf32" if tf32 and has_tf32() else "ieee"):
        slot_attention.forward(q, k, v, 1e-8, new, exact, sums, a, line)
        grads = new if updates else None, a, line
        slot_attention_backward.backward(*grads, q, k, v, exact, sums, 1e-8, *empty_gradients(q, k, v))


def cases():
    for name, dtype in DTYPES.items():
        yield f"spot {name}", partial(both_ways, SPOT, dtype)
        yield f"largest {name}", partial(both_ways, LARGEST, dtype)
    yield "image float32", partial(both_ways, IMAGE, torch.float32)
    yield "image bf16", partial(both_ways, IMAGE, torch.bfloat16)
    yield "spot float32 tf32", partial(both_ways, SPOT, torch.float32, tf32=True)
    yield "largest float32 tf32", partial(both_ways, LARGEST, torch.float32, tf32=True)
    yield "spot, all results", partial(both_ways, SPOT, torch.bfloat16, attn=True, logits=True)
    yield "spot, logits alone", partial(both_ways, SPOT, torch.bfloat16, logits=True, updates=False)
    yield "four heads, all results", partial(both_ways, FOUR_HEADS, torch.bfloat16, attn=True, logits=True)
    yield "joint heads, all results", partial(both_ways, JOINT, torch.bfloat16, attn=True, logits=True)
