"""Segments many images: threads read ahead, the model works in batches, threads draw and write the results."""

from __future__ import annotations

import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from spot_fast.data import Scenes
from spot_fast.data.decoding.opening import memory_of, open_rgb
from spot_fast.data.loading.read_ahead import read_ahead
from spot_fast.data.masks.fit import both_sizes, stored_size, turned
from spot_fast.data.masks.instances import Listed
from spot_fast.errors import CorruptImage
from spot_fast.segmentation import coco, files, overlays
from spot_fast.segmentation.colours import segment_colours
from spot_fast.segmentation.grids import Fit, Grid, resized
from spot_fast.segmentation.segmenter import CAPTIONS, Segmenter, Segments

MAX_SHEET = 96  # images on a contact sheet
_SHEET_PANEL = 400, 200  # largest width and height there
_LARGE = 1 << 24  # pixels; one image beyond that is worked on at a time, so that memory does not follow the threads
_AHEAD = 2  # batches read ahead, and batches whose masks are being written

Row = list[tuple[str, Image.Image]]  # captioned panels
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Source:
    """An image to segment: a file, or pixels uint8 [3, S, S] in memory.

    image: what the user knows it by. name: of its outputs. file_name: in a data set. model: the segmenter's identity.
    listed: the image in an annotation file, whose size and orientation the masks get.
    """

    image: str
    name: str
    file_name: str
    model: str
    path: Path | None = None
    pixels: Tensor | None = None
    listed: Listed | None = None

    @property
    def origin(self) -> files.Origin:
        # Made when it is asked for: the names of 100,000 images are most of what this command remembers.
        return files.Origin(self.image, str(self.path.resolve()) if self.path else self.image, self.model)

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) as stored, from the file's header; (0, 0) where it has none."""
        if self.path is None:
            return self.pixels.shape[2], self.pixels.shape[1]
        try:
            return stored_size(self.path)
        except CorruptImage:  # `open` reports what is wrong
            return 0, 0

    def open(self) -> Image.Image:
        """RGB, upright or as the annotations were drawn; CorruptImage where the file is no image or not the annotated
        one."""
        if self.path is None:
            return Image.fromarray(self.pixels.permute(1, 2, 0).numpy())
        upright = True
        if size := self.mask_size:
            stored, turned_size = both_sizes(self.path)
            upright = turned(size, stored, turned_size, self.listed.drawn_upright)
            if upright is None:
                raise CorruptImage(
                    f"image {self.path} is {stored[0]} x {stored[1]}, the annotations are of {size[0]} x {size[1]}"
                )
        return open_rgb(self.path, upright=upright)

    @property
    def mask_size(self) -> tuple[int, int] | None:
        """(width, height) of the masks where it is not the image's own."""
        return (self.listed.width, self.listed.height) if self.listed and self.listed.width else None


@dataclass(frozen=True)
class Outputs:
    """Which files to write for each image. kinds: of masks, keys of CAPTIONS; regions: return those of the first kind;
    metadata: for safetensors files."""

    out: Path
    kinds: Sequence[str]
    labels: bool = True
    overlay: bool = True
    soft: bool = False
    slots: bool = False
    regions: bool = False
    metadata: dict[str, str] = field(default_factory=dict)

    @property
    def endings(self) -> list[str]:
        """Endings of an image's files, after NAME_."""
        asked = {files.OVERLAY: self.overlay, files.SOFT: self.soft, files.SLOTS: self.slots}
        labels = [files.LABELS[kind] for kind in self.kinds] if self.labels else []
        return labels + [ending for ending in asked if asked[ending]]

    def complete(self, name: str) -> bool:
        """Whether all files of an image are there."""
        return all((self.out / f"{name}_{ending}").exists() for ending in self.endings)


@dataclass(frozen=True)
class Finished:
    """An image whose files are written: the (width, height) of its masks; its regions and slots [K, U], where there are
    any; its row of the contact sheet."""

    size: tuple[int, int]
    regions: list[dict] | None
    slots: Tensor | None
    row: Row | None = None


