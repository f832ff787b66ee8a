"""A quick look at a model in training: reconstruction loss and mBO_i on a few validation pictures."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .data.base import ImageSet
from .encoder import normalise
from .errors import UserError
from .evaluation import slot_noise
from .metrics import Scores, labels_from_soft
from .model import Spot


@torch.no_grad()
def quick_validation(model: Spot, val_set: ImageSet, *, images: int, batch_size: int,
                     device: torch.device) -> dict[str, float]:  # fmt: skip
    """Scores of the first `images` readable pictures in patch order 0; the same noise every time.

    val_loss is the reconstruction loss; mbo_i_decoder and mbo_i_slots are fractions, missing without masks. Draws
    nothing from PyTorch's generators.
    """
    scores = {"decoder": Scores(), "slots": Scores()}
    error, seen = 0.0, 0
    indices = list(range(min(images, len(val_set))))
    for start in range(0, len(indices), batch_size):
        batch = [found for index in indices[start : start + batch_size] if (found := _read(val_set, index))]
        if not batch:
            continue
        numbers, pictures, masks = zip(*batch, strict=True)
        features, target = model.encode(normalise(torch.stack(pictures).to(device)))
        slots = model.slot_encoder
        noise = slot_noise(0, numbers, slots.num_slots, slots.slot_dim).to(device) if slots.init == "gaussian" else None
        output = model(features, target, noise=noise)
        error += F.mse_loss(output.prediction.float(), target.float()).item() * len(batch)
        seen += len(batch)
        if masks[0] is not None:
            instances = torch.stack([m.instances for m in masks]).to(device)
            ignore = [torch.zeros_like(m.instances) if m.ignore is None else m.ignore for m in masks]
            for name, soft in (("decoder", output.masks), ("slots", output.slot_attn)):
                labels = labels_from_soft(soft, instances.shape[-1])
                scores[name].add(labels, slots.num_slots, instances, ignore=torch.stack(ignore).to(device))
    if not seen:
        return {}
    mbo = {f"mbo_i_{name}": score.result()["mbo_i"] for name, score in scores.items()}
    return {"val_loss": error / seen, **{name: value for name, value in mbo.items() if value is not None}}


def _read(val_set: ImageSet, index: int):
    """Index, picture and masks (None if the set has none); None where they cannot be read."""
    try:
        return index, val_set.val_image(index), val_set.val_masks(index) if val_set.has_masks else None
    except UserError:
        return None
