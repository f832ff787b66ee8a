"""Errors about what a user gave: the commands print them as one sentence and end with exit code 2."""

from __future__ import annotations


class UserError(ValueError):
    """Wrong input; the message names the argument, its value and the remedy."""


class CorruptImage(UserError):
    """An image file that cannot be decoded; the message names the file and the reason."""


def one_line(error: BaseException) -> str:
    """A third-party error for the middle of a sentence: its type and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:120]}" if lines else type(error).__name__
