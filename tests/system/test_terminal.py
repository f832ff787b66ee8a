"""Output never ends a command: any encoding, a reader that has gone, no output at all, a full disk."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

import spot_fast
from spot_fast import presets

ROOT = Path(spot_fast.__file__).parent
PROGRAM = """
import sys
from spot_fast.system import terminal
def main():
    for number in range({lines}):
        print("mBO_i – 3 ± 1 · 64 × 64 … café", "caf\\udce9.jpg", flush={flush})
        print("note – one", file=sys.stderr)
    open(sys.argv[1], "w").close()
    return {code}
sys.exit(terminal.run(main))
"""


def start(tmp_path, lines=1, flush=True, code=0, redirect="", **environment):
    """The shell's exit code, standard output and error of a program; tmp_path/done says that it came to its end."""
    (tmp_path / "program.py").write_text(PROGRAM.format(lines=lines, flush=flush, code=code))
    words = f'"{sys.executable}" "{tmp_path}/program.py" "{tmp_path}/done" {redirect}'
    paths = os.pathsep.join([str(ROOT.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {words}"],
        capture_output=True,
        env={**os.environ, "PYTHONPATH": paths, **environment},
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    "encoding, line",
    [
        ("latin-1", "mBO_i - 3 ± 1 · 64 × 64 ... café caf\\udce9.jpg"),
        ("cp1252", "mBO_i – 3 ± 1 · 64 × 64 … café caf\\udce9.jpg"),
        ("ascii", "mBO_i - 3 +- 1 - 64 x 64 ... caf\\xe9 caf\\udce9.jpg"),
        ("utf-8", "mBO_i – 3 ± 1 · 64 × 64 … café caf\\udce9.jpg"),
    ],
)
def test_characters_that_a_terminal_lacks_are_replaced(tmp_path, encoding, line):
    code, out, error = start(tmp_path, PYTHONIOENCODING=encoding)
    assert code == 0 and out.decode(encoding) == line + "\n", (out, error)
    assert error.decode(encoding).startswith("note ")


def test_a_locale_of_ascii_is_no_reason_to_stop(tmp_path):
    environment = dict(LC_ALL="POSIX", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    assert start(tmp_path, **environment)[0] == 0 and (tmp_path / "done").exists()


@pytest.mark.parametrize("redirect", ["| head -1", "2>&1 | head -1", "| true", ">&-", "2>&-", ">&- 2>&-"])
def test_who_does_not_read_does_not_stop_a_command(tmp_path, redirect):
    code, _, error = start(tmp_path, lines=3000, redirect=redirect)
    assert code == 0 and (tmp_path / "done").exists(), error
    assert b"Traceback" not in error and b"Broken pipe" not in error and b"Exception" not in error


@pytest.mark.parametrize("flush", [True, False])
def test_output_that_a_full_disk_lost_is_told(tmp_path, flush):
    code, _, error = start(tmp_path, redirect="> /dev/full", flush=flush)
    assert code == 2 and (tmp_path / "done").exists()
    assert error.decode().endswith("error: not all output could be written (No space left on device)\n")


def test_the_exit_code_of_a_command_stays(tmp_path):
    assert start(tmp_path, code=130)[0] == 130
    assert start(tmp_path, code=2, lines=2000, redirect="| head -1")[0] == 2


def test_every_command_is_run_so():
    commands = [path for path in ROOT.rglob("*.py") if '"__main__"' in path.read_text() and path.name != "processes.py"]
    assert len(commands) == 10
    for path in commands:
        assert "sys.exit(cli.run(main))" in path.read_text(), path


def test_a_command_that_is_called_by_a_program_replaces_characters_too(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), "ascii", write_through=True)
    monkeypatch.setattr(sys, "stdout", stream)
    assert presets.main(["coco+spot_ens"]) == 0
    assert b"mBO_i" in stream.buffer.getvalue() and b"+-" in stream.buffer.getvalue()
