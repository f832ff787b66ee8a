"""NVIDIA DALI's part: from encoded images to squares on the device, several batches ahead.

It decodes an image, resizes the region that becomes the square with an antialiased filter, mirrors and normalises it,
on the GPU if there is one. Only this file imports DALI, when a pipeline is built.
"""

from __future__ import annotations

import ctypes
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import torch

from spot_fast.config import IMAGENET_MEAN, IMAGENET_STD
from spot_fast.errors import UserError, one_line

INSTALL = "pip install nvidia-dali-cuda130 (-cuda120 for drivers of CUDA 12)"
_DEPTH = 2  # batches that DALI works on or has ready


@dataclass(frozen=True)
class EncodedImage:
    """An image for DALI: encoded uint8 [bytes]; start and end float32 [2], (y, x) of the region that becomes the
    square, in pixels of the upright image."""

    encoded: np.ndarray
    start: np.ndarray
    end: np.ndarray


@dataclass(frozen=True)
class Request:
    """A batch: its images, which of them to mirror (bool [B]), and the caller's own data about it."""

    images: list[EncodedImage]
    mirrored: np.ndarray
    about: Any = None


class DaliError(RuntimeError):
    """DALI failed at a batch, its pipeline is unusable; what it has not returned is in `Pipeline.pending`."""


def import_dali() -> ModuleType:
    """The module nvidia.dali; ImportError if it is missing."""
    import nvidia.dali
    import nvidia.dali.fn
    import nvidia.dali.types

    return nvidia.dali


