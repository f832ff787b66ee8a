"""Recognises label maps among the images of a folder, which data sets ship beside images and nobody trains on.

A label map has (nearly) the stem of an image elsewhere, as aachen_000019_gtFine_labelIds.png has of
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
from collections.abc import Callable, Iterable
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
    # A file whose stem is unique is no label map; in a folder of photos that settles all, without opening one.
    shared = [index for indices in by_stem.values() if len(indices) > 1 for index in indices]
    if not shared:
        return paths, Counter()
    label_maps: dict[int, Path] = {}
    for group, among in (
        (_in_named_folders, range(len(paths))),
        (_beside_images, shared),
        (_of_lossy_images, shared),
    ):
        for folder, indices in group(paths, among, root):
            indices = [index for index in indices if index not in label_maps]
            if _sampled(indices, paths, by_stem, label_maps, grey_only=group is _of_lossy_images):
                label_maps.update((index, folder) for index in indices)
    if len(label_maps) == len(paths):  # a folder of label maps alone: they are the images
        return paths, Counter()
    return [path for index, path in enumerate(paths) if index not in label_maps], Counter(label_maps.values())


def _stem(path: Path) -> str:
    """The part of the name that an image and its label map share."""
    stem = path.stem.lower()
    return (_WIDE_ENDING.sub("", stem) or stem) if _JOINT.search(stem) else stem


Groups = Iterable[tuple[Path, list[int]]]


def _grouped(paths: list[Path], among: Iterable[int], group: Callable[[Path], Path | None]) -> Groups:
    groups: dict[Path, list[int]] = defaultdict(list)
    for index in among:
        if (folder := group(paths[index])) is not None:
            groups[folder].append(index)
    return groups.items()


def _in_named_folders(paths: list[Path], among: Iterable[int], root: Path) -> Groups:
    """Files grouped by the outermost folder below `root` that is named for label maps."""
    named: dict[Path, Path | None] = {}

    def outermost(path: Path) -> Path | None:
        parent = path.parent
        if parent not in named:
            parts = parent.relative_to(root).parts
            depth = next((depth for depth, part in enumerate(parts, 1) if _FOLDER.fullmatch(part.lower())), None)
            named[parent] = None if depth is None else root.joinpath(*parts[:depth])
        return named[parent]

    return _grouped(paths, among, outermost)


def _beside_images(paths: list[Path], among: list[int], root: Path) -> Groups:
    """Lossless files, grouped by folder, named as a label map of another file there."""
    names = {(paths[index].parent, paths[index].stem.lower()) for index in among}

    def folder(path: Path) -> Path | None:
        bare = _ENDING.sub("", stem := path.stem.lower())
        named = bare != stem and path.suffix.lower() in _LOSSLESS and (path.parent, bare) in names
        return path.parent if named else None

    return _grouped(paths, among, folder)


def _of_lossy_images(paths: list[Path], among: list[int], root: Path) -> Groups:
    """Lossless files, grouped by folder, with the stem of a JPEG or WebP."""
    lossy = {paths[index].stem.lower() for index in among if paths[index].suffix.lower() in _LOSSY}
    return _grouped(
        paths,
        among,
        lambda path: path.parent if path.suffix.lower() in _LOSSLESS and path.stem.lower() in lossy else None,
    )


def _sampled(
    indices: list[int], paths: list[Path], by_stem: dict[str, list[int]], known: dict[int, Path], *, grey_only: bool
) -> bool:
    """Whether most of these files share their stem with an image elsewhere, and most of a sample are label maps of it.

    known: label maps so far.
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
    like = 0
    for opened, index in enumerate(chosen, 1):
        like += _is_label_map(paths[index], paths[partners[index]], grey_only=grey_only)
        if grey_only and like < opened:  # without a name that says so, all have to look like label maps
            return False
    return 2 * like > len(chosen)


def _is_label_map(path: Path, photo: Path, *, grey_only: bool) -> bool:
    """Whether an image looks like a label map of another one; grey_only: indexed or grey, and of the same size."""
    try:
        with Image.open(path) as image, Image.open(photo) as other:
            grey = _is_grey(image)
            if grey_only:
                return (grey or image.mode == "P") and image.size == other.size and _few(image, _FEW_GREY)
            return grey and not _is_grey(other) or _few(image, _FEW_GREY if grey else _FEW)
    except Exception:
        return False


def _is_grey(image: Image.Image) -> bool:
    return image.mode in ("L", "1", "LA") or image.mode.startswith("I")


def _few(image: Image.Image, most: int) -> bool:
    if image.mode.startswith("I"):
        low, high = image.getextrema()
        return high - low < most
    return image.getcolors(most) is not None
