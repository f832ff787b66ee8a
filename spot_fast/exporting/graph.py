"""The graph that is exported: pixels in; slots, masks and label maps out."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from spot_fast.errors import UserError
from spot_fast.model.adaptive_slots import joined
from spot_fast.model.encoder import normalise
from spot_fast.model.spot import Spot
from spot_fast.segmentation.colours import MAX_LABELS
from spot_fast.segmentation.exported_model import INPUT, LABELS, MASKS, SLOTS
from spot_fast.segmentation.segmenter import initial_noise
from spot_kernels import use_backend

_TRACED = 2  # images; torch.export takes a batch of one for a constant


class SegmentationGraph(nn.Module):
    """A trained model from uint8 images to label maps, on the CPU in float32.

    Gaussian slots start from the noise of `model_segmenter`, the same for every image, which is stored as a constant.

    Args:
        decoder: also give the decoder's masks and their label map.
        orders: of the decoder masks, patch order "0", or "all" averaged.
    """

    def __init__(self, model: Spot, *, decoder: bool, orders: str = "0") -> None:
        super().__init__()
        if model.config.num_slots > MAX_LABELS:
            raise UserError(f"this model has {model.config.num_slots} slots: a label map of uint8 holds {MAX_LABELS}")
        self.model = model.float().eval().requires_grad_(False)
        self.decoder, self.orders = decoder, orders
        self.register_buffer("noise", initial_noise(model.config))

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of masks, keys of MASKS."""
        return ("decoder", "slots") if self.decoder else ("slots",)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """uint8 [B, 3, S, S] → the outputs that `exported_model.outputs` names."""
        # not len(images), which torch.export would take for a constant
        noise = None if self.noise is None else self.noise.expand(images.shape[0], -1, -1)
        images, masks = normalise(images), {}
        if self.decoder:
            output = self.model.segment(images, orders=self.orders, noise=noise)
            slots, masks["decoder"], masks["slots"] = output.slots, output.masks, output.slot_attn
        else:
            features, target = self.model.encode(images)
            slots, attn, _ = self.model.slot_encoder(features, noise)
            masks["slots"] = joined(attn, self.model.groups(attn, target))
        results = {SLOTS: slots}
        for kind in self.kinds:
            results[MASKS[kind]] = masks[kind]
            results[LABELS[kind]] = label_map(masks[kind], self.model.config.image_size)
        return results


def label_map(masks: Tensor, size: int) -> Tensor:
    """`spot_kernels.mask_labels` in operators that ONNX has: masks [B, N, K] → uint8 [B, size, size]."""
    grid = math.isqrt(masks.shape[1])
    maps = masks.mT.unflatten(2, (grid, grid))
    return F.interpolate(maps, size=(size, size), mode="bilinear", align_corners=False).argmax(1).to(torch.uint8)


@torch.no_grad()
def traced(graph: SegmentationGraph) -> ExportedProgram:
    """The graph in ATen operators, for any number of images."""
    size = graph.model.config.image_size
    images = torch.zeros(_TRACED, 3, size, size, dtype=torch.uint8)
    with use_backend("torch"):
        return torch.export.export(graph, (images,), dynamic_shapes={INPUT: {0: Dim("batch", min=1)}})
