"""The forward pass and losses of a step as one compiled graph, and the backward pass that goes with it.

What changes from step to step (features, patch orders, slot noise, lambda) enters as tensors, so that none of it
compiles anything anew. A CapPa run has two graphs, one for its parallel steps; nothing else has more than one.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from spot_kernels import dispatch

from .errors import UserError

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

    `say` is told how long the first call took. torch keeps what Inductor compiles ($TORCHINDUCTOR_CACHE_DIR), so that
    a second run takes a fraction of it. Where the function cannot be compiled the first call raises UserError or, if
    `optional`, says so and everything runs uncompiled.
    """

    def __init__(self, function: Callable[..., Any], *, backend: str = "inductor", optional: bool = False) -> None:
        self._plain, self._optional = function, optional
        self._function = torch.compile(function, fullgraph=True, dynamic=False, backend=backend)
        self._first = True
        self.say: Callable[[str], None] = print

    def __call__(self, *arguments: Any) -> Any:
        if not self._first:
            return self._function(*arguments)
        start = time.monotonic()
        try:
            results = self._function(*arguments)
        except Exception as error:
            # What is wrong with the pictures or the memory is not the compiler's fault.
            if isinstance(error, UserError | torch.OutOfMemoryError) or not (
                    self._optional or isinstance(error, torch._dynamo.exc.TorchDynamoException)):  # fmt: skip
                raise
            reason = " ".join(str(error).partition("Set TORCHDYNAMO_VERBOSE")[0].split())[:200]
            if not self._optional:
                raise UserError(f"the step cannot be compiled ({reason}): use --compile no") from error
            self.say(f"the step cannot be compiled ({reason}): it runs uncompiled")
            self._function, self._first = self._plain, False
            return self._function(*arguments)
        self._first = False
        self.say(f"forward and backward pass were compiled in {time.monotonic() - start:.0f} s")
        return results
