"""Traces the CUDA path on a machine without a GPU: where a step would fail or wait there.

    python bench/studies/fake_cuda.py [--tiny] [--stages 1 2]

Models are moved to a device "cuda" whose tensors have shapes, dtypes and a device but no memory (FakeTensorMode). Every
operator then runs as it would be dispatched there: operators of spot_kernels choose their kernels, and a tensor left on
the CPU meets one on the GPU. Three kinds of findings are printed, each with the line of the project it comes from:

    error   two devices in one operator, or whatever else raises
    wait    a number read on the host (`.item()`, `bool()`), a copy to the host, a shape that depends on values
    copy    a copy to the GPU out of memory that is not pinned, which waits as well

Steps must have none of them; evaluation and segmentation have to bring their results to the host. Needs a CUDA build of
PyTorch, whose driver need not be there. Backward passes do not run on such tensors: of training everything else is
traced, and gradients are made up for what follows them.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "bench")]

from harness import fake_gpu
from harness.fake_gpu import CUDA, draws_on_gpu, trainer_on_gpu
from harness.step_runs import settings

from spot_fast.data import Batch, open_set
from spot_fast.data.caching.feature_cache import FeatureCache
from spot_fast.evaluation.protocols import GroundTruth, chosen
from spot_fast.evaluation.scoring import _Pass
from spot_fast.segmentation.segmenter import model_segmenter
from spot_fast.training.flat import FlatAdam, rounded_weights
from spot_fast.training.losses import loss_weights
from spot_fast.training.optimiser import set_learning_rate
from spot_kernels import dispatch

ERROR, WAIT, COPY = "error", "wait", "copy"


@dataclass(frozen=True)
class Finding:
    """kind: ERROR, WAIT or COPY; what: the operator or exception; where: the innermost line of the project."""

    kind: str
    what: str
    where: str

    def __str__(self) -> str:
        return f"{self.kind:5}  {self.where}: {self.what}"


@dataclass
class Section:
    """A part of the CUDA path, what was found in it, and the operators of spot_kernels that ran with their backends."""

    name: str
    findings: list[Finding] = field(default_factory=list)
    operators: dict[str, str] = field(default_factory=dict)

    @property
    def unexpected(self) -> list[Finding]:
        """All but the copies of results to the host, where the section's name says that it brings some."""
        return [one for one in self.findings if not (one.kind == WAIT and "to the host" in self.name)]


