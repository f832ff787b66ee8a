"""Distributions that parameters start with, for the tests of modules."""

import math

import torch


def uniform_bound(weight, bound):
    """Uniform in ±bound: nothing beyond, the extremes reached, standard deviation bound / √3."""
    assert weight.abs().max() <= bound * (1 + 1e-6)
    assert weight.abs().max() > 0.95 * bound
    torch.testing.assert_close(weight.std().item(), bound / math.sqrt(3), rtol=0.06, atol=0)


def xavier(weight, gain=1.0):
    uniform_bound(weight, gain * math.sqrt(6 / sum(weight.shape)))
