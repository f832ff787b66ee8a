"""Modules on the operators: slot attention in its published variants, and the permuted decoder."""

from spot_kernels.modules.initial_slots import InitialSlots
from spot_kernels.modules.layers import linear, mlp
from spot_kernels.modules.name_maps import from_state_dict_of
from spot_kernels.modules.permuted_decoder import (
    PermutedDecoder,
    PermutedDecoderBlock,
    PermutedSelfAttention,
    SlotCrossAttention,
)
from spot_kernels.modules.slot_attention import VARIANTS, SlotAttention

__all__ = [
    "VARIANTS",
    "InitialSlots",
    "PermutedDecoder",
    "PermutedDecoderBlock",
    "PermutedSelfAttention",
    "SlotAttention",
    "SlotCrossAttention",
    "from_state_dict_of",
    "linear",
    "mlp",
]
