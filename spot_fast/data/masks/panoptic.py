"""COCO panoptic files: segments of things and stuff, as a JSON list beside a folder of PNGs whose colours are ids."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from spot_fast.data.listing.names import read_text
from spot_fast.data.masks.labels import open_lossless
from spot_fast.errors import UserError


class Panoptic:
    """Segments of the images that `path`, such as annotations/panoptic_val2017.json, lists; UserError if it is no such
    file. folder: of the PNGs."""

    def __init__(self, path: Path, folder: Path) -> None:
        self.path, self.folder = path, folder
        try:
            annotations = json.loads(read_text(path))["annotations"]
            self._of_image = {str(each["image_id"]): self._listed(each) for each in annotations}
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise UserError(
                f"{path} is not a COCO panoptic file ({type(error).__name__}: {error}): download it again, or move it "
                "away to be scored without it"
            ) from None

    @staticmethod
    def _listed(annotation: dict) -> tuple[str, dict[int, bool]]:
        """File name, and for each id whether it is a crowd region."""
        segments = {int(segment["id"]): bool(segment.get("iscrowd")) for segment in annotation["segments_info"]}
        return str(annotation["file_name"]), segments

    def file(self, image_id: object) -> Path | None:
        """The PNG of an image; None if the list lacks the image."""
        found = self._of_image.get(str(image_id))
        return found and self.folder / found[0]

    def segments(self, image_id: object) -> np.ndarray | None:
        """int32 [height, width]: the image's segments from 1, in the order of their ids; None if it is not listed.

        0 is unlabelled, and a crowd region: several things that nobody separated.
        """
        if (file := self.file(image_id)) is None:
            return None
        image = open_lossless(file)
        if image.mode not in ("RGB", "RGBA"):
            raise UserError(
                f"{file} has no colours ({image.mode}): which are the ids of panoptic segments: download it again"
            )
        colours = np.asarray(image)[..., :3].astype(np.int32)
        ids, at = np.unique(colours @ np.array([1, 1 << 8, 1 << 16], np.int32), return_inverse=True)
        crowd = self._of_image[str(image_id)][1]
        unlisted = [each for each in ids.tolist() if each and each not in crowd]
        if unlisted:
            raise UserError(
                f"{file} has {len(unlisted)} segments that {self.path.name} does not list, the first {unlisted[0]}: "
                "download both again"
            )
        counts = np.array([each != 0 and not crowd[each] for each in ids.tolist()], np.int32)
        return (counts.cumsum() * counts).astype(np.int32)[at].reshape(colours.shape[:2])
