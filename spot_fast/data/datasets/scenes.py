"""Generated images: textured objects on a textured ground, with exact masks. The data set that needs no data.

An image is a pure function of (seed, index): every random number is a hash of seed, index and a counter, so images
are the same in any batch, and on any machine up to one grey level. Training images have even hash keys and validation
images odd ones, so the two never share an image.

Candidate objects are placed one in front of the other; one stays if it is large enough and hides at most `MAX_HIDDEN`
of every object behind it. Outlines are radius tables r(angle), one per class. Objects are solids: they darken towards
their outline, so that one is told from another of the same look. Half of them look like the one placed before (class,
colours, pattern; not size, place or direction): an image may have several of a kind, which only their shading and
place tell apart.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from spot_fast.data.base import ImageSet, Masks
from spot_fast.errors import UserError
from spot_fast.system.cpu_threads import side_by_side

CLASSES = ("disc", "square", "triangle", "star", "cross", "ellipse", "flower", "drop")
MIN_OBJECTS, MAX_OBJECTS = 2, 5
MIN_AREA = 0.05  # visible part of an object, as a fraction of the image
MAX_HIDDEN = 0.4  # of an object, by the objects in front of it
RADIUS = (0.17, 0.36)  # of the outline's bounding circle, in image sides
REPEAT = 0.5  # probability that an object looks like the one placed before
TRIES = 14  # candidates of an image before MIN_OBJECTS are enough
_CHUNK = 64
_LAYER_DRAWS = 20  # uniform draws of an object, or of the ground
_LOOK = (3, 5, 6, 7, 8, 9, 10, 12, 15, 16)  # those of class, two colours, period, pattern and warp


def _uniform(seed: int, index: np.ndarray, stream: int, count: int) -> np.ndarray:
    """Uniform draws [len(index), count] in [0, 1): splitmix64 of (seed, index, stream, counter)."""
    with np.errstate(over="ignore"):
        key = np.uint64(seed) * np.uint64(0x9E3779B97F4A7C15) + index.astype(np.uint64)
        key = _mix(key) + np.uint64(stream) * np.uint64(0xD1342543DE82EF95)
        counter = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        bits = _mix(_mix(key)[:, None] + counter[None])
    return ((bits >> np.uint64(40)).astype(np.float32)) * np.float32(2.0**-24)


def _mix(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _outlines(steps: int = 512) -> np.ndarray:
    """Radius tables [classes, steps + 1]: outline radius at angle 2 pi i / steps, at most 1."""
    t = np.arange(steps + 1) * (2 * np.pi / steps)

    def polygon(sides: int) -> np.ndarray:
        return np.cos(np.pi / sides) / np.cos((t % (2 * np.pi / sides)) - np.pi / sides)

    arm = 0.36
    bar = np.minimum(1 / np.maximum(np.abs(np.cos(t)), 1e-6), arm / np.maximum(np.abs(np.sin(t)), 1e-6))
    column = np.minimum(1 / np.maximum(np.abs(np.sin(t)), 1e-6), arm / np.maximum(np.abs(np.cos(t)), 1e-6))
    tables = [
        np.full_like(t, 0.9),
        polygon(4),
        polygon(3),
        0.72 + 0.28 * np.cos(5 * t),
        np.maximum(bar, column) / np.hypot(1, arm),
        0.5 / np.sqrt((0.5 * np.cos(t)) ** 2 + np.sin(t) ** 2),
        0.82 + 0.16 * np.cos(3 * t),
        0.55 + 0.45 * np.abs(np.cos(t / 2)) ** 3,
    ]
    return np.stack(tables).astype(np.float32)


_OUTLINES = _outlines()


def _texture_value(kind: np.ndarray, u: np.ndarray, v: np.ndarray, warp: np.ndarray) -> np.ndarray:
    """Pattern in [0, 1] at texture coordinates (u, v) in radians; kind selects stripes, checks, dots or waves."""
    su, sv = np.sin(u), np.sin(v)
    stripes = su
    checks = su * sv * 1.6
    dots = (su + sv) * 1.1 - 0.6
    waves = np.sin(u + 1.8 * np.sin(warp * v))
    value = np.where(kind < 2, np.where(kind < 1, stripes, checks), np.where(kind < 3, dots, waves))
    return np.clip(0.5 + 0.9 * value, 0, 1)


def draw_scenes(seed: int, index: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """index int64 [n] → images uint8 [n, size, size, 3]; instances uint8 [n, size, size], 0 = ground, others from
    back to front; and classes uint8 [n, size, size], 0 = ground, else 1 + index in `CLASSES`."""
    index = np.asarray(index, dtype=np.int64)
    chunks = [index[i : i + _CHUNK] for i in range(0, len(index), _CHUNK)]
    parts = list(side_by_side(lambda chunk: _draw_chunk(seed, chunk, size), chunks, torch.device("cpu")))
    if not parts:
        return (np.zeros((0, size, size, 3), np.uint8), *(np.zeros((0, size, size), np.uint8) for _ in range(2)))
    images, instances, classes = (np.concatenate(part) for part in zip(*parts, strict=True))
    return images, instances, classes


def _draw_chunk(seed: int, index: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    instances, layers, shade = _place_objects(seed, index, size)
    n = len(index)
    per_object = layers.reshape(n * (MAX_OBJECTS + 1), _LAYER_DRAWS)
    owner = instances + (np.arange(n, dtype=np.int64) * (MAX_OBJECTS + 1))[:, None]
    classes = np.where(instances > 0, 1 + (per_object[:, 3] * len(CLASSES)).astype(np.int64)[owner], 0)
    image = _paint(per_object, owner, size) * shade[..., None]
    noise = _uniform(seed, index, 997, 2)
    # Light falls off across the image: one object's colour is not one value.
    axis = (np.arange(size, dtype=np.float32) + 0.5) / size - 0.5
    angle = 2 * np.pi * noise[:, :1]
    light = (np.cos(angle) * axis)[:, None, :] + (np.sin(angle) * axis)[:, :, None]
    image *= (1 + 0.5 * noise[:, 1, None, None] * light).reshape(n, size * size, 1)
    image = np.clip(image * 255 + 0.5, 0, 255).astype(np.uint8).reshape(n, size, size, 3)
    return image, instances.reshape(n, size, size).astype(np.uint8), classes.reshape(n, size, size).astype(np.uint8)


def _place_objects(seed: int, index: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Instance maps [n, size²] int64, the draws of ground and objects [n, MAX_OBJECTS + 1, _LAYER_DRAWS], and the
    factor [n, size²] by which shading changes a pixel's brightness."""
    n, pixels = len(index), size * size
    axis = (np.arange(size, dtype=np.float32) + 0.5) / size
    x, y = np.tile(axis, size), np.repeat(axis, size)
    instances = np.zeros((n, pixels), np.int64)
    shade = np.ones((n, pixels), np.float32)
    layers = np.zeros((n, MAX_OBJECTS + 1, _LAYER_DRAWS), np.float32)
    layers[:, 0] = _uniform(seed, index, 0, _LAYER_DRAWS)
    wanted = MIN_OBJECTS + (_uniform(seed, index, 998, 1)[:, 0] * (MAX_OBJECTS - MIN_OBJECTS + 1)).astype(np.int64)
    full = np.ones((n, MAX_OBJECTS + 1), np.float32)  # pixels of each object before anything hides it
    count = np.zeros(n, np.int64)
    attempt = 0
    while True:
        attempt += 1
        todo = np.flatnonzero((count < wanted) if attempt <= TRIES else (count < MIN_OBJECTS))
        if not len(todo):
            return instances, layers, shade
        draws = _uniform(seed, index[todo], attempt, _LAYER_DRAWS)
        again = np.flatnonzero((draws[:, 17] < REPEAT) & (count[todo] > 0))
        draws[np.ix_(again, _LOOK)] = layers[todo[again], count[todo[again]]][:, _LOOK]
        radius = RADIUS[0] + (RADIUS[1] - RADIUS[0]) * draws[:, 2:3]
        centre = radius * 0.6 + draws[:, :2] * (1 - 1.2 * radius)
        dx, dy = x[None] - centre[:, :1], y[None] - centre[:, 1:]
        turn = np.arctan2(dy, dx) * np.float32(1 / (2 * np.pi)) + draws[:, 4:5]
        table = _OUTLINES[(draws[:, 3] * len(CLASSES)).astype(np.int64)]
        bins = ((turn - np.floor(turn)) * np.float32(table.shape[1] - 1)).astype(np.int64)
        outward = np.hypot(dx, dy) / (radius * np.take_along_axis(table, bins, axis=1))  # 0: centre, 1: outline
        inside = outward < 1
        area = inside.sum(1)
        covered = np.where(inside, 0, instances[todo])
        left = np.stack([(covered == k).sum(1) for k in range(1, MAX_OBJECTS + 1)], 1)
        exists = np.arange(1, MAX_OBJECTS + 1)[None] <= count[todo, None]
        kept = (left >= (1 - MAX_HIDDEN) * full[todo, 1:]) & (left >= MIN_AREA * pixels)
        good = (area >= MIN_AREA * pixels) & (kept | ~exists).all(1)
        chosen = todo[good]
        count[chosen] += 1
        instances[chosen] = np.where(inside[good], count[chosen, None], instances[chosen])
        shade[chosen] = np.where(inside[good], 1.1 - 0.6 * outward[good] ** 4, shade[chosen])
        layers[chosen, count[chosen]] = draws[good]
        full[chosen, count[chosen]] = area[good]


