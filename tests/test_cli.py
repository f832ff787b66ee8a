"""Protects what all commands share: one line and an exit code for what a user can mend, a traceback for a bug."""

from __future__ import annotations

import argparse

import pytest
import torch

from spot_fast import cli
from spot_fast.errors import UserError


def ending(error: BaseException | None) -> int:
    """The exit code of a command that ends with `error`."""

    @cli.command("nothing was written")
    def main(argv=None):
        if error is not None:
            raise error

    return main([])


@pytest.mark.parametrize(
    "error, code, line",
    [
        (UserError("--lr is 0: use more"), 2, "error: --lr is 0: use more\n"),
        (
            PermissionError(13, "Permission denied", "x.png"),
            2,
            "error: x.png cannot be used (Permission denied): check the path, its permissions and the free space\n",
        ),
        (
            OSError("no device"),
            2,
            "error: a file cannot be used (no device): check the path, its permissions and the free space\n",
        ),
        (
            torch.OutOfMemoryError("CUDA out of memory"),
            2,
            "error: the device's memory is full: use a smaller --batch-size\n",
        ),
        (KeyboardInterrupt(), 130, "error: interrupted; nothing was written\n"),
        (None, 0, ""),
    ],
)
def test_what_a_user_can_mend_is_one_line_and_an_exit_code(error, code, line, capsys):
    assert ending(error) == code
    assert capsys.readouterr() == ("", line)


@pytest.mark.parametrize("bug", [ValueError("shape [3]"), TypeError("no"), RuntimeError("CUDA error")])
def test_a_bug_keeps_its_traceback(bug):
    with pytest.raises(type(bug)):
        ending(bug)


def test_main_keeps_its_exit_code():
    assert cli.command("")(lambda argv: 3)([]) == 3


def parsed(*words: str) -> argparse.Namespace:
    parser = cli.Parser(prog="x")
    cli.add_device(parser)
    cli.add_threads(parser)
    cli.add_precision(parser, "float32", "of the model")
    cli.add_seed(parser, "noise")
    cli.add_batch_size(parser, 32)
    cli.add_workers(parser, 2, "threads")
    cli.add_runs_folder(parser, dest="root")
    parser.add_argument("--rate", action=cli.Number, least=0, type=float, default=0.5)
    return parser.parse_args(words)


def test_shared_options_and_their_defaults():
    defaults = dict(device=None, threads=None, precision="float32", seed=0, batch_size=32, workers=2, rate=0.5)
    assert vars(parsed()) == defaults | {"root": "runs"}
    assert vars(parsed(*"--threads 3 --rate 0 --runs here".split())) == defaults | dict(
        threads=3, rate=0.0, root="here"
    )


@pytest.mark.parametrize(
    "words, sentence",
    [
        ("--threads 0", "--threads is 0: use 1 or more"),
        ("--batch-size 0", "--batch-size is 0: use 1 or more"),
        ("--workers -1", "--workers is -1: use 0 or more"),
        ("--seed -4", "--seed is -4: use 0 or more"),
        ("--rate nan", "--rate is nan: use 0 or more"),
    ],
)
def test_a_number_below_its_bound_is_refused(words, sentence):
    with pytest.raises(UserError) as refused:
        parsed(*words.split())
    assert str(refused.value) == sentence


@pytest.mark.parametrize(
    "words, sentence",
    [
        ("--seed x", "error: argument --seed: invalid int value: 'x' (see --help)\n"),
        ("--precision fp8", "error: argument --precision: invalid choice: 'fp8'"),
        ("--thread 2", "error: unrecognized arguments: --thread 2 (see --help)\n"),
    ],
)
def test_bad_usage_is_one_line_without_the_usage(words, sentence, capsys):
    with pytest.raises(SystemExit) as stop:
        parsed(*words.split())
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith(sentence) and error.count("\n") == 1
