"""A trained model for images of other shapes: the same weights on another grid of patches.

Nothing in SPOT but positions is tied to the grid it was trained on. The ViT's position table is resampled as for a
ViT of another image size, a rotary table is computed anew; slots have no positions; the transformer decoder has none
either, knows its place from the features it is fed, and takes any order of any number of patches. CapPa and the MLP
decoder have learned positions, which are resampled like the ViT's. At the trained grid the outputs are the same bits;
elsewhere everything is defined and nothing is guaranteed: the model has not seen such grids.
"""

from __future__ import annotations

import copy
from typing import TypeVar

from torch import nn

from spot_fast.model.encoder import resample_positions
from spot_fast.model.patch_orders import patch_orders
from spot_fast.model.spot import Spot

Module = TypeVar("Module", bound=nn.Module)


def sharing_copy(module: Module) -> Module:
    """A copy with the very same parameters, so that it takes no memory; what is set on it is not set on `module`."""
    return copy.deepcopy(module, {id(parameter): parameter for parameter in module.parameters()})


def at_grid(model: Spot, height: int, width: int) -> Spot:
    """`model` for images of height × width patches, in its precision and on its device; weights are shared.

    `segment` of the result takes [B, 3, height · patch, width · patch]; N = height · width tokens in raster order.
    """
    twin = sharing_copy(model)
    how = model.config.pos_resize
    twin.encoder.set_grid(height, width, how)
    decoder = twin.decoder
    if hasattr(decoder, "orders"):
        decoder.orders = patch_orders((height, width), model.config.orders).to(decoder.orders.device)
    if hasattr(decoder, "positions"):
        table = resample_positions(decoder.positions.detach()[None], (height, width), 0, how)
        decoder.positions = nn.Parameter(table[0], requires_grad=decoder.positions.requires_grad)
    return twin