def _paint(draws: np.ndarray, owner: np.ndarray, size: int) -> np.ndarray:
    """Colours [n, size², 3] in [0, 1] of the pixels whose object (row of draws) is `owner` [n, size²]."""
    n, pixels = owner.shape
    first = draws[:, 5:8]
    # The second colour is near the first, so that a pattern is visible but one object stays one.
    second = np.clip(first + (draws[:, 8:11] - 0.5) * 0.8, 0, 1)
    angle = np.pi * draws[:, 11]
    period = (0.07 + 0.13 * draws[:, 12]) * (1 + 0.6 * (np.arange(len(draws)) % (MAX_OBJECTS + 1) == 0))
    scale = (2 * np.pi / period).astype(np.float32)
    cos, sin = (np.cos(angle) * scale).astype(np.float32), (np.sin(angle) * scale).astype(np.float32)
    axis = (np.arange(size, dtype=np.float32) + 0.5) / size
    x, y = np.tile(axis, size)[None], np.repeat(axis, size)[None]
    c, s = cos[owner], sin[owner]
    phase = (2 * np.pi * draws[:, 13:15]).astype(np.float32)
    u = x * c + y * s + phase[:, 0][owner]
    v = y * c - x * s + phase[:, 1][owner]
    kind = (draws[:, 15] * 4)[owner]
    value = _texture_value(kind, u, v, (0.3 + 0.4 * draws[:, 16])[owner])[..., None]
    return first[owner] + value * (second - first)[owner]


