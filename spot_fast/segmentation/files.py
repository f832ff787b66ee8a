"""Files that the segment command reads and writes: images of folders and lists, names of outputs, PNG, safetensors.

An image's outputs are OUT/NAME_*.png and .safetensors. NAME is the image's path without its ending, relative to the
folder or list that contains it, or its bare name where it was given itself; of several folders or lists each gets a
folder of its own name. Every output carries a key of its image and model, and only outputs of the same key are
overwritten.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
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
_OF = "spot_fast:of"  # metadata entry: the key of a file's origin
_FAST = 1  # zlib's level: a third of the usual time for a quarter more bytes


@dataclass(frozen=True)
class Origin:
    """The origin of an output: the image as the user named it, its full path, and the model."""

    image: str
    path: str
    model: str

    @property
    def key(self) -> str:
        return key_of(f"{self.path}\n{self.model}")

    def metadata(self) -> dict[str, str]:
        return {"image": self.image, _OF: self.key}


def key_of(identity: str) -> str:
    """A key that tells an image or a model from others without naming its folder."""
    return hashlib.sha256(identity.encode(errors="surrogateescape")).hexdigest()[:32]


def stamp_of(path: Path | None) -> str:
    """Size and time of a file, which change when it is written anew; "" for none."""
    if path is None or not path.exists():
        return ""
    about = path.stat()
    return f"{about.st_size} {about.st_mtime_ns}"


def find_images(
    sources: Sequence[str | Path], out: Path, notify: Callable[[str], object] = lambda note: None
) -> list[tuple[Path, str]]:
    """(file, NAME) of every image in `sources`: image files, folders, and text files that list images.

    A file without the ending of an image is an image if Pillow knows it, and a list otherwise. Outputs of earlier calls
    and duplicates are left out; `notify` gets a note of whatever else is left out of folders. UserError where a source
    is none of these.
    """
    groups: list[tuple[Path | None, str, list[Path]]] = []
    for source in map(Path, sources):
        if source.is_dir():
            paths, notes = list_noted(source)
            groups.append((source, source.resolve().name, [path for path in paths if not _is_output(path, out)]))
            for note in notes:
                notify(note)
        elif is_list(source) and not _is_image(source):
            groups.append((source.parent, source.stem, read_list(source)))
        else:
            groups.append((None, "", list_images(source)))
    several = sum(base is not None for base, _, _ in groups) > 1
    images: dict[Path, tuple[Path, str]] = {}
    for base, name, paths in groups:
        for path in paths:
            below = path.relative_to(base) if base is not None and path.is_relative_to(base) else Path(path.name)
            below = Path(path.name) if ".." in below.parts else below
            stem = (Path(name) / below if several and base is not None else below).with_suffix("")
            images.setdefault(path.resolve(), (path, stem.as_posix()))
    return list(images.values())


def _is_image(path: Path) -> bool:
    try:
        with Image.open(path):
            return True
    except Exception:  # Pillow's plugins raise errors of every kind
        return False


def _is_output(path: Path, out: Path) -> bool:
    """Whether a file is an output of this command, by its name and its metadata."""
    return any(path.name.endswith(f"_{ending}") for ending in ENDINGS) and _key_in(path) is not None


def output_names(
    stems: Sequence[str], inputs: Sequence[Path], out: Path, endings: Iterable[str] = ENDINGS
) -> list[str]:
    """A name for each image's outputs: its stem, with -2, -3... where another image has it.

    No output replaces one of the `inputs`, the files that are read. Names that differ only in case count as equal, as
    on some file systems.
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


def check_overwriting(out: Path, names: Sequence[str], origins: Iterable[Origin], endings: Sequence[str]) -> None:
    """UserError where an output would replace a file that is not of the same image and model."""
    others = [
        path
        for name, origin in zip(names, origins, strict=True)
        for path in (out / f"{name}_{ending}" for ending in endings)
        if path.exists() and _key_in(path) != origin.key
    ]
    if others:
        exist = "exists and is" if len(others) == 1 else f"and {len(others) - 1} more exist and are"
        raise UserError(
            f"{others[0]} {exist} not of the same image and model: choose another --out, or add --overwrite"
        )


def _key_in(path: Path) -> str | None:
    """The key in an output's metadata; None for any other file."""
    try:
        if path.suffix == ".png":
            with Image.open(path) as image:
                return image.info.get(_OF)
        with safe_open(path, framework="pt") as file:
            return (file.metadata() or {}).get(_OF)
    except Exception:  # whatever the file is, it was not written here, so it is not overwritten
        return None


def save(image: Image.Image, path: Path, metadata: dict[str, str] | None = None, *, fast: bool = False) -> None:
    """Writes a PNG, whole or not at all, and makes its folder where it is missing."""
    make_folder(path)
    text = PngImagePlugin.PngInfo()
    for name, value in (metadata or {}).items():
        text.add_itxt(name, _unicode(value))
    options = {"compress_level": _FAST} if fast else {}
    atomic_write(path, lambda partial: image.save(partial, format="PNG", pnginfo=text, **options))


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Writes a safetensors file, whole or not at all, and makes its folder where it is missing."""
    make_folder(path)
    text = {name: _unicode(value) for name, value in metadata.items()}
    data = to_bytes({name: value.contiguous() for name, value in tensors.items()}, text)
    atomic_write(path, lambda partial: partial.write_bytes(data))


def _unicode(name: str) -> str:
    """A file name as text that every format can hold."""
    return name.encode(errors="replace").decode()


def make_folder(path: Path) -> None:
    """Makes the folder that a file is to be in. UserError where that cannot be."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"folder {path.parent} cannot be made ({error.strerror}): choose another") from None
