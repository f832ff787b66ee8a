"""What the tests of the Triton kernels share: the device they run on, and the one tolerance.

On a GPU the kernels run compiled; without one under Triton's interpreter, on the CPU (conftest.py sees to that).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch

from spot_kernels import dispatch, native

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
needs_triton = pytest.mark.skipif(
    not dispatch.TRITON or (DEVICE.type == "cpu" and not dispatch.INTERPRETED), reason="needs triton"
)
needs_library = pytest.mark.skipif(not native.available(), reason=native.describe())
needs_gpu = pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU")
NATIVE, TRITON = pytest.param("native", marks=needs_library), pytest.param("triton", marks=needs_triton)
every_backend = pytest.mark.parametrize("backend", ["torch", NATIVE, TRITON])
OUTPUT, GRADIENT = 2.0, 3.0


def assert_as_exact(name: str, ours: torch.Tensor, exact: torch.Tensor, plain: torch.Tensor, factor: float) -> None:
    """The largest error of `ours` against float64 `exact` is at most `factor` times that of `plain` PyTorch.

    `plain` is the reference computed in the dtype under test. Where PyTorch happens to be exact (one slot, say) an
    error of one unit in the last place of the largest value is allowed.
    """
    assert ours.shape == exact.shape, f"{name}: shape {tuple(ours.shape)}, expected {tuple(exact.shape)}"
    assert ours.dtype == plain.dtype, f"{name}: {ours.dtype}, expected {plain.dtype}"
    if not ours.numel():
        return
    eps = torch.finfo(ours.dtype).eps
    ours, exact, plain = ours.detach().double().cpu(), exact.detach().cpu(), plain.detach().double().cpu()
    assert bool(torch.isfinite(ours).all()), f"{name}: not finite"
    error, baseline = (ours - exact).abs().max().item(), (plain - exact).abs().max().item()
    limit = factor * max(baseline, eps * exact.abs().max().item())
    assert error <= limit, f"{name}: error {error:.3g}, PyTorch's {baseline:.3g}, allowed {limit:.3g}"


def joined(tensors: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> torch.Tensor:
    """All of `tensors` in one, float64, each divided by the size of its exact value, for `assert_as_exact`.

    Results of one long chain of products share their errors: judged alone, each would pass or fail by the luck that
    PyTorch had with it. What is next to nothing beside the rest is not blown up to its size.
    """
    sizes = {name: value.abs().max().double() for name, value in exact.items()}
    least = 1e-2 * max(sizes.values())
    return torch.cat([(tensors[name].double() / size.clamp_min(least)).flatten() for name, size in sizes.items()])


def random_order(tokens: int, batch: int | None = None, seed: int = 0) -> torch.Tensor:
    """A permutation [tokens], or one for each sample [batch, tokens]."""
    generator = torch.Generator().manual_seed(seed)
    orders = torch.stack([torch.randperm(tokens, generator=generator) for _ in range(batch or 1)])
    return orders if batch else orders[0]


def assert_graph_replays(run: Callable[[], Sequence[torch.Tensor]], change: Callable[[int], None]) -> None:
    """Requires that `run` never waits for the device, and that a CUDA graph of it gives its results.

    change: puts other values, drawn from the given seed, into the tensors that `run` reads.
    """
    run()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    # Once on the stream of the capture: libraries make a workspace for each stream, which no capture may do.
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        captured = run()
    for seed in (1, 2):
        change(seed)
        graph.replay()
        for replayed, expected in zip(captured, run(), strict=True):
            assert replayed.dtype == expected.dtype and torch.equal(replayed, expected)


def redraw(tensors: Sequence[torch.Tensor], seed: int) -> None:
    """Fills `tensors` with normal values."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for tensor in tensors:
            tensor.normal_()
