"""The values that presets set, with their sources: data sets, methods, encoders and sizes are independent choices.

Sources are sections and tables of the paper (arXiv 2312.00648v3); "authors' code" is gkakogeorgiou/spot, "ours" a
choice on which the paper is silent. `python -m spot_fast.presets NAME` shows them. The rest are `Config`'s defaults.
"""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from spot_fast.errors import UserError


class Value(NamedTuple):
    value: Any
    source: str


Values = Mapping[str, Value]


def _from(source: str, **values: Any) -> dict[str, Value]:
    return {name: Value(value, source) for name, value in values.items()}


@dataclass(frozen=True)
class DataSet:
    """Images and their settings in both stages; stage2 holds what the second stage changes.

    folder: its --data in examples of commands; None where it needs none.
    own_settings: epochs, rates and lambda of methods and encoders do not apply.
    own_rates: the learning rates of encoders do not apply.
    """

    about: str
    title: str
    values: Values
    stage2: Values = field(default_factory=dict)
    folder: str | None = "DATA"
    own_settings: bool = False
    own_rates: bool = False


@dataclass(frozen=True)
class Method:
    """A way of training. stage2: None for a single stage. teachers: methods whose stage 1 teaches stage 2.

    by_data: data set → values that hold there alone.
    """

    about: str
    values: Values = field(default_factory=dict)
    stage2: Values | None = None
    teachers: tuple[str, ...] = ()
    by_data: Mapping[str, Values] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Vit:
    """A frozen encoder: timm's name, and settings for the paper's data sets.

    untagged: timm's name without the tag, where that means the same weights.
    rates: learning rates on COCO and PASCAL; MOVi has its own.
    patch: side of a patch in pixels; None leaves the check of image sizes to the ViT itself.
    """

    about: str
    timm: str
    source: str
    licence: str
    weights: str
    untagged: str | None = None
    values: Values = field(default_factory=dict)
    rates: Values = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    patch: int | None = None


# Stage 2 starts its student fresh, with learned slots whose gradient rule is bi-level.
STAGE2 = _from("3.3", slot_init="learned", truncation="bi_level")

_RATES = _from("D.2", lr=4e-4, lr_low=4e-7)
_MOVI = {
    **_from("4.1, D.2", epochs=65),
    **_from("D.3", crop="stretch", flip=False, mask_size=128),
    **_from("D.2", lr=2e-4, lr_low=4e-5),
}
_MOVI_256 = _from("size of the released masks", mask_size=256)
_MOVI2 = {**_from("4.1, D.2", epochs=30), **_from("D.2", lr_low=1.5e-4)}

