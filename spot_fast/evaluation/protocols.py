"""Protocols: how published code bases turn masks into scores. They count differently, so their numbers differ.

A protocol is a size of label maps, a conversion of annotations to a label map, and `metrics.Rules`; it names the source
and commit that it follows. All use the centred square of an image (MOVi frames: all of it) and the run's own input,
whatever size and filter the code base has, so one forward pass serves every protocol.

Annotations differ as well. If a data set lacks those that a code base reads, its own are used: OCBench reads COCO's
panoptic maps (here instances_val2017.json, where a pixel of several instances is the earlier one's) and VOC 2007 (here
VOC 2012 val). Sets without crowd regions, overlaps or undecided pixels use their own label maps, resized by the nearest
neighbour. MOVi is scored frame by frame; SlotDiffusion scores whole clips.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from spot_fast.data.base import FullLabels, ImageFiles, ImageSet, Masks
from spot_fast.data.decoding import transforms
from spot_fast.errors import UserError
from spot_fast.evaluation.metrics import OVERLAP, SPOT_RULES, VOID, Rules


@dataclass(frozen=True)
class Protocol:
    """One way of scoring.

    about, source    a line each: its peculiarities, and their source
    size, stretched  side of the label map, pixels, for photos and for stretched frames; 0: the run's mask_size
    truth            (annotations at full size, size) → Masks with VOID and OVERLAP; None: the set's own `val_masks`
    crowd            COCO's crowd regions are instances
    ignored          label of pixels that a set without full annotations ignores; None: they keep their own
    square           the square of panoptic segments, which has to be that of `truth`: (label map, size) → label map
    """

    name: str
    about: str
    source: str
    rules: Rules = SPOT_RULES
    size: int = 0
    stretched: int = 0
    truth: Callable[[FullLabels, int], Masks] | None = None
    crowd: bool = True
    ignored: int | None = VOID
    square: Callable[[np.ndarray, int], torch.Tensor] = transforms.center_crop_labels


def _crop_first(labels: np.ndarray, size: int) -> torch.Tensor:
    """The largest centred square, resized by the nearest pixel centre."""
    height, width = labels.shape
    side = min(height, width)
    at = ((np.arange(size) + 0.5) * side / size).astype(np.int64)
    return torch.from_numpy(labels[np.ix_((height - side) // 2 + at, (width - side) // 2 + at)])


def _nearest_corner(labels: np.ndarray, size: int) -> torch.Tensor:
    """Minor side to `size` by the nearest upper left corner (OpenCV's nearest), centred square."""
    height, width = labels.shape
    factor = max(size / height, size / width)
    positions = []
    for length in (height, width):
        resized = round(length * factor)
        at = np.arange((resized - size) // 2, (resized - size) // 2 + size)
        positions.append(np.minimum((at * (length / resized)).astype(np.int64), length - 1))
    return torch.from_numpy(labels[np.ix_(*positions)])


def _masked(labels: np.ndarray, where: np.ndarray, value: int) -> np.ndarray:
    return np.where(where, np.int32(value), labels)


def _oclf_truth(full: FullLabels, size: int) -> Masks:
    # VOC's two maps disagree here and there: a pixel is an instance's if both label it.
    both = (full.instances > 0) & (full.top_classes > 0)
    instances = _masked(np.where(both, full.instances, 0), full.covered | full.undecided, VOID)
    classes = _masked(np.where(both, full.top_classes, 0), full.undecided, VOID)
    return Masks(transforms.center_crop_labels(instances, size), transforms.center_crop_labels(classes, size))


def _slotdiffusion_truth(full: FullLabels, size: int) -> Masks:
    apart = full.covered | full.undecided
    maps = (_masked(labels, apart, OVERLAP) for labels in (full.instances, full.classes))
    return Masks(*(_nearest_corner(labels, size) for labels in maps))


def _ocbench_truth(full: FullLabels, size: int) -> Masks:
    return Masks(_crop_first(full.instances, size))


def _lsd_truth(full: FullLabels, size: int) -> Masks:
    return Masks(transforms.center_crop_labels(full.instances, size))


PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol(
            "spot",
            "SPOT: mask_size (320; MOVi 128), pixels of several instances ignored, VOC's rim is background",
            "gkakogeorgiou/spot eval_spot.py, ocl_metrics.py, datasets.py; SPOT, section 4",
        ),
        Protocol(
            "oclf",
            "DINOSAUR: as spot, but without crowd regions; VOC's rim ignored; the class maps keep pixels of several "
            "instances, which are of the highest class",
            "amazon-science/object-centric-learning-framework@0a97292 configs/evaluation/projects/bridging/"
            "metrics_coco_ccrop.yaml, metrics_voc2012_masks_ccrop.yaml, metrics_movi_c.yaml, ocl/metrics/masks.py",
            truth=_oclf_truth,
            crowd=False,
        ),
        Protocol(
            "ocbench",
            "OCBench (VQ-VFM-OCL, DIAS): 256 × 256, the background counts as a mask in mBO and mIoU, nothing is "
            "ignored, no FG-ARI for an image without foreground, no class maps",
            "Genera1Z/VQ-VFM-OCL@d21cab5 config-dinosaur/dinosaur_r-coco.py, object_centric_bench/learn/metric.py, "
            "datum/dataset_coco.py",
            Rules(mbo_background=True, miou_background=True, classes=False, empty_ari=False),
            size=256,
            stretched=256,
            truth=_ocbench_truth,
            ignored=None,
            square=_crop_first,
        ),
        Protocol(
            "slotdiffusion",
            "SlotDiffusion: 224 × 224 (MOVi 128), without crowd regions; pixels of several instances and VOC's rim "
            "become background and a predicted mask of their own; the background counts in mIoU",
            "Wuziyi616/SlotDiffusion@eacfc9a slotdiffusion/img_based/test_seg.py, models/eval_utils.py, "
            "datasets/coco.py, datasets/voc.py",
            Rules(miou_background=True),
            size=224,
            stretched=128,
            truth=_slotdiffusion_truth,
            crowd=False,
            ignored=OVERLAP,
            square=_nearest_corner,
        ),
        Protocol(
            "lsd",
            "Latent Slot Diffusion: 256 × 256, mBO and mIoU are means over all objects of all images, matched by "
            "cosine similarity; objects without a partner count nowhere; nothing is ignored, no class maps",
            "JindongJiang/latent-slot-diffusion@b04e74b src/eval/eval.py, src/eval/eval_utils.py",
            Rules(cosine=True, per_object=True, classes=False),
            size=256,
            stretched=256,
            truth=_lsd_truth,
            ignored=None,
        ),
    )
}


