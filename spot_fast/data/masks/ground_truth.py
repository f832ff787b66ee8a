"""Ground truth of one image, as square label maps or at the image's own size."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class Masks:
    """Ground truth of one image, int64 label maps [M, M]; 0 is background. ignore: 1 = void, which counts nowhere.

    panoptic: segments of things and stuff; -1 where nothing is labelled.
    """

    instances: torch.Tensor
    classes: torch.Tensor | None = None
    ignore: torch.Tensor | None = None
    panoptic: torch.Tensor | None = None


@dataclass(frozen=True)
class FullLabels:
    """Ground truth of one image at its own size, [height, width], for protocols that crop or count differently.

    instances    int32, 0 is background; where instances overlap, the earlier one
    classes      int32, class of that instance
    top_classes  int32, the highest class of all instances at the pixel
    covered      bool, more than one instance covers the pixel
    undecided    bool, the annotators left the pixel open (VOC's rim); background in the maps above
    """

    instances: np.ndarray
    classes: np.ndarray
    top_classes: np.ndarray
    covered: np.ndarray
    undecided: np.ndarray
