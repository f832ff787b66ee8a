"""What all commands share: options, errors as one line on stderr, exit codes.

A command module has a parser, a `main` that `command` decorates, and ends with `sys.exit(cli.run(main))`. Exit codes:
0; 2 for bad input, with a remedy; 130 after Ctrl-C. Any other error is a bug and shows its traceback.
"""

from __future__ import annotations

import argparse
import functools
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from spot_fast.config import OPTIONS
from spot_fast.errors import UserError
from spot_fast.system import terminal

BAD_INPUT, INTERRUPTED = 2, 130
Main = Callable[[Sequence[str] | None], int | None]

run = terminal.run


def command(after_interrupt: str) -> Callable[[Main], Callable[..., int]]:
    """Decorates a command's `main(argv)`: an error that `failure` knows becomes a line on stderr and an exit code.

    after_interrupt: what holds after Ctrl-C, as the second half of a sentence.
    """

    def decorate(main: Main) -> Callable[..., int]:
        @functools.wraps(main)
        def wrapped(argv: Sequence[str] | None = None) -> int:
            terminal.any_character()
            try:
                return main(argv) or 0
            except (Exception, KeyboardInterrupt) as error:
                known = failure(error, after_interrupt)
                if known is None:
                    raise
                code, sentence = known
                print(f"error: {sentence}", file=sys.stderr)
                return code

        return wrapped

    return decorate


def failure(
    error: BaseException, after_interrupt: str, out_of_memory: str = "use a smaller --batch-size"
) -> tuple[int, str] | None:
    """(exit code, sentence) of an error that a user can mend; None for a bug. out_of_memory: the remedy for that."""
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED, f"interrupted; {after_interrupt}"
    if isinstance(error, UserError):
        return BAD_INPUT, str(error)
    if type(error).__name__ == "OutOfMemoryError":  # torch's, without importing torch for commands that need none
        return BAD_INPUT, f"the device's memory is full: {out_of_memory}"
    if isinstance(error, OSError):
        return BAD_INPUT, (
            f"{error.filename or 'a file'} cannot be used ({error.strerror or error}): check the path, its permissions "
            "and the free space"
        )
    return None


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that reports bad usage in one line and takes no abbreviated options."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        print(f"error: {message} (see --help)", file=sys.stderr)
        sys.exit(BAD_INPUT)


class Number(argparse.Action):
    """Stores a number; UserError if it is below `least` or not finite."""

    def __init__(self, *args: Any, least: float, **options: Any) -> None:
        super().__init__(*args, **({"type": int, "metavar": "N"} | options))
        self.least = least

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, value: Any, option: str | None = None
    ) -> None:
        if not (math.isfinite(value) and value >= self.least):
            raise UserError(f"{option} is {value}: use {self.least} or more")
        setattr(namespace, self.dest, value)


def add_device(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--device", metavar="NAME", help="cpu, cuda or cuda:N (default: cuda where there is a GPU, else cpu)"
    )


def add_threads(parser: argparse._ActionsContainer, more: str = "") -> None:
    """more: what else --help says about the default."""
    parser.add_argument(
        "--threads",
        action=Number,
        least=1,
        help=f"CPU threads that compute (default: one a core, fewer while other programs use it{more})",
    )


def add_adaptive_slots(parser: argparse._ActionsContainer, more: str = "") -> None:
    """more: what else --help says."""
    parser.add_argument(
        "--adaptive-slots",
        action=argparse.BooleanOptionalAction,
        help=f"join the masks of slots that divide an object (default: as the run was trained){more}",
    )


def add_precision(parser: argparse._ActionsContainer, default: str, about: str) -> None:
    parser.add_argument(
        "--precision", choices=OPTIONS["precision"].choices, default=default, help=f"{about} (default: {default})"
    )


def add_seed(parser: argparse._ActionsContainer, of: str) -> None:
    parser.add_argument("--seed", action=Number, least=0, default=0, help=f"seed of {of} (default: 0)")


def add_batch_size(parser: argparse._ActionsContainer, default: int, about: str = "images at a time") -> None:
    parser.add_argument("--batch-size", action=Number, least=1, default=default, help=f"{about} (default: {default})")


def add_workers(parser: argparse._ActionsContainer, default: int, about: str, least: int = 0) -> None:
    parser.add_argument(
        "--workers",
        action=Number,
        least=least,
        default=default,
        help=f"{about} (default: one a core, at most 8; here {default})",
    )


def add_runs_folder(parser: argparse._ActionsContainer, **options: Any) -> None:
    """options: of `add_argument`, such as another dest."""
    parser.add_argument("--runs", **({"metavar": "DIR", "default": "runs"} | options))
