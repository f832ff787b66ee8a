"""Many images through a masker: threads read ahead, the model works in batches, threads write what it found."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from spot_fast.data import Scenes
from spot_fast.data.decoding.opening import memory_of, open_rgb
from spot_fast.data.loading.read_ahead import read_ahead
from spot_fast.data.masks.fit import stored_size
from spot_fast.errors import CorruptImage
from spot_fast.segmentation import files as segment_files
from spot_fast.segmentation import overlays as images
from spot_fast.segmentation.colours import segment_colours
from spot_fast.segmentation.layouts import Fit, Layout, windows_of
from spot_fast.segmentation.segmenter import CAPTIONS, Found, Masker
from spot_fast.segmentation.stitching import stitch

MAX_GRID = 96  # images on a contact sheet
_GRID_PANEL = 400, 200  # largest width and height there
_LARGE = 1 << 24  # pixels; one image beyond that is worked on at a time, so that memory does not follow the threads
_AHEAD = 2  # batches read ahead, and batches whose masks are being written

Row = list[tuple[str, Image.Image]]  # captioned panels


@dataclass(frozen=True)
class Source:
    """An image to come: a file, or pixels uint8 [3, S, S] in memory."""

    origin: segment_files.Origin
    path: Path | None = None
    pixels: Tensor | None = None

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) as stored, from the file's header; (0, 0) where there is none."""
        if self.path is None:
            return self.pixels.shape[2], self.pixels.shape[1]
        try:
            return stored_size(self.path)
        except CorruptImage:  # `open` says what is wrong
            return 0, 0

    def open(self) -> Image.Image:
        """Upright RGB; CorruptImage where the file is none."""
        if self.path is not None:
            return open_rgb(self.path, upright=True)
        return Image.fromarray(self.pixels.permute(1, 2, 0).numpy())


@dataclass(frozen=True)
class Wanted:
    """What to write of each image. kinds: of masks, in CAPTIONS; metadata: for safetensors files."""

    out: Path
    kinds: Sequence[str]
    overlay: bool = True
    soft: bool = False
    slots: bool = False
    metadata: dict[str, str] = field(default_factory=dict)

    @property
    def endings(self) -> list[str]:
        """Of the files of an image, after NAME_."""
        asked = {segment_files.OVERLAY: self.overlay, segment_files.SOFT: self.soft, segment_files.SLOTS: self.slots}
        return [segment_files.LABELS[kind] for kind in self.kinds] + [ending for ending in asked if asked[ending]]


@dataclass
class Results:
    """(width, height) of the images that were segmented, by index; how many could not be read; the contact sheet's
    rows by index."""

    sizes: dict[int, tuple[int, int]] = field(default_factory=dict)
    skipped: int = 0
    rows: dict[int, Row] = field(default_factory=dict)


@dataclass(frozen=True)
class _Prepared:
    """An image that was read: what the model sees, and small copies to draw on. The image itself is not kept."""

    index: int
    size: tuple[int, int]
    layout: Layout
    windows: Tensor
    panel: Image.Image | None
    grid_panel: Image.Image | None


def images_of(paths: Sequence[Path], scenes: int, size: int, model: str) -> list[Source]:
    """The files, then as many validation scenes of side `size`; model: the masker's identity."""
    found = [Source(segment_files.Origin(str(path), str(path.resolve()), model), path) for path in paths]
    for index, pixels in enumerate(Scenes(scenes, "val", size=size).images if scenes else ()):
        name = f"generated scene {index}, {size} px"
        found.append(Source(segment_files.Origin(name, name, model), pixels=pixels))
    return found