class Watch(TorchDispatchMode):
    """Notes what would wait, and gives something instead of numbers that do not exist."""

    NUMBERS = ("_local_scalar_dense", "equal", "is_nonzero")
    SHAPES = ("nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "bincount")

    pinned = False  # whether a copy out of pinned memory is under way

    def __init__(self, section: Section) -> None:
        super().__init__()
        self.section = section

    def note(self, kind: str, what: str) -> None:
        finding = Finding(kind, what, _line(traceback.extract_stack()))
        if finding not in self.section.findings:
            self.section.findings.append(finding)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        space = func.namespace
        if space == "spot_kernels":
            given = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
            self.section.operators[name] = given.get("backend", "")
        first = next((a for a in args if isinstance(a, Tensor)), None)
        on_gpu = first is not None and first.device.type == "cuda"
        if name in self.NUMBERS and first is not None:
            if on_gpu:
                self.note(WAIT, name)
            return True if name != "_local_scalar_dense" else _some_number(first.dtype)
        if name.startswith("_fused_adam"):  # PyTorch has no fake of it
            devices = {t.device for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
            if devices != {CUDA}:
                self.note(ERROR, f"{name} of tensors on {', '.join(sorted(map(str, devices)))}")
            return None
        if name in self.SHAPES and on_gpu:
            self.note(WAIT, name)
        if name == "nonzero":
            return torch.zeros((1, first.dim()), dtype=torch.int64, device=first.device)
        if name in ("_to_copy", "copy_"):
            source = args[1] if name == "copy_" else first
            target = args[0].device if name == "copy_" else torch.device(kwargs.get("device") or first.device)
            if source.device.type == "cuda" and target.type == "cpu":
                self.note(WAIT, f"{name} to the CPU")
            elif source.device.type == "cpu" and target.type == "cuda" and source.numel() > 1 and not self.pinned:
                self.note(COPY, f"{name} of {tuple(source.shape)} {source.dtype} out of memory that is not pinned")
        return func(*args, **kwargs)


def _pinned(tensor: Tensor) -> Tensor:
    """Instead of pinned memory, which there is none of: on the GPU already, without a note."""
    Watch.pinned = True
    try:
        return tensor.to(CUDA)
    finally:
        Watch.pinned = False


def _some_number(dtype: torch.dtype) -> bool | int | float:
    return True if dtype == torch.bool else 0.5 if dtype.is_floating_point else 1


def _line(stack: traceback.StackSummary) -> str:
    """The innermost line of the project, this file left out."""
    for frame in reversed(stack):
        path = Path(frame.filename)
        if path.is_relative_to(ROOT) and path != Path(__file__).resolve():
            return f"{path.relative_to(ROOT)}:{frame.lineno}"
    return "outside the project"


class Study:
    """Traces the sections of one stage."""

    def __init__(self, stage: int, *, tiny: bool) -> None:
        self.stage, self.sections = stage, []
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        config = settings(stage, precision="bf16", batch_size=4 if tiny else 8, tiny=tiny, val_images=2)
        self.trainer = trainer_on_gpu(config, self.mode)
        self.val_set = open_set(config, "val")
        self.images = torch.zeros(config.batch_size, 3, config.image_size, config.image_size, dtype=torch.uint8)

    @contextlib.contextmanager
    def section(self, name: str, *, watched: bool = True) -> Iterator[Section]:
        section = Section(f"stage {self.stage}, {name}")
        self.sections.append(section)
        try:
            with self.mode, Watch(section) if watched else contextlib.nullcontext():
                yield section
        except Exception as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
            section.findings.append(Finding(ERROR, reason, _line(traceback.extract_tb(error.__traceback__))))

    def run(self) -> list[Section]:
        trainer, config = self.trainer, self.trainer.config
        batch = weights = draws = None
        indices = torch.arange(config.batch_size)
        with self.mode:  # what a prefetcher has brought to the GPU
            images = torch.empty(self.images.shape, dtype=torch.uint8, device=CUDA)
        with self.section("frozen features of images on the GPU"):
            features = trainer.forward.frozen_features(images)
            batch = Batch(None, indices, indices > 0, features)
        with self.section("cached features held on the GPU"):
            rows = len(trainer.train_set)
            held = [torch.empty(rows, *f.shape[1:], dtype=f.dtype, device=CUDA) for f in features]
            FeatureCache([], 1, tensors=held).take(torch.empty(config.batch_size, dtype=torch.int64, device=CUDA))
        with self.section("what is drawn"):
            draws = draws_on_gpu(trainer)
            weights = loss_weights(config, 0, trainer.total_steps, CUDA)
        with self.mode, Watch(Section("making Adam, before the first step")):
            optimiser = trainer.update.optimiser = FlatAdam(
                trainer.parameters, model=trainer.model, rounded=rounded_weights(trainer.model), graphed=True
            )
            optimiser.refresh()
        if trainer.teacher is not None:
            with self.section("teaching"), trainer.forward.autocast():
                trainer.forward.teach(features[0].float(), features[1].float(), draws)
        with self.section("losses"), optimiser.in_use():
            losses = trainer.forward.losses(batch, draws, weights)
        # a wait would break the graph, which is an error
        with self.section("losses as one graph of torch.compile", watched=False) as section:
            with optimiser.in_use():
                self.compiled(section, batch, draws, weights)
        with self.section("after backward: clip, judge, Adam, meter"), torch.no_grad():
            self.after_backward(optimiser, {name: loss.detach() for name, loss in losses.items()})
        with self.section("evaluation, results to the host"), torch.no_grad():
            self.evaluation()
        with self.section("segmentation, results to the host"):
            for orders in ("0", "all"):
                segmenter = model_segmenter(trainer.model.eval(), orders=orders, precision="bf16")
                segmenter._device = str(CUDA)
                segmenter.segment(self.images)
        return self.sections

    def compiled(self, section: Section, *arguments: object) -> None:
        """Traces the losses as the compiler does, and notes the operators of ours in the graph."""

        def note(graph: torch.fx.GraphModule, inputs: Sequence[Tensor]) -> Callable:
            for node in graph.graph.nodes:
                if getattr(node.target, "namespace", "") == "spot_kernels":
                    section.operators[node.target.overloadpacket.__name__] = node.args[-1]
            return graph

        torch._dynamo.reset()
        torch.compile(self.trainer.forward.losses, fullgraph=True, dynamic=False, backend=note)(*arguments)

    def after_backward(self, optimiser: FlatAdam, losses: dict[str, Tensor]) -> None:
        trainer, config = self.trainer, self.trainer.config
        optimiser.zero_grad()
        for leaf in optimiser.leaves:
            leaf.grad = torch.empty_like(leaf)
        optimiser.collect()
        set_learning_rate(optimiser, 1e-4)
        means = dict(zip(losses, trainer.update.gradients.finish(list(losses.values())), strict=True))
        norm = optimiser.clip(config.clip)
        verdict = trainer.bad_steps.judge(means["loss"], norm)
        optimiser.update(verdict[0])
        trainer.meter.add({**means, "grad_norm": norm}, verdict[0])
        trainer.bad_steps.note(1, verdict)

    def evaluation(self) -> None:
        truths = [GroundTruth(protocol, self.val_set) for protocol in chosen("spot")]
        with _disable_current_modes():
            batch = [
                (index, self.val_set.val_image(index), [truth.masks(index, {}) for truth in truths])
                for index in range(2)
            ]
        run = _Pass(self.trainer.model.eval(), 0, [truth.protocol for truth in truths], (), "bf16")
        run.collect(run.measure(batch), [self.val_set.label(index) for index, _, _ in batch])


def report(sections: Sequence[Section]) -> str:
    lines = []
    for section in sections:
        lines.append(section.name + ("" if section.findings else ": no findings"))
        lines += [f"  {finding}" for finding in section.findings]
        if section.operators:
            ran = ", ".join(f"{name} ({backend})" for name, backend in sorted(section.operators.items()))
            lines.append(f"  ran: {ran}")
    return "\n".join(lines)


@contextlib.contextmanager
def as_if_there_was_a_gpu() -> Iterator[None]:
    """For what PyTorch asks of the driver, pinned memory included."""
    with fake_gpu.as_if_there_was_a_gpu(), patch.object(Tensor, "pin_memory", _pinned):
        yield


def study(stages: Sequence[int], *, tiny: bool) -> list[Section]:
    """All sections of the stages."""
    with as_if_there_was_a_gpu():
        return [section for stage in stages for section in Study(stage, tiny=tiny).run()]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="a small model instead of ViT-B/16 at 224 px")
    parser.add_argument("--stages", type=int, nargs="+", default=[1, 2], choices=(1, 2))
    args = parser.parse_args(argv)
    if torch.version.cuda is None or not dispatch.TRITON:
        print(
            f"error: PyTorch {torch.__version__} is not built for CUDA, or there is no Triton: install its CUDA "
            "build, which needs no driver for this",
            file=sys.stderr,
        )
        return 2
    sections = study(args.stages, tiny=args.tiny)
    print(report(sections))
    unexpected = [finding for section in sections for finding in section.unexpected]
    print(f"torch {torch.__version__}: {len(sections)} sections, {len(unexpected)} findings that should not be there")
    return int(bool(unexpected))


if __name__ == "__main__":
    sys.exit(main())