DATA_SETS: dict[str, DataSet] = {
    "scenes": DataSet(
        "generated images and a packaged encoder: needs no data",
        "generated scenes",
        _from(
            "ours",
            image_size=96,
            mask_size=96,
            flip=False,
            train_images=4096,
            val_images=500,
            encoder="spot_scenes",
            feature_norm=True,
            train_blocks=2,
            num_slots=6,
            slot_dim=128,
            slot_mlp=256,
            slot_iterations=5,
            initial_weights="clustering",
            slot_rate=0.2,
            dec_blocks=3,
            dec_heads=4,
            epochs=8,
            batch_size=16,
            lr=2e-3,
            lr_low=1e-5,
            warmup_steps=256,
            att_weight=0.02,
            eval_every=2,
        ),
        _from("ours", epochs=3, initial_weights="teacher", lr=1e-3, slot_rate=1.0),
        folder=None,
        own_settings=True,
        own_rates=True,
    ),
    "coco": DataSet(
        "COCO 2017, 118,287 images to train, 5,000 to evaluate",
        "COCO",
        {
            **_from("4.1, D.2", num_slots=7, epochs=50),
            **_RATES,
            **_from("D.3", crop="center", flip=True, mask_size=320),
        },
        folder="COCO",
    ),
    "voc": DataSet(
        "PASCAL VOC 2012, trainaug (10,582) to train, val (1,449) to evaluate",
        "PASCAL VOC 2012",
        {
            **_from("4.1, D.2", num_slots=6, epochs=560),
            **_RATES,
            **_from("D.3", crop="random", flip=True, mask_size=320),
        },
        folder="VOCdevkit",
    ),
    "movi_c": DataSet(
        "MOVi-C, nine frames of each clip to train, all to evaluate",
        "MOVi-C",
        {**_from("4.1, D.2", num_slots=11), **_MOVI},
        _MOVI2,
        folder="MOVI_C",
        own_rates=True,
    ),
    "movi_e": DataSet(
        "MOVi-E, nine frames of each clip to train, all to evaluate",
        "MOVi-E",
        {**_from("4.1, D.2", num_slots=24), **_MOVI},
        _MOVI2,
        folder="MOVI_E",
        own_rates=True,
    ),
    "movi_c_256": DataSet(
        "MOVi-C as it is released at 256 x 256, masks compared at that size; settings as movi_c",
        "MOVi-C at 256 x 256",
        {**_from("as movi_c", num_slots=11), **_MOVI, **_MOVI_256},
        _MOVI2,
        folder="MOVI_C_256",
        own_rates=True,
    ),
    "movi_e_256": DataSet(
        "MOVi-E as it is released at 256 x 256, masks compared at that size; settings as movi_e",
        "MOVi-E at 256 x 256",
        {**_from("as movi_e", num_slots=24), **_MOVI, **_MOVI_256},
        _MOVI2,
        folder="MOVI_E_256",
        own_rates=True,
    ),
    "clevrtex": DataSet(
        "ClevrTex, 40,000 images to train, its test split (5,000) to evaluate; not in the paper",
        "ClevrTex",
        {
            **_from("ClevrTex, arXiv 2111.10265", num_slots=11, crop="center", mask_size=128),
            **_from("as movi_c", flip=False, lr=2e-4, lr_low=4e-5),
            **_from("ours: the steps of movi_c", epochs=142),
        },
        {**_from("ours: the steps of movi_c", epochs=66), **_from("as movi_c", lr_low=1.5e-4)},
        folder="CLEVRTEX",
        own_rates=True,
    ),
    "folder": DataSet(
        "your images, with masks or without; settings as coco",
        "a folder of images",
        _from("as coco", num_slots=7, epochs=50, lr=4e-4, lr_low=4e-7, crop="center", flip=True, mask_size=320),
        folder="PHOTOS",
    ),
}

_RATES_ON_VOC = ("dino_vitb16", "moco_vitb16")  # encoders whose rates on PASCAL the paper gives
_MLP = {**_from("D.1, Tab. 4", decoder="mlp"), **_from("no order to draw", orders="standard")}
# The paper's 2,048 are 2.7 times its features' width; those of scenes are narrow, and CPUs slow.
_NARROW = {"scenes": _from("ours", dec_mlp_hidden=128)}
_MASKED = {**_from("DIAS", decoder="masked"), **_from("no order to draw", orders="standard")}
_LESS = _from("D.2", att_weight=0.001)
_OWN_NUMBERS = "DINOSAUR's own numbers are of its authors' settings, some of ViT-S/8"
_SILENT = "the paper does not say its epochs on {}: as SPOT's first stage"

METHODS: dict[str, Method] = {
    "spot": Method(
        "nine patch orders, then self-training; scored in the default order",
        stage2={},
        teachers=("spot", "spot_ens"),
        notes=(
            "--orders standard in both stages is row (e) of Table 1",
            "stage 2 with --att-weight 0 is Table 2 (a), lambda 0, and the second row of Table 8",
        ),
    ),
    "spot_ens": Method(
        "spot, with masks averaged over the nine orders (ENS)",
        stage2={},
        teachers=("spot", "spot_ens"),
        notes=(
            "trains exactly as spot; its scores are the rows 'nine orders' of python -m spot_fast.evaluate",
            "python -m spot_fast.segment --orders all draws its masks",
        ),
    ),
    "spot_mlp": Method(
        "the MLP decoder, then self-training",
        _MLP,
        stage2=_LESS,
        teachers=("spot_mlp", "dinosaur_mlp"),
        by_data=_NARROW,
        notes=("the paper has it on COCO; elsewhere epochs and rates are SPOT's of the data set",),
    ),
    "spot_masked": Method(
        "the masked decoder of DIAS and SmoothSA, then self-training",
        _MASKED,
        stage2={},
        teachers=("spot_masked",),
        notes=(
            "not in the paper: epochs and rates are SPOT's of the data set",
            "it trains on random shares of the tokens and is scored with all of them shown, as DIAS's code does",
        ),
    ),
    "dinosaur": Method(
        "one patch order, no self-training: a re-implementation of DINOSAUR",
        _from("Tab. 1 (a)", orders="standard"),
        by_data={"coco": _from("Tab. 9, authors' code", epochs=100)},
        notes=("--epochs 50 is row (a) of Table 1", _SILENT.format("PASCAL and MOVi"), _OWN_NUMBERS),
    ),
    "dinosaur_mlp": Method(
        "the MLP decoder, no self-training",
        _MLP,
        by_data=_NARROW,
        notes=("the paper does not say its epochs: as SPOT's first stage", _OWN_NUMBERS),
    ),
    "cappa": Method(
        "one patch order, a quarter of the steps decode in parallel",
        {**_from("Tab. 3", orders="standard"), **_from("4.2 (A), D.2", cappa=0.25)},
        notes=(
            "the paper does not say its epochs: as SPOT's first stage, which is row (a) of Table 1 beside it",
            "--cappa 0.5 and --cappa 1 are 25.9 and 23.6 mBO_i on COCO (D.2)",
        ),
    ),
    "bo_qsa": Method(
        "dinosaur with learned initial slots and bi-level gradients (BO-QSA)",
        {**_from("Tab. 9", orders="standard"), **_from("Tab. 9, B.4", slot_init="learned", truncation="bi_level")},
        by_data={"coco": _from("Tab. 9", epochs=100)},
        notes=(
            _SILENT.format("PASCAL and MOVi"),
            "with nine orders and a trained encoder it is the second row of "
            "Table 8: preset spot, stage 2, --att-weight 0",
        ),
    ),
}

