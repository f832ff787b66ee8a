"""Protects the reader: every command and Python block in README.md and docs/ works.

`HOW` says how each kind of command is tried, the first rule that fits counts; a command without a rule fails. To add a
command to a page, nothing is to do where it is a `python -m spot_fast.…` that runs in a second on the small data sets
of `doc_commands.furnish`; otherwise put a rule in front.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import re
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import generate
import pytest
import torch

from doc_commands import PAGES, ROOT, commands, furnish, python_blocks, untrained
from spot_fast.config import Config
from spot_fast.data import READERS, open_sets
from spot_fast.model.decoders import DECODERS
from spot_fast.recipes import DATA_SETS, ENCODERS

# Long training: as many images as one step takes. A run of its own data set is told to print its configuration.
SHORT = (
    "--train-images 8 --val-images 2 --batch-size 4 --epochs 1 --warmup-steps 0 --eval-images 0 --no-tensorboard "
    "--threads 1"
)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder as after `python -m spot_fast.train` of both stages, with everything that commands name."""
    folder = tmp_path_factory.mktemp("place")
    furnish(folder)
    with contextlib.chdir(folder):
        for number in (1, 2, 3):
            untrained(folder, "coco", number)
        untrained(folder, "coco", 1, stage=1)
        for stage in ("1", "2"):
            assert call("spot_fast.train", f"--stage {stage} {SHORT}".split())[0] == 0
        yield folder


def call(module: str, words: list[str]) -> tuple[int, str]:
    """Exit code and output of a module's main, in this process."""
    package = importlib.import_module(module)
    module = f"{module}.__main__" if hasattr(package, "__path__") else module
    main = importlib.import_module(module).main
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [module, *words])
        try:
            code = main(words) if main.__code__.co_argcount else main()
        except SystemExit as stop:
            code = stop.code
    return code or 0, out.getvalue()


def as_written(words: list[str]) -> None:
    """python -m MODULE …"""
    code, output = call(words[2], words[3:])
    assert code == 0, output


def with_options(options: str) -> Callable[[list[str]], None]:
    """As written, with options after it."""
    return lambda words: as_written([*words, *options.split()])


def configured(words: list[str]) -> None:
    """Training on a data set: the command line makes a configuration, whose data set opens with images in it."""
    start = words.index("spot_fast.train")
    code, output = call("spot_fast.train", [*words[start + 1 :], "--print-config"])
    assert code == 0, output
    config = Config.from_json(output[output.index("{") :])
    assert all(len(image_set) for image_set in open_sets(config))


def helped(words: list[str]) -> None:
    """python FILE … or python -m MODULE …, too long to run: the program exists and its --help knows the options."""
    module = words[2] if words[1] == "-m" else Path(words[1]).stem
    code, output = call(module, ["--help"])
    assert code == 0 and (words[1] == "-m" or (ROOT / words[1]).is_file())
    own = words[: words.index("--")] if "--" in words else words  # what follows is another program's
    for option in (word for word in own if word.startswith("--")):
        assert option in output


def planned(words: list[str]) -> None:
    """python -m spot_fast.reproduce …, which trains: with --plan, the words of a shell ($…, >) left out."""
    words = words[: words.index(">")] if ">" in words else words
    if "--only" in words:
        at = words.index("--only")
        words = words[:at] + words[at + 2 :]
    end = words.index("--") if "--" in words else len(words)
    plan = [] if {"--plan", "--list", "--show"} & set(words) or end == 3 else ["--plan"]
    as_written([*words[:end], *plan, *words[end:]])


def exported(words: list[str]) -> None:
    """python -m spot_fast.export RUN OUT …, as often as asked, without the minutes of --latency."""
    shutil.rmtree(words[4], ignore_errors=True)
    as_written([word for word in words if word != "--latency"])


def of_export(words: list[str]) -> None:
    """python -m spot_fast.segment … --onnx OUT/model.onnx, as written, after an export to OUT."""
    out = Path(words[words.index("--onnx") + 1]).parent
    if not out.exists():
        exported(["python", "-m", "spot_fast.export", "runs/scenes-stage2-001", str(out), "--formats", "onnx"])
    as_written(words)


def script(words: list[str]) -> None:
    """python FILE …, as written."""
    code, output = call(Path(words[1]).stem, words[2:])
    assert code == 0, output


def gpu_parts(words: list[str]) -> None:
    """bash bench/gpu_check.sh PART…, which needs a GPU: the script knows the parts."""
    text = (ROOT / words[1]).read_text(encoding="utf-8")
    assert all(re.search(rf"\b{part}\b", text) for part in words[2:])


