"""Label maps among the images of a folder: what a data set ships beside its images and nobody wants to train on.

A label map has the stem of an image elsewhere, or nearly (aachen_000019_gtFine_labelIds.png for
aachen_000019_leftImg8bit.png), and shows in one of three ways what it is:

- a folder is named for label maps, as in ADE20K, Cityscapes, DAVIS, VOC and COCO panoptic, and what lies in it has few
  colours, or is grey where the image is coloured
- its own name says so, beside the image: photo_seg.png, with few colours or grey
- it is indexed or grey, with few values, of the size of a JPEG or WebP with the same stem

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
# What is added to the stem of an image beside it, and what more is in folders of label maps.
_ENDING = re.compile(rf"([-_. ]({_WORDS}|parts?_\d+|labelids|instanceids|labeltrainids))+$")
_WIDE_ENDING = re.compile(
    rf"([-_. ]({_WORDS}|parts?_\d+|labelids|instanceids|labeltrainids|trainids|gtfine|gtcoarse|color|colour|l|slot|"
    r"overlay|polygons|leftimg8bit|im|rgb|image))+$"
)
_JOINT = re.compile("[-_. ]")
_LOSSY = frozenset((".jpg", ".jpeg", ".jpe", ".jfif", ".webp"))
_LOSSLESS = frozenset((".png", ".bmp", ".gif", ".tif", ".tiff"))
_SAMPLE = 6  # files of a folder that are looked into
_FEW, _FEW_GREY = 256, 64  # colours, and grey values, that a label map has at most


def without_labels(paths: list[Path], root: Path) -> tuple[list[Path], Counter[Path]]:
    """`paths` below `root` without label maps, and how many these are by folder."""
    by_stem: dict[str, list[int]] = defaultdict(list)
    for place, path in enumerate(paths):
        by_stem[_stem(path)].append(place)
    # Files whose stem no other has are looked at no further, in a large folder of images all.
    shared = [place for places in by_stem.values() if len(places) > 1 for place in places]
    if not shared:
        return paths, Counter()
    found: dict[int, Path] = {}
    for ways, among in (
        (_in_named_folders, range(len(paths))),
        (_beside_images, shared),
        (_of_lossy_images, shared),
    ):
        for folder, places in ways(paths, among, root):
            places = [place for place in places if place not in found]
            if _sampled(places, paths, by_stem, found, grey_only=ways is _of_lossy_images):
                found.update((place, folder) for place in places)
    if len(found) == len(paths):
        return paths, Counter()
    return [path for place, path in enumerate(paths) if place not in found], Counter(found.values())


def _stem(path: Path) -> str:
    """What an image and its label map have in common of their names."""
    stem = path.stem.lower()
    return (_WIDE_ENDING.sub("", stem) or stem) if _JOINT.search(stem) else stem


Groups = Iterable[tuple[Path, list[int]]]


def _grouped(paths: list[Path], among: Iterable[int], group: Callable[[Path], Path | None]) -> Groups:
    groups: dict[Path, list[int]] = defaultdict(list)
    for place in among:
        if (folder := group(paths[place])) is not None:
            groups[folder].append(place)
    return groups.items()


def _in_named_folders(paths: list[Path], among: Iterable[int], root: Path) -> Groups:
    """Files by the outermost folder below `root` that is named for label maps."""
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
    """Lossless files by their folder that are named as a label map of another file there."""
    there = {(paths[place].parent, paths[place].stem.lower()) for place in among}

    def folder(path: Path) -> Path | None:
        bare = _ENDING.sub("", stem := path.stem.lower())
        named = bare != stem and path.suffix.lower() in _LOSSLESS and (path.parent, bare) in there
        return path.parent if named else None

    return _grouped(paths, among, folder)


def _of_lossy_images(paths: list[Path], among: list[int], root: Path) -> Groups:
    """Lossless files by their folder that have the stem of a JPEG or WebP."""
    lossy = {paths[place].stem.lower() for place in among if paths[place].suffix.lower() in _LOSSY}
    return _grouped(
        paths,
        among,
        lambda path: path.parent if path.suffix.lower() in _LOSSLESS and path.stem.lower() in lossy else None,
    )


def _sampled(
    places: list[int], paths: list[Path], by_stem: dict[str, list[int]], found: dict[int, Path], *, grey_only: bool
) -> bool:
    """Whether most of these files have images of their stem elsewhere, and most of a sample are their label maps."""
    own = set(places)
    partners = {}
    for place in places:
        others = (other for other in by_stem[_stem(paths[place])] if other not in own and other not in found)
        if (partner := next(others, None)) is not None:
            partners[place] = partner
    if not partners or 2 * len(partners) <= len(places):
        return False
    chosen = list(partners)[:: max(1, len(partners) // _SAMPLE)][:_SAMPLE]
    like = 0
    for asked, place in enumerate(chosen, 1):
        like += _is_label_map(paths[place], paths[partners[place]], grey_only=grey_only)
        if grey_only and like < asked:
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