def chosen(names: str | Sequence[str]) -> list[Protocol]:
    """The protocols of "spot,oclf" or ["spot", "oclf"], each once, in that order; or "all"."""
    words = names.split(",") if isinstance(names, str) else list(names)
    words = list(dict.fromkeys(word.strip() for word in words if word.strip()))
    if words == ["all"]:
        return list(PROTOCOLS.values())
    unknown = [word for word in words if word not in PROTOCOLS]
    if unknown or not words:
        raise UserError(
            f"--protocol {','.join(words)} is unknown: use all, or some of {', '.join(PROTOCOLS)} with commas between"
        )
    return [PROTOCOLS[word] for word in words]


class GroundTruth:
    """Label maps of the images of `image_set` under one protocol.

    panoptic: with panoptic segments where the set has them, which costs another image file a picture.
    """

    def __init__(self, protocol: Protocol, image_set: ImageSet, *, panoptic: bool = False) -> None:
        self.protocol = protocol
        self.panoptic = panoptic and image_set.has_panoptic
        stretched = getattr(image_set, "crop", "center") == "stretch"
        self._square = transforms.stretch_labels if stretched else protocol.square
        self._size = protocol.stretched if stretched else protocol.size
        self._set = image_set
        if self._size and isinstance(image_set, ImageFiles):
            self._set = copy.copy(image_set)
            self._set.mask_size = self._size

    def masks(self, index: int, read: dict[bool | str, FullLabels | np.ndarray] | None = None) -> Masks:
        """int label maps, all of one size, with VOID and OVERLAP; UserError if they cannot be read.

        read: the image's annotations with and without crowd regions (True, False) and its "panoptic" segments, filled
        in here and shared between protocols.
        """
        read = {} if read is None else read
        masks = self._masks(index, read)
        if not self.panoptic:
            return masks
        if "panoptic" not in read:
            read["panoptic"] = self._set.panoptic_segments(index)
        square = self._square(read["panoptic"], len(masks.instances))
        return replace(masks, panoptic=square.masked_fill(square == 0, VOID))

    def _masks(self, index: int, read: dict[bool | str, FullLabels | np.ndarray]) -> Masks:
        full_labels = getattr(self._set, "full_labels", None)
        if self.protocol.truth is not None and full_labels is not None:
            crowd = self.protocol.crowd
            if crowd not in read:
                read[crowd] = full_labels(index, crowd=crowd)
            return self.protocol.truth(read[crowd], self._size or self._set.mask_size)
        masks = self._set.val_masks(index)
        maps = [masks.instances, masks.classes if self.protocol.rules.classes else None]
        if masks.ignore is not None and self.protocol.ignored is not None:
            maps = [m if m is None else m.masked_fill(masks.ignore != 0, self.protocol.ignored) for m in maps]
        if self._size and len(masks.instances) != self._size:
            maps = [m if m is None else _crop_first(m.numpy(), self._size) for m in maps]
        return Masks(*maps)
