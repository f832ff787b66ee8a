"""The default dtype and device of a process (PyTorch Lightning's bf16-true sets one) are not those of an operator."""

import contextlib
import os
import subprocess
import sys

import pytest
import torch

from kernel_tier import needs_triton
from operator_calls import calls, with_gradients
from spot_fast.evaluation.metrics import image_scores, labels_from_soft
from spot_fast.model.encoder import normalise
from spot_fast.segmentation.overlays import labels_at
from spot_kernels import PermutedDecoder, SlotAttention, native, use_backend

DEFAULTS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
BACKENDS = [
    "torch",
    pytest.param("native", marks=pytest.mark.skipif(not native.available(), reason=native.describe())),
    pytest.param("triton", marks=needs_triton),
]


@contextlib.contextmanager
def default(dtype=torch.float32, device=None):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with contextlib.nullcontext() if device is None else torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


def assert_same(found, expected):
    assert len(found) == len(expected)
    for value, true in zip(found, expected, strict=True):
        assert value.dtype == true.dtype and value.device == true.device and torch.equal(value, true)


@pytest.mark.skipif(not native.available(), reason=native.describe())
def test_the_library_writes_within_its_buffers_under_any_default_dtype():
    """In a process of its own, because a write beyond a buffer may end it."""
    code = """
import torch
from spot_kernels import linear_assignment, mask_labels, overlap_counts, use_backend
cost, masks, labels = torch.randn(200, 11, 11), torch.rand(4, 196, 7), torch.randint(7, (4, 9000))
def run():
    return linear_assignment(cost), mask_labels(masks, 320), overlap_counts(labels, labels.flip(0), 7, 7)
with use_backend("torch"):
    expected = run()
for dtype in (torch.float64, torch.bfloat16, torch.float16):
    torch.set_default_dtype(dtype)
    with use_backend("native"):
        for _ in range(20):
            assert all(map(torch.equal, run(), expected))
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DEFAULTS[1:], ids=str)
@pytest.mark.parametrize("operator", calls())
def test_every_operator_is_the_same_under_any_default_dtype(operator, dtype, backend):
    """Results and gradients, bit for bit."""
    function, tensors = calls()[operator]
    with use_backend(backend):
        expected = with_gradients(function, tensors)
        with default(dtype):
            assert_same(with_gradients(function, tensors), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("operator", calls())
def test_every_operator_is_the_same_with_another_default_device(operator, backend):
    """Neither the library nor a kernel could write to a buffer on the default device."""
    function, tensors = calls()[operator]
    with use_backend(backend):
        expected = with_gradients(function, tensors)
        with default(device="meta"):
            assert_same(with_gradients(function, tensors), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("operator", ["slot_attention_step", "slot_cross_attention", "gru_norm", "shift_by_order"])
def test_autocast_is_the_same_under_any_default_dtype(operator, backend):
    function, tensors = calls()[operator]
    with use_backend(backend), torch.autocast("cpu", torch.bfloat16):
        expected = with_gradients(function, tensors)
        for dtype in DEFAULTS[1:]:
            with default(dtype):
                assert_same(with_gradients(function, tensors), expected)


def test_modules_are_the_same_under_any_default_dtype_and_device():
    """Created in float32, run under another default, as PyTorch Lightning sets it."""
    torch.manual_seed(0)
    attention, inputs = SlotAttention(16, 8, mlp_hidden=16, num_slots=3), torch.randn(2, 9, 16)
    decoder, slots = PermutedDecoder(16, blocks=2, heads=2), torch.randn(2, 3, 16)
    order = torch.randperm(9)

    def run():
        return [*attention(inputs, initial)[:2], *decoder(inputs, slots, order)]

    with torch.no_grad():
        initial = torch.randn(2, 3, 8)
        expected = run()
        for dtype in DEFAULTS[1:]:
            with default(dtype, "meta"):
                assert_same(run(), expected)


def test_images_and_their_masks_are_the_same_under_any_default_dtype():
    """Functions of spot_fast that such a process may call: the encoder's input, label maps, scores."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (2, 3, 8, 8), generator=generator, dtype=torch.uint8)
    masks = torch.rand(2, 64, 3, generator=generator).softmax(-1)
    truth = torch.randint(3, (2, 80, 80), generator=generator)

    def run():
        scores = image_scores(labels_from_soft(masks, 80), 3, truth).values()
        labels = torch.from_numpy(labels_at(masks[0], 80, 60))
        return [normalise(images), labels, *map(torch.nan_to_num, scores)]

    expected = run()
    for dtype in DEFAULTS[1:]:
        with default(dtype):
            assert_same(run(), expected)
