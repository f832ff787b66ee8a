"""How many bytes tensors hold at most while something runs, counted on any device.

Every operator's results are followed until they are freed. What a kernel allocates for itself inside an operator is not
seen, nor what an allocator rounds up or keeps. Products need not be computed for it: they cost nearly all of the time.
With `kernels` the operators of spot_kernels allocate what they do on a GPU, where no N × N matrix is kept.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from spot_kernels import dispatch

_ATEN = torch.ops.aten
_PRODUCTS = {
    _ATEN.mm.default,
    _ATEN.addmm.default,
    _ATEN.bmm.default,
    _ATEN.baddbmm.default,
    _ATEN.convolution.default,
    _ATEN._scaled_dot_product_flash_attention_for_cpu.default,
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward.default,
}


class LiveBytes(TorchDispatchMode):
    """`peak`: the most bytes that lived at once, `held` (there before, still there) included.

    products=False: matrix products and attention give zeros of the right shape and dtype.
    """

    def __init__(self, held: list[torch.Tensor], *, products: bool = True) -> None:
        super().__init__()
        self._products = products
        self._known: dict[int, weakref.ref] = {}
        self.now = self.peak = 0
        for tensor in held:
            self._follow(tensor)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "spot_kernels" and "triton" in args:  # counted, not run: there is no GPU
            skipped = True
        else:
            skipped = not self._products and func in _PRODUCTS
        if not skipped:
            results = func(*args, **(kwargs or {}))
        else:
            shapes = func(*tree_map(_on(torch.device("meta")), args), **(kwargs or {}))
            device = next(value.device for value in tree_flatten(args)[0] if isinstance(value, torch.Tensor))
            results = tree_map(
                lambda value: torch.zeros_like(value, device=device) if isinstance(value, torch.Tensor) else value,
                shapes,
            )
        for result in tree_flatten(results)[0]:
            if isinstance(result, torch.Tensor):
                self._follow(result)
        return results

    def _follow(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known or not storage.nbytes():
            return
        size = storage.nbytes()

        def freed(_) -> None:
            self.now -= size
            self._known.pop(key, None)

        self._known[key] = weakref.ref(storage, freed)
        self.now += size
        self.peak = max(self.peak, self.now)


def _on(device: torch.device):
    return lambda value: value.to(device) if isinstance(value, torch.Tensor) else value


@contextlib.contextmanager
def kernels() -> Iterator[None]:
    """Operators of spot_kernels choose their kernels on any device; inside `LiveBytes` they then give zeros."""
    choose = dispatch.choose

    def on_gpu(operator: str, tensor: torch.Tensor, limit: str = "") -> str:
        taken = not limit and tensor.dtype in dispatch.SUPPORT[operator].get("triton", ())
        return "triton" if taken else choose(operator, tensor, limit)

    with patch.object(dispatch, "choose", on_gpu):
        yield


def of_step(steps, *, products: bool = True) -> int:
    """Peak bytes of the next step of `steps` (`step_runs.TrainerSteps`), after one that has made Adam's moments.

    Weights, moments and all else that a GPU would hold are in it; cached features are not. products=False: what the
    steps compute is nonsense, but they need the same memory.
    """
    with LiveBytes([], products=products):
        steps.next()
    trainer = steps.trainer
    modules = [trainer.model, *([trainer.teacher] if trainer.teacher is not None else [])]
    held = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
    held += [gradient for gradient in trainer.optimiser.last_gradients() if gradient is not None]
    held += trainer.optimiser.tensors()
    with LiveBytes(held, products=products) as counter:
        steps.next()
    return counter.peak
