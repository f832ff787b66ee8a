"""The decoder's layout of tokens: raster layout with our kernel, or order layout with PyTorch's attention.

    python bench/first_light/layouts.py [--rehearse]

Self-attention of the decoder, forward and backward, 64 × 6 heads × 196 tokens × 128 in bfloat16:

    raster, ours       `permuted_causal_attention`: rows are gathered and scattered inside the kernel
    raster, gathered   the same by index_select, `is_causal` attention, index_select back, in every block
    raster, Flex       FlexAttention with a block mask of the order, made beforehand
    order, …           tokens lie in the order:  `is_causal` attention alone, by each backend of PyTorch

In order layout the decoder's input is written in the order by `shift_by_order`, which gathers in any case, and the
prediction or the target is indexed once a step: that is timed too. The last row says which layout a step of four blocks
is faster in.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

from compare import compare, fresh_compiler
from record import NO_GO, Options, Recorder, Time, best_of, parser, run

import torch  # isort: skip
import torch.nn.functional as F
from bench_permuted_attention import columns, flex, gathered
from harness.kernel_bench import Function, Problem, randn
from harness.kernel_rows import EAGER, FLEX, OURS, SDPA
from torch.nn.attention import SDPBackend, sdpa_kernel

import spot_kernels
from spot_kernels.reference import permuted_attention as reference

BLOCKS = 4
_FLASH, _CUDNN, _DEFAULT = "order, FLASH", "order, CUDNN", "order, PyTorch's choice"


def causal(backend: SDPBackend | None) -> Function:
    """Attention of tokens that lie in the order; the last argument is the order, which it does not need."""

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    def by_backend(*given: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel(backend):
            return attend(*given)

    return attend if backend is None else by_backend


def attention(options: Options) -> tuple[Problem, dict[str, str], dict[str, Function]]:
    """The problem, what its techniques are called, and the exact function of those in order layout."""
    batch, heads, tokens, width = (1, 2, 36, 32) if options.rehearse else (64, 6, 196, 128)
    device = options.device
    shape = batch, heads, tokens, width
    dtype = torch.bfloat16 if options.gpu else torch.float32

    def inputs(seed: int) -> tuple[torch.Tensor, ...]:
        return *randn(seed, shape, shape, shape, device=device, dtype=dtype), columns(tokens, device)

    plain = reference.permuted_causal_attention
    techniques: dict[str, Callable[[], Function]] = {
        OURS: lambda: spot_kernels.permuted_causal_attention,
        EAGER: lambda: plain,
        SDPA: lambda: gathered,
        FLEX: lambda: flex(tokens, device),
        _FLASH: lambda: causal(SDPBackend.FLASH_ATTENTION),
        _CUDNN: lambda: causal(SDPBackend.CUDNN_ATTENTION),
        _DEFAULT: lambda: causal(None),
    }
    names = {
        OURS: "raster, ours",
        SDPA: "raster, gathered",
        FLEX: "raster, Flex",
        _FLASH: _FLASH,
        _CUDNN: _CUDNN,
        _DEFAULT: _DEFAULT,
    }
    if not options.gpu:
        del names[FLEX]  # compiling it takes a CPU longer than all else
    identity = torch.arange(tokens, device=device)
    in_order = lambda q, k, v, order: plain(q, k, v, identity)  # noqa: E731 - the key of its results
    return Problem(inputs, techniques, plain), names, dict.fromkeys((_FLASH, _CUDNN, _DEFAULT), in_order)


def indexing(options: Options) -> Problem:
    """What order layout adds to a step: the prediction, or the target, is indexed by the order once."""
    batch, tokens, width = (1, 36, 32) if options.rehearse else (64, 196, 768)
    device, dtype = options.device, torch.bfloat16 if options.gpu else torch.float32

    def inputs(seed: int) -> tuple[torch.Tensor, ...]:
        return *randn(seed, (batch, tokens, width), device=device, dtype=dtype), columns(tokens, device)

    def index(target: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
        return target.index_select(1, order)

    return Problem(inputs, {EAGER: lambda: index}, index)


def layouts(recorder: Recorder, options: Options, time: Time) -> None:
    problem, names, exact = attention(options)
    with fresh_compiler():
        rows = compare(recorder, options, "decoder's self-attention", problem, names, exact)
    once = compare(
        recorder, options, "indexing the target", indexing(options), {EAGER: "order, once a step"}, backward=False
    )
    ours = next((row for row in rows if row.variant == names[OURS] and row.value is not None), None)
    order = best_of([row for row in rows if row.variant.startswith("order")])
    if ours is None or order is None or not once or once[0].value is None:
        recorder.add("a step of four blocks", verdict=NO_GO, note="one of the layouts has no time")
        return
    raster_us, order_us = BLOCKS * ours.value, BLOCKS * order.value + once[0].value
    faster = "raster stays" if raster_us <= order_us else "order layout wins"
    recorder.add("a step of four blocks", "raster", figure="µs", value=raster_us)
    recorder.add(
        "a step of four blocks",
        "order",
        figure="µs",
        value=order_us,
        note=f"{faster}: {abs(raster_us - order_us):.0f} µs a step, by {order.variant}",
    )


if __name__ == "__main__":
    sys.exit(run("layouts", layouts, parser(__doc__).parse_args()))
