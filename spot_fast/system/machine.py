"""What a number was measured on: processor, GPU, commit."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]  # the checkout, if there is one


def cpu_name() -> str:
    """The model name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), os.uname().machine)


def gpu_name() -> str:
    """The name of the first GPU."""
    return (nvidia_smi("name") or ["cuda"])[0]


def nvidia_smi(names: str, seconds: float = 20) -> list[str]:
    """What nvidia-smi says of the first GPU, a text for each of `names` (separated by commas); [] without an answer."""
    command = ["nvidia-smi", f"--query-gpu={names}", "--format=csv,noheader,nounits"]
    lines = _output(command, seconds).splitlines()
    return [word.strip() for word in lines[0].split(",")] if lines else []


def commit() -> str:
    """The checkout's short commit, with + where tracked files differ from it; empty outside a git checkout."""
    if not (ROOT / ".git").exists():
        return ""  # installed, perhaps inside another project's checkout
    git = ["git", "-C", str(ROOT)]
    head = _output([*git, "rev-parse", "--short", "HEAD"])
    return head + ("+" if head and _output([*git, "status", "--porcelain", "--untracked-files=no"]) else "")


def _output(command: list[str], seconds: float = 20) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return "" if done.returncode else done.stdout.strip()  # nvidia-smi prints its errors there
