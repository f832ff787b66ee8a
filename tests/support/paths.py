"""Where things stand in the checkout."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BENCH = ROOT / "bench"
GOLDEN = ROOT / "tests" / "golden"
