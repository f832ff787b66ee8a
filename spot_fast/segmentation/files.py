"""Which files the segment command reads and writes: images of folders and lists, names of outputs, PNG, safetensors.

An image's outputs are OUT/NAME_*.png and .safetensors. NAME is the image's path without its ending, relative to the
folder or the list it was found through, or its bare name where it was named itself; of several folders or lists each
has a folder of its own name. Every output says within itself of which image and model it is, and is overwritten for
these only.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, PngImagePlugin
from safetensors import safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from spot_fast.data.datasets.folder import is_list, list_images, list_noted, read_list
from spot_fast.errors import UserError
from spot_fast.files import atomic_write

OVERLAY, SOFT, SLOTS = "overlay.png", "soft.safetensors", "slots.safetensors"
LABELS = {"decoder": "labels.png", "slots": "slot_labels.png", "clusters": "labels.png"}
ENDINGS = (OVERLAY, *dict.fromkeys(LABELS.values()), SOFT, SLOTS)
_OF = "spot_fast:of"  # in a file's metadata: what it was made of, by whom
_FAST = 1  # zlib's level: a third of the usual time for a quarter more bytes


@dataclass(frozen=True)
class Origin:
    """What an output is made of: the image as the user named it, its full path, and the model."""

    image: str
    path: str
    model: str

    @property
    def key(self) -> str:
        return hashlib.sha256(f"{self.path}\n{self.model}".encode(errors="surrogateescape")).hexdigest()[:32]

    def metadata(self) -> dict[str, str]:
        return {"image": self.image, _OF: self.key}


def find_images(
    sources: Sequence[str | Path], out: Path, say: Callable[[str], object] = lambda note: None
) -> list[tuple[Path, str]]:
    """(file, NAME) of every image in `sources`: image files, folders, and text files that list images.

    A file without the ending of an image is one if Pillow knows it, and a list otherwise. Outputs of earlier calls that
    lie in a folder are left out, and so is what is named twice. `say` is told what else was left out of folders.
    UserError where a source is none of these.
    """
    groups: list[tuple[Path | None, str, list[Path]]] = []
    for source in map(Path, sources):
        if source.is_dir():
            paths, notes = list_noted(source)
            groups.append((source, source.resolve().name, [path for path in paths if not _is_output(path, out)]))
            for note in notes:
                say(note)
        elif is_list(source) and not _is_image(source):
            groups.append((source.parent, source.stem, read_list(source)))
        else:
            groups.append((None, "", list_images(source)))
    several = sum(base is not None for base, _, _ in groups) > 1
    found: dict[Path, tuple[Path, str]] = {}
    for base, name, paths in groups:
        for path in paths:
            below = path.relative_to(base) if base is not None and path.is_relative_to(base) else Path(path.name)
            below = Path(path.name) if ".." in below.parts else below
            stem = (Path(name) / below if several and base is not None else below).with_suffix("")
            found.setdefault(path.resolve(), (path, stem.as_posix()))
    return list(found.values())


def _is_image(path: Path) -> bool:
    try:
        with Image.open(path):
            return True
    except Exception:
        return False


def _is_output(path: Path, out: Path) -> bool:
    """Whether a file is an output of this command, by name and by what it says of itself."""
    return any(path.name.endswith(f"_{ending}") for ending in ENDINGS) and _key_of(path) is not None


def output_names(
    stems: Sequence[str], inputs: Sequence[Path], out: Path, endings: Iterable[str] = ENDINGS
) -> list[str]:
    """A name for each image's outputs: its stem, with -2, -3... where another image has it.

    No output takes the place of one of the `inputs`, the files that are read. Case does not tell names apart, as on
    some file systems.
    """
    reserved = {str(path.resolve()).lower() for path in inputs}
    root = out.resolve()
    taken: set[str] = set()
    names = []
    for stem in stems:
        name, number = stem, 1
        while name.lower() in taken or any(str(root / f"{name}_{e}").lower() in reserved for e in endings):
            number += 1
            name = f"{stem}-{number}"
        taken.add(name.lower())
        names.append(name)
    return names


def check_overwriting(out: Path, names: Sequence[str], origins: Sequence[Origin], endings: Sequence[str]) -> None:
    """UserError where an output would take the place of a file that is not of the same image and model."""
    foreign = [
        path
        for name, origin in zip(names, origins, strict=True)
        for path in _outputs(out, name, endings)
        if path.exists() and _key_of(path) != origin.key
    ]
    if foreign:
        what = (
            f"{foreign[0]} exists and is"
            if len(foreign) == 1
            else (f"{foreign[0]} and {len(foreign) - 1} more exist and are")
        )
        raise UserError(f"{what} not of the same image and model: choose another --out, or add --overwrite")


def _outputs(out: Path, name: str, endings: Iterable[str]) -> Iterator[Path]:
    return (out / f"{name}_{ending}" for ending in endings)


def _key_of(path: Path) -> str | None:
    """What an output says it was made of; None for any other file."""
    try:
        if path.suffix == ".png":
            with Image.open(path) as image:
                return image.info.get(_OF)
        with safe_open(path, framework="pt") as file:
            return (file.metadata() or {}).get(_OF)
    except Exception:
        return None


def save(image: Image.Image, path: Path, metadata: dict[str, str] | None = None, *, fast: bool = False) -> None:
    """Writes a PNG, whole or not at all, and makes its folder where there is none."""
    _make_folder(path)
    text = PngImagePlugin.PngInfo()
    for name, value in (metadata or {}).items():
        text.add_itxt(name, _unicode(value))
    options = {"compress_level": _FAST} if fast else {}
    atomic_write(path, lambda partial: image.save(partial, format="PNG", pnginfo=text, **options))


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Writes a safetensors file, whole or not at all, and makes its folder where there is none."""
    _make_folder(path)
    text = {name: _unicode(value) for name, value in metadata.items()}
    data = to_bytes({name: value.contiguous() for name, value in tensors.items()}, text)
    atomic_write(path, lambda partial: partial.write_bytes(data))


def _unicode(name: str) -> str:
    """A file name as text that every format can hold."""
    return name.encode(errors="replace").decode()


def _make_folder(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"folder {path.parent} cannot be made ({error.strerror}): choose another") from None
