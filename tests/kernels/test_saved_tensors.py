"""Gradients when hooks return saved tensors in another layout, as offloading to pinned memory does."""

import pytest
import torch

from kernel_tier import DEVICE, every_backend, needs_triton
from operator_calls import INTEGERS, calls, with_gradients
from spot_kernels import use_backend

LAYOUTS = {
    "contiguous": lambda x: torch.empty(x.shape, dtype=x.dtype, device=x.device).copy_(x),
    "axes reversed": lambda x: x.permute(*reversed(range(x.dim()))).contiguous().permute(*reversed(range(x.dim()))),
    "every other element": lambda x: torch.stack([x, x.roll(1)], -1)[..., 0],
}

DEPENDS = {"gru_norm": ("every other element",), "add_norm": ("axes reversed", "every other element")}


@every_backend
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("operator", [name for name in calls() if name not in INTEGERS])
def test_gradients_do_not_depend_on_the_layout_of_what_was_saved(operator, layout, backend):
    if layout in DEPENDS.get(operator, ()) and backend != "triton":
        pytest.skip("PyTorch's own LayerNorm does")
    function, tensors = calls(DEVICE.type)[operator]
    with use_backend("torch" if backend == "native" and DEVICE.type != "cpu" else backend):
        expected = with_gradients(function, tensors)
        with torch.autograd.graph.saved_tensors_hooks(LAYOUTS[layout], lambda x: x):
            results = with_gradients(function, tensors)
    torch.testing.assert_close(results, expected, rtol=1e-5, atol=1e-5)


@needs_triton
def test_a_buffer_that_a_kernel_would_write_beyond_is_refused():
    """Called with buffers of another dtype, size or layout, a launcher raises before it launches."""
    from spot_kernels.gpu import launch
    from spot_kernels.gpu import slot_attention as kernels
    from spot_kernels.slot_attention import empty_results

    q, k, v = (torch.randn(2, 2, n, 8, device=DEVICE) for n in (3, 9, 9))
    good = empty_results(q, k, v, True, True)
    for i, wrong in (
        (0, good[0].contiguous()),
        (1, good[1][:, :8]),
        (2, good[2].double()),
        (3, good[3].to("meta")),
        (4, good[4].mT.contiguous().mT),
    ):
        updates, attn, logits, exact, sums = (wrong if j == i else result for j, result in enumerate(good))
        with pytest.raises(ValueError, match="kernels: (updates|attn|logits|exact|sums) .* (pass|strides)"):
            kernels.forward(q, k, v, 1e-8, updates, exact, sums, attn, logits)
    far = torch.empty_strided((1, 1, 4, 8), (2**30, 2**29, 2**25, 1), device="meta")
    assert launch.rows_last(far).stride(-2) == 8
