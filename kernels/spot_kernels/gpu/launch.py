"""Launching kernels, and the properties of the chip that configurations depend on.

Configurations are static tables keyed by architecture and shape class instead of autotuning: a first call takes no
extra time, a captured graph contains no trial runs, and all kernels of a chip can be listed without it.

Under `recording(architecture)` launchers record what they would launch. The compile-only tests use it to compile every
kernel exactly as it is launched, on a machine without a GPU.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from spot_kernels.dispatch import INTERPRETED

# A100; consumer Ampere, Ada and Blackwell (8.6, 8.9, 12.x), with less shared memory; H100 and H200; B200; MI300X.
ARCHITECTURES = ("sm_80", "sm_89", "sm_90", "sm_100", "gfx942")
# Bytes of shared memory that one program may use.
SHARED_MEMORY = {"sm_80": 166912, "sm_89": 101376, "sm_90": 232448, "sm_100": 232448, "gfx942": 65536}
# Strides must be smaller, so that 32-bit offsets hold within a tile of at most 64 × 256: below 2^31 / 64.
_LARGEST_STRIDE = 2**24
_MULTIPROCESSORS = {"sm_80": 108, "sm_89": 128, "sm_90": 132, "sm_100": 148, "gfx942": 304, "interpreter": 4}


@dataclass
class Call:
    """A recorded launch: kernel, runtime arguments in order, compile-time constants, options."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple
    constants: dict[str, Any]
    num_warps: int
    num_stages: int


@dataclass
class Recording:
    architecture: str
    calls: list[Call] = field(default_factory=list)


_recording: Recording | None = None


@contextlib.contextmanager
def recording(architecture: str) -> Iterator[list[Call]]:
    """Appends launches in this block to the list it yields, as on a chip of `architecture`; nothing runs."""
    global _recording
    _recording = Recording(architecture)
    try:
        yield _recording.calls
    finally:
        _recording = None


@functools.cache
def _device_facts(index: int) -> tuple[str, int]:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        name = properties.gcnArchName.split(":")[0]
        architecture = name if name in ARCHITECTURES else "gfx942"
    else:
        small = properties.major < 8 or properties.major == 8 and properties.minor > 0 or properties.major > 11
        architecture = "sm_89" if small else {8: "sm_80", 9: "sm_90"}.get(properties.major, "sm_100")
    return architecture, properties.multi_processor_count


def architecture(device: torch.device) -> str:
    """The one of ARCHITECTURES whose tables hold for `device`, or `interpreter` for a CPU."""
    if _recording is not None:
        return _recording.architecture
    if device.type == "cpu":
        return "interpreter"
    return _device_facts(device.index if device.index is not None else torch.cuda.current_device())[0]


def multiprocessors(device: torch.device) -> int:
    """The number of multiprocessors, which is the least number of programs that a launch should have."""
    if _recording is not None or device.type == "cpu":
        return _MULTIPROCESSORS[architecture(device)]
    return _device_facts(device.index if device.index is not None else torch.cuda.current_device())[1]


def widen(device: torch.device) -> bool:
    """Whether kernels have to convert tiles to float32, because the interpreter's bfloat16 arithmetic is wrong."""
    return _recording is None and INTERPRETED and device.type == "cpu"


def float32_precision(device: torch.device) -> str:
    """`input_precision` of float32 products: exact, or tf32 where the user has allowed it in PyTorch.

    Reads the attribute that all of PyTorch's settings write (`torch.set_float32_matmul_precision` and `allow_tf32`
    too): the older getters raise if a user has set the newer attribute.
    """
    interpreted = _recording is None and device.type == "cpu"
    if interpreted or torch.version.hip or torch.backends.cuda.matmul.fp32_precision != "tf32":
        return "ieee"
    return "tf32"


def launch(
    kernel: Any, grid: tuple[int, ...], *arguments: Any, num_warps: int, num_stages: int, **constants: Any
) -> None:
    """Runs `kernel` on `grid`: runtime arguments by position, tl.constexpr ones by name. An empty grid does nothing."""
    if _recording is not None:
        _recording.calls.append(Call(kernel, grid, arguments, constants, num_warps, num_stages))
        return
    if 0 in grid:
        return
    # fusion of multiply and add is explicit because Triton is about to change its default
    options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True}
    device = next(argument.device for argument in arguments if isinstance(argument, torch.Tensor))
    if device.type == "cuda" and device.index not in (None, torch.cuda.current_device()):
        with torch.cuda.device(device):
            kernel[grid](*arguments, **options, **constants)
    else:
        kernel[grid](*arguments, **options, **constants)


def rows_last(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor with unit stride in its last axis, along which kernels load rows; a copy only if needed."""
    return near(tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous())


def near(tensor: torch.Tensor, axes: int = 2) -> torch.Tensor:
    """The tensor, copied if the strides of its last axes are so large that a tile's 32-bit offsets might overflow."""
    return tensor if max(tensor.stride()[-axes:]) < _LARGEST_STRIDE else tensor.contiguous()


def dense(
    name: str, tensor: torch.Tensor, dtype: torch.dtype, shape: tuple[int, ...], device: torch.device
) -> torch.Tensor:
    """An input as contiguous tensor; ValueError for another dtype, shape or device.

    Copies saved tensors whose layout a hook has changed, such as one that offloads them to the CPU.
    """
    if tensor.dtype != dtype or tensor.shape != shape or tensor.device != device:
        actual = f"{tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"
        raise ValueError(f"kernels: {name} is {actual}: pass {dtype} {tuple(shape)} on {device}")
    return tensor.contiguous()


def written(
    name: str, tensor: torch.Tensor, dtype: torch.dtype, shape: tuple[int, ...], device: torch.device
) -> torch.Tensor:
    """As `dense`, for an output: another layout is a ValueError as well, because a copy would be lost."""
    if not tensor.is_contiguous():
        raise ValueError(f"kernels: {name} {tuple(tensor.shape)} has strides {tensor.stride()}: pass it contiguous")
    return dense(name, tensor, dtype, shape, device)


def power_of_2(value: int, least: int = 16) -> int:
    """The smallest power of two not below `value` and `least` (16: the smallest side of a tile)."""
    return max(least, 1 << max(0, value - 1).bit_length())
