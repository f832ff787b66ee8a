"""Recognises label maps among the images of a folder, which nobody trains on.

A label map has (nearly) the stem of an image elsewhere, such as aachen_000019_gtFine_labelIds.png of
aachen_000019_leftImg8bit.png, and one of three signs:

- its folder is named for label maps, as in ADE20K, Cityscapes, DAVIS, VOC and COCO panoptic, and it has few colours, or
  is grey while the image is coloured
- its own name says so, beside the image: photo_seg.png, with few colours or grey
- it is indexed or grey, with few values, and as large as a JPEG or WebP with the same stem

A name alone decides nothing: photos of people with_mask/ and without_mask/ are photos.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable
from functools import cache
from pathlib import Path

from PIL import Image

_WORDS = (
    r"masks?|labels?|labelmaps?|gt|segs?|segm|segmentations?|instances?|semantics?|panoptic|annotations?|annot|"
    r"trimaps?|mattes?"
)
_FOLDER = re.compile(
    rf"(.*[-_. ])?({_WORDS})([-_. ].*)?|.*(labels|annot|masks)|segmentation.*|segments|gt(fine|coarse)|"
    r"ground[-_ ]?truths?|parsing|stuffthingmaps|pixelmaps"
)
# Suffixes of a label map's stem beside its image, and further ones in folders of label maps.
_ENDING = re.compile(rf"([-_. ]({_WORDS}|parts?_\d+|labelids|instanceids|labeltrainids))+$")
_WIDE_ENDING = re.compile(
    rf"([-_. ]({_WORDS}|parts?_\d+|labelids|instanceids|labeltrainids|trainids|gtfine|gtcoarse|color|colour|l|slot|"
    r"overlay|polygons|leftimg8bit|im|rgb|image))+$"
)
_JOINT = re.compile("[-_. ]")
_LOSSY = frozenset((".jpg", ".jpeg", ".jpe", ".jfif", ".webp"))
_LOSSLESS = frozenset((".png", ".bmp", ".gif", ".tif", ".tiff"))
_SAMPLE = 6  # files of a folder that are opened
_FEW, _FEW_GREY = 256, 64  # most colours, and grey values, of a label map


def without_labels(paths: list[Path], root: Path) -> tuple[list[Path], Counter[Path]]:
    """`paths` below `root` without label maps, and the numbers of these by folder."""
    by_stem: dict[str, list[int]] = defaultdict(list)
    for index, path in enumerate(paths):
        by_stem[_stem(path)].append(index)
    # A file with a unique stem is no label map: a folder of photos is settled without opening one.
    shared = [index for indices in by_stem.values() if len(indices) > 1 for index in indices]
    if not shared:
        return paths, Counter()
    label_maps: dict[int, Path] = {}
    for folder_of, among, grey_only in (
        (_in_named_folders(root), range(len(paths)), False),
        (_beside_images([paths[index] for index in shared]), shared, False),
        (_of_lossy_images([paths[index] for index in shared]), shared, True),
    ):
        groups: dict[Path, list[int]] = defaultdict(list)
        for index in among:
            if index not in label_maps and (folder := folder_of(paths[index])) is not None:
                groups[folder].append(index)
        for folder, indices in groups.items():
            if _sampled(indices, paths, by_stem, label_maps, grey_only=grey_only):
                label_maps.update((index, folder) for index in indices)
    if len(label_maps) == len(paths):  # a folder of label maps alone: they are the images
        return paths, Counter()
    return [path for index, path in enumerate(paths) if index not in label_maps], Counter(label_maps.values())


def _stem(path: Path) -> str:
    """The part of the name that an image and its label map share."""
    stem = path.stem.lower()
    return (_WIDE_ENDING.sub("", stem) or stem) if _JOINT.search(stem) else stem


FolderOf = Callable[[Path], Path | None]  # the folder under which a possible label map counts, None for other files


def _in_named_folders(root: Path) -> FolderOf:
    """The outermost folder below `root` that is named for label maps."""

    @cache
    def outermost(folder: Path) -> Path | None:
        parts = folder.relative_to(root).parts
        depth = next((depth for depth, part in enumerate(parts, 1) if _FOLDER.fullmatch(part.lower())), None)
        return None if depth is None else root.joinpath(*parts[:depth])

    return lambda path: outermost(path.parent)


def _beside_images(paths: list[Path]) -> FolderOf:
    """The folder of a lossless file named as a label map of another file there."""
    names = {(path.parent, path.stem.lower()) for path in paths}

    def folder(path: Path) -> Path | None:
        bare = _ENDING.sub("", stem := path.stem.lower())
        named = bare != stem and path.suffix.lower() in _LOSSLESS and (path.parent, bare) in names
        return path.parent if named else None

    return folder


def _of_lossy_images(paths: list[Path]) -> FolderOf:
    """The folder of a lossless file with the stem of a JPEG or WebP."""
    lossy = {path.stem.lower() for path in paths if path.suffix.lower() in _LOSSY}
    return lambda path: path.parent if path.suffix.lower() in _LOSSLESS and path.stem.lower() in lossy else None


def _sampled(
    indices: list[int], paths: list[Path], by_stem: dict[str, list[int]], known: dict[int, Path], *, grey_only: bool
) -> bool:
    """Whether most of these files share their stem with an image elsewhere, and most of a sample are label maps of it.

    known: the label maps so far, which are no such images.
    """
    own = set(indices)
    partners = {}
    for index in indices:
        others = (other for other in by_stem[_stem(paths[index])] if other not in own and other not in known)
        if (partner := next(others, None)) is not None:
            partners[index] = partner
    if not partners or 2 * len(partners) <= len(indices):
        return False
    chosen = list(partners)[:: max(1, len(partners) // _SAMPLE)][:_SAMPLE]
    like = (_is_label_map(paths[index], paths[partners[index]], grey_only=grey_only) for index in chosen)
    # Without a name that says so, all have to look like label maps.
    return all(like) if grey_only else 2 * sum(like) > len(chosen)


def _is_label_map(path: Path, photo: Path, *, grey_only: bool) -> bool:
    """Whether an image looks like a label map of another one; grey_only: indexed or grey, and of the same size."""
    try:
        with Image.open(path) as image, Image.open(photo) as other:
            grey = _is_grey(image)
            if grey_only:
                return (grey or image.mode == "P") and image.size == other.size and _few(image, _FEW_GREY)
            return grey and not _is_grey(other) or _few(image, _FEW_GREY if grey else _FEW)
    except (
        Exception
    ):  # Pillow's plugins raise errors of every kind; an unreadable file is listed, then named as corrupt
        return False


def _is_grey(image: Image.Image) -> bool:
    return image.mode in ("L", "1", "LA") or image.mode.startswith("I")


def _few(image: Image.Image, most: int) -> bool:
    if image.mode.startswith("I"):
        low, high = image.getextrema()
        return high - low < most
    return image.getcolors(most) is not None
