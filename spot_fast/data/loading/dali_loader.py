"""The loader whose images DALI decodes: the same images in the same order as `Loader`'s, on the device.

Order, mirroring, crops, replacements of corrupt images, shards and resuming are `Loader`'s. Threads read the files and
compute which region becomes the square; DALI does the rest (`dali_pipeline`).

DALI decodes whole JPEGs of 8 bits, grey or YCbCr. Pillow decodes everything else in the reading threads, and DALI gets
plain pixels: it has no GPU decoder for PNG and most other formats, draws transparent parts over another colour, and
does not read GIF. A JPEG without its last bytes goes the same way, so a damaged file counts as it does for `Loader`.
If DALI still fails at an image, Pillow decodes that image from then on, and the batch is made once more.

On the CPU the decoders agree bit for bit. Resized bilinearly, pixels differ by one level, by rounding; the outermost
two by more, because Pillow renormalises the filter at the border and DALI repeats the last pixel. Of 128 photos of
480 x 360 at 224 pixels: 8 levels at most, 0.16 on average; bicubic 7 and 0.17. Features of DINOv2 ViT-S/14 differ by
0.45 % of an image's norm, 1.55 % at most; those of the packaged encoder, at 64 pixels, by 0.35 % and 0.73 %
(`bench/loader_speed.py --photos`, with `--crop` and `--encoder`). On a GPU nvJPEG decodes, with its own rounding.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from contextlib import closing

import numpy as np
import torch
from PIL import Image

from spot_fast.data.base import ImageFiles
from spot_fast.data.batch import Batch
from spot_fast.data.decoding import jpeg
from spot_fast.data.decoding.opening import open_rgb
from spot_fast.data.loading.dali_pipeline import DaliError, EncodedImage, Pipeline, Request, require
from spot_fast.data.loading.loader import Loaded, Loader


class DaliLoader(Loader):
    """`Loader` for files, with images on `device` in `dtype`: uint8, or float32 or bfloat16 normalised by ImageNet's
    mean and standard deviation. `workers` threads read; without a GPU as many of DALI's decode.

    UserError if DALI is not installed or does not run here.
    """

    kind = "dali"

    def __init__(
        self,
        image_set: ImageFiles,
        batch_size: int,
        seed: int = 0,
        workers: int = 0,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.uint8,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if not isinstance(image_set, ImageFiles):
            raise ValueError(f"image_set is {type(image_set).__name__}: DALI reads sets of files, ImageFiles")
        super().__init__(image_set, batch_size, seed, workers, rank=rank, world=world)
        self.device, self.dtype = torch.device(device), dtype
        require(self.device)
        self._by_pillow: set[int] = set()  # images at which DALI failed
        self._idle: list[Pipeline] = [self._pipeline()]

    @property
    def decoder(self) -> str:
        return f"{self.kind} on {self.device.type}"  # nvJPEG has its own rounding

    def _pipeline(self, batch_size: int = 0) -> Pipeline:
        images = self.image_set
        return Pipeline(
            batch_size or self.batch_size // self.world,
            images.image_size,
            device=self.device,
            dtype=self.dtype,
            bicubic=images.crop == "stretch",
            upright=images.upright,
            threads=max(1, self.workers),
        )

    def fetch(self, index: int, rng: np.random.Generator) -> EncodedImage:
        images = self.image_set
        encoded = images.encoded(index)
        plain = None if index in self._by_pillow else _plain(encoded, images.upright)
        if plain is None:
            image = open_rgb(images.paths[index], encoded, upright=images.upright)
            plain = b"P6 %d %d 255\n" % image.size + image.tobytes(), *image.size
        encoded, width, height = plain
        geometry = images.geometry(width, height, rng)
        # Resizing everything and then cropping equals resizing just the region that the crop comes from.
        scale = np.array([height / geometry.height, width / geometry.width])
        corner = np.array([geometry.top, geometry.left])
        start, end = corner * scale, (corner + images.image_size) * scale
        return EncodedImage(np.frombuffer(encoded, np.uint8), start.astype(np.float32), end.astype(np.float32))

    def _batches(self, epoch: int, steps: list[torch.Tensor], flips: torch.Tensor) -> Iterator[Batch]:
        with closing(self._ahead(epoch, steps)) as ahead:
            feed: Iterator[Request] = (self._request(loaded, flips) for loaded in ahead)
            while feed is not None:
                pipeline = self._idle.pop() if self._idle else self._pipeline()
                try:
                    with closing(pipeline.run(feed)) as results:
                        for images, request in results:
                            indices = torch.tensor([each.index for each in request.about])
                            yield Batch(images, indices, flips[indices])
                    feed = None
                except DaliError as error:
                    repaired = self._repaired(epoch, pipeline.pending, error)
                    waiting = [self._request(loaded, flips) for loaded in repaired]
                    rest = feed if pipeline.feed_error is None else _raise(pipeline.feed_error)
                    feed = itertools.chain(waiting, rest)
                finally:
                    if pipeline.usable:
                        self._idle.append(pipeline)

    def _request(self, loaded: list[Loaded], flips: torch.Tensor) -> Request:
        return Request([each.item for each in loaded], flips[[each.index for each in loaded]].numpy(), loaded)

    def _repaired(self, epoch: int, requests: Iterable[Request], error: DaliError) -> list[list[Loaded]]:
        """The batches of `requests` with Pillow's version, or a replacement, of each image that DALI cannot decode;
        raises `error` if no image is to blame."""
        blamed, probe, result = False, self._pipeline(1), []
        for request in requests:
            batch = []
            for each in request.about:
                try:
                    list(probe.run(iter([Request([each.item], np.zeros(1, bool))])))
                except DaliError:
                    blamed = True
                    self._by_pillow.add(each.index)
                    probe, each = self._pipeline(1), self.load(epoch, each.wanted)
                batch.append(each)
            result.append(self._counted(batch))
        if not blamed:
            raise error
        return result


def _plain(encoded: bytes, upright: bool) -> tuple[bytes, int, int] | None:
    """(encoded, width, height) of an image that DALI decodes as Pillow does; None for any other.

    upright: the size is the turned image's, and `encoded` has the orientation that Pillow found as its only metadata.
    """
    header = jpeg.plain_header(encoded)
    if header is None or header.width * header.height > (Image.MAX_IMAGE_PIXELS or math.inf):
        return None
    if not upright or not header.metadata:
        return encoded, header.width, header.height
    turn = jpeg.orientation(encoded)
    if turn is None:
        return None
    size = (header.height, header.width) if turn >= 5 else (header.width, header.height)
    return jpeg.oriented(encoded, header.metadata, turn), *size


def _raise(error: Exception) -> Iterator[Request]:
    raise error
    yield
