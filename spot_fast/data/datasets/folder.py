"""Any folder of images, or any list of image files, with or without masks.

Splits: train/ and val/ (or validation/, valid/) in the folder or in its images/ are training and validation images;
a folder without both, or a list, is used for either. Masks are looked for in this order:

- a COCO instances file: a .json with "images", "annotations" and segmentations in the validation folder, the folder
  itself or its annotations/. The images are those it lists; names are relative to where it lies, to the validation
  folder, to the folder or to its images/. Classes are numbered from 1 in the order of its categories.
- an indexed PNG for an image, palette or grey, whose values are instances and 0 background: photo_mask.png beside
  photo.jpg, or masks/…/photo.png for images/…/photo.jpg. In a palette PNG 255 is a rim, as in VOC, and background.
  TIFF, GIF and BMP will do too; of several PNG goes first. These names may be in capitals.

Where some images have masks, those are the validation images. Masks are never taken as images. Training reads no
masks. What else of a folder is taken or left out: `listing` and `label_maps`; how a list may be written: `names`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

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
    """Images of folders or files, cropped as COCO's; `limit` 0 = all. Turned upright by EXIF, unless masks are not.

    split: "train" or "val"; None for all images, without masks. A file among `sources` is an image, but a single
    source that is no image by its name is a text file that lists some, one a line, relative to where it lies.
    """

    def __init__(
        self,
        sources: Sources,
        split: str | None = None,
        *,
        image_size: int = 224,
        mask_size: int = 320,
        crop: str = "center",
        flip: bool = False,
        limit: int = 0,
    ) -> None:
        self.name = "image folder" if split is None else f"image folder {split}"
        self.masks: list[Path] = []  # of each image, where they are files
        self.instances: Instances | None = None
        self.listed: list[Listed] = []  # each image, where they are in a COCO instances file
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
        super().__init__(
            paths[:limit] if limit else paths,
            image_size=image_size,
            mask_size=mask_size,
            crop=crop,
            flip=flip,
            upright=True,
        )

    def _of_folder(self, root: Path, split: str | None) -> list[Path]:
        folder = _split_folder(root, split)
        if split == "val" and (file := _instances_file(folder, root)):
            self.instances = Instances(file)
            others = file.parent, root, root / "images", _split_folder(root, "train")
            found = [(_locate(image.file_name, folder, others), image) for image in self.instances.images]
            found = [(path, image) for path, image in found if path.is_relative_to(folder)]
            if not found:
                raise UserError(f"{file} lists no images in {folder}: put the annotations of these images there")
            self.listed, self.notes = [image for _, image in found], self.instances.notes
            return [path for path, _ in found]
        paths, self.notes = list_noted(folder)
        return self._with_masks(paths, root) if split == "val" else paths

    def _with_masks(self, paths: list[Path], root: Path | None) -> list[Path]:
        """Those of `paths` that have masks, all where none has."""
        places: dict[Path, list[dict[str, Path]]] = {}
        found = [(path, mask) for path in paths if (mask := _mask_of(path, root, places))]
        self.masks = [mask for _, mask in found]
        return [path for path, _ in found] or paths

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
    """Image files of folders (recursively, by extension, sorted) and files (as they are, whatever their name).

    Of folders, hidden files and folders, the masks of images and label maps are left out. UserError names a source
    that does not exist or a folder without images.
    """
    return list_noted(sources)[0]


def list_noted(sources: Sources) -> tuple[list[Path], list[str]]:
    """`list_images`, and a line for each kind of file that was left out of folders."""
    if isinstance(sources, str | Path):
        sources = [sources]
    found: list[Path] = []
    notes: list[str] = []
    for source in map(Path, sources):
        if source.is_dir():
            inside = list_folder(source)
            paths, inside.labels = without_labels(_without_masks(inside.paths, source), source)
            if not paths:
                left_out = "; ".join(inside.notes())
                raise UserError(
                    f"{source} has no images (.jpg, .png, .webp and others) in it"
                    + (f": {left_out}" if left_out else "")
                )
            found += paths
            notes += inside.notes()
        elif located(source).exists():
            found.append(located(source))
        else:
            raise UserError(f"{source} does not exist: name an image or a folder of images")
    return found, notes


def _without_masks(paths: list[Path], root: Path) -> list[Path]:
    """`paths` but for photo_mask.png beside a photo, and for masks/ beside images/."""
    stems = {(path.parent, composed(path.stem)) for path in paths}
    mask_folders = {folder for folder in {path.parent for path in paths} if _in_masks(folder, root)}

    def is_mask(path: Path) -> bool:
        of = without_ending(path.name).removesuffix(MASK)
        return path.parent in mask_folders or of != composed(path.stem) and (path.parent, of) in stems

    return [path for path in paths if not is_mask(path)]


def _in_masks(folder: Path, root: Path) -> bool:
    """Whether `folder` is, or lies in, a folder masks/ under `root` that has images/ beside it."""
    parts = folder.relative_to(root).parts
    return any(
        part.lower() == "masks" and _folders(root.joinpath(*parts[:i]), "images") for i, part in enumerate(parts)
    )


def _folders(base: Path, name: str) -> list[Path]:
    """The folders of that name in `base`, in any capitals."""
    try:
        return sorted(
            (base / inside for inside in os.listdir(base) if inside.lower() == name and (base / inside).is_dir()),
            reverse=True,
        )
    except OSError:
        return []


def _mask_of(path: Path, root: Path | None, places: dict[Path, list[dict[str, Path]]]) -> Path | None:
    """The mask file of an image. places: `_mask_places` of each folder; what is looked up is added."""
    folder = path.parent
    if folder not in places:
        places[folder] = _mask_places(folder, root)
    beside, *apart = places[folder]
    stem = composed(path.stem)
    found = [beside.get(stem + MASK), *(masks.get(stem) or masks.get(stem + MASK) for masks in apart)]
    return next(filter(None, found), None)


def _mask_places(folder: Path, root: Path | None) -> list[dict[str, Path]]:
    """Masks by name in the folder itself, then in the folders masks/ that stand for an images/ in its path.

    images/ is looked for below `root` (None: anywhere in the path).
    """
    parts, places = folder.parts, [folder]
    for i in reversed(range(len(root.parts) if root else 0, len(parts))):
        if parts[i].lower() == "images":
            places += [masks.joinpath(*parts[i + 1 :]) for masks in _folders(Path(*parts[:i]), "masks")]
    return list(map(masks_in, places))


def _split_folder(root: Path, split: str | None) -> Path:
    """The folder of a split: `root` itself where it has no training and validation folders."""
    for base in (root, root / "images") if split else ():
        validation = next((base / name for name in _VALIDATION if (base / name).is_dir()), None)
        if validation and (base / "train").is_dir():
            return base / "train" if split == "train" else validation
    return root


def _instances_file(folder: Path, root: Path) -> Path | None:
    """The COCO instances file for the validation images in `folder`; UserError where it is not clear which."""
    for place in dict.fromkeys([folder, root, root / "annotations"]):
        images = {path.stem for path in place.glob("*") if path.suffix.lower() in extensions()}
        # Annotation tools write a file for each image, with the image in it: those are not read.
        files = [file for file in sorted(place.glob("*.json")) if file.stem not in images and is_instances_file(file)]
        chosen = [file for file in files if "val" in file.stem.lower()] or files
        if len(chosen) > 1:
            raise UserError(
                f"{place} has several COCO instances files ({', '.join(file.name for file in chosen)}): "
                'leave one there, or one with "val" in its name'
            )
        if chosen:
            return chosen[0]
    return None


def _locate(name: str, folder: Path, others: Iterable[Path]) -> Path:
    """The file `name` in `folder` or one of the others, in `folder` where none has it."""
    found = (located(base / name) for base in (folder, *others))
    return next(filter(os.path.isfile, found), folder / name)


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
    # Lines that begin with # are notes, unless there is such a file.
    paths = [path for path, line in zip(paths, lines, strict=True) if line[0] != "#" or os.path.isfile(path)]
    if not any(map(os.path.isfile, paths)):
        windows = next(filter(is_windows, lines), None)
        why = "" if windows is None else f", and {windows.strip()} is a path of Windows"
        raise UserError(f"{file} lists no image that exists: it needs one name a line, relative to its folder{why}")
    return paths
