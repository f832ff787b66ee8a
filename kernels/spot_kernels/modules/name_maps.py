"""Parameters of published slot-attention modules → those of `spot_kernels.SlotAttention`, by name.

`NAMES` has the names of each implementation, with the public repository and file that they come from. Weights that
TensorFlow and Flax keep as [in, out] are transposed, and the gates of their GRUs reordered.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch


def _renamed(names: Mapping[str, str], changes: Mapping[str, str]) -> dict[str, str]:
    """The same layers, some of them under other published names."""
    return {changes.get(theirs, theirs): ours for theirs, ours in names.items()}


_PROJECTIONS = {name: name for name in ("project_q", "project_k", "project_v")}
_SLATE = {
    "norm_inputs": "norm_inputs",
    "norm_slots": "norm_slots",
    "norm_mlp": "norm_mlp",
    **_PROJECTIONS,
    "gru": "gru",
    "mlp.0": "mlp.0",
    "mlp.2": "mlp.2",
    "slot_mu": "initial.mean",
    "slot_log_sigma": "initial.scale",
}
_LUCIDRAINS = {
    "to_q": "project_q",
    "to_k": "project_k",
    "to_v": "project_v",
    "norm_input": "norm_inputs",
    "norm_slots": "norm_slots",
    "gru": "gru",
    "slots_mu": "initial.mean",
    "slots_logsigma": "initial.scale",
}
_PORT = {**_LUCIDRAINS, "norm_pre_ff": "norm_mlp", "mlp.0": "mlp.0", "mlp.2": "mlp.2"}
_OCLF = {
    **_LUCIDRAINS,
    "ff_mlp.module.0": "norm_mlp",
    "ff_mlp.module.1": "mlp.0",
    "ff_mlp.module.3": "mlp.2",
    "slots": "initial.mean",
}
_BO_QSA = {**_renamed(_SLATE, {"norm_inputs": "norm_feature"}), "slots_init": "initial.mean"}
_OCBENCH = {
    "proj_q": "project_q",
    "proj_k": "project_k",
    "proj_v": "project_v",
    "norm1kv": "norm_inputs",
    "norm1q": "norm_slots",
    "rnn": "gru",
    "norm2": "norm_mlp",
    "ffn.0": "mlp.0",
    "ffn.2": "mlp.2",
    "ffn.3": "mlp.2",
    "mean": "initial.mean",
    "logstd": "initial.scale",
}

# Implementation → its name of a layer or parameter → ours. If two map to the same one, a state dict has only one.
NAMES: dict[str, dict[str, str]] = {
    # google-research/google-research, slot_attention/model.py, SlotAttention; attribute names, as in its checkpoints
    "locatello": {
        "norm_inputs": "norm_inputs",
        "norm_slots": "norm_slots",
        "norm_mlp": "norm_mlp",
        **_PROJECTIONS,
        "gru": "gru",
        "mlp.layer_with_weights-0": "mlp.0",
        "mlp.layer_with_weights-1": "mlp.2",
        "slots_mu": "initial.mean",
        "slots_log_sigma": "initial.scale",
    },
    # lucidrains/slot-attention, slot_attention/slot_attention.py, SlotAttention
    "lucidrains": _PORT,
    # lucidrains/slot-attention, slot_attention/multi_head_slot_attention.py, MultiHeadSlotAttention
    "lucidrains_heads": {**_PORT, "combine_heads": "project_out"},
    # evelinehong/slot-attention-pytorch, model.py, SlotAttention, and before it learned the logarithm of sigma
    "evelinehong": _renamed(_PORT, {"mlp.0": "fc1", "mlp.2": "fc2", "slots_logsigma": "slots_log_sigma"}),
    "evelinehong_2021": _renamed(_PORT, {"mlp.0": "fc1", "mlp.2": "fc2", "slots_logsigma": "slots_sigma"}),
    # untitled-ai/slot_attention, slot_attention/model.py, SlotAttention
    "untitled_ai": _renamed(_SLATE, {"slot_mu": "slots_mu", "slot_log_sigma": "slots_log_sigma"}),
    # addtt/object-centric-library, models/slot_attention/model.py, SlotAttentionModule
    "object_centric_library": _renamed(_PORT, {"slots_logsigma": "slots_log_sigma"}),
    # stelzner/osrt, osrt/layers.py, SlotAttention
    "osrt": _renamed(_PORT, {"norm_pre_ff": "norm_pre_mlp", "slots_mu": "initial_slots"}),
    # charigyang/motiongrouping, src/model.py, SlotAttention
    "motion_grouping": _renamed(
        _PORT, {"to_q": "project_q", "to_k": "project_k", "to_v": "project_v", "slots_mu": "slots_embedding"}
    ),
    # singhgautam/slate, slot_attn.py, SlotAttention; the initialiser of its SlotAttentionEncoder
    "slate": _SLATE,
    # singhgautam/steve, steve.py, SlotAttentionVideo; its predictor is left out
    "steve": _SLATE,
    # amazon-science/object-centric-learning-framework, ocl/perceptual_grouping.py, SlotAttention with the residual
    # two-layer MLP of ocl/neural_networks/convenience.py; the initialisers of ocl/conditioning.py
    "dinosaur": _OCLF,
    # amazon-science/object-centric-multiple-object-tracking, ocl/perceptual_grouping.py, SlotAttention
    "mot": _OCLF,
    # amazon-science/AdaSlot, ocl/perceptual_grouping.py, SlotAttentionGumbelV1; what scores slots is left out
    "adaslot": _OCLF,
    # rw-ocrl/ftdinosaur-inference, ftdinosaur_inference/modules/slot_attention.py, SlotAttention with the MLP of
    # helpers.py; its RandomSlotInitialization
    "ftdinosaur": {name: ours for name, ours in _OCLF.items() if name != "slots"},
    # YuLiu-LY/BO-QSA, models/slot_attn.py, SlotAttention; the initialisers of its SlotAttentionEncoder
    "bo_qsa": _BO_QSA,
    # YuLiu-LY/BO-QSA, models/SA.py, SlotAttention; the initialisers of its SlotAttentionEncoder
    "bo_qsa_plain": _BO_QSA,
    # google-research/slot-attention-video, savi/modules/attention.py, SlotAttention (Flax)
    "savi": {
        "LayerNorm_0": "norm_slots",
        "LayerNorm_1": "norm_inputs",
        "general_dense_q_0": "project_q",
        "general_dense_k_0": "project_k",
        "general_dense_v_0": "project_v",
        "GRU_0.GRUCell_0": "gru",
        "InvertedDotProductAttention_0.DenseGeneral_0": "project_out",
        "MLP_0.LayerNorm_0": "norm_mlp",
        "MLP_0.dense_mlp_0": "mlp.0",
        "MLP_0.dense_mlp_1": "mlp.2",
    },
    # pairlab/SlotFormer, slotformer/base_slots/models/savi.py, SlotAttention
    "slotformer": {
        "norm_inputs": "norm_inputs",
        "project_q.0": "norm_slots",
        "project_q.1": "project_q",
        "project_k": "project_k",
        "project_v": "project_v",
        "gru": "gru",
        "mlp.0": "norm_mlp",
        "mlp.1": "mlp.0",
        "mlp.3": "mlp.2",
    },
    # gkakogeorgiou/spot, slot_attn.py, SlotAttention; the initialisers of its SlotAttentionEncoder
    "spot": {**_SLATE, "slots_init": "initial.mean"},
    # martius-lab/videosaur, videosaur/modules/groupers.py, SlotAttention with the MLP of networks.py; the initialisers
    # of initializers.py
    "videosaur": {
        "to_q": "project_q",
        "to_k": "project_k",
        "to_v": "project_v",
        "norm_features": "norm_inputs",
        "norm_slots": "norm_slots",
        "gru": "gru",
        "mlp.layers.0": "norm_mlp",
        "mlp.layers.1": "mlp.0",
        "mlp.layers.3": "mlp.2",
        "mean": "initial.mean",
        "log_std": "initial.scale",
        "slots": "initial.mean",
    },
    # JindongJiang/latent-slot-diffusion, src/models/slot_attn.py, MultiHeadSTEVESA; the layers before and after slot
    # attention are left out
    "lsd": _SLATE,
    # sony/coda, src/layers/slot_attn.py, SlotAttn, likewise
    "coda": _SLATE,
    # Genera1Z/SmoothSA, object_centric_bench/model/ocl.py, SlotAttention, with dropout in its MLP or without; its
    # NormalShared and NormalSeparat
    "ocbench": _OCBENCH,
    # Genera1Z/DIAS, object_centric_bench/model/dias.py, SlotAttentionWithAllAttent
    "dias": _OCBENCH,
    # lhj-lhj/MetaSlot, object_centric_bench/model/metaslot.py, MetaSlot; its codebook is left out
    "metaslot": _OCBENCH,
}
_AROUND_LSD = ("pos.", "in_layer_norm.", "in_mlp.", "out_layer_norm.", "out_linear.")
_LEFT_OUT = {
    "steve": ("predictor.",),
    "adaslot": ("single_gumbel_score_network.",),
    "lsd": _AROUND_LSD,
    "coda": _AROUND_LSD,
    "metaslot": ("vq.", "clust_prob"),
}
_NORMS = ("norm_inputs", "norm_slots", "norm_mlp")
_GRU = ("gru.weight_ih", "gru.weight_hh", "gru.bias_ih", "gru.bias_hh")
_REQUIRED = (
    "norm_inputs.weight",
    "norm_inputs.bias",
    "norm_slots.weight",
    "norm_slots.bias",
    "project_q.weight",
    "project_k.weight",
    "project_v.weight",
)
_MLP = ("norm_mlp.weight", "norm_mlp.bias", "mlp.0.weight", "mlp.0.bias", "mlp.2.weight", "mlp.2.bias")


def from_state_dict_of(
    variant: str, state: Mapping[str, Any], *, prefix: str = "", initial_prefix: str | None = None
) -> dict[str, torch.Tensor]:
    """Converts the state dict of a published implementation to our names, shapes and gate order.

    Args:
        variant: one of `NAMES`.
        state: its parameters, tensors or NumPy arrays. Names may be joined by dots or slashes, or nested (Flax);
            TensorFlow's `/.ATTRIBUTES/VARIABLE_VALUE` and its optimiser's slots are dropped.
        prefix: it is cut off, and names without it are ignored. With "" every name has to be known.
        initial_prefix: prefix of the initial slots' parameters, if not `prefix`: in SLATE's checkpoint `prefix` is
            `slot_attn.slot_attention.`, `initial_prefix` is `slot_attn.`. These parameters may be missing.

    Raises:
        ValueError: naming the variant if it is unknown, or the parameters that are unknown or missing.
    """
    if variant not in NAMES:
        raise ValueError(f"variant={variant!r} is unknown: use one of {', '.join(NAMES)}")
    names, layers, unknown = NAMES[variant], {}, []
    for name, value in _selected(variant, state, _dotted(prefix), initial_prefix):
        layer = max((x for x in names if name == x or name.startswith(f"{x}.")), key=len, default=None)
        if layer is None or layer != layers.setdefault(names[layer], (layer, {}))[0]:
            unknown.append(name)
        else:
            layers[names[layer]][1][name[len(layer) :].removeprefix(".")] = torch.as_tensor(value)
    convert = {"locatello": _from_keras, "savi": _from_flax}.get(variant, _from_torch)
    converted: dict[str, torch.Tensor] = {}
    for ours, (theirs, parameters) in layers.items():
        converted.update(convert(ours, parameters))
        unknown += [f"{theirs}.{parameter}" for parameter in parameters]
    # VideoSAUR's GRU is an option, as the MLP of all is
    optional = (_MLP, _GRU) if variant == "videosaur" else (_MLP,)
    absent = [group for group in optional if converted.keys().isdisjoint(group)]
    required = [name for group in (_REQUIRED, _GRU, _MLP) if group not in absent for name in group]
    missing = [name for name in required if name not in converted]
    if unknown or missing:
        raise ValueError(
            f"this is not the state dict of {variant}: unknown {', '.join(sorted(unknown)) or 'nothing'}; "
            f"missing (by our names) {', '.join(missing) or 'nothing'}"
        )
    return converted


def _dotted(name: str) -> str:
    return name.replace("/", ".")


def _flat(state: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in state.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{above}{name}.")
        else:
            yield _dotted(above + name).removesuffix("..ATTRIBUTES.VARIABLE_VALUE"), value


def _selected(
    variant: str, state: Mapping[str, Any], prefix: str, initial_prefix: str | None
) -> Iterator[tuple[str, Any]]:
    initial = [name for name, ours in NAMES[variant].items() if ours.startswith("initial.")]
    for name, value in _flat(state):
        if ".OPTIMIZER_SLOT" in name:
            continue
        if initial_prefix is not None and name.startswith(_dotted(initial_prefix)):
            inner = name[len(initial_prefix) :]
            if inner.removesuffix(".weight") in initial:
                yield inner, value
                continue
        if name.startswith(prefix):
            inner = name[len(prefix) :]
            if not inner.startswith(_LEFT_OUT.get(variant, ())):
                yield inner, value


# Each converter removes the parameters that it knows from `parameters`, so that unknown ones are left, and returns them
# by our names.


def _take(layer: str, parameters: dict[str, torch.Tensor], names: Mapping[str, str]) -> dict[str, torch.Tensor]:
    return {f"{layer}.{ours}": parameters.pop(theirs) for theirs, ours in names.items() if theirs in parameters}


def _from_torch(layer: str, parameters: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    if layer.startswith("initial."):
        # a parameter [1, K, U], or the weight [K, U] of an nn.Embedding
        value = parameters.pop("weight" if "weight" in parameters else "", None)
        return {} if value is None else {layer: value if value.dim() == 3 else value[None]}
    names = (name.removeprefix("gru.") for name in _GRU) if layer == "gru" else ("weight", "bias")
    return _take(layer, parameters, {name: name for name in names})


def _from_keras(layer: str, parameters: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    if layer.startswith("initial."):
        return _from_torch(layer, parameters)
    if layer in _NORMS:
        return _take(layer, parameters, {"gamma": "weight", "beta": "bias"})
    if layer != "gru":
        return _transposed(_take(layer, parameters, {"kernel": "weight", "bias": "bias"}))
    converted = _transposed(_take(layer, parameters, {"kernel": "weight_ih", "recurrent_kernel": "weight_hh"}))
    if "bias" in parameters:
        converted["gru.bias_ih"], converted["gru.bias_hh"] = parameters.pop("bias")
    # Keras keeps update, reset, candidate; PyTorch reset, update, candidate
    thirds = {name: value.chunk(3) for name, value in converted.items()}
    return {name: torch.cat((reset, update, new)) for name, (update, reset, new) in thirds.items()}


def _from_flax(layer: str, parameters: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    if layer in _NORMS:
        return _take(layer, parameters, {"scale": "weight", "bias": "bias"})
    if layer != "gru":
        converted = _take(layer, parameters, {"kernel": "weight", "bias": "bias"})
        # q, k, v: [in, H, d]; the projection of all heads: [H, d, out]
        joined = (0, -2) if layer == "project_out" else (1, -1)
        if f"{layer}.weight" in converted:
            converted[f"{layer}.weight"] = converted[f"{layer}.weight"].flatten(*joined)
        return _transposed(converted)
    converted = {}
    for kind, gates in (("ih", ("ir", "iz", "in")), ("hh", ("hr", "hz", "hn"))):
        if all(f"{gate}.kernel" in parameters for gate in gates):
            weights = [parameters.pop(f"{gate}.kernel").T for gate in gates]
            # of the hidden state's gates only the candidate has a bias
            biases = [parameters.pop(f"{gate}.bias", weights[0].new_zeros(len(weights[0]))) for gate in gates]
            converted |= {f"gru.weight_{kind}": torch.cat(weights), f"gru.bias_{kind}": torch.cat(biases)}
    return converted


def _transposed(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights from [in, out] to [out, in]."""
    return {name: value.T.contiguous() if value.dim() == 2 else value for name, value in weights.items()}