@dataclass
class Results:
    """How many images were segmented and how many could not be read; the contact sheet's rows by image index; seconds
    of "read" and "write", added up over the threads, and of "model"."""

    images: int = 0
    skipped: int = 0
    rows: dict[int, Row] = field(default_factory=dict)
    seconds: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class _Prepared:
    """An image that was read: the model's input uint8 [3, H, W], and small copies to draw on. The image itself is not
    kept, so that memory does not grow with its size. size: (width, height) of its masks."""

    index: int
    size: tuple[int, int]
    grid: Grid
    pixels: Tensor
    panel: Image.Image | None
    sheet_panel: Image.Image | None


def sources_of(paths: Sequence[Path], scenes: int, size: int, names: Sequence[str], model: str) -> list[Source]:
    """The files, then so many validation scenes of side `size`; names: of the outputs of each; model: the segmenter's
    identity."""
    file_names = [PurePosixPath(name).with_name(path.name).as_posix() for path, name in zip(paths, names, strict=False)]
    # Files of one name from several places keep the paths that they were given by.
    count = Counter(file_names)
    file_names = [name if count[name] == 1 else path.as_posix() for path, name in zip(paths, file_names, strict=True)]
    sources = [
        Source(str(path), name, file, model, path) for path, name, file in zip(paths, names, file_names, strict=False)
    ]
    for index, pixels in enumerate(Scenes(scenes, "val", size=size).images if scenes else ()):
        image = f"generated scene {index}, {size} px"
        name = names[len(sources)]
        sources.append(Source(image, name, f"{name}.png", model, pixels=pixels))
    return sources


