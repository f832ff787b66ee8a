"""Whether exported files compute what PyTorch does: label maps, masks and slots of the same images."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from spot_fast.errors import UserError
from spot_fast.exporting.formats import Runner
from spot_fast.segmentation.exported_model import LABELS, MASKS, SLOTS
from spot_fast.segmentation.segmenter import Segmenter
from spot_kernels import mask_labels

LEAST_EQUAL = 0.999  # share of the pixels whose labels are PyTorch's
FEWEST = 5  # images that make batches of three sizes
_FIRST = (1, 3)  # sizes of the first batches; the graph was traced with another


@dataclass
class Agreement:
    """pixels, equal: how many labels were compared and are PyTorch's, by kind of masks. worst: largest absolute
    difference of each float output; NaN if one has it."""

    pixels: dict[str, int] = field(default_factory=dict)
    equal: dict[str, int] = field(default_factory=dict)
    worst: dict[str, float] = field(default_factory=dict)

    def share(self, kind: str) -> float:
        """Of the pixels whose labels are PyTorch's."""
        return self.equal[kind] / self.pixels[kind]

    def add(self, results: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
        for kind, name in LABELS.items():
            if name in expected:
                self.pixels[kind] = self.pixels.get(kind, 0) + expected[name].numel()
                self.equal[kind] = self.equal.get(kind, 0) + int((results[name] == expected[name]).sum())
        for name in (SLOTS, *MASKS.values()):
            if name in expected:
                difference = (results[name] - expected[name]).abs().max()
                self.worst[name] = float(torch.maximum(difference, torch.tensor(self.worst.get(name, 0.0))))


def batches(images: Tensor, size: int) -> list[Tensor]:
    """The images in batches of 1, of 3, and of at most `size`."""
    first, second = _FIRST
    return [images[:first], images[first : first + second], *images[first + second :].split(size)]


def compare(runners: Mapping[str, Runner], reference: Segmenter, batches: Iterable[Tensor]) -> dict[str, Agreement]:
    """Every runner's agreement with `reference`, which computes in PyTorch without a traced graph.

    batches: uint8 images [B, 3, S, S]. Of kinds of masks those are compared that a runner gives.
    """
    agreements = {name: Agreement() for name in runners}
    for images in batches:
        expected = _expected(reference, images)
        for name, run in runners.items():
            results = run(images)
            agreements[name].add(results, {output: expected[output] for output in results})
    return agreements


def _expected(reference: Segmenter, images: Tensor) -> dict[str, Tensor]:
    segments = reference.segment(images)
    outputs = {SLOTS: segments.slots}
    for kind, soft in segments.masks.items():
        outputs |= {MASKS[kind]: soft, LABELS[kind]: mask_labels(soft, reference.size)}
    return outputs


def require_agreement(agreements: Mapping[str, Agreement]) -> None:
    """UserError that names the first format whose labels, masks or slots are not PyTorch's."""
    for name, agreement in agreements.items():
        for kind in agreement.equal:
            if agreement.share(kind) < LEAST_EQUAL:
                raise UserError(
                    f"{name}: {100 * agreement.share(kind):.2f} % of the pixels of {LABELS[kind]} have PyTorch's "
                    f"label, fewer than {100 * LEAST_EQUAL:g} %, so nothing was kept: {_REMEDY}"
                )
        for output, worst in agreement.worst.items():
            if not worst < float("inf"):
                raise UserError(f"{name}: {output} has values that are not finite, so nothing was kept: {_REMEDY}")


_REMEDY = "install the versions in constraints.txt, or leave the format out with --formats"
