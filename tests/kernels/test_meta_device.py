"""Tensors without data: shapes, dtypes and devices of every operator and module, with backward."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from kernel_tier import NATIVE, TRITON
from operator_calls import calls, with_gradients
from spot_kernels import PermutedDecoder, SlotAttention, chosen_backend, use_backend

BACKENDS = ["auto", "torch", NATIVE, TRITON]


def described(tensors):
    return [(tuple(tensor.shape), tensor.dtype) for tensor in tensors]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("operator", calls())
def test_every_operator_runs_on_the_meta_device(operator, backend):
    """Whatever backend is requested, outside and inside autocast."""
    function, tensors = calls()[operator]
    on_meta, on_meta_tensors = calls("meta")[operator]
    expected = described(with_gradients(function, tensors))
    with use_backend(backend):
        results = with_gradients(on_meta, on_meta_tensors)
        with torch.autocast("cpu", torch.bfloat16):
            inside = with_gradients(on_meta, on_meta_tensors)
    assert {tensor.device.type for tensor in results} == {"meta"}
    assert described(results) == described(inside) == expected


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("operator", calls())
def test_every_operator_takes_fake_tensors(operator, backend):
    function, tensors = calls()[operator]
    with use_backend(backend):
        expected = with_gradients(function, tensors)
        with FakeTensorMode():
            results = with_gradients(*calls()[operator])
    assert described(results) == described(expected)
    assert [tensor.device for tensor in results] == [tensor.device for tensor in expected]


def test_modules_run_on_the_meta_device():
    with torch.device("meta"):
        attention = SlotAttention(16, 8, mlp_hidden=16, heads=2, initial="gaussian", num_slots=3)
        decoder = PermutedDecoder(8, blocks=2, heads=2)
        slots, attn, _ = attention(torch.randn(2, 9, 16))
        out, mean_map = decoder(torch.randn(2, 9, 8), slots, torch.arange(9))
        out.sum().backward()
    assert slots.shape == (2, 3, 8) and attn.shape == mean_map.shape == (2, 9, 3) and out.shape == (2, 9, 8)
    assert all(parameter.grad is not None for parameter in attention.parameters() if parameter.requires_grad)


def test_tensors_on_two_devices_are_refused():
    """One on the meta device, the other on the CPU: the message names both."""
    for operator, (function, tensors) in calls().items():
        if len(tensors) > 1:
            with pytest.raises(ValueError, match=f"{operator}: .*meta"):
                function(tensors[0], *(tensor.to("meta") for tensor in tensors[1:]))


@pytest.mark.parametrize("operator", calls())
def test_sparse_tensors_are_refused(operator):
    """Operators need strides."""
    function, tensors = calls()[operator]
    with pytest.raises(ValueError, match=f"{operator}: [a-z_]+ is torch.sparse_coo: pass an ordinary dense tensor"):
        function(*(tensor.to_sparse() for tensor in tensors))


def test_a_backend_on_the_meta_device_is_torch():
    with use_backend("native"):
        assert chosen_backend("slot_attention_step", torch.empty(1, 1, 3, 8, device="meta")) == "torch"
