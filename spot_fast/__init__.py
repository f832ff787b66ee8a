"""SPOT: unsupervised object discovery with slots, a patch-order-permuting decoder and self-training, made fast."""

__version__ = "0.1.0"

__all__ = ["Segmentation", "Spot", "UserError", "load"]
_HOMES = {"Segmentation": "api", "Spot": "api", "UserError": "errors", "load": "api"}


def __getattr__(name: str) -> object:
    """Imports a public name on first use, so that `import spot_fast` alone does not import torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
