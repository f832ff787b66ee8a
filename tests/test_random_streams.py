"""Protects the independence of random numbers: no two purposes, seeds or images ever draw the same ones."""

from __future__ import annotations

import itertools
import re

import pytest

from paths import ROOT
from spot_fast.random_streams import Stream, generator, seed_of

SMALL = [words for count in range(4) for words in itertools.product(range(4), repeat=count)]


def test_all_streams_differ_for_all_small_words():
    """Trailing zeros too: NumPy takes [7], [7, 0] and [7, 0, 0] for one seed."""
    keys = [(stream, seed, *words) for stream in Stream for seed in (0, 1, 7) for words in SMALL]
    assert len({seed_of(*key) for key in keys}) == len(keys)
    assert len({generator(*key).bytes(16) for key in keys}) == len(keys)


def test_words_are_not_joined():
    assert seed_of(Stream.FLIP, 1, 23) != seed_of(Stream.FLIP, 12, 3)
    assert seed_of(Stream.FLIP, 2**32) != seed_of(Stream.FLIP, 0, 1)


def test_draws_repeat_and_seeds_fit_torch():
    assert generator(Stream.CROP, 3, 1, 2).random() == generator(Stream.CROP, 3, 1, 2).random()
    assert all(0 <= seed_of(stream, 10**12, 5) < 2**63 for stream in Stream)


@pytest.mark.parametrize(
    "stream, words, expected",
    [(Stream.IMAGE_ORDER, (0, 0), 4886674274058135995), (Stream.STEP, (0, 0), 7764340918697682521)],
)
def test_draws_are_the_same_on_every_machine_and_in_every_version(stream, words, expected):
    assert seed_of(stream, *words) == expected


def test_nothing_else_makes_generators():
    """Each of these would be a stream of its own that may be equal to another."""
    exceptions = {
        "random_streams.py",
        "movi.py",  # which frames of a clip are taken is part of the data set
        "pretrain.py",  # draws as it did when the packaged encoder was made
    }
    pattern = re.compile(r"default_rng\(|SeedSequence\(|manual_seed\((?!seed_of\()")
    for path in (ROOT / "spot_fast").rglob("*.py"):
        assert path.name in exceptions or not pattern.findall(path.read_text(encoding="utf-8")), path
