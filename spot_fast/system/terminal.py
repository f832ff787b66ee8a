"""Standard output and error that cannot fail: neither a character nor a closed pipe ends a command.

A terminal may know Latin-1 or ASCII only, `| head` stops reading, and the disk of `> log` may be full. None of these is
a reason to lose an hour's results or to stop a training.
"""

from __future__ import annotations

import codecs
import errno
import io
import os
import select
import sys
from collections.abc import Callable

_PLAIN = {
    "–": "-",
    "—": "-",
    "−": "-",
    "·": "-",
    "×": "x",
    "±": "+-",
    "…": "...",
    "→": "->",
    "≤": "<=",
    "≥": ">=",
    "λ": "lambda",
}
_ERRORS = "spot_fast.plain"
_NO_READER = (errno.EPIPE, errno.EIO, errno.ECONNRESET)


def run(main: Callable[[], int]) -> int:
    """Runs `main` as a process: its exit code, or 2 where it succeeded but its output could not be written."""
    outputs = [_outlasting(name) for name in ("stdout", "stderr")]
    code = main()
    sys.stdout.flush()
    for raw in filter(None, outputs):
        if raw.failure is not None and raw.failure.errno not in _NO_READER:
            print(f"error: not all output could be written ({raw.failure.strerror})", file=sys.stderr)
            return code or 2
    return code


def any_character() -> None:
    """From now on standard output and error replace characters that their encoding lacks."""
    codecs.register_error(_ERRORS, _plain)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors=_ERRORS)


def _plain(error: UnicodeError) -> tuple[str, int]:
    """The replacement of characters that the terminal's encoding lacks."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lost = error.object[error.start : error.end]
    return "".join(_PLAIN.get(c) or c.encode("ascii", "backslashreplace").decode() for c in lost), error.end


class _Raw(io.RawIOBase):
    """Writes to a file descriptor; once that fails, to /dev/null."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self.failure: OSError | None = None

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def write(self, data) -> int:
        try:
            return os.write(self._descriptor, data)
        except BlockingIOError:
            select.select([], [self._descriptor], [])
            return 0
        except OSError as error:
            self.failure = error
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._descriptor)
            os.close(nowhere)
            return len(data)


def _outlasting(name: str) -> _Raw | None:
    """Replaces sys.stdout or sys.stderr by a stream that never fails; None where it was closed.

    A stream that a library has installed stays, and None is returned, too.
    """
    codecs.register_error(_ERRORS, _plain)
    stream = getattr(sys, name)
    if stream is None:  # closed before Python began
        setattr(sys, name, open(os.devnull, "w", encoding="utf-8", errors=_ERRORS))
        return None
    if stream is not getattr(sys, f"__{name}__"):
        return None
    stream.flush()
    raw = _Raw(stream.fileno())
    setattr(
        sys,
        name,
        io.TextIOWrapper(
            io.BufferedWriter(raw),
            stream.encoding,
            _ERRORS,
            line_buffering=stream.line_buffering,
            write_through=stream.write_through,
        ),
    )
    return raw
