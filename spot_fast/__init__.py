"""SPOT: unsupervised object discovery with slots, a patch-order-permuting decoder and self-training, made fast."""

__all__ = ["Segmentation", "Spot", "UserError", "load"]
_HOMES = {
    "Segmentation": "spot_fast.api",
    "Spot": "spot_fast.api",
    "UserError": "spot_fast.errors",
    "__version__": "spot_kernels",  # both have one version
    "load": "spot_fast.api",
}


def __getattr__(name: str) -> object:
    """Imports a public name on first use, so that `import spot_fast` alone does not import torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
