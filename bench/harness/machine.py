"""What a number was measured on, as spot_fast.system.machine has it, and how many cores there are."""

from __future__ import annotations

import os

from spot_fast.system.machine import ROOT, commit, cpu_name, gpu_name, nvidia_smi

__all__ = ["ROOT", "commit", "cores", "cpu_name", "gpu_name", "nvidia_smi"]


def cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0))
