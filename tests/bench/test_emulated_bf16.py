"""bfloat16 products in float32 are bfloat16 products."""

import torch
from emulated_bf16 import Float32Products


def test_products_and_their_gradients_are_those_of_bfloat16():
    torch.manual_seed(0)
    x, weight = torch.randn(64, 32), torch.randn(48, 32, requires_grad=True)
    found = []
    for mode in (Float32Products(), torch.no_grad()):
        weight.grad = None
        with mode, torch.enable_grad():
            with torch.autocast("cpu", torch.bfloat16):
                out = torch.nn.functional.linear(x, weight)
            out.float().square().sum().backward()
        assert out.dtype == torch.bfloat16 and weight.grad.dtype == torch.float32
        found.append((out.detach().float(), weight.grad))
    for ours, theirs in zip(*found, strict=True):
        # One rounding to bfloat16 may fall to the other side.
        assert (ours - theirs).abs().max() <= 2**-7 * theirs.abs().max()
    exact = x.bfloat16().double() @ weight.detach().bfloat16().double().T
    assert torch.equal(found[0][0], exact.float().bfloat16().float())
