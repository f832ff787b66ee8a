"""The published slot-attention classes that `spot_kernels.patch` knows, one row each; the table in kernels/README.md is
made from them.

A class is recognised by what its replacement needs: the attributes that the replacement reads, and methods with the
same arguments. Layers may be of any type and size, since the replacement calls them as the original does; whether both
compute the same is up to `comparison`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import nn

from spot_kernels.patching import framework_replacements as frameworks
from spot_kernels.patching import replacements
from spot_kernels.patching.comparison import Call, Draw, ExampleCalls

BATCH, TOKENS, SLOTS = 2, 11, 3

WHOLE = "attention and update"
ATTENTION = "attention"
_MASKS = "calls with slot masks run the original"


@dataclass(frozen=True)
class Implementation:
    """One published class.

    name: as reports have it. source: public repository, file and class. variants: what `SlotAttention.like` and
    `load_variant` call it; classes whose methods are replaced alike may have several. methods: name of a method → its
    replacement. reads: the attributes that these read. replaced: what of it, in words. example_calls: small calls of
    each of these methods, for the comparison. note: what a user should know after the replacement. default_noise:
    whether noise has the default dtype instead of that of the inputs, which matters where the two differ (bfloat16
    inputs, say).
    """

    name: str
    source: str
    variants: tuple[str, ...]
    methods: dict[str, Callable]
    reads: frozenset[str]
    replaced: str
    example_calls: ExampleCalls
    note: str = ""
    default_noise: bool = False


def _width(layer: nn.Module) -> int:
    """Of the inputs of a Linear or LayerNorm, or of a Sequential that begins with one."""
    return next(layer.parameters()).shape[-1]


def _alone(norm: str) -> ExampleCalls:
    """forward(inputs), inputs as wide as the layer `norm`"""
    return lambda module, draw: [Call((draw(BATCH, TOKENS, _width(getattr(module, norm))),))]


def _with_number_of_slots(module: nn.Module, draw: Draw) -> list[Call]:
    """forward(inputs, num_slots), the number by default and another one"""
    inputs = draw(BATCH, TOKENS, _width(module.norm_input))
    return [Call((inputs,)), Call((inputs,), {"num_slots": SLOTS})]


def _with_one_slot(module: nn.Module, draw: Draw) -> list[Call]:
    """forward(inputs, num_slots), where there may be parameters for two slots only"""
    inputs = draw(BATCH, TOKENS, _width(module.norm_input))
    return [Call((inputs,)), Call((inputs,), {"num_slots": 1})]


def _with_slots(norm_inputs: str, norm_slots: str) -> ExampleCalls:
    """forward(inputs, slots)"""

    def calls(module: nn.Module, draw: Draw) -> list[Call]:
        inputs = draw(BATCH, TOKENS, _width(getattr(module, norm_inputs)))
        slots = draw(BATCH, getattr(module, "num_slots", SLOTS), _width(getattr(module, norm_slots)))
        return [Call((inputs, slots))]

    return calls


def _with_iterations(name: str, norm_inputs: str, norm_slots: str, *, slots_first: bool = False) -> ExampleCalls:
    """forward(inputs, slots, iterations): as many as by default, and two"""

    def calls(module: nn.Module, draw: Draw) -> list[Call]:
        (call,) = _with_slots(norm_inputs, norm_slots)(module, draw)
        tensors = call.args[::-1] if slots_first else call.args
        return [Call(tensors), Call(tensors, {name: 2})]

    return calls


def _video(module: nn.Module, draw: Draw) -> list[Call]:
    """forward(inputs), inputs [B, T, N, D]"""
    return [Call((draw(BATCH, 2, TOKENS, _width(module.norm_inputs)),))]


def _maps(module: nn.Module, draw: Draw) -> list[Call]:
    """forward_slots(inputs), inputs [B, T, D, h, w]; the grid of positions gives h and w"""
    own = *module.pos.parameters(recurse=False), *module.pos.buffers(recurse=False)
    positions = next((p for p in own if p.dim() == 4), None)
    height, width = (4, 4) if positions is None else positions.shape[-2:]
    return [Call((draw(BATCH, 1, _width(module.in_layer_norm), height, width),), method="forward_slots")]


def _maps_with_noise(module: nn.Module, draw: Draw) -> list[Call]:
    """forward_slots(inputs, eps), without and with the noise of the initial slots"""
    (call,) = _maps(module, draw)
    return [call, call._replace(kwargs={"eps": draw(BATCH, module.num_slots, module.slot_size)})]


def _iterate_and_step(module: nn.Module, draw: Draw) -> list[Call]:
    """iterate(slots, k, v) and step(slots, k, v)"""
    (call,) = _step_of_heads(module, draw)
    return [call._replace(method="iterate"), call]


def _step_of_heads(module: nn.Module, draw: Draw) -> list[Call]:
    """step(slots, k, v), k and v [B, N, H, d]"""
    k, v = (draw(BATCH, TOKENS, module.n_heads, module.dims_per_head) for _ in range(2))
    return [Call((draw(BATCH, SLOTS, _width(module.norm_slots)), k, v), method="step")]


def _step(norm_slots: str, project_q: str) -> ExampleCalls:
    """step(slots, k, v), k and v as wide as the queries"""

    def calls(module: nn.Module, draw: Draw) -> list[Call]:
        slots = draw(BATCH, SLOTS, _width(getattr(module, norm_slots)))
        width = getattr(module, project_q)(slots).shape[-1]
        return [Call((slots, draw(BATCH, TOKENS, width), draw(BATCH, TOKENS, width)), method="step")]

    return calls


def _together(*of_methods: ExampleCalls) -> ExampleCalls:
    return lambda module, draw: [call for calls in of_methods for call in calls(module, draw)]


def _names(*groups: str) -> frozenset[str]:
    return frozenset(" ".join(groups).split())


_LUCIDRAINS = "norm_input norm_slots norm_pre_ff to_q to_k to_v gru num_slots iters eps scale slots_mu"
_SLATE = "norm_slots norm_mlp project_q project_k project_v gru mlp epsilon"
_LSD = f"{_SLATE} norm_inputs num_iterations num_slots slot_size num_heads pos in_layer_norm in_mlp slot_mu"
_LSD_FILE = "JindongJiang/latent-slot-diffusion, src/models/slot_attn.py, MultiHeadSTEVESA"
_CODA_FILE = "sony/coda, src/layers/slot_attn.py, SlotAttn"
_OCLF_STEP = "norm_slots to_q gru ff_mlp n_heads dims_per_head iters eps scale"
_OCLF_PROJECTIONS = "norm_input to_k to_v"
_OCBENCH_STEP = "norm1q proj_q rnn norm2 ffn"
_OCBENCH = _names(_OCBENCH_STEP, "norm1kv proj_k proj_v num_iter trunc_bp")
_SLOTFORMER = _names(
    "norm_inputs project_q project_k project_v gru mlp num_iterations num_slots slot_size eps attn_scale"
)

_PUBLISHED = (
    Implementation(
        "Slot Attention (evelinehong)",
        "evelinehong/slot-attention-pytorch, model.py, SlotAttention",
        ("evelinehong",),
        {"forward": replacements.evelinehong},
        _names(_LUCIDRAINS, "fc1 fc2 slots_log_sigma"),
        WHOLE,
        _with_number_of_slots,
    ),
    Implementation(
        "Slot Attention (evelinehong, 2021)",
        "evelinehong/slot-attention-pytorch, model.py, SlotAttention, before it learned the logarithm of sigma",
        ("evelinehong_2021",),
        {"forward": replacements.evelinehong_2021},
        _names(_LUCIDRAINS, "fc1 fc2 slots_sigma"),
        WHOLE,
        _with_number_of_slots,
    ),
    Implementation(
        "Slot Attention (untitled-ai)",
        "untitled-ai/slot_attention, slot_attention/model.py, SlotAttention",
        ("untitled_ai",),
        {"forward": replacements.untitled},
        _names(_SLATE, "norm_inputs num_iterations num_slots slot_size slots_mu slots_log_sigma"),
        WHOLE,
        _alone("norm_inputs"),
    ),
    Implementation(
        "object-centric-library",
        "addtt/object-centric-library, models/slot_attention/model.py, SlotAttentionModule",
        ("object_centric_library",),
        {"forward": replacements.object_centric_library},
        _names(_LUCIDRAINS, "mlp slots_log_sigma"),
        WHOLE,
        _with_number_of_slots,
    ),
    Implementation(
        "OSRT",
        "stelzner/osrt, osrt/layers.py, SlotAttention",
        ("osrt",),
        {"forward": replacements.osrt},
        _names(
            "norm_input norm_slots norm_pre_mlp to_q to_k to_v gru mlp num_slots iters eps scale slot_dim",
            "initial_slots randomize_initial_slots",
        ),
        WHOLE,
        _alone("norm_input"),
    ),
    Implementation(
        "Motion Grouping",
        "charigyang/motiongrouping, src/model.py, SlotAttention",
        ("motion_grouping",),
        {"forward": replacements.motion_grouping},
        _names(
            "norm_input norm_slots norm_pre_ff project_q project_k project_v gru mlp num_slots iters eps scale",
            "slots_embedding device",
        ),
        WHOLE,
        _with_one_slot,
    ),
    Implementation(
        "lucidrains",
        "lucidrains/slot-attention, slot_attention/slot_attention.py, SlotAttention",
        ("lucidrains",),
        {"forward": replacements.lucidrains},
        _names(_LUCIDRAINS, "mlp slots_logsigma"),
        WHOLE,
        _with_number_of_slots,
    ),
    Implementation(
        "lucidrains, heads",
        "lucidrains/slot-attention, slot_attention/multi_head_slot_attention.py, MultiHeadSlotAttention",
        ("lucidrains_heads",),
        {"forward": replacements.lucidrains_heads},
        _names(_LUCIDRAINS, "mlp slots_logsigma split_heads merge_heads combine_heads"),
        WHOLE,
        _with_number_of_slots,
    ),
    Implementation(
        "SLATE",
        "singhgautam/slate, slot_attn.py, SlotAttention",
        ("slate",),
        {"forward": replacements.slate},
        _names(_SLATE, "norm_inputs num_iterations num_slots slot_size num_heads"),
        WHOLE,
        _with_slots("norm_inputs", "norm_slots"),
    ),
    Implementation(
        "STEVE",
        "singhgautam/steve, steve.py, SlotAttentionVideo",
        ("steve",),
        {"forward": replacements.steve},
        _names(_SLATE, "norm_inputs num_iterations num_slots slot_size slot_mu slot_log_sigma predictor"),
        WHOLE,
        _video,
    ),
    Implementation(
        "BO-QSA",
        "YuLiu-LY/BO-QSA, models/slot_attn.py, SlotAttention",
        ("bo_qsa",),
        {"forward": replacements.bo_qsa},
        _names(_SLATE, "norm_feature truncate drop_path"),
        WHOLE,
        _with_iterations("num_iter", "norm_feature", "norm_slots"),
    ),
    Implementation(
        "BO-QSA, its Slot Attention",
        "YuLiu-LY/BO-QSA, models/SA.py, SlotAttention",
        ("bo_qsa_plain",),
        {"forward": replacements.bo_qsa_plain},
        _names(_SLATE, "norm_feature"),
        WHOLE,
        _with_iterations("num_iter", "norm_feature", "norm_slots"),
    ),
    Implementation(
        "SPOT",
        "gkakogeorgiou/spot, slot_attn.py, SlotAttention",
        ("spot",),
        {"forward": replacements.spot},
        _names(_SLATE, "norm_inputs num_iter slot_size num_heads truncate"),
        WHOLE,
        _with_slots("norm_inputs", "norm_slots"),
    ),
    Implementation(
        "OCLF (DINOSAUR)",
        "amazon-science/object-centric-learning-framework, ocl/perceptual_grouping.py, SlotAttention; "
        "amazon-science/object-centric-vol has the same",
        ("dinosaur",),
        {"forward": frameworks.oclf_forward, "iterate": frameworks.oclf_iterate, "step": frameworks.oclf_step},
        _names(_OCLF_STEP, _OCLF_PROJECTIONS, "use_implicit_differentiation"),
        ATTENTION,
        _together(_with_slots("norm_input", "norm_slots"), _iterate_and_step),
        _MASKS,
    ),
    # its forward, which returns more, stays: it calls the other two
    Implementation(
        "AdaSlot, MOT (OCLF in another forward)",
        "ocl/perceptual_grouping.py, SlotAttentionGumbelV1 of amazon-science/AdaSlot, SlotAttention of "
        "amazon-science/object-centric-multiple-object-tracking",
        ("adaslot", "mot"),
        {"iterate": frameworks.oclf_iterate, "step": frameworks.oclf_step},
        _names(_OCLF_STEP),
        ATTENTION,
        _iterate_and_step,
        _MASKS,
    ),
    Implementation(
        "FT-DINOSAUR",
        "rw-ocrl/ftdinosaur-inference, ftdinosaur_inference/modules/slot_attention.py, SlotAttention",
        ("ftdinosaur",),
        {"forward": frameworks.ftdinosaur_forward, "step": frameworks.ftdinosaur_step},
        _names(_OCLF_STEP, _OCLF_PROJECTIONS),
        ATTENTION,
        _together(_with_slots("norm_input", "norm_slots"), _step_of_heads),
    ),
    Implementation(
        "VideoSAUR, SlotContrast",
        "martius-lab/videosaur, videosaur/modules/groupers.py, SlotAttention; martius-lab/slotcontrast has the same",
        ("videosaur",),
        {"forward": frameworks.videosaur_forward, "step": frameworks.videosaur_step},
        _names("norm_features norm_slots to_q to_k to_v gru mlp n_iters eps scale"),
        ATTENTION,
        _together(
            _with_iterations("n_iters", "norm_features", "norm_slots", slots_first=True), _step("norm_slots", "to_q")
        ),
    ),
    # before OCBench, whose attributes it has: its forward draws from NumPy's generator, which no comparison rewinds
    Implementation(
        "MetaSlot",
        "lhj-lhj/MetaSlot, object_centric_bench/model/metaslot.py, MetaSlot",
        ("metaslot",),
        {"step": frameworks.metaslot_step},
        _names(_OCBENCH_STEP),
        WHOLE,
        _step("norm1q", "proj_q"),
        _MASKS,
    ),
    Implementation(
        "OCBench",
        "object_centric_bench/model/ocl.py, SlotAttention, of Genera1Z/VQ-VFM-OCL, DIAS, RandSF.Q and SmoothSA",
        ("ocbench",),
        {"forward": frameworks.ocbench},
        _OCBENCH,
        WHOLE,
        _with_iterations("num_iter", "norm1kv", "norm1q"),
        _MASKS,
    ),
    Implementation(
        "OCBench, attention of every iteration",
        "Genera1Z/DIAS, object_centric_bench/model/dias.py, SlotAttentionWithAllAttent",
        ("dias",),
        {"forward": frameworks.ocbench_with_all_attention},
        _OCBENCH,
        WHOLE,
        _with_iterations("num_iter", "norm1kv", "norm1q"),
        _MASKS,
    ),
    Implementation(
        "LSD",
        _LSD_FILE,
        ("lsd",),
        {"forward_slots": replacements.lsd_forward_slots},
        _names(_LSD, "learnable_slot_init bi_level slot_log_sigma"),
        WHOLE,
        _maps,
    ),
    Implementation(
        "LSD, learned slots",
        _LSD_FILE,
        ("lsd",),
        {"forward_slots": replacements.lsd_forward_slots},
        _names(_LSD, "learnable_slot_init bi_level"),
        WHOLE,
        _maps,
    ),
    Implementation(
        "CODA",
        _CODA_FILE,
        ("coda",),
        {"forward_slots": replacements.coda_forward_slots},
        _names(_LSD, "learnable_slot_init bi_level slot_log_sigma"),
        WHOLE,
        _maps_with_noise,
    ),
    Implementation(
        "CODA, learned slots",
        _CODA_FILE,
        ("coda",),
        {"forward_slots": replacements.coda_forward_slots},
        _names(_LSD, "learnable_slot_init bi_level"),
        WHOLE,
        _maps_with_noise,
    ),
    Implementation(
        "SlotDiffusion, SlotFormer",
        "Wuziyi616/SlotDiffusion, slotdiffusion/img_based/models/slot_attention.py, SlotAttention; pairlab/SlotFormer "
        "has the same",
        ("slotformer",),
        {"forward": frameworks.slotformer},
        _SLOTFORMER,
        WHOLE,
        _with_slots("norm_inputs", "project_q"),
    ),
    Implementation(
        "SlotDiffusion, SlotFormer, with masks",
        "Wuziyi616/SlotDiffusion, slotdiffusion/img_based/models/sa_diffusion.py, SlotAttentionWMask",
        ("slotformer",),
        {"forward": frameworks.slotformer_with_mask},
        _SLOTFORMER,
        WHOLE,
        _with_slots("norm_inputs", "project_q"),
    ),
)

_DRAWING = ("Slot Attention (evelinehong)", "lucidrains", "lucidrains, heads", "STEVE", "LSD")
# After the originals, which draw noise in the inputs' dtype, forks that draw it without naming a dtype.
IMPLEMENTATIONS = _PUBLISHED + tuple(
    replace(known, name=f"{known.name}, noise in the default dtype", default_noise=True)
    for known in _PUBLISHED
    if known.name in _DRAWING
)
