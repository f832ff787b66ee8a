"""spot-kernels by itself: all but the native library is in pyproject.toml."""

import sys
from pathlib import Path

from setuptools import setup

sys.path.insert(0, str(Path(__file__).resolve().parent))

from native_build import NATIVE

setup(**NATIVE)
