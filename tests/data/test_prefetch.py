"""Batches made ahead: the same ones in the same order, errors where they belong, no thread left behind."""

import threading
import time

import pytest
import torch

from spot_fast.data.batch import Batch
from spot_fast.data.loading.prefetch import ahead, to_device
from spot_fast.system.devices import send

CPU = torch.device("cpu")


def test_order_and_end():
    assert list(ahead(iter(range(50)))) == list(range(50))
    assert list(ahead(iter(()))) == []
    batches = [(torch.tensor([i]), torch.tensor([2 * i])) for i in range(3)]
    assert all(a is b for a, b in zip(to_device(iter(batches), CPU), batches, strict=True))


def test_made_while_the_present_one_is_used():
    made = []

    def make():
        for i in range(20):
            made.append(i)
            yield i

    items = ahead(make(), depth=3)
    assert next(items) == 0
    deadline = time.monotonic() + 5
    while len(made) < 4 and time.monotonic() < deadline:
        time.sleep(0.005)
    time.sleep(0.1)
    assert len(made) == 4  # one in use, three ahead
    items.close()


def test_an_error_comes_in_its_turn():
    def make():
        yield 1
        raise KeyError("the second")

    items = ahead(make())
    assert next(items) == 1
    with pytest.raises(KeyError, match="the second"):
        next(items)


def test_closing_early_ends_the_thread():
    before = threading.active_count()
    items = ahead(iter(range(100)))
    next(items)
    assert threading.active_count() == before + 1
    items.close()
    assert threading.active_count() == before


class Memory:
    """Stands for a tensor on the CPU; notes how it is copied."""

    def __init__(self, pinned=False):
        self.device, self.pinned = CPU, pinned

    def pin_memory(self):
        return Memory(pinned=True)

    def to(self, device, non_blocking=False):
        return device.type, self.pinned, non_blocking


def test_a_copy_to_a_gpu_is_from_pinned_memory_and_waits_for_nothing():
    assert send(Memory(), torch.device("cuda")) == ("cuda", True, True)
    assert send(Memory(), CPU) == ("cpu", False, False)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_copies_to_a_gpu():
    device = torch.device("cuda")
    images = [torch.full((4, 3, 64, 64), i, dtype=torch.uint8) for i in range(8)]
    batches = [Batch(p, torch.arange(4) + i, torch.zeros(4, dtype=torch.bool)) for i, p in enumerate(images)]
    for batch, image in zip(to_device(iter(batches), device), images, strict=True):
        assert batch.images.device.type == batch.indices.device.type == "cuda"
        assert torch.equal(batch.images.cpu(), image)
