"""Ctrl-C and SIGTERM as a request that a loop answers between two steps."""

from __future__ import annotations

import signal
import threading
from types import FrameType


class StopRequest:
    """While it is entered, the first SIGINT or SIGTERM sets `made`; a second one interrupts at once."""

    def __init__(self) -> None:
        self.made = False
        self._previous: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # signals reach no other thread
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.made:
            raise KeyboardInterrupt
        self.made = True