class Pipeline:
    """Turns batches of at most `batch_size` images into tensors [B, 3, size, size] on `device`, in their order.

    dtype: uint8, or float32 or bfloat16 normalised by ImageNet's mean and standard deviation. bicubic: else bilinear.
    upright: obey EXIF orientation. Raises what DALI raises if it cannot be built.
    """

    def __init__(
        self,
        batch_size: int,
        size: int,
        *,
        device: torch.device,
        dtype: torch.dtype = torch.uint8,
        bicubic: bool = False,
        upright: bool = False,
        threads: int = 1,
    ) -> None:
        if dtype not in (torch.uint8, torch.float32, torch.bfloat16):
            raise ValueError(f"dtype is {dtype}: use torch.uint8, torch.float32 or torch.bfloat16")
        self.device, self.dtype = device, dtype
        self.usable = True
        self.pending: deque[Request] = deque()  # given to DALI and not returned
        self.feed_error: Exception | None = None  # what the feed ended with
        self._feed: Iterator[Request] = iter(())
        self._held: deque[tuple] = deque(maxlen=2 * _DEPTH + 1)
        self._dali = self._build(batch_size, size, bicubic, upright, threads)

    def _build(self, batch_size: int, size: int, bicubic: bool, upright: bool, threads: int):
        dali = import_dali()
        fn, types = dali.fn, dali.types
        on_gpu = self.device.type == "cuda"
        gpu = self.device.index
        if on_gpu and gpu is None:
            gpu = torch.cuda.current_device()
        pipeline = dali.Pipeline(
            batch_size=batch_size,
            num_threads=threads,
            device_id=gpu if on_gpu else None,
            prefetch_queue_depth=_DEPTH,
            seed=0,
        )
        with pipeline:
            # no_copy: a copy would make the training thread wait. So DALI reads our arrays until the batch is done;
            # `_held` keeps them alive so long, and the cycle through `_next` makes `_held` outlive the pipeline.
            encoded, start, end, mirrored = fn.external_source(
                source=self._next,
                num_outputs=4,
                batch=True,
                no_copy=True,
                ndim=[1, 1, 1, 0],
                dtype=[types.UINT8, types.FLOAT, types.FLOAT, types.INT32],
            )
            # Upsampling and DCT as libjpeg does them for Pillow; DALI's defaults are coarser.
            images = fn.decoders.image(
                encoded,
                device="mixed" if on_gpu else "cpu",
                output_type=types.RGB,
                adjust_orientation=upright,
                jpeg_fancy_upsampling=True,
                use_fast_idct=False,
            )
            images = fn.resize(
                images,
                size=[float(size)] * 2,
                roi_start=start,
                roi_end=end,
                antialias=True,
                interp_type=types.INTERP_CUBIC if bicubic else types.INTERP_LINEAR,
            )
            raw = self.dtype == torch.uint8
            images = fn.crop_mirror_normalize(
                images,
                mirror=mirrored,
                output_layout="CHW",
                dtype=types.UINT8 if raw else types.FLOAT,
                mean=[0.0] * 3 if raw else [255 * m for m in IMAGENET_MEAN],
                std=[1.0] * 3 if raw else [255 * s for s in IMAGENET_STD],
            )
            pipeline.set_outputs(images)
        pipeline.build()
        return pipeline

    def run(self, feed: Iterator[Request]) -> Iterator[tuple[torch.Tensor, Request]]:
        """The images of each request of `feed`, which is read ahead; an exception of it is raised in its turn."""
        self._feed, self.feed_error = feed, None
        try:
            self._call(self._dali.schedule_run)  # the first call fills the queue
            while self.pending:
                stream = self._stream()
                (images,) = self._call(lambda: self._dali.share_outputs(cuda_stream=stream))  # noqa: B023 - called here
                images = self._copied(images, stream)
                self._dali.release_outputs()
                request = self.pending.popleft()
                self._call(self._dali.schedule_run)
                yield images, request
            if self.feed_error is not None:
                raise self.feed_error
        finally:
            self._finish()

    def _next(self) -> tuple[list[np.ndarray], np.ndarray, np.ndarray, np.ndarray]:
        """The next request in DALI's form; StopIteration ends the epoch."""
        try:
            request = next(self._feed)
        except StopIteration:
            raise
        except Exception as error:
            self.feed_error = error
            raise StopIteration from None
        self.pending.append(request)
        images = request.images
        arrays = (
            [p.encoded for p in images],
            np.stack([p.start for p in images]),
            np.stack([p.end for p in images]),
            request.mirrored.astype(np.int32),
        )
        self._held.append(arrays)
        return arrays

    def _call(self, function: Callable) -> Any:
        try:
            return function()
        except Exception as error:
            self.usable = False
            raise DaliError(str(error)) from error

    def _finish(self) -> None:
        """Empties the queue, so that another epoch can begin."""
        self._feed = iter(())
        try:
            if self.usable:
                self._call(self._dali.schedule_run)
                while self.pending:
                    self._call(self._dali.share_outputs)
                    self._dali.release_outputs()
                    self.pending.popleft()
                self._dali.reset()
        except DaliError:
            pass  # an unused batch; the next epoch gets another pipeline

    def _stream(self) -> torch.cuda.Stream | None:
        """The current stream, to bind DALI's outputs to: without one the host would wait for the GPU."""
        return torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None

    def _copied(self, images, stream: torch.cuda.Stream | None) -> torch.Tensor:
        """A copy of DALI's buffer, which it reuses, on the stream that the buffer is bound to."""
        dense = images.as_tensor()
        dtype = torch.uint8 if self.dtype == torch.uint8 else torch.float32
        copy = torch.empty(tuple(dense.shape()), dtype=dtype, device=self.device)
        target = ctypes.c_void_p(copy.data_ptr())
        if stream is None:
            dense.copy_to_external(target)
        else:
            dense.copy_to_external(target, ctypes.c_void_p(stream.cuda_stream), non_blocking=True)
        return copy.to(self.dtype)


def unavailable(device: torch.device) -> str:
    """Why DALI does not work for `device`; empty if it does."""
    if device.type == "cuda" and torch.version.hip is not None:
        return "DALI needs an NVIDIA GPU"
    try:
        import_dali()
    except Exception as error:
        missing = isinstance(error, ModuleNotFoundError) and str(error.name).startswith("nvidia")
        return f"DALI is not installed, {INSTALL}" if missing else f"DALI cannot be imported ({one_line(error)})"
    return ""


def require(device: torch.device) -> None:
    """UserError if DALI does not work for `device`."""
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--loader dali does not work on {device.type}: use --loader torch")
    why = unavailable(device)
    if why:
        raise UserError(f"--loader dali: {why}" + ("" if INSTALL in why else ", or use --loader torch"))
