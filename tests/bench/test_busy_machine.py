"""The bench of a step beside other programs: all ways run, and their losses agree."""

import csv
import subprocess
import sys

import pytest

from paths import BENCH

BUSY_MACHINE = BENCH / "busy_machine.py"


@pytest.mark.slow
def test_a_way_has_a_time_on_an_idle_and_on_a_busy_machine(tmp_path):
    file = tmp_path / "rows.csv"
    words = "--tiny --ways commands --rounds 1 --steps 2 --csv".split()
    command = [sys.executable, BUSY_MACHINE, *words, file]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    with open(file, newline="") as opened:
        rows = list(csv.DictReader(opened))
    assert len(rows) == 4 and {row["way"] for row in rows} == {"commands", "one thread"}
    assert all(float(row["ms"]) > 0 and float(row["error"]) < 1e-4 for row in rows)
    assert "| one thread |" in done.stdout and "| commands |" in done.stdout


def test_no_rounds_are_refused():
    done = subprocess.run([sys.executable, BUSY_MACHINE, "--rounds", "0"], capture_output=True, text=True)
    assert done.returncode == 2 and "--rounds 0: use 1 or more" in done.stderr
