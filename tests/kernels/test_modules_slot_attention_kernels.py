"""`SlotAttention` on the Triton kernels: as exact as on PyTorch, forward and backward, compiled and under autocast."""

import contextlib

import pytest
import torch

from kernel_tier import DEVICE, GRADIENT, OUTPUT, TRITON, assert_as_exact, joined, needs_triton
from spot_kernels import SlotAttention, use_backend
from spot_kernels.dispatch import without
from spot_kernels.modules import layers

BATCH, TOKENS, WIDTH, SLOTS, SLOT_WIDTH, HIDDEN = 2, 9, 12, 7, 16, 20


def build(dtype=torch.float32, **options):
    """GELU unless options say otherwise: rounding changes the sign of a ReLU input next to 0, and with it gradients."""
    torch.manual_seed(0)
    options = {"activation": "gelu"} | options
    module = SlotAttention(WIDTH, SLOT_WIDTH, **{"mlp_hidden": HIDDEN} | options)
    for norm in (m for m in module.modules() if isinstance(m, torch.nn.LayerNorm)):
        torch.nn.init.normal_(norm.weight, 1, 0.3)
        torch.nn.init.normal_(norm.bias, 0, 0.3)
    return module.to(DEVICE, dtype)


def run(module, backend, *, autocast=None, compiled=False):
    """slots, attn and logits, and the gradients of inputs, slots and every parameter."""
    dtype = module.norm_inputs.weight.dtype
    generator = torch.Generator().manual_seed(1)
    shapes = (BATCH, TOKENS, WIDTH), (BATCH, SLOTS, SLOT_WIDTH)
    inputs, slots = (torch.randn(s, generator=generator).to(DEVICE, dtype).requires_grad_() for s in shapes)
    module.zero_grad(set_to_none=True)
    call = torch.compile(module, fullgraph=True, backend="aot_eager") if compiled else module
    cast = torch.autocast(DEVICE.type, autocast) if autocast else contextlib.nullcontext()
    with use_backend(backend):
        with cast:
            results = call(inputs, slots)
        loss = sum(
            (x * torch.randn(x.shape, generator=generator).to(DEVICE, x.dtype)).sum().to(torch.float64) for x in results
        )
        loss.backward()
    names = ["inputs", "slots", *(name for name, _ in module.named_parameters())]
    gradients = [x.new_zeros(x.shape) if x.grad is None else x.grad for x in (inputs, slots, *module.parameters())]
    return dict(zip(("slots", "attn", "logits"), results, strict=True)), dict(zip(names, gradients, strict=True))


def assert_module_as_exact(options, backend="triton", *, autocast=None):
    exact = run(build(torch.float64, **options), "torch")
    plain = run(build(**options), "torch", autocast=autocast)
    ours = run(build(**options), backend, autocast=autocast)
    for i, factor in enumerate((OUTPUT, GRADIENT)):
        # under autocast the kernels keep the slots in float32 between iterations, a GPU's GRU cell does not
        assert autocast or [x.dtype for x in ours[i].values()] == [x.dtype for x in plain[i].values()]
        tensors = (joined(part[i], exact[i]) for part in (ours, exact, plain))
        assert_as_exact("outputs" if i == 0 else "gradients", *tensors, factor)


VARIANTS = {
    "spot": {},
    "bi-level, 2 heads": {"truncation": "bi_level", "heads": 2},
    "fixed point": {"truncation": "fixed_point"},
    "eps in the sum": {"eps": 0.5, "eps_in": "sum"},
    "eps in the sum, 2 heads": {"eps": 0.5, "eps_in": "sum", "heads": 2},
    "2 separate heads, one iteration": {"joint_heads": False, "heads": 2, "iterations": 1, "out_dim": 5},
}


@needs_triton
@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS.keys())
def test_module_on_the_kernels(options):
    assert_module_as_exact(options)


@needs_triton
@pytest.mark.parametrize("options", [{}, {"truncation": "bi_level", "heads": 2}], ids=["spot", "bi-level, 2 heads"])
def test_module_on_the_kernels_under_autocast(options):
    assert_module_as_exact(options, autocast=torch.bfloat16)


@pytest.mark.parametrize("backend", ["torch", "auto", TRITON])
def test_autocast_gives_bf16_products(backend):
    """Slots stay close to float32's and gradients finite in every backend."""
    (expected, _), (results, gradients) = run(build(), "torch"), run(build(), backend, autocast=torch.bfloat16)
    assert results["attn"].dtype == torch.float32
    assert (results["slots"].float() - expected["slots"]).abs().max() < 0.1
    assert (results["attn"] - expected["attn"]).abs().max() < 0.05
    assert all(torch.isfinite(x).all() for x in gradients.values())


@pytest.mark.parametrize("backend", ["torch", "auto", TRITON])
@pytest.mark.parametrize("truncation", ["none", "bi_level"])
def test_compiled_module_gives_the_same_numbers(backend, truncation):
    torch._dynamo.reset()  # other tests compile the same code
    module = build(iterations=2, truncation=truncation)
    torch.testing.assert_close(run(module, backend, compiled=True), run(module, backend))


@needs_triton
@pytest.mark.parametrize(
    ("options", "calls"),
    [
        ({}, 3),
        ({"mlp_last": False}, 2),
        ({"mlp_norm": "post"}, 0),
        ({"mlp_norm": "none"}, 0),
        ({"mlp_hidden": None}, 0),
        ({"update": "residual"}, 0),
    ],
    ids=str,
)
def test_gru_and_layernorm_are_one_kernel_where_they_meet(options, calls, monkeypatch):
    """And only there: where the MLP does not follow on a LayerNorm of the GRU's output, the layers run as they are."""
    fused, count = layers.gru_norm, []
    monkeypatch.setattr(layers, "gru_norm", lambda *arguments: count.append(1) or fused(*arguments))
    with without("residual_norm"):  # the GRU's kernel alone
        assert_module_as_exact(options)
    assert len(count) == calls


@needs_triton
@pytest.mark.parametrize("options", [{}, {"joint_heads": False, "heads": 2}, {"eps_in": "sum", "heads": 2}], ids=str)
def test_empty_batch(options):
    inputs, slots = torch.randn(0, TOKENS, WIDTH, device=DEVICE), torch.randn(0, 3, SLOT_WIDTH, device=DEVICE)
    with use_backend("triton"):
        slots, attn, logits = build(**options)(inputs, slots)
    assert slots.shape == (0, 3, SLOT_WIDTH)
    assert attn.shape == (0, TOKENS, 3) and logits.shape == (0, options.get("heads", 1), TOKENS, 3)
