"""A trained model on another grid of patches, for images of other shapes, with the same weights.

Only positions tie SPOT to the grid that it was trained on. The ViT's position table is resampled as for another image
size, and a rotary table is computed anew. Slots and the transformer decoder have no positions: the decoder takes any
order of any number of patches. The learned positions of CapPa and of the MLP decoder are resampled like the ViT's.
At the trained grid the outputs are bit for bit the model's own; other grids the model has never seen.
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
    """A copy that shares the parameters and so takes no memory; attributes set on it are not set on `module`."""
    # deepcopy takes what its memo maps an object to, here the parameters themselves, for the copy.
    return copy.deepcopy(module, {id(parameter): parameter for parameter in module.parameters()})


def at_grid(model: Spot, height: int, width: int) -> Spot:
    """`model` for images [B, 3, height · patch, width · patch]: N = height · width tokens; weights are shared."""
    copied = sharing_copy(model)
    how = model.config.pos_resize
    copied.encoder.set_grid(height, width, how)
    decoder = copied.decoder
    # By attribute rather than class, so that registered decoders with orders or learned positions work too.
    if hasattr(decoder, "orders"):
        decoder.orders = patch_orders((height, width), model.config.orders).to(decoder.orders.device)
    if hasattr(decoder, "positions"):
        table = resample_positions(decoder.positions.detach()[None], (height, width), 0, how)
        decoder.positions = nn.Parameter(table[0], requires_grad=decoder.positions.requires_grad)
    return copied