class Scenes(ImageSet):
    """`count` generated scenes of one split, in memory: 64 × 64 pixels take 12 kB each.

    Images [count, 3, S, S] uint8 in `images`, instance and class maps [count, S, S] uint8 in `instances`, `classes`.
    """

    name = "scenes"
    has_masks = True
    has_classes = True

    def __init__(
        self, count: int, split: str, *, size: int = 64, mask_size: int | None = None, seed: int = 0, flip: bool = False
    ) -> None:
        if split not in ("train", "val"):
            raise ValueError(f"split is {split!r}: use 'train' or 'val'")
        if count < 0:
            raise ValueError(f"count is {count}: use 0 or more scenes")
        if mask_size not in (None, size):
            raise UserError(
                f"mask_size is {mask_size} but scenes are drawn at {size}: --mask-size must equal "
                "--image-size for scenes, whose masks are exact at that size"
            )
        self.split, self.count, self.size, self.flip = split, count, size, flip
        index = np.arange(count, dtype=np.int64) * 2 + (split == "val")
        images, instances, classes = draw_scenes(seed, index, size)
        self.images = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
        self.instances, self.classes = torch.from_numpy(instances), torch.from_numpy(classes)

    def __len__(self) -> int:
        return self.count

    def label(self, index: int) -> str:
        return f"{self.split} scene {index}"

    def prepared(self, index: int) -> Tensor:
        return self.images[index]

    def val_image(self, index: int) -> Tensor:
        return self.images[index]

    def val_masks(self, index: int) -> Masks:
        return Masks(self.instances[index].long(), self.classes[index].long())


def open_scenes(
    data: str | None, split: str, *, image_size: int, mask_size: int, crop: str, flip: bool, limit: int
) -> Scenes:
    """`limit` scenes, whatever `data`, `crop` and the run's seed are: they are a data set, not a draw."""
    return Scenes(limit, split, size=image_size, mask_size=mask_size, flip=flip)
