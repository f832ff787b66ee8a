"""Gradients averaged over the processes of a run while backward still computes others.

All gradients are views of one flat buffer, so nothing is gathered before the exchange nor copied back after it. The
buffer is cut into pieces in the order in which backward reaches their parameters: from the last to the first. A piece
is sent when its last gradient has arrived. All processes send pieces in the same order, which keeps exchanges apart.

Some steps leave a parameter without a gradient (CapPa's mask token in a step that is not parallel). It stays without
one, as in a single process, so that Adam leaves it alone. From the first such step on it belongs to the last piece,
which carries the losses and so waits for the end of backward anyway.

A compiled backward pass gives all gradients at its end, so there only the adding up overlaps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from spot_kernels.clipped_adam import UNIT

# Large enough for the full speed of exchanges, small enough that nobody waits long for the last one.
PIECE_BYTES = 25 * 2**20
_LOSSES = 8  # room for the losses at the end of the last piece


class LocalGradients:
    """Gradients of a single process, which need no exchange."""

    def start(self) -> None:
        """Before the backward passes of a step."""

    def last_pass(self) -> None:
        """Before the last backward pass of a step."""

    def finish(self, losses: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """After the last backward pass: makes gradients means over the processes, and returns those of `losses`."""
        return tuple(losses)


class SharedGradients(LocalGradients):
    """The gradients of `parameters` in `size` processes, which all call the same methods.

    group: of the exchange, None for the default one. exchanging: a context for each exchange, which may turn its
    errors into others. leaves: what autograd differentiates by instead of each parameter: in bf16 runs the shadows of
    `flat`. `finish` leaves the same bits in all processes.

    buffer, starts: all gradients of the last step, and where in it those of each parameter begin; zeros lie between.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        size: int,
        group: dist.ProcessGroup | None,
        exchanging: Callable[[], AbstractContextManager],
        *,
        piece_bytes: int = PIECE_BYTES,
        leaves: Sequence[nn.Parameter] | None = None,
    ) -> None:
        self._parameters, self._size, self._group = list(parameters), size, group
        self._exchanging, self._piece_bytes = exchanging, piece_bytes
        self._rare: set[nn.Parameter] = set()
        self._earlier: list[Tensor] = []  # buffers that a recorded step may go on using
        self._lay_out()
        self._sharing, self._has_gradient = False, set()
        for parameter, leaf in zip(self._parameters, leaves or self._parameters, strict=True):
            leaf.register_post_accumulate_grad_hook(partial(self._arrived, parameter))

    def _lay_out(self) -> None:
        """Cuts the buffer into pieces of whole parameters; the last one has the rare ones and room for the losses."""
        pieces: list[list[nn.Parameter]] = [[]]
        filled = 0
        for parameter in reversed(self._parameters):
            if parameter in self._rare:
                continue
            size = parameter.numel() * parameter.element_size()
            if pieces[-1] and filled + size > self._piece_bytes:
                pieces.append([])
                filled = 0
            pieces[-1].append(parameter)
            filled += size
        pieces.append([parameter for parameter in self._parameters if parameter in self._rare])
        counts = [sum(_room(parameter) for parameter in piece) for piece in pieces]
        counts[-1] += _LOSSES
        first = self._parameters[0]
        self._flat = torch.zeros(sum(counts), dtype=first.dtype, device=first.device)
        self._buffers = self._flat.split(counts)
        self._views: dict[nn.Parameter, Tensor] = {}
        self._starts: dict[nn.Parameter, int] = {}
        self._piece_of: dict[nn.Parameter, int] = {}
        start = 0
        for number, piece in enumerate(pieces):
            for parameter in piece:
                view = self._flat[start : start + parameter.numel()].view_as(parameter)
                self._views[parameter], self._starts[parameter], self._piece_of[parameter] = view, start, number
                start += _room(parameter)
        self._members = [set(piece) for piece in pieces]

    @property
    def pieces(self) -> int:
        """The number of exchanges in a step."""
        return len(self._buffers)

    def start(self) -> None:
        # Autograd adds into existing gradients: here into the buffer.
        self._flat.zero_()
        for parameter, view in self._views.items():
            parameter.grad = view
        self._sharing = False
        self._has_gradient: set[nn.Parameter] = set()
        self._missing = [set(members) for members in self._members]
        self._out: list[dist.Work] = []

    def last_pass(self) -> None:
        self._sharing = True

    @torch.no_grad()
    def _arrived(self, parameter: nn.Parameter, leaf: nn.Parameter) -> None:
        """Autograd has added a pass's gradient of `parameter`, or has given it to its shadow, the `leaf`."""
        if leaf is not parameter:
            self._views[parameter].add_(leaf.grad)
            leaf.grad = None
        self._has_gradient.add(parameter)
        if self._sharing:  # before the last pass a gradient is a partial sum
            self._missing[self._piece_of[parameter]].discard(parameter)
            # In order, and without the last piece, which waits for the losses.
            while len(self._out) < len(self._buffers) - 1 and not self._missing[len(self._out)]:
                self._send()

    def _send(self) -> None:
        with self._exchanging():
            self._out.append(dist.all_reduce(self._buffers[len(self._out)], group=self._group, async_op=True))

    @torch.no_grad()
    def finish(self, losses: Sequence[Tensor]) -> tuple[Tensor, ...]:
        if len(losses) > _LOSSES:
            raise ValueError(f"{len(losses)} losses: several processes exchange at most {_LOSSES}")
        room = self._buffers[-1][-_LOSSES:]
        room[: len(losses)] = torch.stack([loss.detach() for loss in losses])
        while len(self._out) < len(self._buffers):
            self._send()
        with self._exchanging():
            for work in self._out:
                work.wait()
        self._flat /= self._size
        means = tuple(room[: len(losses)].clone().unbind())
        self.buffer, self.starts = self._flat[:-_LOSSES], self._starts
        # Adam leaves a parameter without a gradient alone. Zeros would decay its moments.
        without = [parameter for parameter in self._parameters if parameter not in self._has_gradient]
        for parameter in without:
            parameter.grad = None
        if not self._rare.issuperset(without):
            self._rare.update(without)
            self._earlier.append(self._flat)
            self._lay_out()  # for the next step; this one's gradients stay in the old buffer
        return means


def _room(parameter: nn.Parameter) -> int:
    """Elements of the buffer that a parameter takes: whole units, as the kernel of the update reads them."""
    return -(-parameter.numel() // UNIT) * UNIT
