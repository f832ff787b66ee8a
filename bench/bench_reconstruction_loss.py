"""The end of the decoder, its last LayerNorm and the mean squared error: is anything left for a kernel of ours to win?

With n = B·N·D elements of s bytes: forward has to read the tokens and the targets, 2n·s; backward reads both again and
writes one gradient, 3n·s. Ten and twenty operations for each element. torch.compile turns the chain into as few passes
as that: where it comes near the copy's bytes per second there is nothing to win, so none is shipped, and the trainer
leaves this piece to the compiler. `fwd+bwd at` in the table is the answer.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from harness.kernel_bench import Case, Problem, Results, Setting, compiled, name_of, randn, sizes
from harness.kernel_clock import Work
from harness.kernel_rows import COMPILE, EAGER


def work(batch: int, tokens: int, width: int, size: int) -> tuple[Work, Work]:
    """Forward and backward, of elements of `size` bytes."""
    n = batch * tokens * width
    return Work(2 * n * size, 10 * n), Work(3 * n * size, 20 * n)


def plain(tokens: torch.Tensor, target: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """The scalar loss, in float32 at least."""
    prediction = F.layer_norm(tokens, tokens.shape[-1:], weight, bias)
    dtype = torch.promote_types(tokens.dtype, torch.float32)
    return F.mse_loss(prediction.to(dtype), target.to(dtype))


def errors(computed: Results, exact: Results, _: Results) -> tuple[float, float]:
    """Largest relative errors of loss and gradients. Both techniques are PyTorch's: only a wrong loss is a failure."""
    pairs = [*zip(computed.outputs, exact.outputs, strict=True), *zip(computed.gradients, exact.gradients, strict=True)]
    loss, *gradients = [((ours.double() - true).abs().max() / true.abs().max()).item() for ours, true in pairs]
    assert loss < 1e-3, f"the loss is off by {loss:.1e}"
    return loss, max(gradients)


def build(dims: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> Problem:
    def inputs(seed: int) -> tuple[torch.Tensor, ...]:
        (tokens,) = randn(seed, dims, device=device, dtype=dtype)
        (target,) = randn(seed + 1000, dims, device=device, dtype=dtype, grad=False)
        weights = randn(seed + 2000, dims[-1:], dims[-1:], device=device, dtype=dtype)
        return tokens, target, *weights

    return Problem(inputs, {EAGER: lambda: plain, COMPILE: compiled(plain)}, plain, check=errors)


def cases(setting: Setting) -> list[Case]:
    name, full, on_cpu, *dims = ("tiny", 1, 1, 9, 16) if setting.tiny else ("SPOT", 64, 16, 196, 768)
    batch = setting.batch(full, on_cpu)
    tokens, width = dims
    return [
        Case(
            "reconstruction_loss",
            sizes(name, batch, full, f"{tokens} D{width}"),
            name_of(dtype),
            *work(batch, tokens, width, dtype.itemsize),
            (EAGER,) if setting.tiny else (EAGER, COMPILE),
            lambda dtype=dtype: build((batch, tokens, width), dtype, setting.device),
        )
        for dtype in setting.dtypes
    ]


def test_speed(time_it):
    """Right first, then timed, with every technique."""
    time_it()