_META = "https://dl.fbaipublicfiles.com/"
_AS_DINO = _from("as coco+dino_vitb16", lr=4e-4, lr_low=4e-7)
_NOT_IN_PAPER = "not in the paper: rates and lambda as for DINO"


def _dinov2(size: str, word: str, registers: str = "") -> Vit:
    folder = f"dinov2_vit{size.lower()}14"
    return Vit(
        f"DINOv2 ViT-{size}/14" + (", four registers" if registers else ": 16 x 16 tokens at 224 pixels"),
        f"vit_{word}_patch14{registers}_dinov2.lvd142m",
        "not in the paper",
        "Apache-2.0",
        f"the hub, or {_META}dinov2/{folder}/{folder}{registers}_pretrain.pth",
        f"vit_{word}_patch14{registers}_dinov2",
        rates=_AS_DINO,
        notes=(_NOT_IN_PAPER,),
        patch=14,
    )


def _dinov3(size: str, word: str) -> Vit:
    return Vit(
        f"DINOv3 ViT-{size}/16, registers and rotary positions",
        f"vit_{word}_patch16_dinov3.lvd1689m",
        "not in the paper",
        "DINOv3 licence",
        "the hub",
        f"vit_{word}_patch16_dinov3",
        rates=_AS_DINO,
        notes=(_NOT_IN_PAPER,),
        patch=16,
    )


ENCODERS: dict[str, Vit] = {
    "dino_vitb16": Vit(
        "DINO ViT-B/16, the paper's",
        "vit_base_patch16_224.dino",
        "D.2",
        "Apache-2.0",
        f"the hub, or {_META}dino/dino_vitbase16_pretrain/dino_vitbase16_pretrain.pth",
        rates=_RATES,
        patch=16,
    ),
    "moco_vitb16": Vit(
        "MoCo-v3 ViT-B/16",
        "moco_vitb16",
        "Tab. 10",
        "CC-BY-NC-4.0",
        f"{_META}moco-v3/vit-b-300ep/vit-b-300ep.pth.tar",
        values=_LESS,
        rates=_RATES,
        notes=(
            "neither timm nor the hub has its weights: pass the file as --encoder-weights",
            "the paper has it on COCO",
        ),
        patch=16,
    ),
    "mae_vitb16": Vit(
        "MAE ViT-B/16",
        "vit_base_patch16_224.mae",
        "Tab. 10",
        "CC-BY-NC-4.0",
        f"the hub, or {_META}mae/pretrain/mae_pretrain_vit_base.pth",
        values=_LESS,
        rates=_from("D.2", lr=2e-4, lr_low=4e-5),
        notes=(
            "the paper has it on COCO; PASCAL takes the same rates, MOVi its own, which are the same in stage 1",
            "the authors' command leaves lambda at 0.005",
        ),
        patch=16,
    ),
    "dinov2_vits14": _dinov2("S", "small"),
    "dinov2_vitb14": _dinov2("B", "base"),
    "dinov2_vits14_reg4": _dinov2("S", "small", "_reg4"),
    "dinov2_vitb14_reg4": _dinov2("B", "base", "_reg4"),
    "dinov3_vits16": _dinov3("S", "small"),
    "dinov3_vitb16": _dinov3("B", "base"),
}

