"""Which golden tensors the tests of a session claim and which they compared; fails the session where one was forgotten.

A test module claims tensors with a module-level list `GOLDEN` of name patterns (`fnmatch`). Inputs count as used once
they were loaded; everything else has to go through `golden_tensors.assert_close`. Under pytest-xdist each worker sends
its notes to the controller, which judges.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterable
from fnmatch import fnmatchcase

import pytest

import golden_tensors
from paths import ROOT

# What the official implementation was given; the rest is what it returned.
INPUTS = [
    "inputs:*",
    "stage1_state_dict:*",
    "stage2_student_state_dict:*",
    "decoder_variants:*",
    "matching.student_labels",
    "matching.teacher_labels",
    "*.is_unique",
    "*.matching_is_unique",
    "*.step",
    "metrics.soft_masks",
    "metrics.ground_truth_*",
    "metrics.ignore",
    "metrics.near_tie",
    "checkpoints/images",
    "checkpoints/*.slot_noise",
]


def matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


@functools.cache
def claims() -> dict[str, list[str]]:
    """Test file relative to the checkout → its GOLDEN patterns, read from the source: no import is needed."""
    claimed = {}
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "GOLDEN":
                claimed[path.relative_to(ROOT).as_posix()] = ast.literal_eval(node.value)
    return claimed


def forgotten(files: Iterable[str], loaded: set[str], compared: set[str]) -> list[str]:
    """ "FILE: NAME" of each tensor that one of the test `files` claims and that no test used."""
    used = compared | {name for name in loaded if matches(name, INPUTS)}
    return [
        f"{file}: {name}"
        for file in sorted(files)
        for name in golden_tensors.names()
        if matches(name, claims().get(file, ())) and name not in used
    ]


class Coverage:
    """Pytest plugin: judges the files that ran, unless the session failed or was narrowed to single tests."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.files: set[str] = set()
        self.notes = {"loaded": golden_tensors.loaded, "compared": golden_tensors.compared}
        self.missing: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.files.add(report.nodeid.split("::")[0])

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node, error) -> None:
        for name, values in getattr(node, "workeroutput", {}).get("golden", {}).items():
            self.notes[name].update(values)

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        if hasattr(self.config, "workeroutput"):
            self.config.workeroutput["golden"] = {name: sorted(values) for name, values in self.notes.items()}
        elif exitstatus == pytest.ExitCode.OK and self._whole_files():
            self.missing = forgotten(self.files, **self.notes)
            if self.missing:
                session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def _whole_files(self) -> bool:
        """Whether every test of the files ran but the slow ones, which may not be the only ones to compare a tensor."""
        option = self.config.option
        narrowed = option.keyword or option.deselect or getattr(option, "lf", False)
        return (
            not narrowed
            and option.markexpr in ("", "not slow")
            and not any("::" in argument for argument in self.config.args)
        )

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self.missing:
            terminalreporter.section("golden tensors that their tests claim and did not compare", red=True)
            terminalreporter.write_line("\n".join(self.missing))
