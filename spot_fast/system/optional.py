"""Importing a package that only some options need."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from spot_fast.errors import UserError, one_line


def required(module: str, what: str, install: str) -> ModuleType:
    """The module; UserError where it is missing or broken, which says that `what` needs it and what to install."""
    package = module.split(".")[0]
    try:
        import_module(package)
        return import_module(module)
    except Exception as error:  # anything: a system library that is missing, another NumPy than it was built for
        if isinstance(error, ModuleNotFoundError) and error.name in (package, module):
            raise UserError(f"{what} needs {package}: pip install {install}") from None
        raise UserError(
            f"{what} needs {package}, which is installed but cannot be imported ({one_line(error)}): pip install "
            f"--force-reinstall {install}"
        ) from error
