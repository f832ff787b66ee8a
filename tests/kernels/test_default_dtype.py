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
from spot_fast.segmentation.layouts import Layout
from spot_fast.segmentation.stitching import stitch
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
    """In a process of its own: what is written beyond a buffer ends it."""
    code = """
import torch
from spot_kernels import slot_attention_step, use_backend
q, k, v = (torch.randn(2, 1, n, 16) for n in (3, 2000, 2000))
with use_backend("torch"):
    expected = slot_attention_step(q, k, v)[0]
for dtype in (torch.float64, torch.bfloat16, torch.float16):
    torch.set_default_dtype(dtype)
    with use_backend("native"):
        found = [slot_attention_step(q, k, v, return_attn=True, return_logits=True) for _ in range(20)]
    for updates, attn, logits in found:
        assert attn.dtype == logits.dtype == torch.float32
        assert torch.allclose(updates, expected, atol=1e-5)
        assert torch.allclose(attn, logits[:, 0].softmax(-1), atol=1e-5)
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
    """A buffer on the default device would be one that the library, or a kernel, cannot write to."""
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
    """Made in float32, run where PyTorch Lightning has set another default."""
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
    """What a process that has a default of its own may call of spot_fast: the encoder's input, stitching, scores."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (2, 3, 8, 8), generator=generator, dtype=torch.uint8)
    masks = torch.rand(2, 64, 3, generator=generator).softmax(-1)
    layout = Layout((8, 12), (8, 8), ((0, 0), (0, 4)), tiled=True)
    truth = torch.randint(3, (2, 80, 80), generator=generator)

    def run():
        scores = image_scores(labels_from_soft(masks, 80), 3, truth).values()
        return [normalise(images), stitch({"masks": masks}, layout).masks["masks"], *map(torch.nan_to_num, scores)]

    expected = run()
    for dtype in DEFAULTS[1:]:
        with default(dtype):
            assert_same(run(), expected)
