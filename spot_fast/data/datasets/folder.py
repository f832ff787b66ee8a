"""Any folder of images, or any list of image files, with or without masks.

The splits are train/ and val/ (or validation/, valid/) in the folder or in its images/; without both, the folder or
list serves as both. Masks are searched in this order:

- a COCO instances file: a .json with "images", "annotations" and segmentations in the validation folder, the folder
  itself or its annotations/. It lists the images, by names relative to its own folder, the validation folder, the
  folder or its images/. Classes are numbered from 1 in the order of its categories.
- an indexed PNG for an image, palette or grey, whose values are instances and 0 background: photo_mask.png beside
  photo.jpg, or masks/…/photo.png for images/…/photo.jpg. In a palette PNG 255 is a rim, as in VOC, and background.
  TIFF, GIF and BMP work too, PNG is preferred. These names may be in upper case.

If some images have masks, those are the validation images. Masks never count as images. Training reads none.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from spot_fast.data.base import ImageFiles, Masks
from spot_fast.data.listing.label_maps import without_labels
from spot_fast.data.listing.names import (
    MASK,
    composed,
    is_windows,
    listed,
    located,
    masks_in,
    read_lines,
    without_ending,
)
from spot_fast.data.listing.search import extensions, list_folder
from spot_fast.data.masks import fit
from spot_fast.data.masks.instances import Instances, Listed, is_instances_file
from spot_fast.data.masks.labels import open_labels
from spot_fast.errors import UserError

EXPECTED = "images, or a text file that lists images"
_VALIDATION = ("val", "validation", "valid")

Sources = str | Path | Iterable[str | Path]


class Folder(ImageFiles):
    """Images of folders or files, at most `limit` (0 = all), turned upright by EXIF unless masks are not.

    A file among `sources` is an image; a single one that is no image by its name lists images, one a line, relative to
    its folder. split: "train" or "val"; None for all images, without masks. geometry: options of ImageFiles.
    """

    def __init__(self, sources: Sources, split: str | None = None, *, limit: int = 0, **geometry: Any) -> None:
        self.name = "image folder" if split is None else f"image folder {split}"
        self.masks: list[Path] = []  # of each image, if masks are files
        self.instances: Instances | None = None
        self.listed: list[Listed] = []  # each image, if masks are in a COCO instances file
        root = Path(sources) if isinstance(sources, str | Path) else None
        if root is not None and root.is_dir():
            paths = self._of_folder(root, split)
        else:
            paths = read_list(root) if root is not None and is_list(root) else list_images(sources)
            paths = self._with_masks(paths, None) if split == "val" else paths
        if not paths:
            raise UserError("no images given: name an image or a folder of images")
        self.has_masks = bool(self.masks) or self.instances is not None
        self.has_classes = self.instances is not None and self.instances.class_of is not None
        super().__init__(paths[:limit] if limit else paths, upright=True, **geometry)

    def _of_folder(self, root: Path, split: str | None) -> list[Path]:
        folder = _split_folder(root, split)
        if split == "val" and (file := _instances_file(folder, root)):
            self.instances = Instances(file)
            others = file.parent, root, root / "images", _split_folder(root, "train")
            images = [(_locate(image.file_name, folder, others), image) for image in self.instances.images]
            images = [(path, image) for path, image in images if path.is_relative_to(folder)]
            if not images:
                raise UserError(f"{file} lists no images in {folder}: put the annotations of these images there")
            self.listed, self.notes = [image for _, image in images], self.instances.notes
            return [path for path, _ in images]
        paths, self.notes = list_noted(folder)
        return self._with_masks(paths, root) if split == "val" else paths

    def _with_masks(self, paths: list[Path], root: Path | None) -> list[Path]:
        """Those of `paths` that have masks; all if none has."""
        masks_for = cache(partial(_masks_for, root=root))
        with_masks = [(path, mask) for path in paths if (mask := _mask_of(path, masks_for(path.parent)))]
        self.masks = [mask for _, mask in with_masks]
        return [path for path, _ in with_masks] or paths

    def label(self, index: int) -> str:
        return str(self.paths[index])

    def mask_files(self, index: int) -> list[Path]:
        return self.masks[index : index + 1]

    def full_masks(self, index: int) -> tuple[np.ndarray, ...]:
        """(instances,) or (instances, classes, ignore), each int32 [height, width] at the size of the masks."""
        if self.instances is not None:
            self.fitting(index, self.drawn_size(index), self.instances.path)
            instances, classes, ignore = self.instances.label_maps(self.listed[index])
            return instances, classes if self.has_classes else None, ignore
        if not self.masks:
            raise UserError(
                f"{self.name} is read without masks: they belong beside the images, as photo_mask.png "
                "beside photo.jpg, or masks/photo.png for images/photo.jpg"
            )
        instances = open_labels(self.masks[index], rim=("P",))
        self.fitting(index, instances.shape[::-1], self.masks[index])
        return (instances,)

    def drawn_size(self, index: int) -> fit.Size | None:
        if self.instances is not None:
            return self.instances.size(self.listed[index])
        return fit.stored_size(self.masks[index]) if self.masks else None

    def val_masks(self, index: int) -> Masks:
        return Masks(*(labels if labels is None else self.square_labels(labels) for labels in self.full_masks(index)))


def list_images(sources: Sources) -> list[Path]:
    """Image files of folders (recursively, by extension, sorted) and files (whatever their name).

    Hidden files, masks and label maps in folders are left out. UserError names a source that does not exist or a
    folder without images.
    """
    return list_noted(sources)[0]


def list_noted(sources: Sources) -> tuple[list[Path], list[str]]:
    """`list_images`, and a line for each kind of file left out of folders."""
    if isinstance(sources, str | Path):
        sources = [sources]
    found: list[Path] = []
    notes: list[str] = []
    for source in map(Path, sources):
        if source.is_dir():
            inside = list_folder(source)
            paths, inside.labels = without_labels(_without_masks(inside.paths, source), source)
            if not paths:
                left_out = f": {'; '.join(inside.notes())}" if inside.notes() else ""
                raise UserError(f"{source} has no images (.jpg, .png, .webp and others) in it{left_out}")
            found += paths
            notes += inside.notes()
        elif located(source).exists():
            found.append(located(source))
        else:
            raise UserError(f"{source} does not exist: name an image or a folder of images")
    return found, notes


def _without_masks(paths: list[Path], root: Path) -> list[Path]:
    """`paths` without photo_mask.png beside a photo, and without masks/ beside images/."""
    stems = {(path.parent, composed(path.stem)) for path in paths}
    mask_folders = {folder for folder in {path.parent for path in paths} if _in_masks(folder, root)}

    def is_mask(path: Path) -> bool:
        of = without_ending(path.name).removesuffix(MASK)
        return path.parent in mask_folders or of != composed(path.stem) and (path.parent, of) in stems

    return [path for path in paths if not is_mask(path)]


def _in_masks(folder: Path, root: Path) -> bool:
    """Whether `folder` is in, or is, a folder masks/ under `root` with images/ beside it."""
    parts = folder.relative_to(root).parts
    return any(
        part.lower() == "masks" and _folders(root.joinpath(*parts[:i]), "images") for i, part in enumerate(parts)
    )


def _folders(base: Path, name: str) -> list[Path]:
    """The folders of that name in `base`, in any case."""
    try:
        return sorted(
            (base / inside for inside in os.listdir(base) if inside.lower() == name and (base / inside).is_dir()),
            reverse=True,
        )
    except OSError:
        return []


def _mask_of(path: Path, masks: list[dict[str, Path]]) -> Path | None:
    """The mask file of an image; masks: `_masks_for` its folder."""
    beside, *apart = masks
    stem = composed(path.stem)
    found = [beside.get(stem + MASK), *(masks.get(stem) or masks.get(stem + MASK) for masks in apart)]
    return next(filter(None, found), None)


def _masks_for(folder: Path, root: Path | None) -> list[dict[str, Path]]:
    """Masks by name in the folder itself, then in the folders masks/ beside an images/ in its path (below `root`)."""
    parts, folders = folder.parts, [folder]
    for i in reversed(range(len(root.parts) if root else 0, len(parts))):
        if parts[i].lower() == "images":
            folders += [masks.joinpath(*parts[i + 1 :]) for masks in _folders(Path(*parts[:i]), "masks")]
    return list(map(masks_in, folders))


def _split_folder(root: Path, split: str | None) -> Path:
    """The folder of a split: `root` itself unless it has folders for both."""
    for base in (root, root / "images") if split else ():
        validation = next((base / name for name in _VALIDATION if (base / name).is_dir()), None)
        if validation and (base / "train").is_dir():
            return base / "train" if split == "train" else validation
    return root


def _instances_file(folder: Path, root: Path) -> Path | None:
    """The COCO instances file for the validation images in `folder`; UserError if there are several."""
    for candidate in dict.fromkeys([folder, root, root / "annotations"]):
        images = {path.stem for path in candidate.glob("*") if path.suffix.lower() in extensions()}
        # Annotation tools write a file for each image, with the image in it: reading all would take minutes.
        files = [
            file for file in sorted(candidate.glob("*.json")) if file.stem not in images and is_instances_file(file)
        ]
        chosen = [file for file in files if "val" in file.stem.lower()] or files
        if len(chosen) > 1:
            raise UserError(
                f"{candidate} has several COCO instances files ({', '.join(file.name for file in chosen)}): "
                'leave one there, or one with "val" in its name'
            )
        if chosen:
            return chosen[0]
    return None


def _locate(name: str, folder: Path, others: Iterable[Path]) -> Path:
    """The file `name` in `folder` or one of the others; in `folder` if none has it."""
    candidates = (located(base / name) for base in (folder, *others))
    return next(filter(os.path.isfile, candidates), folder / name)


def is_list(source: Path) -> bool:
    return source.is_file() and source.suffix.lower() not in extensions()


def read_list(file: Path) -> list[Path]:
    if file.suffix.lower() == ".json":
        raise UserError(f"{file} is no list of images: name the folder, in which a COCO instances file is found")
    try:
        lines = [line for line in read_lines(file) if line.strip()]
    except UserError as error:
        raise UserError(
            f"{file} is neither a folder, nor an image by its name, nor a text file that lists images ({error})"
        ) from None
    paths = [listed(line, file.parent) for line in lines]
    # Lines that begin with # are comments, unless such a file exists.
    paths = [path for path, line in zip(paths, lines, strict=True) if line[0] != "#" or os.path.isfile(path)]
    if not any(map(os.path.isfile, paths)):
        windows = next(filter(is_windows, lines), None)
        why = "" if windows is None else f", and {windows.strip()} is a path of Windows"
        raise UserError(f"{file} lists no image that exists: it needs one name a line, relative to its folder{why}")
    return paths
