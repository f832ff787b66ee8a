"""SPOT: unsupervised object discovery with slots, a patch-order-permuting decoder and self-training, made fast."""

__version__ = "0.1.0"
