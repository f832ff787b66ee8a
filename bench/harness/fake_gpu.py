"""A trainer on a GPU that is not there: its tensors have shapes, dtypes and the device "cuda", but no memory.

Inside a FakeTensorMode every operator runs as it would be dispatched there, and operators of spot_kernels choose their
kernels. Needs a CUDA build of PyTorch, whose driver need not be there.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from harness.step_runs import write_teacher
from spot_fast.config import Config
from spot_fast.training.bad_steps import BadSteps
from spot_fast.training.console import Meter
from spot_fast.training.step import Draws
from spot_fast.training.trainer import Trainer

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")


@contextlib.contextmanager
def as_if_there_was_a_gpu() -> Iterator[None]:
    """For what PyTorch asks of the driver."""
    with contextlib.ExitStack() as stack:
        # autocast switches itself off where there is no GPU
        stack.enter_context(patch("torch.cuda.amp.common.amp_definitely_not_available", lambda: False))
        stack.enter_context(patch("torch.cuda.is_bf16_supported", lambda: True))
        stack.enter_context(patch("torch.cuda.is_current_stream_capturing", lambda: False))
        yield


def to_gpu(module: nn.Module) -> nn.Module:
    """The module with parameters and buffers of the same shapes and dtypes on the GPU; inside a FakeTensorMode."""
    for part in module.modules():
        for name, parameter in list(part._parameters.items()):
            if parameter is not None:
                value = torch.empty(parameter.shape, dtype=parameter.dtype, device=CUDA)
                part._parameters[name] = nn.Parameter(value, requires_grad=parameter.requires_grad)
        for name, buffer in list(part._buffers.items()):
            if buffer is not None:
                part._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device=CUDA)
    return module


def trainer_on_gpu(config: Config, mode: FakeTensorMode) -> Trainer:
    """The trainer of `config`, in stage 2 with an untrained teacher, whose models are on the GPU."""
    with tempfile.TemporaryDirectory() as folder:
        teacher = write_teacher(Path(folder) / "teacher", config) if config.stage == 2 else None
        trainer = Trainer(config, device=CPU, teacher=teacher)
    for block in trainer.model.last_blocks or ():
        block.attn.fused_attn = True  # a CPU's blocks train without
    with mode:
        for model in (trainer.model, trainer.teacher):
            if model is not None:
                to_gpu(model)
        trainer.device = trainer.draw.device = trainer.forward.device = CUDA
        trainer.parameters = [p for p in trainer.model.parameters() if p.requires_grad]
        trainer.meter, trainer.bad_steps = Meter(CUDA), BadSteps(CUDA, config.spike)
    return trainer


def draws_on_gpu(trainer: Trainer) -> Draws:
    """As `Draw` makes them, but without its generator, which needs a GPU."""
    draw = trainer.draw
    draw.generator = None
    order, noise = draw._order_and_noise(draw.model)
    teacher_order, teacher_noise = (None, None)
    if draw.teacher is not None:
        teacher_order, teacher_noise = draw._order_and_noise(draw.teacher)
    return Draws(order, noise, teacher_order, teacher_noise, False)