def segment_all(
    sources: Sequence[Source],
    segmenter: Segmenter,
    fit: Fit,
    outputs: Outputs,
    *,
    batch_size: int,
    workers: int,
    finished: Callable[[Source, Finished], object] = lambda source, finished: None,
    contact_sheet: bool = False,
    progress: bool = True,
    between_batches: Callable[[], object] = lambda: None,
) -> Results:
    """Segments `sources` and writes the `outputs` of each under its name.

    An image that cannot be read is named on stderr and skipped. `workers` threads decode, draw and write while this
    one runs the model on `batch_size` images at a time; on fewer where grids are larger than the model's own, so that
    a batch never has more patches. finished: called in this thread with each image whose files are written, which are
    not in order and not kept. contact_sheet: keep its rows. UserError where a file cannot be written.
    """
    results = Results()
    own_tokens = (segmenter.size // segmenter.patch) ** 2
    # Without the limit torch starts a team of threads in each of these, for maps too small to share out.
    pool = ThreadPoolExecutor(workers, "segment", initializer=torch.set_num_threads, initargs=(1,))
    writes: deque[tuple[_Prepared, Future]] = deque()
    waiting: dict[Grid, list[_Prepared]] = {}  # by grid, because only images of one size make a batch

    # One thread for all large images, because each thread keeps some of the memory that it has freed.
    large = ThreadPoolExecutor(1, "segment-large", initializer=torch.set_num_threads, initargs=(1,))

    def in_turn(size: tuple[int, int], work: Callable[[], Any]) -> Any:
        return large.submit(work).result() if size[0] * size[1] > _LARGE else work()

    def prepare(index: int) -> tuple[_Prepared, float]:
        source, on_sheet = sources[index], contact_sheet and index < MAX_SHEET
        with memory_of(source.image):
            return in_turn(
                source.size,
                lambda: _timed(
                    lambda: _prepare(
                        index, source.open(), source.mask_size, fit, segmenter.patch, outputs.overlay, on_sheet
                    )
                ),
            )

    def finish(prepared: _Prepared, segments: Segments) -> tuple[Finished, float]:
        source, first = sources[prepared.index], segmenter.kinds[0]
        return in_turn(prepared.size, lambda: _timed(lambda: _finish(prepared, segments, source, first, outputs)))

    def collect(most: int) -> None:
        """Waits until at most so many images are still being written."""
        while len(writes) > most:
            prepared, future = writes.popleft()
            done, seconds = future.result()
            results.seconds["write"] += seconds
            if done.row is not None:
                results.rows[prepared.index] = done.row
            results.images += 1
            finished(sources[prepared.index], done)
            bar.update()

    def flush(grid: Grid) -> None:
        between_batches()
        batch = waiting.pop(grid)
        at_once = max(1, min(batch_size, batch_size * own_tokens // (grid[0] * grid[1])))
        start = time.perf_counter()
        segmented = list(_segment(batch, segmenter, at_once))
        results.seconds["model"] += time.perf_counter() - start
        for prepared, segments in zip(batch, segmented, strict=True):
            writes.append((prepared, pool.submit(finish, prepared, segments)))
        collect(_AHEAD * max(batch_size, workers))

    try:
        with tqdm(total=len(sources), desc="segment", unit="image", disable=None if progress else True) as bar:
            for future in read_ahead(prepare, range(len(sources)), depth=_AHEAD * batch_size + workers, pool=pool):
                try:
                    prepared, seconds = future.result()
                except CorruptImage as error:
                    results.skipped += 1
                    bar.write(f"skipped: {error}", file=sys.stderr)
                    bar.update()
                    continue
                results.seconds["read"] += seconds
                same = waiting.setdefault(prepared.grid, [])
                same.append(prepared)
                if len(same) >= batch_size:
                    flush(prepared.grid)
                elif sum(map(len, waiting.values())) > 4 * batch_size:
                    flush(max(waiting, key=lambda grid: len(waiting[grid])))
            for other in list(waiting):
                flush(other)
            collect(0)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        large.shutdown()
        torch.set_num_threads(torch.get_num_threads())  # undoes the pools' limit for threads started from now on
    return results


def _timed(work: Callable[[], T]) -> tuple[T, float]:
    """The result and the seconds it took."""
    start = time.perf_counter()
    return work(), time.perf_counter() - start


def _prepare(
    index: int,
    image: Image.Image,
    mask_size: tuple[int, int] | None,
    fit: Fit,
    patch: int,
    panel: bool,
    on_sheet: bool,
) -> _Prepared:
    grid = fit(*image.size)
    small = overlays.image_panel(image, overlays.panel_size(*image.size)) if panel else None
    scale = min(_SHEET_PANEL[0] / image.width, _SHEET_PANEL[1] / image.height)
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    sheet_panel = overlays.image_panel(image, size) if on_sheet else None
    return _Prepared(index, mask_size or image.size, grid, resized(image, grid, patch), small, sheet_panel)


def _segment(batch: Sequence[_Prepared], segmenter: Segmenter, at_once: int) -> Iterator[Segments]:
    """Masks [N, K] and slots [K, U] of each image of a batch of one grid, `at_once` images in a pass."""
    for part in torch.stack([prepared.pixels for prepared in batch]).split(at_once):
        segments = segmenter.segment(part)
        for i in range(len(part)):
            slots = None if segments.slots is None else segments.slots[i]
            yield Segments({kind: soft[i] for kind, soft in segments.masks.items()}, slots)


def _finish(prepared: _Prepared, segments: Segments, source: Source, first: str, outputs: Outputs) -> Finished:
    """Writes an image's files."""
    masks, grid, (width, height) = segments.masks, prepared.grid, prepared.size
    colours = segment_colours(masks[first].argmax(-1).view(grid).numpy().astype("uint8"))
    metadata = source.origin.metadata()
    regions = None

    def path(ending: str) -> Path:
        return outputs.out / f"{source.name}_{ending}"

    row, panels = [("image", prepared.sheet_panel)], [("image", prepared.panel)]
    for kind in outputs.kinds:
        of_regions = outputs.regions and kind == outputs.kinds[0]
        labels = overlays.labels_at(masks[kind], height, width, grid) if outputs.labels or of_regions else None
        if outputs.labels:
            files.save(overlays.indexed_png(labels, colours), path(files.LABELS[kind]), metadata)
        if of_regions:
            regions = coco.regions(labels, masks[kind])
        for strip in (row, panels):
            if (panel := strip[0][1]) is not None:
                same = labels is not None and panel.size == prepared.size
                of_panel = labels if same else overlays.labels_at(masks[kind], panel.height, panel.width, grid)
                strip.append((CAPTIONS[kind], overlays.tinted(panel, of_panel, colours)))
    if prepared.panel is not None:
        files.save(overlays.panel_row(panels), path(files.OVERLAY), metadata, fast=True)
    metadata |= {**outputs.metadata, "width": str(width), "height": str(height)}
    if outputs.soft:
        soft = {kind: masks[kind].T.reshape(-1, *grid).half() for kind in outputs.kinds}
        files.save_tensors(soft, path(files.SOFT), metadata)
    if outputs.slots:
        files.save_tensors({"slots": segments.slots}, path(files.SLOTS), metadata)
    return Finished(prepared.size, regions, segments.slots, None if prepared.sheet_panel is None else row)
