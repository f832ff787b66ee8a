"""torch.compile around the forward pass and losses of a step, and the backward pass that goes with it.

What changes from step to step (features, patch orders, slot noise, lambda) enters as tensors, so that none of it
compiles anything anew. A CapPa run has two graphs, one for its parallel steps; nothing else has more than one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from spot_fast.errors import UserError
from spot_kernels import dispatch

COMPILE = ("auto", "yes", "no")


def resolve_compile(choice: str, device: torch.device) -> str:
    """`auto` → yes on a GPU that Triton compiles for, else no; ValueError for an unknown name.

    On a CPU a graph takes a minute to compile and the step is no faster: preset scenes with two cores, 98 ms without,
    82 to 110 with (epoch lines of `python -m spot_fast.train --stage 1 --compile yes`).
    """
    if choice not in COMPILE:
        raise ValueError(f"--compile {choice} is unknown: use one of {', '.join(COMPILE)}")
    if choice != "auto":
        return choice
    able = device.type == "cuda" and dispatch.TRITON and torch.cuda.get_device_capability(device) >= (7, 0)
    return "yes" if able else "no"


def signature(arguments: Any) -> Hashable:
    """What a compiled or recorded function of `arguments`, a pytree, depends on: shapes, dtypes and plain values."""
    leaves, structure = pytree.tree_flatten(arguments)
    return structure, *((leaf.shape, leaf.dtype) if isinstance(leaf, Tensor) else leaf for leaf in leaves)


class Compiled:
    """`function` compiled as one graph for each `signature` of its arguments.

    It returns a dict of losses, of which `loss` is differentiated by `parameters`. The backward pass is compiled when
    it first runs, so the first call of each signature runs it once for nothing: whatever the compiler cannot do fails
    there. Then UserError is raised or, if `optional`, everything runs uncompiled and `say` prints why.

    `say` also prints how long the first call took. torch keeps what Inductor compiles ($TORCHINDUCTOR_CACHE_DIR), so
    that a second run takes a fraction of it.
    """

    def __init__(
        self,
        function: Callable[..., dict[str, Tensor]],
        parameters: Sequence[Tensor],
        *,
        backend: str = "inductor",
        optional: bool = False,
        say: Callable[[str], None] = print,
    ) -> None:
        self._plain, self._parameters, self._optional, self._say = function, list(parameters), optional, say
        self._function = torch.compile(function, fullgraph=True, dynamic=False, backend=backend)
        self._compiled: set[Hashable] = set()

    def __call__(self, *arguments: Any) -> dict[str, Tensor]:
        if self._function is not self._plain and (key := signature(arguments)) not in self._compiled:
            start = time.monotonic()
            try:
                self._run_both_ways(self._function, arguments)
            except Exception as error:
                self._give_up(error, arguments)
            else:
                if not self._compiled:
                    self._say(f"forward and backward pass were compiled in {time.monotonic() - start:.0f} s")
                self._compiled.add(key)
        return self._function(*arguments)

    def _run_both_ways(self, function: Callable[..., dict[str, Tensor]], arguments: tuple) -> None:
        """Runs forward and backward and leaves nothing behind: gradients are not added to the parameters'."""
        loss = function(*arguments)["loss"]
        if loss.requires_grad:
            torch.autograd.grad(loss, self._parameters, allow_unused=True)

    def _give_up(self, error: Exception, arguments: tuple) -> None:
        # Corrupt images and a full memory are not the compiler's fault.
        if isinstance(error, UserError | torch.OutOfMemoryError):
            raise error
        reason = " ".join(str(error).partition("Set TORCHDYNAMO_VERBOSE")[0].split())[:200]
        if not self._optional:
            if not isinstance(error, torch._dynamo.exc.TorchDynamoException):
                self._run_both_ways(self._plain, arguments)  # raises whatever is wrong without a compiler too
            raise UserError(f"the step cannot be compiled ({reason}): use --compile no") from error
        self._say(f"the step cannot be compiled ({reason}): it runs uncompiled")
        self._function = self._plain
