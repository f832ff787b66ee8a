"""The published slot-attention classes that `spot_kernels.patch` knows: what each looks like, and what replaces what.

`IMPLEMENTATIONS` names for each the public repository and file it was read from.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from spot_kernels.patching import published
from spot_kernels.patching.class_shape import ClassShape, Layer, Sizes, chain, gru, linear, named, norm

# draw(*shape) gives random inputs of the module's dtype; a call is what a published method is passed.
Draw = Callable[..., torch.Tensor]
Call = tuple[tuple[Any, ...], dict[str, Any]]
BATCH, TOKENS, SLOTS = 2, 11, 3

WHOLE = "attention and update"
ATTENTION = "attention"


@dataclass(frozen=True)
class Implementation:
    """name: as reports have it. source: repository and file. shape: of the class. methods: what replaces what of it.

    replaced: in words. calls: small example calls of the forward pass, for the comparison before anything is replaced.
    note: what a user should know about a module that has been replaced. default_noise: whether its noise has the
    default dtype, not that of the inputs, which shows where the two differ (bfloat16 inputs, say).
    """

    name: str
    source: str
    shape: ClassShape
    methods: dict[str, Callable]
    replaced: str
    calls: Callable[[nn.Module, Sizes, Draw], list[Call]]
    note: str = ""
    default_noise: bool = False


def _tokens(sizes: Sizes, draw: Draw) -> torch.Tensor:
    return draw(BATCH, TOKENS, sizes["D"])


def _with_slots(module: nn.Module, sizes: Sizes, draw: Draw) -> list[Call]:
    """forward(inputs, slots)"""
    return [((_tokens(sizes, draw), draw(BATCH, getattr(module, "num_slots", SLOTS), sizes["U"])), {})]


def _with_iterations(name: str, *, slots_first: bool = False) -> Callable[[nn.Module, Sizes, Draw], list[Call]]:
    """forward(inputs, slots, iterations): as often as by default, and twice."""

    def calls(module: nn.Module, sizes: Sizes, draw: Draw) -> list[Call]:
        tensors = _tokens(sizes, draw), draw(BATCH, SLOTS, sizes["U"])
        tensors = tensors[::-1] if slots_first else tensors
        return [(tensors, {}), (tensors, {name: 2})]

    return calls


def _by_count(module: nn.Module, sizes: Sizes, draw: Draw) -> list[Call]:
    """forward(inputs, num_slots)"""
    inputs = _tokens(sizes, draw)
    return [((inputs,), {}), ((inputs,), {"num_slots": SLOTS})]


def _alone(module: nn.Module, sizes: Sizes, draw: Draw) -> list[Call]:
    """forward(inputs)"""
    return [((_tokens(sizes, draw),), {})]


def _video(module: nn.Module, sizes: Sizes, draw: Draw) -> list[Call]:
    """forward(inputs), inputs [B, T, N, D]"""
    return [((draw(BATCH, 2, TOKENS, sizes["D"]),), {})]


def _maps(module: nn.Module, sizes: Sizes, draw: Draw) -> list[Call]:
    """forward(inputs), inputs [B, T, D, h, w]; the positions say h and w."""
    own = *module.pos.parameters(recurse=False), *module.pos.buffers(recurse=False)
    positions = next((p for p in own if p.dim() == 4), None)
    height, width = (4, 4) if positions is None else positions.shape[-2:]
    return [((draw(BATCH, 1, sizes["D"], height, width),), {})]


_FLOAT = (float, int)
_ANY = Layer()
_DROP_PATH = named("DropPath", "Identity")
_MLP = chain(linear("U", "M"), Layer(nn.ReLU), linear("M", "U"))
_NORM_MLP = chain(norm("U"), linear("U", "M"), Layer(nn.ReLU), linear("M", "U"))
_LUCIDRAINS = {
    "to_q": linear("D", "D"),
    "to_k": linear("D", "D"),
    "to_v": linear("D", "D"),
    "gru": gru("D", "D"),
    "norm_input": norm("D"),
    "norm_slots": norm("D"),
    "norm_pre_ff": norm("D"),
}
_LUCIDRAINS_NUMBERS = {"num_slots": int, "iters": int, "eps": _FLOAT, "scale": _FLOAT}
_SLATE = {
    "norm_inputs": norm("D"),
    "norm_slots": norm("U"),
    "norm_mlp": norm("U"),
    "project_q": linear("U", "U", bias=False),
    "project_k": linear("D", "U", bias=False),
    "project_v": linear("D", "U", bias=False),
    "gru": gru("U", "U"),
    "mlp": _MLP,
}
_SLATE_NUMBERS = {"num_iterations": int, "num_slots": int, "slot_size": int, "epsilon": _FLOAT}
_BO_QSA = {("norm_feature" if name == "norm_inputs" else name): layer for name, layer in _SLATE.items()}
_SLOTFORMER = ClassShape(
    "SlotAttention",
    {
        "norm_inputs": norm("D"),
        "project_q": chain(norm("U"), linear("U", "U", bias=False)),
        "project_k": linear("D", "U", bias=False),
        "project_v": linear("D", "U", bias=False),
        "gru": gru("U", "U"),
        "mlp": _NORM_MLP,
    },
    {"num_iterations": int, "num_slots": int, "slot_size": int, "eps": _FLOAT, "attn_scale": _FLOAT},
)
_OCBENCH = ClassShape(
    "SlotAttention",
    {
        "norm1q": norm("U"),
        "proj_q": linear("U", "U", bias=False),
        "norm1kv": norm("D"),
        "proj_k": linear("D", "U", bias=False),
        "proj_v": linear("D", "U", bias=False),
        "rnn": gru("U", "U"),
        "norm2": norm("U"),
        "ffn": _ANY,
    },
    {"num_iter": int, "trunc_bp": (str, type(None))},
)
_LSD_FILE = "JindongJiang/latent-slot-diffusion, src/models/slot_attn.py"
_LSD = ClassShape(
    "MultiHeadSTEVESA",
    {
        **_SLATE,
        "pos": _ANY,
        "in_layer_norm": norm("D"),
        "in_mlp": _ANY,
        "out_layer_norm": norm("U"),
        "out_linear": linear("U", "O"),
    },
    {**_SLATE_NUMBERS, "num_heads": int, "learnable_slot_init": bool, "bi_level": bool},
    {"slot_mu": (1, 1, "U"), "slot_log_sigma": (1, 1, "U")},
)

_EVELINEHONG = ClassShape(
    "SlotAttention",
    {**_LUCIDRAINS, "fc1": linear("D", "M"), "fc2": linear("M", "D")},
    _LUCIDRAINS_NUMBERS,
    {"slots_mu": (1, 1, "D"), "slots_log_sigma": (1, 1, "D")},
)

_PUBLISHED = (
    Implementation(
        "Slot Attention (evelinehong)",
        "evelinehong/slot-attention-pytorch, model.py",
        _EVELINEHONG,
        {"forward": published.evelinehong},
        WHOLE,
        _by_count,
    ),
    Implementation(
        "Slot Attention (evelinehong, 2021)",
        "evelinehong/slot-attention-pytorch, model.py, before it learned the logarithm of sigma",
        replace(_EVELINEHONG, parameters={"slots_mu": (1, 1, "D"), "slots_sigma": (1, 1, "D")}),
        {"forward": published.evelinehong_2021},
        WHOLE,
        _by_count,
    ),
    Implementation(
        "Slot Attention (untitled-ai)",
        "untitled-ai/slot_attention, slot_attention/model.py",
        # its k and v take inputs as wide as the slots
        ClassShape(
            "SlotAttention", _SLATE, _SLATE_NUMBERS, {}, {"slots_mu": (1, 1, "U"), "slots_log_sigma": (1, 1, "U")}
        ),
        {"forward": published.untitled},
        WHOLE,
        _alone,
    ),
    Implementation(
        "lucidrains",
        "lucidrains/slot-attention, slot_attention/slot_attention.py",
        ClassShape(
            "SlotAttention",
            {**_LUCIDRAINS, "mlp": chain(linear("D", "M"), Layer(nn.ReLU), linear("M", "D"))},
            _LUCIDRAINS_NUMBERS,
            {"slots_mu": (1, 1, "D"), "slots_logsigma": (1, 1, "D")},
        ),
        {"forward": published.lucidrains},
        WHOLE,
        _by_count,
    ),
    Implementation(
        "lucidrains, heads",
        "lucidrains/slot-attention, slot_attention/multi_head_slot_attention.py",
        ClassShape(
            "MultiHeadSlotAttention",
            {
                **_LUCIDRAINS,
                "to_q": linear("D", "I"),
                "to_k": linear("D", "I"),
                "to_v": linear("D", "I"),
                "split_heads": named("Rearrange"),
                "merge_heads": named("Rearrange"),
                "combine_heads": linear("I", "D"),
                "mlp": chain(linear("D", "M"), Layer(nn.ReLU), linear("M", "D")),
            },
            _LUCIDRAINS_NUMBERS,
            {"slots_mu": (1, 1, "D"), "slots_logsigma": (1, 1, "D")},
        ),
        {"forward": published.lucidrains_heads},
        WHOLE,
        _by_count,
    ),
    Implementation(
        "SLATE",
        "singhgautam/slate, slot_attn.py",
        ClassShape("SlotAttention", _SLATE, {**_SLATE_NUMBERS, "num_heads": int}),
        {"forward": published.slate},
        WHOLE,
        _with_slots,
    ),
    Implementation(
        "STEVE",
        "singhgautam/steve, steve.py",
        ClassShape(
            "SlotAttentionVideo",
            {**_SLATE, "predictor": _ANY},
            _SLATE_NUMBERS,
            {"slot_mu": (1, 1, "U"), "slot_log_sigma": (1, 1, "U")},
        ),
        {"forward": published.steve},
        WHOLE,
        _video,
    ),
    Implementation(
        "BO-QSA",
        "YuLiu-LY/BO-QSA, models/slot_attn.py",
        ClassShape(
            "SlotAttention",
            {**_BO_QSA, "drop_path": _DROP_PATH},
            {"slot_size": int, "epsilon": _FLOAT, "truncate": str},
        ),
        {"forward": published.bo_qsa},
        WHOLE,
        _with_iterations("num_iter"),
    ),
    Implementation(
        "BO-QSA, its Slot Attention",
        "YuLiu-LY/BO-QSA, models/SA.py",
        ClassShape("SlotAttention", _BO_QSA, {"slot_size": int, "epsilon": _FLOAT}),
        {"forward": published.bo_qsa_plain},
        WHOLE,
        _with_iterations("num_iter"),
    ),
    Implementation(
        "SPOT",
        "gkakogeorgiou/spot, slot_attn.py",
        ClassShape(
            "SlotAttention",
            {**_SLATE, "drop_path": _DROP_PATH},
            {"num_iter": int, "slot_size": int, "epsilon": _FLOAT, "num_heads": int, "truncate": str},
        ),
        {"forward": published.spot},
        WHOLE,
        _with_slots,
    ),
    Implementation(
        "OCLF (DINOSAUR)",
        "amazon-science/object-centric-learning-framework, ocl/perceptual_grouping.py",
        ClassShape(
            "SlotAttention",
            {
                "to_q": linear("U", "I"),
                "to_k": linear("D", "I"),
                "to_v": linear("D", "I"),
                "gru": gru("I", "U"),
                "norm_input": norm("D"),
                "norm_slots": norm("U"),
                "ff_mlp": Layer(optional=True),
            },
            {
                "n_heads": int,
                "dims_per_head": int,
                "iters": int,
                "eps": _FLOAT,
                "scale": _FLOAT,
                "use_implicit_differentiation": bool,
            },
        ),
        {"forward": published.oclf_forward, "iterate": published.oclf_iterate, "step": published.oclf_step},
        ATTENTION,
        _with_slots,
        "calls with slot masks run the original",
    ),
    Implementation(
        "VideoSAUR, SlotContrast",
        "martius-lab/videosaur, videosaur/modules/groupers.py; martius-lab/slotcontrast has the same class",
        ClassShape(
            "SlotAttention",
            {
                "to_q": linear("U", "I", bias=False),
                "to_k": linear("D", "I", bias=False),
                "to_v": linear("D", "I", bias=False),
                "gru": gru("I", "U", optional=True),
                "mlp": Layer(optional=True),
                "norm_features": norm("D"),
                "norm_slots": norm("U"),
            },
            {"n_iters": int, "eps": _FLOAT, "scale": _FLOAT},
        ),
        {"forward": published.videosaur_forward, "step": published.videosaur_step},
        ATTENTION,
        _with_iterations("n_iters", slots_first=True),
    ),
    Implementation(
        "OCBench",
        "Genera1Z's object_centric_bench (VQ-VFM-OCL, DIAS, RandSF.Q, SmoothSA), object_centric_bench/model/ocl.py",
        _OCBENCH,
        {"forward": published.ocbench},
        WHOLE,
        _with_iterations("num_iter"),
        "calls with slot masks run the original",
    ),
    Implementation(
        "OCBench, attention of every iteration",
        "Genera1Z/DIAS, object_centric_bench/model/dias.py",
        replace(_OCBENCH, name="SlotAttentionWithAllAttent"),
        {"forward": published.ocbench_with_all_attention},
        WHOLE,
        _with_iterations("num_iter"),
        "calls with slot masks run the original",
    ),
    Implementation("LSD", _LSD_FILE, _LSD, {"forward_slots": published.lsd_forward_slots}, WHOLE, _maps),
    Implementation(
        "LSD, learned slots",
        _LSD_FILE,
        replace(_LSD, parameters={"slot_mu": (1, "K", "U")}),
        {"forward_slots": published.lsd_forward_slots},
        WHOLE,
        _maps,
    ),
    Implementation(
        "SlotDiffusion, SlotFormer",
        "Wuziyi616/SlotDiffusion, img_based/models/slot_attention.py; pairlab/SlotFormer has the same class",
        _SLOTFORMER,
        {"forward": published.slotformer},
        WHOLE,
        _with_slots,
    ),
    Implementation(
        "SlotDiffusion, SlotFormer, with masks",
        "Wuziyi616/SlotDiffusion, img_based/models/sa_diffusion.py",
        replace(_SLOTFORMER, name="SlotAttentionWMask"),
        {"forward": published.slotformer_with_mask},
        WHOLE,
        _with_slots,
    ),
)

_DRAWING = ("Slot Attention (evelinehong)", "lucidrains", "lucidrains, heads", "STEVE", "LSD")
# Forks that draw noise without naming a dtype behind those that take the inputs'.
IMPLEMENTATIONS = _PUBLISHED + tuple(
    replace(known, name=f"{known.name}, noise in the default dtype", default_noise=True)
    for known in _PUBLISHED
    if known.name in _DRAWING
)