# Sides of the square that the encoder sees, in pixels. All other settings stay what they are at 224.
SIZES: dict[str, int] = {f"{side}px": side for side in (336, 448, 512, 518)}


def timm_name(encoder: str) -> str:
    """timm's name of an encoder given by its or our name."""
    return ENCODERS[encoder].timm if encoder in ENCODERS else encoder


def encoder_recipe(encoder: str) -> str | None:
    """Our name of an encoder given by its or timm's name; None for one that no preset knows."""
    return next((name for name, vit in ENCODERS.items() if encoder in (name, vit.timm, vit.untagged)), None)


def default_encoder(data: str) -> str | None:
    """Our name of a data set's encoder; None where its settings name another."""
    return None if "encoder" in DATA_SETS[data].values else "dino_vitb16"


def needs_data(data: str) -> bool:
    """Whether the data set needs --data; true of one that is not registered in this process."""
    return data not in DATA_SETS or DATA_SETS[data].folder is not None


class Parts(NamedTuple):
    """What a --preset names; None for a part that it leaves out. size: pixels."""

    data: str | None
    method: str | None
    encoder: str | None
    size: int | None


def split(name: str) -> Parts:
    """The parts of names joined with + in any order.

    UserError for an unknown name, for two of a kind, and for a size that the named encoder's patches do not divide.
    """
    kinds: dict[str, Iterable[str]] = {"data sets": DATA_SETS, "methods": METHODS, "encoders": ENCODERS, "sizes": SIZES}
    chosen: dict[str, str] = {}
    for part in name.split("+"):
        kind = next((kind for kind, known in kinds.items() if part in known), None)
        if kind is None:
            raise UserError(
                f"--preset {name} is unknown: use one of {', '.join(DATA_SETS)}, with + a method, an encoder and a "
                f"size that python -m spot_fast.presets lists{_closest(part, itertools.chain(*kinds.values()))}"
            )
        if kind in chosen:
            raise UserError(f"--preset {name} has two {kind}: choose {chosen[kind]} or {part}")
        chosen[kind] = part
    data, method, encoder, size = map(chosen.get, kinds)
    if size:
        _check_patches(name, size, encoder or (default_encoder(data) if data else None))
    return Parts(data, method, encoder, SIZES[size] if size else None)


def _check_patches(name: str, size: str, encoder: str | None) -> None:
    patch = ENCODERS[encoder].patch if encoder else None
    if patch and SIZES[size] % patch:
        fitting = [other for other, side in SIZES.items() if side % patch == 0]
        raise UserError(
            f"--preset {name}: {size} is not a multiple of the patch size {patch} of {encoder}, use "
            f"{', '.join(fitting[:-1])} or {fitting[-1]}"
        )


def _closest(name: str, known: Iterable[str]) -> str:
    """The end of a sentence: the known name most like `name`, if any."""
    close = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.4)
    return f"; did you mean {close[0]}?" if close else ""


def check_method(method: str, stage: int) -> None:
    """UserError if the method is unknown or lacks the stage."""
    if method not in METHODS:
        raise UserError(f"--method {method} is unknown: use one of {', '.join(METHODS)}{_closest(method, METHODS)}")
    if stage == 2 and METHODS[method].stage2 is None:
        student = "spot_mlp" if method == "dinosaur_mlp" else "spot"
        raise UserError(f"--method {method} has no stage 2, it is stage 1 alone: use --method {student} for a student")


def values(data: str, method: str, encoder: str | None, stage: int, size: int | None = None) -> dict[str, Value]:
    """The values that a combination sets beside Config's defaults, later sources over earlier ones.

    encoder: our name; None for the data set's own or one that no preset knows. size: None for the data set's own.
    """
    data_set, chosen = DATA_SETS[data], METHODS[method]
    result = dict(data_set.values)
    if stage == 2:
        result |= STAGE2 | data_set.stage2
    result |= chosen.values | chosen.by_data.get(data, {})
    if stage == 2 and not data_set.own_settings:
        result |= chosen.stage2 or {}
    if encoder is not None:
        vit = ENCODERS[encoder]
        result["encoder"] = Value(vit.timm, vit.source)
        if not data_set.own_settings:
            result |= vit.values
        if not data_set.own_rates:
            rates = vit.rates
            if data != "coco" and not (data == "voc" and encoder in _RATES_ON_VOC):
                rates = {name: Value(value, f"as coco+{encoder}") for name, (value, _) in rates.items()}
            result |= rates
    if size is not None:
        result["image_size"] = Value(size, "not in the paper")
    return result
