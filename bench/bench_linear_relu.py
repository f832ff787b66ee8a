"""A linear layer with its ReLU, `linear_relu`: the first half of an MLP.

With M rows, I inputs and O outputs of s bytes: forward reads x, W and b and writes the result, (M I + O I + O + M O) s;
backward reads x, W, the result and its gradient and writes three gradients, and once writes and reads the gradient
before the ReLU, (2 M I + 2 O I + O + 4 M O) s. One product forward and two backward, 2 M I O operations each.

Values are multiples of powers of two for which no sum is next to zero: which ones the ReLU keeps is the same in every
precision.
"""

from __future__ import annotations

import torch
from harness.kernel_bench import Case, Problem, Setting, compiled, name_of, randn, sizes
from harness.kernel_clock import Work
from harness.kernel_rows import COMPILE, EAGER, OURS

import spot_kernels
from spot_kernels.reference import linear_relu as reference

# Name, images, rows an image, inputs, outputs; images on a CPU.
SHAPES = (("decoder FFN", 64, 196, 768, 3072, 2), ("slots", 64, 7, 256, 1024, 64))


def work(rows: int, inputs: int, outputs: int, size: int) -> tuple[Work, Work]:
    """Forward and backward of elements of `size` bytes."""
    x, weight, out = rows * inputs, outputs * inputs, rows * outputs
    product = 2 * rows * inputs * outputs
    forward = Work((x + weight + outputs + out) * size, product)
    return forward, Work((2 * x + 2 * weight + outputs + 4 * out) * size, 2 * product)


def build(
    rows: int, inputs: int, outputs: int, dtype: torch.dtype, device: torch.device, names: tuple[str, ...]
) -> Problem:
    def made(seed: int) -> tuple[torch.Tensor, ...]:
        shapes = (rows, inputs), (outputs, inputs), (outputs,)
        x, weight, bias = (t.detach() for t in randn(seed, *shapes, device=device, dtype=torch.float32))
        # sums of multiples of 1/256, and biases between them
        x, weight = (4 * x).round() / 4, (2 * weight).round() / 64
        bias = (16 * bias).round().clamp(-64, 63) / 256 + 1 / 512
        return tuple(t.to(dtype).requires_grad_() for t in (x, weight, bias))

    techniques = {
        OURS: lambda: spot_kernels.linear_relu,
        EAGER: lambda: reference.linear_relu,
        COMPILE: compiled(reference.linear_relu),
    }
    return Problem(made, {name: techniques[name] for name in names}, reference.linear_relu)


def cases(setting: Setting) -> list[Case]:
    made = []
    names = (OURS, EAGER, *[COMPILE] * (setting.gpu and not setting.tiny))
    for name, images, each, inputs, outputs, on_cpu in (("tiny", 1, 3, 8, 16, 1),) if setting.tiny else SHAPES:
        batch = setting.batch(images, on_cpu)
        dims = batch * each, inputs, outputs
        for dtype in setting.dtypes:
            made.append(
                Case(
                    "linear_relu",
                    sizes(name, batch, images, f"{each} {inputs} to {outputs}"),
                    name_of(dtype),
                    *work(*dims, dtype.itemsize),
                    names,
                    lambda dims=dims, dtype=dtype: build(*dims, dtype, setting.device, names),
                )
            )
    return made


def test_speed(time_it):
    """Right first, then timed, with every technique."""
    time_it()
