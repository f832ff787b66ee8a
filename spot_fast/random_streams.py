"""Every random number of a run, an evaluation or a report: one stream for each purpose, none of them the same.

A stream gives independent numbers for every (seed, words), such as (seed, epoch, image). So the draws of an image
depend neither on its batch nor on when it is read, and a resumed run draws what it would have drawn.

Two things are no draws and stay outside: generated scenes (`data.datasets.scenes`) and the frames that MOVi's training
takes (`data.datasets.movi`) are part of their data set, the same whatever the seed.
"""

from __future__ import annotations

import hashlib
from enum import StrEnum

import numpy as np


class Stream(StrEnum):
    """What numbers are drawn for. The value is hashed: changing one changes the results of all seeds."""

    # of training, with the words that follow the seed
    INITIAL_WEIGHTS = "initial weights"  # stage
    STEP = "step"  # step: patch orders and initial slots
    PARALLEL = "parallel step"  # step
    IMAGE_ORDER = "image order"  # epoch
    FLIP = "flip"  # epoch
    CROP = "crop"  # epoch, image
    REPLACEMENT = "replacement of a corrupt image"  # epoch, image
    # of what comes after training
    EVALUATION_SLOTS = "slots in evaluation"  # image
    SEGMENTATION_SLOTS = "slots in segmentation"
    KMEANS = "k-means"  # image
    GALLERY = "gallery of a report"
    # without a seed of the user's
    RANDOM_ENCODER = "encoder without weights"


def _digest(stream: Stream, seed: int, words: tuple[int, ...]) -> bytes:
    # NumPy's own way to mix words pads with zeros, so that [7], [7, 0] and [7, 0, 0] are one and the same generator.
    # As text, no two of (stream, seed, words) are equal.
    text = "/".join([stream.value, *(str(int(word)) for word in (seed, *words))])
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def generator(stream: Stream, seed: int, *words: int) -> np.random.Generator:
    """NumPy's generator of a stream at (seed, words)."""
    return np.random.default_rng(int.from_bytes(_digest(stream, seed, words)))


def seed_of(stream: Stream, seed: int, *words: int) -> int:
    """The seed of a stream at (seed, words) for torch's generators: 0 to 2**63 - 1."""
    return int.from_bytes(_digest(stream, seed, words)[:8]) >> 1
