"""Trains a model and its patched copy side by side: the same batches and random draws, one step of each in turn.

The examples share this command line, loop and output. Speeds are medians of ratios, patched to plain, of the same step,
so that a busy machine slows both.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from spot_fast.data import Scenes
from spot_kernels import patch

CALLS = 30  # timed calls of slot attention alone
WARM_UP = 2  # first steps, left out of the times


def main(build: Callable[[], nn.Module], size: int, description: str, argv: Sequence[str] | None = None) -> int:
    """Runs the command line of an example. build() makes the model; model(images uint8 [B, 3, size, size]) → loss."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--steps", type=int, default=40, help="training steps (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=16, help="images a step (default: %(default)s)")
    parser.add_argument("--no-patch", action="store_true", help="train the model as it is, and nothing else")
    options = parser.parse_args(argv)
    if options.steps < 1 or options.batch_size < 1:
        parser.error("--steps and --batch-size: give at least 1")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    models = {"plain": build().to(device)}
    if not options.no_patch:
        models["patched"] = copy.deepcopy(models["plain"])
        report = patch(models["patched"])
        print(report, flush=True)
    images = Scenes(min(options.steps, 32) * options.batch_size, "train", size=size).images.to(device)
    batches = images.split(options.batch_size)
    if options.no_patch:
        train(models, batches, options.steps)
        return 0
    path = report.replaced[0].path
    gradients = [gradients_of(model, path, batches[0]) for model in models.values()]
    losses, times = train(models, batches, options.steps)
    print(faster("training step", times["plain"], times["patched"]))
    print(faster(f"{path} alone", *alone(models, path, batches[0])))
    loss = max(abs(a - b) / abs(a) for a, b in zip(losses["plain"], losses["patched"], strict=True))
    before, after = gradients
    print(
        f"largest difference: loss of a step {loss:.1e}; in float64, gradients of {path} before the first step "
        f"{((before - after).norm() / before.norm()).item():.1e}"
    )
    return 0


def gradients_of(model: nn.Module, path: str, images: Tensor) -> Tensor:
    """All gradients of the module at `path` in one vector; in float64, where rounding flips no ReLU."""
    model = copy.deepcopy(model).double()
    torch.manual_seed(0)
    model(images).backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.get_submodule(path).parameters()])


def train(
    models: dict[str, nn.Module], batches: Sequence[Tensor], steps: int
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Losses and seconds of every step of every model."""
    optimisers = {name: torch.optim.Adam(model.parameters(), lr=4e-4) for name, model in models.items()}
    losses, times = ({name: [] for name in models} for _ in range(2))
    for step in range(steps):
        # in turns, so that neither model always runs first
        for name in list(models)[:: -1 if step % 2 else 1]:
            torch.manual_seed(step)
            start = now()
            loss = models[name](batches[step % len(batches)])
            optimisers[name].zero_grad()
            loss.backward()
            optimisers[name].step()
            times[name].append(now() - start)
            losses[name].append(loss.item())
        if step == 0 or (step + 1) % max(steps // 5, 1) == 0:
            latest = ", ".join(f"{name} {values[-1]:.6g}" for name, values in losses.items())
            print(f"step {step + 1}: loss {latest}", flush=True)
    return losses, times


def now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def faster(what: str, plain: Sequence[float], patched: Sequence[float]) -> str:
    plain, patched = (seconds[min(WARM_UP, len(seconds) - 1) :] for seconds in (plain, patched))
    ratio = statistics.median(a / b for a, b in zip(plain, patched, strict=True))
    before, after = (statistics.median(seconds) * 1e3 for seconds in (plain, patched))
    return f"{what}: {before:.1f} ms before, {after:.1f} ms after patching; {ratio:.2f} times as fast"


def alone(models: dict[str, nn.Module], path: str, images: Tensor) -> list[list[float]]:
    """Seconds of forward and backward of the module at `path`, of each model, on the inputs that it gets in there."""
    modules = [model.get_submodule(path) for model in models.values()]
    inputs: list[Any] = []
    hook = modules[0].register_forward_pre_hook(lambda _, args: inputs.extend(args))
    models["plain"](images)
    hook.remove()
    inputs = [x.detach().requires_grad_() for x in inputs]
    times: list[list[float]] = [[] for _ in modules]
    for i in range(CALLS):
        for j in (0, 1) if i % 2 else (1, 0):
            start = now()
            modules[j](*inputs)[0].sum().backward()
            times[j].append(now() - start)
    return times
