"""Any folder of images, or any list of image files, without masks."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from ..errors import UserError
from .base import ImageFiles

EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm", ".jp2"})


def list_images(sources: str | Path | Iterable[str | Path]) -> list[Path]:
    """Image files of folders (recursively, by extension, sorted) and files (as they are, whatever their name).

    Hidden files and folders are left out. UserError names a source that does not exist or a folder without images.
    """
    if isinstance(sources, str | Path):
        sources = [sources]
    found: list[Path] = []
    for source in map(Path, sources):
        if source.is_dir():
            inside = [path for path in sorted(source.rglob("*")) if _is_image(path.relative_to(source), path)]
            if not inside:
                raise UserError(f"{source} has no images ({', '.join(sorted(EXTENSIONS))}) in it")
            found += inside
        elif source.exists():
            found.append(source)
        else:
            raise UserError(f"{source} does not exist: name an image or a folder of images")
    return found


def _is_image(inside: Path, path: Path) -> bool:
    return path.suffix.lower() in EXTENSIONS and not any(p.startswith(".") for p in inside.parts) and path.is_file()


class Folder(ImageFiles):
    """Pictures of folders or files, cropped as COCO's; `limit` 0 = all. Turned upright by EXIF."""

    def __init__(self, sources: str | Path | Iterable[str | Path], *, image_size: int = 224, mask_size: int = 320,
                 crop: str = "center", flip: bool = False, limit: int = 0) -> None:
        self.name = "image folder"
        paths = list_images(sources)
        if not paths:
            raise UserError("no images given: name an image or a folder of images")
        super().__init__(paths[:limit] if limit else paths, image_size=image_size, mask_size=mask_size, crop=crop,
                         flip=flip, upright=True)

    def label(self, index: int) -> str:
        return str(self.paths[index])
