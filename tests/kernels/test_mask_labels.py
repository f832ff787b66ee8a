"""mask_labels: the library against PyTorch bit by bit, both against float64, and what is said about bad arguments."""

import pytest
import torch
import torch.nn.functional as F

import golden_tensors
from kernel_tier import needs_library
from spot_kernels import mask_labels, native, use_backend
from spot_kernels.reference.mask_labels import mask_labels as reference

# Elsewhere the compiler that built PyTorch may have fused other operations: near-ties may then fall another way.
x86 = pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() not in ("DEFAULT", "AVX2", "AVX512"), reason="not an x86 processor"
)


def soft(grid, num_masks, kind, seed, batch=3):
    masks = torch.randn(batch, grid * grid, num_masks, generator=torch.Generator().manual_seed(seed))
    if kind == "softmax":
        return (3 * masks).softmax(-1)
    return (4 * masks).round() / 4 if kind == "ties" else masks


@needs_library
@x86
@pytest.mark.parametrize("kind", ["normal", "softmax", "ties"])
@pytest.mark.parametrize(
    "grid, size, num_masks",
    [
        (14, 320, 7),
        (16, 320, 7),
        (28, 320, 6),
        (37, 320, 7),
        (14, 128, 24),
        (14, 224, 7),
        (16, 256, 11),
        (14, 96, 256),
        (1, 80, 3),
        (5, 320, 1),
        (13, 65, 3),
        (14, 70, 3),
        (11, 203, 3),
        (9, 129, 2),
        (16, 335, 7),
    ],
)
def test_library_equals_pytorch(grid, size, num_masks, kind):
    for seed in range(3):
        masks = soft(grid, num_masks, kind, seed)
        assert torch.equal(native.mask_labels(masks, size), reference(masks, size))


@needs_library
@x86
def test_library_equals_pytorch_on_golden_masks():
    masks = golden_tensors.load("metrics.soft_masks").flatten(2).mT
    assert torch.equal(native.mask_labels(masks, 320), reference(masks, 320))


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("grid, size", [(8, 64), (14, 320), (16, 11), (5, 77)])
def test_only_near_ties_differ_from_float64(backend, grid, size):
    """Where another mask wins than in float64, the two are equal to a few units in the last place of float32."""
    masks = soft(grid, 7, "normal", 0)
    maps = masks.double().mT.reshape(3, 7, grid, grid)
    exact = F.interpolate(maps, size=(size, size), mode="bilinear", align_corners=False)
    with use_backend(backend):
        labels = mask_labels(masks, size)
    assert labels.dtype == torch.uint8
    chosen = exact.gather(1, labels.long()[:, None])[:, 0]
    assert (exact.amax(1) - chosen).max() <= 8 * torch.finfo(torch.float32).eps * masks.abs().max()


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("size", [16, 96])
def test_first_of_equals(backend, size):
    masks = torch.zeros(2, 16, 5)
    masks[1, :, 2:] = 1
    with use_backend(backend):
        labels = mask_labels(masks, size)
    assert labels[0].unique().tolist() == [0] and labels[1].unique().tolist() == [2]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_and_views(dtype):
    masks = soft(14, 7, "normal", 1).to(dtype)
    expected = reference(masks.float(), 128)
    assert torch.equal(mask_labels(masks, 128), expected)
    spread = torch.stack([masks, -masks], -1)[..., 0].transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(mask_labels(spread, 128), expected)


def test_empty_batch():
    for size in (8, 320):
        assert mask_labels(torch.empty(0, 16, 3), size).shape == (0, size, size)


def test_opcheck():
    """Schema, fake tensors and the other rules of torch.library."""
    torch.library.opcheck(torch.ops.spot_kernels.mask_labels, (torch.rand(2, 16, 3), 80, "torch"))


@pytest.mark.parametrize(
    "masks, size, message",
    [
        (torch.rand(2, 15, 3), 8, "15 tokens"),
        (torch.rand(2, 0, 3), 8, "0 tokens"),
        (torch.rand(2, 16), 8, r"must have the layout \[B, N, K\]"),
        (torch.rand(2, 16, 257), 8, "257 masks: pass 1 to 256"),
        (torch.rand(2, 16, 0), 8, "0 masks"),
        (torch.rand(2, 16, 3), 0, "size is 0"),
        (torch.ones(2, 16, 3, dtype=torch.int64), 8, "masks is torch.int64"),
    ],
)
def test_bad_arguments(masks, size, message):
    with pytest.raises(ValueError, match=message):
        mask_labels(masks, size)


@needs_library
def test_library_refuses_sizes_it_does_not_take():
    with pytest.raises(ValueError, match="does not take"):
        native.mask_labels(torch.rand(1, 4, 257), 8)
    assert native.mask_labels(torch.rand(1, 4, 256), 8).shape == (1, 8, 8)


@needs_library
def test_threads_change_nothing():
    """Labels and counts large enough for several threads are the same on any number of them."""
    masks = torch.randn(24, 196, 7, generator=torch.Generator().manual_seed(0))
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            labels = native.mask_labels(masks, 320)
            maps = labels.flatten(1), labels.flip(0).flatten(1)
            results.append((labels, native.overlap_counts(*maps, 7, 7)))
            with pytest.raises(ValueError, match="a label is out of range"):
                native.overlap_counts(*maps, 7, 6)
    finally:
        torch.set_num_threads(before)
    for both in results[1:]:
        assert all(map(torch.equal, both, results[0]))
