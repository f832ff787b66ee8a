"""Keeps Inductor from writing a message that never ends.

Before it lowers the first call of an operator that it does not know, Inductor of PyTorch 2.11 formats all arguments for
its log, also when nothing is logged. Each argument is printed with all that it was computed from, and `add_norm` takes
two results of the `add_norm` before it: behind n of them the text has 2^n parts, and a deep encoder does not compile in
any time. PyTorch 2.13 formats when it logs, and is left alone.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch

_done = False


def shorten() -> None:
    """Called where operators are traced: from then on such an Inductor's messages name the types of arguments alone."""
    global _done
    if _done or torch._guards.TracingContext.try_get() is None:
        return
    _done = True
    try:
        from torch._inductor import exc, graph

        if _formats_at_once(graph):
            exc.OperatorIssue.operator_str = staticmethod(_operator_str)
    except (ImportError, AttributeError):  # another version: its messages are its own affair
        return


def _formats_at_once(graph: ModuleType) -> bool:
    """Whether torch._inductor.graph formats a message that may not be logged."""
    return not hasattr(graph, "LazyString")


def _operator_str(target: Any, args: Any, kwargs: Any) -> str:
    types = [type(argument).__name__ for argument in (*args, *(kwargs or {}).values())]
    return f"  target: {target}\n  arguments: {', '.join(types)}"