def not_run(words: list[str]) -> None:
    """Not run here; the rule says why."""


# A command's beginning as a pattern, how it is tried, and in words.
HOW: list[tuple[str, Callable[[list[str]], None], str]] = [
    (r"pip install", not_run, "changes the environment; .ci/run does it in a fresh one"),
    (r"python -m pytest|pytest bench/", not_run, "the tests themselves"),
    (r"tensorboard ", not_run, "a server that does not end"),
    (r"docker |gsutil ", not_run, "another machine's programs"),
    (
        r"torchrun ",
        configured,
        "makes a configuration; tests/training/test_distributed.py trains with two",
    ),
    (r"bash bench/(gpu_check|first_light)\.sh", gpu_parts, "needs a GPU; tests/bench/test_first_light.py rehearses it"),
    (r"python bench/hours\.py|python docs/generate\.py --check|python docs/import_graph\.py", script, "as written"),
    (r"python docs/generate\.py", lambda words: script([*words, "--check"]), "with --check: writes nothing"),
    (r"python kernels/build_hub\.py", script, "as written"),
    (r"python bench/", helped, "takes minutes: its options are checked"),
    (r"python -m spot_fast\.train .*--help", as_written, "as written"),
    (r"python -m spot_fast\.train .*--print-config", as_written, "as written"),
    (r"python -m spot_fast\.train --resume", as_written, "as written; the newest run is finished"),
    (r"python -m spot_fast\.train .*--preset (?!scenes|dinosaur)", configured, "configuration and data set, untrained"),
    (r"python -m spot_fast\.train .*--att-warmup-steps", with_options(f"{SHORT} --att-warmup-steps 1"), "likewise"),
    (r"python -m spot_fast\.train", with_options(SHORT), "trains two steps"),
    (r"python -m spot_fast\.reproduce", planned, "what it would train"),
    (r"python -m spot_fast\.pretrain", helped, "takes minutes: its options are checked"),
    (r"python -m spot_fast\.segment .*--encoder vit_small_patch14", with_options("--size 56"), "on 16 tokens"),
    (r"python -m spot_fast\.export", exported, "without --latency; tests/test_export.py has it"),
    (r"python -m spot_fast\.segment .*--onnx", of_export, "as written, after an export"),
    (r"python -m spot_fast\.segment --scenes", with_options("--scenes 1"), "with one scene"),
    (r"python -m spot_fast\.evaluate", with_options("--limit 2"), "on two images"),
    (r"python -m (spot_fast\.\w+|spot_kernels)", as_written, "as written"),
]
COMMANDS = commands()
# What README's block of the library leaves to its reader.
_README = {
    "features": torch.randn(2, 196, 384),
    "initial_slots": torch.randn(2, 7, 256),
    "q": torch.randn(2, 6, 196, 64),
    "k": torch.randn(2, 6, 196, 64),
    "v": torch.randn(2, 6, 196, 64),
    "order": torch.randperm(196),
    "student": torch.randint(7, (2, 196)),
    "teacher": torch.randint(7, (2, 196)),
}


def test_commands_are_found():
    """The reader of pages works: a handful that will always be there."""
    assert {"python -m spot_fast.train --stage 1", "python -m spot_fast.presets"} <= COMMANDS.keys()
    assert {"README.md", "reproducing.md", "troubleshooting.md"} <= set(sum(COMMANDS.values(), []))


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_works(command, place):
    rule = next((how for pattern, how, _ in HOW if re.match(pattern, command)), None)
    assert rule is not None, f"{COMMANDS[command]} have `{command}`: say in HOW how it is tried"
    rule(shlex.split(command))


@pytest.mark.parametrize("page, number, code", python_blocks(), ids=lambda value: str(value)[:20].splitlines()[0])
def test_every_python_block_runs(page, number, code, place):
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        for registry in (READERS, DECODERS, DATA_SETS, ENCODERS):  # to which the examples add
            stack.enter_context(mock.patch.dict(registry))
        exec(compile(code, f"{page}, block {number}", "exec"), {"__name__": "__main__", **_README})


def test_links_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            assert target.startswith("http") or (page.parent / target).exists(), f"{page.name}: {target}"


@pytest.mark.parametrize("name", generate.SECTIONS)
def test_generated_sections_are_current(name):
    """Every score and hour of reproducing.md is what the code has."""
    assert generate.renewed(name) == (ROOT / "docs" / name).read_text(encoding="utf-8"), "python docs/generate.py"
