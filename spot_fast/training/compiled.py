"""The forward pass and losses of a step as one compiled graph, and the backward pass that goes with it.

What changes from step to step (features, patch orders, slot noise, lambda) enters as tensors, so that none of it
compiles anything anew. A CapPa run has two graphs, one for its parallel steps; nothing else has more than one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from spot_fast.errors import UserError
from spot_fast.nested import shapes_and_values
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


class Compiled:
    """`function` compiled as one graph for each combination of shapes and of arguments that are not tensors.

    Its first result is differentiated by `parameters`. The backward pass is compiled when it first runs, so the first
    call of each combination runs it once for nothing: whatever the compiler cannot do shows there. Then UserError is
    raised or, if `optional`, `say` is told and everything runs uncompiled.

    `say` is told how long the first call took. torch keeps what Inductor compiles ($TORCHINDUCTOR_CACHE_DIR), so that
    a second run takes a fraction of it.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        parameters: Sequence[Tensor],
        *,
        backend: str = "inductor",
        optional: bool = False,
    ) -> None:
        self._plain, self._parameters, self._optional = function, list(parameters), optional
        self._function = torch.compile(function, fullgraph=True, dynamic=False, backend=backend)
        self._compiled: set[tuple] = set()
        self.say: Callable[[str], None] = print

    def __call__(self, *arguments: Any) -> Any:
        if self._function is not self._plain and (key := shapes_and_values(arguments)) not in self._compiled:
            start = time.monotonic()
            try:
                self._run_both_ways(self._function, arguments)
            except Exception as error:
                self._give_up(error, arguments)
            else:
                if not self._compiled:
                    self.say(f"forward and backward pass were compiled in {time.monotonic() - start:.0f} s")
                self._compiled.add(key)
        return self._function(*arguments)

    def _run_both_ways(self, function: Callable[..., Any], arguments: tuple) -> None:
        """Leaves nothing behind: gradients are not added to the parameters'."""
        loss, *_ = function(*arguments)
        if loss.requires_grad:
            torch.autograd.grad(loss, self._parameters, allow_unused=True)

    def _give_up(self, error: Exception, arguments: tuple) -> None:
        # What is wrong with the images or the memory is not the compiler's fault.
        if isinstance(error, UserError | torch.OutOfMemoryError):
            raise error
        reason = " ".join(str(error).partition("Set TORCHDYNAMO_VERBOSE")[0].split())[:200]
        if not self._optional:
            if not isinstance(error, torch._dynamo.exc.TorchDynamoException):
                self._run_both_ways(self._plain, arguments)  # raises whatever is wrong without a compiler too
            raise UserError(f"the step cannot be compiled ({reason}): use --compile no") from error
        self.say(f"the step cannot be compiled ({reason}): it runs uncompiled")
        self._function = self._plain