def segment_all(
    sources: Sequence[Source],
    names: Sequence[str],
    masker: Masker,
    fit: Fit,
    wanted: Wanted,
    *,
    batch_size: int,
    workers: int,
    grid: bool = False,
    progress: bool = True,
    between_batches: Callable[[], object] = lambda: None,
) -> Results:
    """Segments `sources` and writes what is `wanted` of each under its name.

    An image that cannot be read is named on stderr and skipped. `workers` threads decode, draw and write while this
    one runs the model on `batch_size` windows at a time; of images with larger grids than the model's own fewer, so
    that the patches are no more. grid: keep the rows of a contact sheet. UserError where a file cannot be written.
    """
    results = Results()
    own_tokens = (masker.size // masker.patch) ** 2
    # torch would start a team of threads in each of these for a map that is small.
    pool = ThreadPoolExecutor(workers, "segment", initializer=torch.set_num_threads, initargs=(1,))
    writes: deque[tuple[_Prepared, Future]] = deque()
    waiting: dict[tuple[int, int], list[_Prepared]] = {}  # by window, because only equal windows make a batch

    # In a thread of their own, because each thread keeps some of the memory that it has freed.
    large = ThreadPoolExecutor(1, "segment-large", initializer=torch.set_num_threads, initargs=(1,))

    def in_turn(size: tuple[int, int], work: Callable[[], Any]) -> Any:
        return large.submit(work).result() if size[0] * size[1] > _LARGE else work()

    def prepare(index: int) -> _Prepared:
        source = sources[index]
        with memory_of(source.origin.image):
            return in_turn(
                source.size,
                lambda: _prepare(index, source.open(), fit, masker.patch, wanted.overlay, grid and index < MAX_GRID),
            )

    def finish(prepared: _Prepared, found: Found) -> Row | None:
        origin = sources[prepared.index].origin
        return in_turn(
            prepared.size, lambda: _finish(prepared, found, names[prepared.index], origin, masker.kinds[0], wanted)
        )

    def written(most: int) -> None:
        while len(writes) > most:
            done, future = writes.popleft()
            if (row := future.result()) is not None:
                results.rows[done.index] = row
            results.sizes[done.index] = done.size
            bar.update()

    def flush(window: tuple[int, int]) -> None:
        between_batches()
        batch = waiting.pop(window)
        at_once = max(1, min(batch_size, batch_size * own_tokens // (window[0] * window[1])))
        for prepared, found in zip(batch, _find(batch, masker, at_once), strict=True):
            writes.append((prepared, pool.submit(finish, prepared, found)))
        written(_AHEAD * max(batch_size, workers))

    try:
        with tqdm(total=len(sources), desc="segment", unit="image", disable=None if progress else True) as bar:
            for future in read_ahead(prepare, range(len(sources)), depth=_AHEAD * batch_size + workers, pool=pool):
                try:
                    prepared = future.result()
                except CorruptImage as error:
                    results.skipped += 1
                    bar.write(f"skipped: {error}", file=sys.stderr)
                    bar.update()
                    continue
                window = prepared.layout.window
                waiting.setdefault(window, []).append(prepared)
                if _windows(waiting[window]) >= batch_size:
                    flush(window)
                elif sum(map(_windows, waiting.values())) > 4 * batch_size:
                    flush(max(waiting, key=lambda w: _windows(waiting[w])))
            for window in list(waiting):
                flush(window)
            written(0)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        large.shutdown()
        torch.set_num_threads(torch.get_num_threads())  # what threads made from now on start with
    return results


def _prepare(index: int, image: Image.Image, fit: Fit, patch: int, panel: bool, on_grid: bool) -> _Prepared:
    layout = fit(*image.size)
    small = images.image_panel(image, images.panel_size(*image.size)) if panel else None
    scale = min(_GRID_PANEL[0] / image.width, _GRID_PANEL[1] / image.height)
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    return _Prepared(
        index,
        image.size,
        layout,
        windows_of(image, layout, patch),
        small,
        images.image_panel(image, size) if on_grid else None,
    )


def _windows(batch: Sequence[_Prepared]) -> int:
    return sum(len(prepared.windows) for prepared in batch)


def _find(batch: Sequence[_Prepared], masker: Masker, at_once: int) -> Iterator[Found]:
    """What the masker finds in each image's windows."""
    windows = torch.cat([prepared.windows for prepared in batch])
    parts = [masker.find(part) for part in windows.split(at_once)]
    masks = {kind: torch.cat([part.masks[kind] for part in parts]) for kind in parts[0].masks}
    slots = torch.cat([part.slots for part in parts]) if parts[0].slots is not None else None
    start = 0
    for prepared in batch:
        own = slice(start, start + len(prepared.windows))
        yield Found({kind: soft[own] for kind, soft in masks.items()}, None if slots is None else slots[own])
        start = own.stop


def _finish(
    prepared: _Prepared, found: Found, name: str, origin: segment_files.Origin, first: str, wanted: Wanted
) -> Row | None:
    """Writes an image's outputs; its row of the contact sheet if it has one."""
    layout, (width, height) = prepared.layout, prepared.size
    segments = None
    if layout.tiled:
        stitched = stitch(found.masks, layout)
        masks, segments = stitched.masks, stitched.segments
    else:
        masks = {kind: soft[0] for kind, soft in found.masks.items()}
    colours = segment_colours(masks[first].argmax(-1).view(layout.grid).numpy().astype("uint8"))
    metadata = origin.metadata()

    def path(ending: str) -> Path:
        return wanted.out / f"{name}_{ending}"

    row, panels = [("image", prepared.grid_panel)], [("image", prepared.panel)]
    for kind in wanted.kinds:
        labels = images.labels_at(masks[kind], height, width, layout.grid)
        segment_files.save(images.indexed_png(labels, colours), path(segment_files.LABELS[kind]), metadata)
        for strip in (row, panels):
            if (panel := strip[0][1]) is not None:
                of_panel = (
                    labels
                    if panel.size == prepared.size
                    else images.labels_at(masks[kind], panel.height, panel.width, layout.grid)
                )
                strip.append((CAPTIONS[kind], images.tinted(panel, of_panel, colours)))
    if prepared.panel is not None:
        segment_files.save(images.panel_row(panels), path(segment_files.OVERLAY), metadata, fast=True)
    metadata |= {**wanted.metadata, "width": str(width), "height": str(height)}
    if wanted.soft:
        soft = {kind: masks[kind].T.reshape(-1, *layout.grid).half() for kind in wanted.kinds}
        segment_files.save_tensors(soft, path(segment_files.SOFT), metadata)
    if wanted.slots:
        segment_files.save_tensors(_slots(found.slots, segments, prepared), path(segment_files.SLOTS), metadata)
    return None if prepared.grid_panel is None else row


def _slots(slots: Tensor, segments: Tensor | None, prepared: _Prepared) -> dict[str, Tensor]:
    """What the slots' file holds: slots [K, U], in tiles [W, K, U] with where they are and what they became."""
    if segments is None:
        return {"slots": slots[0]}
    layout, (width, height) = prepared.layout, prepared.size
    rows, columns = layout.grid
    (tall, wide) = layout.window
    boxes = torch.tensor([(left, top, left + wide, top + tall) for top, left in layout.corners], dtype=torch.float32)
    scale = torch.tensor([width / columns, height / rows] * 2, dtype=torch.float32)
    return {"slots": slots, "segments": segments, "windows": boxes * scale}
