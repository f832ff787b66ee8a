"""Counts the kernels that Triton compiles for a training step, without a GPU: JSON {"first": …, "later": …}.

    python tests/kernels/count_compilations.py STAGE [--full]

Launches of trainer steps are recorded as for an H100 and distinguished as Triton's own compiler does: `first` is the
number of compilations of the first step, `later` that of all steps after it, in which all random draws change. --full:
ViT-B/16, 224 px and COCO's settings instead of a small model. Must run without TRITON_INTERPRET.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE), str(ROOT), str(ROOT / "kernels"), str(ROOT / "bench")]

import torch
from compile_kernels import specialise
from harness.step_runs import TrainerSteps, settings, write_teacher

from spot_fast.training import losses as self_training
from spot_kernels import dispatch, match_masks, use_backend
from spot_kernels.gpu.launch import recording

STEPS = 12


def compilations(stage: int, full: bool) -> dict[str, int]:
    # recorded operators leave their outputs unwritten, so nothing may depend on the values
    config = settings(stage, precision="bf16", batch_size=16 if full else 4, tiny=not full, on_bad_step="skip")
    dispatch.INTERPRETED = True  # kernels for tensors on the CPU, which are not run
    self_training.match_masks = lambda *maps: match_masks(*maps).clamp(0, 0)  # unwritten labels may be out of range
    with tempfile.TemporaryDirectory() as folder:
        teacher = write_teacher(Path(folder) / "teacher", config) if stage == 2 else None
        steps = TrainerSteps(config, torch.device("cpu"), teacher, cached=True)
    seen: list[set] = []
    for _ in range(2 if full else STEPS):
        with use_backend("triton"), recording("sm_90") as calls:
            steps.next()
        seen.append({(call.kernel.__name__, call.num_warps, call.num_stages, repr(specialise(call))) for call in calls})
    return {"first": len(seen[0]), "later": len(set().union(*seen) - seen[0])}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", type=int, choices=(1, 2))
    parser.add_argument("--full", action="store_true", help="ViT-B/16 at 224 px instead of a small model")
    options = parser.parse_args()
    print(json.dumps(compilations(options.stage, options.full)))
