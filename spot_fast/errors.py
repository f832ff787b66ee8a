"""What a user sees when something is wrong with what they gave: one sentence, exit code 2."""

from __future__ import annotations


class UserError(ValueError):
    """Wrong input; the message names the argument, its value and the remedy."""


class CorruptImage(UserError):
    """An image file that cannot be decoded; the message names the file and the reason."""
