"""`python -m spot_kernels` prints which copy of the package runs, and its native library or what runs without one."""

from importlib import metadata
from pathlib import Path

from spot_kernels import __version__, native


def owners() -> list[str]:
    """Installed distributions that hold this very file: spot-fast or spot-kernels, both, or none in a checkout."""
    return [
        f"{name} {distribution.version}"
        for name in ("spot-fast", "spot-kernels")
        for distribution in metadata.distributions(name=name)
        if distribution.read_text("RECORD")  # an egg-info that a build left in a checkout has none
        and any(distribution.locate_file(file) == Path(__file__) for file in distribution.files or ())
    ]


if __name__ == "__main__":
    print(f"spot_kernels {__version__} in {Path(__file__).parent}")
    print(native.describe())
    if len(names := owners()) > 1:
        print(f"{' and '.join(names)} share these files: to be rid of one, uninstall both and install the other again")
