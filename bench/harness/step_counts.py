"""Operations of a training step on a GPU, counted: launches, products, FLOPs, bytes. See `bench/step_operations.py`."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from harness import fake_gpu
from harness.fake_gpu import CUDA
from harness.step_runs import settings
from spot_fast.data import Batch
from spot_fast.data.caching.feature_cache import FeatureCache
from spot_fast.training.losses import loss_weights
from spot_fast.training.optimiser import adam, set_learning_rate
from spot_fast.training.step import Update
from spot_fast.training.trainer import Trainer
from spot_kernels.gpu import launch

COLUMNS = ("part", "operations", "products", "ours", "GFLOP", "MB read and written", "peak MB")
_PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "_addmm_activation")
# Launches of PyTorch's fused attention; its backward has one for the sums and one for the query's gradient beside it.
_ATTENTION = {"": 1, "_backward": 3}
# torch/aten's multi_tensor_apply: elements of a block, blocks of a launch, tensors of a launch by lists.
_CHUNK, _BLOCKS, _TENSORS = 65536, 320, {1: 110, 2: 64, 3: 48, 4: 36, 5: 30}


@dataclass
class Count:
    """A part of a stage's step. peak: bytes that it holds at most, 0 where that is not known."""

    stage: int
    part: str
    names: Counter[str] = field(default_factory=Counter)
    products: int = 0
    ours: int = 0
    flops: float = 0.0
    bytes: float = 0.0
    peak: float = 0.0

    @property
    def operations(self) -> int:
        return self.names.total()

    def add(self, name: str, launches: int = 1) -> None:
        self.names[name] += launches
        self.products += launches * (name in _PRODUCTS)
        self.ours += launches * name.startswith("spot_kernels.")

    def __add__(self, other: Count) -> Count:
        return Count(
            self.stage,
            "",
            self.names + other.names,
            self.products + other.products,
            self.ours + other.ours,
            self.flops + other.flops,
            self.bytes + other.bytes,
            max(self.peak, other.peak),
        )

    def line(self, title: str = "") -> str:
        """Of the Markdown table."""
        values = (
            f"{self.operations:,}",
            f"{self.products:,}",
            f"{self.ours:,}",
            f"{self.flops / 1e9:,.0f}" if self.flops else "–",
            f"{self.bytes / 1e6:,.0f}",
            f"{self.peak / 1e6:,.0f}" if self.peak else "–",
        )
        return f"| {title or self.part} | " + " | ".join(values) + " |"

    def row(self) -> Row:
        return Row(
            self.stage,
            self.part,
            self.operations,
            self.products,
            self.ours,
            self.flops / 1e9,
            self.bytes / 1e6,
            self.peak / 1e6,
        )


@dataclass(frozen=True)
class Row:
    """A line of the CSV."""

    stage: int
    part: str
    operations: int
    products: int
    ours: int
    gflop: float
    megabytes: float
    peak_megabytes: float


# ---- operators one by one


class Operators(TorchDispatchMode):
    """Counts the launches of every operator that is called in its block, views and allocations left out."""

    def __init__(self, count: Count) -> None:
        super().__init__()
        self.count = count

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if name == "_local_scalar_dense":  # there is no number to read
            self.count.add("a number read by the host")
            return 0.5
        if func.namespace == "spot_kernels":
            operator = f"{func.namespace}.{name}"
            self.count.add(operator, launches_of(func, args, kwargs))
            results = func(*args, **kwargs)
        elif name.startswith("_fused_adam"):  # PyTorch has no fake of it
            results = None
            self.count.add(name, multi_tensor_launches(args))
        else:
            results = func(*args, **kwargs)
            if launches(func):
                self.count.add(name, multi_tensor_launches(args) if name.startswith("_foreach") else 1)
        if launches(func):
            self.count.bytes += moved(func, args, kwargs, results)
        return results


def launches(func: torch._ops.OpOverload) -> bool:
    """Whether an operator does anything on the device: no view, no allocation, no mark in a profile."""
    returns = [one.alias_info for one in func._schema.returns]
    if returns and all(alias is not None and not alias.is_write for alias in returns) or func.namespace == "prim":
        return False
    nothing = "empty", "new_empty", "_unsafe_view", "_reshape_alias", "lift_fresh", "detach", "_record_function"
    return not func.overloadpacket.__name__.startswith(nothing)


def moved(func: torch._ops.OpOverload, args: Sequence, kwargs: dict, results: object) -> int:
    """Bytes of all tensors read and of all written, those changed in place both ways."""
    schema = func._schema.arguments
    given = dict(zip((argument.name for argument in schema), args, strict=False)) | kwargs
    changed = [given.get(a.name) for a in schema if a.alias_info is not None and a.alias_info.is_write]
    made = [] if changed else [results]
    return sum(t.numel() * t.element_size() for t in pytree.tree_leaves([given, changed, made]) if _tensor(t))


def _tensor(value: object) -> bool:
    return isinstance(value, Tensor)


def multi_tensor_launches(args: Sequence) -> int:
    """Of an operator on lists of tensors, as PyTorch cuts them into launches."""
    lists = [one for one in args if isinstance(one, list | tuple) and one and _tensor(one[0])]
    if not lists:
        return 1
    most, launches, tensors, blocks = _TENSORS[min(len(lists), 4)], 0, 0, 0
    for number, tensor in enumerate(lists[0], 1):
        chunks = math.ceil(tensor.numel() / _CHUNK)
        tensors += 1
        for chunk in range(1, chunks + 1):
            blocks += 1
            full = tensors == most and chunk == chunks
            last = number == len(lists[0]) and chunk == chunks
            if full or blocks == _BLOCKS or last:
                launches += 1
                blocks, tensors = 0, 0 if chunk == chunks else 1
    return launches


