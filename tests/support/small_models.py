"""An untrained model of 4 × 4 tokens, and scenes for it of which some cannot be read or are marked as void."""

import torch

from spot_fast.checkpoints.encoder_weights import frozen_encoder
from spot_fast.config import preset
from spot_fast.data.base import ImageSet, Masks
from spot_fast.data.datasets.scenes import Scenes
from spot_fast.errors import CorruptImage
from spot_fast.model.spot import Spot

SIZE = 32


def small_config(stage=1, **changes):
    sizes = dict(
        image_size=SIZE,
        mask_size=SIZE,
        num_slots=4,
        slot_dim=16,
        slot_mlp=16,
        dec_blocks=1,
        dec_mlp_hidden=16,
        val_images=10,
        train_images=8,
        encoder_weights="none",
    )
    return preset("scenes", stage, **(sizes | changes))


def small_model(seed=0, **changes):
    torch.manual_seed(seed)
    config = small_config(**changes)
    return Spot(config, frozen_encoder(config)).eval()


class Images(ImageSet):
    """Scenes of which some cannot be read, or with other masks."""

    name = "images"
    has_masks = True

    def __init__(self, count, *, broken=(), classes=True, ignore=()):
        self.scenes, self.broken, self.ignore = Scenes(count, "val", size=SIZE), broken, ignore
        self.has_classes = classes

    def __len__(self):
        return len(self.scenes)

    def label(self, index):
        return f"{index}.jpg"

    def prepared(self, index):
        return self.scenes.prepared(index)

    def val_image(self, index):
        if index in self.broken:
            raise CorruptImage(f"image {index}.jpg cannot be read: truncated")
        return self.scenes.val_image(index)

    def val_masks(self, index):
        masks = self.scenes.val_masks(index)
        ignore = (masks.instances == 1).long() if index in self.ignore else None
        return Masks(masks.instances, masks.classes if self.has_classes else None, ignore)
