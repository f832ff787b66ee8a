"""What the tests of the Triton kernels share: the device they run on, and the one tolerance.

On a GPU the kernels run compiled; without one under Triton's interpreter, on the CPU (conftest.py sees to that).
"""

from __future__ import annotations

import pytest
import torch

from spot_kernels import dispatch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
needs_triton = pytest.mark.skipif(
    not dispatch.TRITON or (DEVICE.type == "cpu" and not dispatch.INTERPRETED), reason="needs triton"
)
OUTPUT, GRADIENT = 2.0, 3.0


def assert_as_exact(name: str, found: torch.Tensor, exact: torch.Tensor, plain: torch.Tensor, factor: float) -> None:
    """The largest error of `found` against float64 `exact` is at most `factor` times that of `plain` PyTorch.

    `plain` is the reference computed in the dtype under test. Where PyTorch happens to be exact (one slot, say) an
    error of one unit in the last place of the largest value is allowed.
    """
    assert found.shape == exact.shape, f"{name}: shape {tuple(found.shape)}, expected {tuple(exact.shape)}"
    assert found.dtype == plain.dtype, f"{name}: {found.dtype}, expected {plain.dtype}"
    if not found.numel():
        return
    eps = torch.finfo(found.dtype).eps
    found, exact, plain = found.detach().double().cpu(), exact.detach().cpu(), plain.detach().double().cpu()
    assert bool(torch.isfinite(found).all()), f"{name}: not finite"
    error, baseline = (found - exact).abs().max().item(), (plain - exact).abs().max().item()
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
