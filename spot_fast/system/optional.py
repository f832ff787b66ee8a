"""Packages that some options need: what is told where one is missing, or there and broken."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from spot_fast.errors import UserError


def required(module: str, what: str, install: str) -> ModuleType:
    """The module; UserError where it cannot be imported, which says that `what` needs it and what to install.

    A package that is there may raise anything: a missing system library, another NumPy than it was built for.
    """
    package = module.split(".")[0]
    try:
        import_module(package)
        return import_module(module)
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name in (package, module):
            raise UserError(f"{what} needs {package}: pip install {install}") from None
        raise UserError(
            f"{what} needs {package}, which is there but cannot be imported ({said(error)}): pip install "
            f"--force-reinstall {install}"
        ) from error


def said(error: BaseException) -> str:
    """The first line of what an error says, with its kind."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:120]}" if lines else type(error).__name__
