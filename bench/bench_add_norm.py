"""An addition to the residual stream with the LayerNorm that follows it, `add_norm`.

With n = B·N·D elements: forward reads the stream and what is added and writes the sum and its LayerNorm; backward reads
the sum and both gradients and writes one, or two where stream and addend have different dtypes. No products, about 10
and 15 operations an element.

Streams: of 24 bits (bfloat16 and its `low`), as modules have them under autocast; bfloat16; float32, as autocast has it
without the kernel; and a LayerNorm alone. PyTorch has no streams of 24 bits: its techniques leave the eight bits out
there and have less to move, at the error of a bfloat16 stream.
"""

from __future__ import annotations

import torch
from harness.kernel_bench import Case, Problem, Setting, compiled, name_of, randn, sizes
from harness.kernel_clock import Work
from harness.kernel_rows import COMPILE, EAGER, OURS

import spot_kernels
from spot_kernels.reference import add_norm as reference

_EPS = 1e-5
BF16, F32 = torch.bfloat16, torch.float32
# name → dtypes of stream, addend (None: nothing is added) and LayerNorm, and whether the stream has 24 bits
KINDS = {
    "24 bits": (BF16, BF16, BF16, True),
    "stream": (BF16, BF16, BF16, False),
    "float32 stream": (F32, BF16, BF16, False),
    "LayerNorm": (BF16, None, BF16, False),
    "float32": (F32, F32, F32, False),
}


def work(elements: int, stream: int, delta: int, normed: int, low: bool) -> tuple[Work, Work]:
    """Forward and backward; bytes of an element of each, delta 0: nothing is added and no sum is written."""
    forward = stream + normed + (delta + stream + 2 * low if delta else 0)
    backward = stream + normed + stream + (stream + delta * (delta != stream) if delta else 0)
    return Work(forward * elements, 10 * elements), Work(backward * elements, 15 * elements)


def build(dims: tuple[int, int, int], kind: str, device: torch.device, names: tuple[str, ...]) -> Problem:
    stream, addend, normed, with_low = KINDS[kind]

    def inputs(seed: int) -> tuple[torch.Tensor, ...]:
        (wide,) = randn(seed, dims, device=device, dtype=F32, grad=False)
        x, low = reference.split(wide) if with_low else (wide.to(stream), None)
        weight, bias = randn(seed + 1000, dims[2:], dims[2:], device=device, dtype=F32)
        delta = randn(seed + 2000, dims, device=device, dtype=addend) if addend else ()
        return x.requires_grad_(), weight, bias, *delta, *([low] if with_low else [])

    def ours(x, weight, bias, delta=None, low=None) -> tuple[torch.Tensor, ...]:
        given = {"low": low, "low_of": "sum"} if with_low else {}
        results = spot_kernels.add_norm(x, weight, bias, _EPS, delta, dtype=normed, **given)
        return results[:2] if addend else results[1:2]

    def plain(x, weight, bias, delta=None, low=None) -> tuple[torch.Tensor, ...]:
        results = reference.add_norm(x, None, delta, weight, bias, _EPS, None, normed)
        return results[:2] if addend else results[1:2]

    def exact(x, weight, bias, delta=None, low=None) -> tuple[torch.Tensor, ...]:
        if low is not None:
            x = x + (reference.join(x.detach().to(BF16), low) - x.detach())
        results = reference.add_norm(x, None, delta, weight, bias, _EPS, None, torch.float64)
        return results[:2] if addend else results[1:2]

    techniques = {OURS: lambda: ours, EAGER: lambda: plain, COMPILE: compiled(plain)}
    return Problem(inputs, {name: techniques[name] for name in names}, exact)


def cases(setting: Setting) -> list[Case]:
    full, on_cpu, tokens, width = (1, 1, 9, 16) if setting.tiny else (64, 8, 196, 768)
    batch = setting.batch(full, on_cpu)
    names = (OURS, EAGER, *[COMPILE] * (setting.gpu and not setting.tiny))
    found = []
    for kind, (stream, addend, normed, with_low) in KINDS.items():
        sized = (stream.itemsize, addend.itemsize if addend else 0, normed.itemsize)
        found.append(
            Case(
                "add_norm",
                sizes(kind, batch, full, f"{tokens} D{width}"),
                name_of(normed),
                *work(batch * tokens * width, *sized, with_low),
                names,
                lambda kind=kind: build((batch, tokens, width), kind, setting.device, names),
            )
        )
    return found


def test_speed(time_it):
    """Right first, then timed, with every technique."""
    time_it()
