"""What the segment command keeps of all images beside each one's own files: its record, a data set in COCO's format,
one file of slots. A stopped call goes on with them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from spot_fast import __version__
from spot_fast.segmentation import coco
from spot_fast.segmentation.batch import Finished, Outputs, Source
from spot_fast.segmentation.files import key_of, stamp_of
from spot_fast.segmentation.record import Record
from spot_fast.segmentation.segmenter import Segmenter
from spot_fast.segmentation.slot_file import SlotFile


class Collected:
    """Takes finished images with `add`; `finish` writes the files of all.

    Args:
        outputs: the files of each image.
        settings: everything else that they depend on, but for the model.
        coco_file, slot_file: the files to write, or None.
        resume: go on with what an earlier call with the same settings finished.
    """

    def __init__(
        self,
        segmenter: Segmenter,
        outputs: Outputs,
        settings: dict,
        *,
        coco_file: Path | None = None,
        slot_file: Path | None = None,
        resume: bool = False,
    ) -> None:
        self._model, self._coco_file, self._outputs = key_of(segmenter.identity), coco_file, outputs
        settings = {
            "model": key_of(f"{segmenter.identity}\n{segmenter.version}"),
            "version": __version__,
            "files": outputs.endings,
            "kinds": list(outputs.kinds),
            "regions": outputs.regions,
            **settings,
        }
        self._record = Record(outputs.out, settings, read=resume)
        self._slots = None
        if slot_file is not None:
            self._slots = SlotFile(slot_file, self._record.of_settings, read=resume)

    def has(self, source: Source) -> bool:
        """Whether nothing of the image is missing, so that it need not be segmented again."""
        key = source.origin.key
        return (
            self._record.has(key, _stamp(source))
            and self._outputs.complete(source.name)
            and (self._slots is None or key in self._slots)
        )

    def add(self, source: Source, finished: Finished) -> None:
        """Takes an image whose own files are written."""
        key, (width, height) = source.origin.key, finished.size
        if self._slots is not None:
            self._slots.add(key, finished.slots)
        entry = {"image": source.image, "name": source.name, "width": width, "height": height}
        if finished.regions is not None:
            entry["regions"] = finished.regions
        self._record.add(key, _stamp(source), entry)  # last: what has a line is complete

    def finish(self, sources: Sequence[Source]) -> None:
        """Writes the files of all images, in the order of `sources`; those that could not be read are left out."""
        self._record.close()
        done = [(number, key) for number, source in enumerate(sources) if (key := source.origin.key) in self._record]
        if self._coco_file is not None:
            about = coco.info(self._model, self._outputs.kinds[0])

            def images() -> Iterator[coco.ImageEntry]:
                entries = self._record.entries([key for _, key in done])
                for (number, _), entry in zip(done, entries, strict=True):
                    source = sources[number]
                    id = source.listed.id if source.listed else number + 1
                    yield coco.ImageEntry(id, source.file_name, entry["width"], entry["height"], entry["regions"])

            coco.write_data_set(self._coco_file, about, images)
        if self._slots is not None:
            names = [sources[number].file_name for number, _ in done]
            self._slots.finish([key for _, key in done], names, self._model)

    def close(self) -> None:
        """What was added stays for a call that goes on."""
        self._record.close()
        if self._slots is not None:
            self._slots.close()


def _stamp(source: Source) -> str:
    width, height = source.mask_size or (0, 0)
    return f"{stamp_of(source.path)} {width} {height}"
