"""Fused operators for slot models: slot attention, permuted causal attention, slot cross-attention, mask matching.

Every function takes and returns plain tensors in raster layout; `spot_kernels.reference` has the same operators in a
few lines of PyTorch each.
"""

from spot_kernels import flops
from spot_kernels.add_norm import add_norm
from spot_kernels.clipped_adam import clipped_adam, infinity_norm
from spot_kernels.dispatch import chosen_backend, use_backend
from spot_kernels.folded_cross_attention import folded_cross_attention, folded_cross_map
from spot_kernels.gru_norm import gru_norm
from spot_kernels.linear_assignment import assignment_to_indices, batch_linear_assignment, linear_assignment
from spot_kernels.linear_relu import linear_relu
from spot_kernels.mask_labels import mask_labels
from spot_kernels.mask_matching import assign_masks, match_masks, overlap_counts
from spot_kernels.modules import PermutedDecoder, PermutedDecoderBlock, SlotAttention
from spot_kernels.patching.patch import PatchReport, patch, unpatch
from spot_kernels.permuted_attention import permuted_causal_attention
from spot_kernels.shift_by_order import shift_by_order
from spot_kernels.slot_attention import slot_attention_step
from spot_kernels.slot_cross_attention import slot_cross_attention, slot_cross_map

# of spot-kernels and of spot-fast, which contains it
__version__ = "0.1.0"

__all__ = [
    "PatchReport",
    "PermutedDecoder",
    "PermutedDecoderBlock",
    "SlotAttention",
    "add_norm",
    "assign_masks",
    "assignment_to_indices",
    "batch_linear_assignment",
    "chosen_backend",
    "clipped_adam",
    "folded_cross_attention",
    "folded_cross_map",
    "gru_norm",
    "infinity_norm",
    "linear_assignment",
    "linear_relu",
    "mask_labels",
    "match_masks",
    "overlap_counts",
    "patch",
    "permuted_causal_attention",
    "shift_by_order",
    "slot_attention_step",
    "slot_cross_attention",
    "slot_cross_map",
    "unpatch",
    "use_backend",
]

flops.register()