def launches_of(func: torch._ops.OpOverload, args: Sequence, kwargs: dict) -> int:
    """Of an operator of spot_kernels, on an H100 or H200; inside the FakeTensorMode of its arguments."""
    given = {a.name: value for a, value in zip(func._schema.arguments, args, strict=False)} | kwargs
    if given.get("backend", "triton") != "triton":
        return 1
    count = Count(0, "")
    with launch.recording("sm_90") as calls, Operators(count):
        OPDEFS[func._name.partition(".default")[0]]._init_fn(*args, **kwargs)
    return len(calls) + count.operations


# ---- what Inductor generates


_STATEMENTS = (
    (re.compile(r"^\s*(\w+)\.run\("), lambda name: re.sub(r"_\d+$", "", name)),
    (re.compile(r"^\s*extern_kernels\.(\w+)\("), str),
    (re.compile(r"\)\.(sum)\(dim=0\)$"), lambda name: "sum of partial sums"),
    (re.compile(r"^\s*\w+\.(zero_|copy_|fill_)\("), str),
    (re.compile(r"= (?:torch\.ops\.)?aten\.(\w+)\."), str),
)


def of_generated(stage: int, one) -> Count:
    """Launches of a `Generated`, FLOPs of the operators it was made of."""
    count = Count(stage, "backward" if one.backward else "forward", bytes=one.bytes, peak=one.peak)
    for line in one.body.splitlines():
        for pattern, name_of in _STATEMENTS:
            found = pattern.search(line)
            if found:
                name = name_of(found[1])
                attention = "attention" in name and "scaled_dot" in name
                count.add(name, _ATTENTION["_backward" if name.endswith("_backward") else ""] if attention else 1)
                break
    for node in one.graph.nodes:
        if not isinstance(node.target, torch._ops.OpOverload):
            continue
        args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda other: other.meta["val"])
        packet = node.target.overloadpacket
        if packet in flop_registry:
            count.flops += flop_registry[packet](*args, **kwargs, out_val=node.meta["val"])
        if node.target.namespace == "spot_kernels":
            count.add(f"spot_kernels.{packet.__name__}", launches_of(node.target, args, kwargs))
    return count


# ---- a step


class _Given(torch.autograd.Function):
    """A loss whose backward pass gives every parameter a gradient and does nothing."""

    @staticmethod
    def forward(ctx, *parameters: Tensor) -> Tensor:
        ctx.like = parameters
        return torch.empty((), device=CUDA)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(parameter) for parameter in ctx.like)


def update_on_gpu(trainer: Trainer, losses: Callable) -> Update:
    """The trainer's update of the parameters that are on the GPU now."""
    with Operators(Count(0, "")):  # nothing of a step; reads the rate
        optimiser = adam(trainer.parameters, graphed=True)
    return Update(
        losses,
        trainer.parameters,
        optimiser,
        trainer.update.gradients,
        trainer.bad_steps,
        clip=trainer.config.clip,
        accumulate=1,
    )


def count_stage(stage: int, batch_size: int, *, tiny: bool = False) -> list[Count]:
    """What a step is given, its forward and backward pass, and its update."""
    from harness.inductor_code import generated

    mode = FakeTensorMode(allow_non_fake_inputs=True)
    config = settings(stage, precision="bf16", batch_size=4 if tiny else batch_size, tiny=tiny)
    given, updating = Count(stage, "what it is given"), Count(stage, "update")
    with fake_gpu.as_if_there_was_a_gpu():
        trainer = fake_gpu.trainer_on_gpu(config, mode)
        model = trainer.model
        tokens, dim = model.encoder.num_tokens, model.encoder.dim
        shapes = [(tokens, dim)] + [(tokens + model.encoder.num_prefix, dim)] * (model.last_blocks is not None)
        with mode, torch.autograd.set_multithreading_enabled(False):
            held = [torch.empty(2 * config.batch_size, *s, dtype=torch.bfloat16, device=CUDA) for s in shapes]
            rows = torch.empty(config.batch_size, dtype=torch.int64, device=CUDA)
            update = update_on_gpu(trainer, lambda *_: dict.fromkeys(names, _Given.apply(*trainer.parameters)))
            with Operators(given):
                features = FeatureCache([], 1, tensors=held).take(rows)
                draws = fake_gpu.draws_on_gpu(trainer)
                weights = loss_weights(config, 0, trainer.total_steps, CUDA)
                set_learning_rate(update.optimiser, 1e-4)
            batch = Batch(None, rows, torch.empty(config.batch_size, dtype=torch.bool, device=CUDA), features)
            copied = [leaf for leaf in pytree.tree_leaves((batch, draws, weights)) if _tensor(leaf)]
            given.add("copy into the recording", len(copied))
            given.bytes += 2 * sum(leaf.numel() * leaf.element_size() for leaf in copied)
            names = ("loss", "loss_rec") if stage == 1 else ("loss", "loss_rec", "loss_att")
            with Operators(Count(stage, "")):  # makes the moments
                update(batch, draws, weights)
            with Operators(updating):
                update(batch, draws, weights)
            passes = [of_generated(stage, one) for one in generated(trainer.forward.losses, (batch, draws, weights))]
    return [given, *passes, updating]
