"""Quick validation of a model in training: reconstruction loss and mBO_i on a few images."""

from __future__ import annotations

from itertools import islice

import torch
import torch.nn.functional as F

from spot_fast.data.base import ImageSet
from spot_fast.evaluation.metrics import Scores, count_pairs, labels_from_soft
from spot_fast.evaluation.protocols import PROTOCOLS, GroundTruth
from spot_fast.evaluation.scoring import WORKERS, read_images, slot_noise, stack_truth
from spot_fast.model.adaptive_slots import joined
from spot_fast.model.encoder import normalise
from spot_fast.model.spot import Spot
from spot_fast.system.devices import send


@torch.no_grad()
def quick_validation(
    model: Spot,
    val_set: ImageSet,
    *,
    images: int,
    batch_size: int,
    device: torch.device,
    skipped: dict[str, str] | None = None,
) -> dict[str, float]:
    """Scores of the readable ones among the first `images` images, in patch order 0, with the same noise every time.

    val_loss is the reconstruction loss; mbo_i_decoder and mbo_i_slots are fractions, missing without masks. PyTorch's
    generators do not advance, so a run with validation trains as one without.

    skipped: gets the label of each unreadable image and the reason.
    """
    scores = {"decoder": Scores(), "slots": Scores()}
    truths = GroundTruth(PROTOCOLS["spot"], val_set) if val_set.has_masks else None

    def load(index: int):
        return index, val_set.val_image(index), truths and truths.masks(index)

    error, seen, slots = 0.0, 0, model.slot_encoder
    skipped = {} if skipped is None else skipped
    readable = read_images(load, val_set, range(min(images, len(val_set))), WORKERS, skipped)
    while batch := list(islice(readable, batch_size)):
        numbers, squares, masks = zip(*batch, strict=True)
        features, target = model.encode(normalise(send(torch.stack(squares), device)))
        noise = None
        if slots.init == "gaussian":
            noise = send(slot_noise(0, numbers, slots.num_slots, slots.slot_dim), device)
        output = model(features, target, noise=noise)
        error += F.mse_loss(output.prediction.float(), target.float()).item() * len(batch)
        seen += len(batch)
        if truths:
            truth = stack_truth(masks, device)
            groups = model.groups(output.slot_attn, target)
            for name, soft in (("decoder", output.masks), ("slots", output.slot_attn)):
                labels = labels_from_soft(joined(soft, groups), truth.labels.shape[-1])
                scores[name].add_counts(count_pairs(labels, slots.num_slots, truth).cpu(), truth)
    if not seen:
        return {}
    mbo = {f"mbo_i_{name}": score.result()["mbo_i"] for name, score in scores.items()}
    return {"val_loss": error / seen, **{name: value for name, value in mbo.items() if value is not None}}


def skipped_images_line(skipped: dict[str, str]) -> str:
    """The line about images that validation cannot read."""
    label, reason = next(iter(skipped.items()))
    others = f", and {len(skipped) - 1} more" if len(skipped) > 1 else ""
    return f"validation leaves out {label}{others}: {reason}"
