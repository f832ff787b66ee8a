"""Patched modules call their layers: hooks fire, layers may be exchanged; the iterations of a compiled one may vary."""

import copy
from collections import Counter

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrize, prune

from kernel_tier import TRITON, needs_triton
from patch_modules import assert_equal_to_rounding, build, inputs_of, run
from published_modules import SLOT_WIDTH
from spot_kernels import SlotAttention, patch, use_backend
from spot_kernels.gru_norm import gru_norm
from spot_kernels.modules import layers

both_backends = pytest.mark.parametrize("backend", ["torch", TRITON])


def pair(name):
    """The module patched, and the same one as it was published."""
    module = build(name).eval()
    plain = copy.deepcopy(module)
    assert patch(module).replaced
    return module, plain


def one_image(name):
    return [x.detach()[:1].requires_grad_() for x in inputs_of(name)]


def listen(module):
    """Counts the calls of every layer."""
    calls = Counter()
    for path, layer in module.named_modules():
        if path:
            layer.register_forward_hook(lambda *_, path=path: calls.update([path]))
    return calls


@both_backends
@pytest.mark.parametrize("name", ["SLATE", "SlotDiffusion, SlotFormer", "STEVE", "OCBench", "VideoSAUR, SlotContrast"])
def test_every_layer_is_called_as_often_as_in_the_published_forward(name, backend):
    module, plain = pair(name)
    calls, expected = listen(module), listen(plain)
    with use_backend(backend):
        results = run(module, one_image(name))
    assert_equal_to_rounding(results, run(plain, one_image(name)))
    assert calls == expected


class HalfGru(nn.GRUCell):
    def forward(self, updates, slots):
        return 0.5 * super().forward(updates, slots)


class WrappedNorm(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, x):
        return 2 * self.norm(x)


class TwiceAsLarge(nn.Module):
    def forward(self, weight):
        return 2 * weight


def exchange_gru(module):
    module.gru, gru = HalfGru(SLOT_WIDTH, SLOT_WIDTH), module.gru
    module.gru.load_state_dict(gru.state_dict())


def wrap_norm(module):
    module.norm_mlp = WrappedNorm(module.norm_mlp)


def replace_forward(module):
    module.norm_mlp.forward = lambda x: 3 * x


def double_output(module):
    module.gru.register_forward_hook(lambda gru, inputs, result: 2 * result)


def change_input(module):
    module.norm_mlp.register_forward_pre_hook(lambda norm, inputs: (inputs[0] + 1,))


def reverse_gradient(module):
    module.gru.register_full_backward_hook(lambda gru, gradients, _: tuple(-x for x in gradients))


def parametrise(module):
    parametrize.register_parametrization(module.gru, "weight_hh", TwiceAsLarge())


def prune_gru(module):
    prune.l1_unstructured(module.gru, "weight_hh", amount=0.5)


def without_weights(module):
    module.norm_mlp = nn.LayerNorm(SLOT_WIDTH, elementwise_affine=False)


def without_bias(module):
    module.gru = nn.GRUCell(SLOT_WIDTH, SLOT_WIDTH, bias=False)
    with torch.no_grad():
        module.gru.weight_hh.fill_(0.1)
        module.gru.weight_ih.fill_(0.1)


@both_backends
@pytest.mark.parametrize(
    "change",
    [
        exchange_gru,
        wrap_norm,
        replace_forward,
        double_output,
        change_input,
        reverse_gradient,
        parametrise,
        prune_gru,
        without_weights,
        without_bias,
    ],
)
def test_a_layer_changed_after_patching_computes_what_it_computes_in_the_published_forward(change, backend):
    """Exchanged, wrapped, hooked, parametrised or pruned: the fused GRU and LayerNorm would bypass all of it."""
    module, plain = pair("SLATE")
    change(module)
    change(plain)
    with use_backend(backend):
        results = run(module, one_image("SLATE"))
    assert_equal_to_rounding(results, run(plain, one_image("SLATE")))


@both_backends
@pytest.mark.parametrize("change", [exchange_gru, wrap_norm, double_output])
def test_our_own_module_calls_changed_layers(change, backend):
    torch.manual_seed(0)
    module, plain = SlotAttention(12, SLOT_WIDTH, mlp_hidden=20), SlotAttention(12, SLOT_WIDTH, mlp_hidden=20)
    plain.load_state_dict(module.state_dict())
    change(module)
    before = run(plain, one_image("SLATE"))
    with use_backend(backend):
        results = run(module, one_image("SLATE"))
    with use_backend("torch"):
        assert_equal_to_rounding(results, run(module, one_image("SLATE")))
    assert not torch.allclose(results[0][0], before[0][0], atol=1e-3)


@needs_triton
def test_a_hook_of_all_modules_is_called_for_gru_and_norm():
    """And without one both are one kernel."""
    module, _ = pair("SLATE")
    seen = Counter()
    handle = register_module_forward_hook(lambda layer, inputs, result: seen.update([type(layer).__name__]))
    try:
        with use_backend("triton"):
            module(*one_image("SLATE"))
    finally:
        handle.remove()
    assert (seen["GRUCell"], seen["LayerNorm"]) == (3, 7)


@needs_triton
def test_plain_gru_and_norm_are_one_kernel(monkeypatch):
    module, _ = pair("SLATE")
    count = []
    monkeypatch.setattr(layers, "gru_norm", lambda *arguments: count.append(1) or gru_norm(*arguments))
    with use_backend("triton"):
        module(*one_image("SLATE"))
    assert len(count) == 3


@pytest.mark.parametrize("dynamic", [None, True])
def test_a_compiled_module_takes_any_number_of_iterations(dynamic):
    """As the published ones do: the number is a symbol from its second value on."""
    module, _ = pair("BO-QSA")
    torch._dynamo.reset()
    compiled, inputs = torch.compile(module, backend="eager", dynamic=dynamic), inputs_of("BO-QSA")
    for number in (2, 3, 1):
        assert_equal_to_rounding(run(compiled, inputs, num_iter=number), run(module, inputs, num_iter=number))


def test_our_own_module_compiled_takes_any_number_of_iterations():
    torch.manual_seed(0)
    module = SlotAttention(12, SLOT_WIDTH, mlp_hidden=20, truncation="bi_level")
    torch._dynamo.reset()
    compiled, inputs = torch.compile(module, backend="eager"), inputs_of("SLATE")
    for number in (2, 3, 1):
        assert_equal_to_rounding(run(compiled, inputs, iterations=number), run(module, inputs, iterations=number))
