"""The default dtype and device of a process (PyTorch Lightning's bf16-true sets one) are not those of an operator."""

import contextlib

import pytest
import torch

from kernel_tier import every_backend
from operator_calls import calls, with_gradients
from spot_fast.evaluation.metrics import image_scores, labels_from_soft
from spot_fast.model.encoder import normalise
from spot_fast.segmentation.overlays import labels_at
from spot_kernels import PermutedDecoder, SlotAttention, use_backend

DEFAULTS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@contextlib.contextmanager
def default(dtype=torch.float32, device=None):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with contextlib.nullcontext() if device is None else torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


def assert_same(results, expected):
    for value, true in zip(results, expected, strict=True):
        assert value.dtype == true.dtype and value.device == true.device and torch.equal(value, true)


@every_backend
@pytest.mark.parametrize("dtype", DEFAULTS[1:], ids=str)
@pytest.mark.parametrize("operator", calls())
def test_every_operator_is_the_same_under_any_default_dtype(operator, dtype, backend):
    """Results and gradients, bit for bit."""
    function, tensors = calls()[operator]
    with use_backend(backend):
        expected = with_gradients(function, tensors)
        with default(dtype):
            assert_same(with_gradients(function, tensors), expected)


@every_backend
@pytest.mark.parametrize("operator", calls())
def test_every_operator_is_the_same_with_another_default_device(operator, backend):
    """Neither the library nor a kernel could write to a buffer on the default device."""
    function, tensors = calls()[operator]
    with use_backend(backend):
        expected = with_gradients(function, tensors)
        with default(device="meta"):
            assert_same(with_gradients(function, tensors), expected)


@every_backend
@pytest.mark.parametrize(
    "operator", ["slot_attention_step", "slot_cross_attention", "gru_norm", "add_norm", "shift_by_order", "linear_relu"]
)
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
