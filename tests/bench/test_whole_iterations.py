"""The experiment `whole_iterations` computes slot attention: times of a wrong kernel would say nothing."""

import pytest
import torch

from kernel_tier import DEVICE, OUTPUT, needs_triton


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "slots", "width"), [(33, 7, 32), (5, 17, 20)])
def test_one_kernel_for_all_iterations_equals_the_module(dtype, tokens, slots, width):
    import whole_iterations

    torch.manual_seed(0)
    ours, plain = whole_iterations.error(2, tokens, slots, width, dtype, DEVICE)
    assert ours <= OUTPUT * plain
