"""Every option of a training run: `Config`, a dataclass whose fields hold all that is known about them.

A `Config` is built from a preset (`preset("scenes", stage=1)`; `recipes` holds them), changed from the command line,
and written to `config.json` in the run folder. A new option is a new field: its name with dashes is the command-line
option, its `Option` holds the rest. No other list of fields exists; `option_names` derives them.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Callable, Container, Iterable
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from spot_fast import recipes
from spot_fast.errors import UserError

# Of the images that encoders take, with values in [0, 1] before.
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Option:
    """What is known about a field of `Config` beside its name, type and default.

    help, group: its line in --help, and the section of that line.
    source: section or table of the paper with its default; empty for a choice of ours.
    choices: all its values. names: gives the values that --help lists, where plugins may add to them.
    least, most: the smallest and the largest value of a number.
    path: what --help calls a value that is a path. keywords: values that are none nevertheless.
    resumable: changes only the last bits of the weights, so a resumed run may change it.
    keeps_auto: config.json holds what "auto" became, and a resumed run stays with it.
    inherited: a student takes its teacher's value unless its own command line sets another.
    shared: its name in words, if student and teacher must have the same value.
    validation: decides which validation images and masks there are.
    only: (field, values) of the runs in which it has an effect.
    """

    help: str
    group: str
    source: str = ""
    choices: tuple[Any, ...] | None = None
    names: Callable[[], Iterable[str]] | None = None
    least: float | None = None
    most: float | None = None
    path: str | None = None
    keywords: tuple[str, ...] = ()
    resumable: bool = False
    keeps_auto: bool = False
    inherited: bool = False
    shared: str = ""
    validation: bool = False
    only: tuple[str, tuple[Any, ...]] | None = None


def _option(default: Any, help: str, *, group: str, **about: Any) -> Any:
    return field(default=default, metadata=vars(Option(help, group, **about)))


_run = functools.partial(_option, group="run")
_data = functools.partial(_option, group="data")
_encoder = functools.partial(_option, group="frozen encoder")
_slots = functools.partial(_option, group="slot attention")
_decoder = functools.partial(_option, group="decoder", inherited=True)
_optimisation = functools.partial(_option, group="optimisation")

ONE_ORDER = ("masked", "mlp")  # decoders that know no other patch order than the standard one
_TRANSFORMERS, _MASKED, _MLP = (("decoder", names) for names in (("transformer", "masked"), ("masked",), ("mlp",)))


@dataclass(frozen=True)
class Config:
    """One training run. Sizes in tokens, pixels or channels, rates per step; the defaults are SPOT's (section 4)."""

    preset: str = _run(
        "scenes",
        "data set, with + a method, an encoder and a size if you like",
        names=lambda: recipes.DATA_SETS,
        validation=True,
    )
    method: str = _run("spot", "how it is trained", names=lambda: recipes.METHODS)
    stage: int = _run(1, "1: reconstruction; 2: a student taught by a stage-1 run", choices=(1, 2))
    seed: int = _run(0, "seed of weights, data order, patch orders and slot noise", least=0)

    precision: str = _run(
        "auto",
        "float32, tf32 (a GPU rounds the factors of float32 products), bf16 (float32 weights), or auto: bf16 where the "
        "device multiplies it in hardware",
        choices=("auto", "float32", "tf32", "bf16"),
        keeps_auto=True,
    )
    float8: bool = _run(
        False,
        "the decoder multiplies in float8 (bf16 runs on GPUs of compute capability 8.9 or more; needs torchao); the "
        "run reports the error on its first batch",
    )
    compile: str = _run(
        "auto",
        "compile forward and backward pass with torch.compile: yes, no, or auto: on a GPU",
        choices=("auto", "yes", "no"),
        resumable=True,
        keeps_auto=True,
    )
    cuda_graph: str = _run(
        "auto",
        "record the whole step as a CUDA graph and replay it: yes, no, or auto: on an NVIDIA GPU, in a run of one "
        "process",
        choices=("auto", "yes", "no"),
        resumable=True,
    )
    on_bad_step: str = _run(
        "stop",
        "when loss or gradient is not finite or the loss spikes: stop, or skip the step's update (ten in a row stop "
        "the run)",
        choices=("stop", "skip"),
        resumable=True,
    )
    spike: float = _run(
        5.0, "a loss spikes when it is so many times the mean of the last 100 or so; 0 = never", least=0, resumable=True
    )
    log_every: int = _run(20, "steps between lines of metrics.jsonl and TensorBoard", least=1)
    save_every: int = _run(
        500, "steps between saved training states (every five minutes in any case)", least=1, resumable=True
    )
    eval_every: int = _run(5, "epochs between quick validations, 0 = only at the end", least=0)
    eval_images: int = _run(200, "validation images of a quick validation, 0 = none", least=0)

    data: str | None = _data(
        None, "folder of the data set (scenes need none)", path="DIR", resumable=True, inherited=True, validation=True
    )
    train_images: int = _data(
        0, "how many training images to use, 0 = all (scenes: how many to generate)", least=0, inherited=True
    )
    val_images: int = _data(
        0,
        "how many validation images to use, 0 = all (scenes: how many to generate)",
        least=0,
        inherited=True,
        validation=True,
    )
    image_size: int = _data(
        224,
        "side of the square the encoder sees, pixels",
        source="D.3",
        least=1,
        inherited=True,
        shared="image size, which makes the token grid",
        validation=True,
    )
    mask_size: int = _data(
        320, "side of the square on which masks are compared, pixels", least=1, inherited=True, validation=True
    )
    crop: str = _data(
        "center",
        "training crop after resizing the minor side",
        choices=("center", "random", "stretch"),
        inherited=True,
        validation=True,
    )
    flip: bool = _data(True, "flip training images horizontally with probability 1/2", inherited=True)
    sbd: str | None = _data(
        None,
        "folder of the SBD data set, from which VOC's trainaug list is made where VOC has none",
        path="DIR",
        resumable=True,
    )
    loader: str = _data(
        "auto",
        "what decodes images: dali, torch (Pillow), or auto: DALI where it is installed and there is a GPU",
        choices=("auto", "dali", "torch"),
        keeps_auto=True,
    )
    workers: int | None = _data(
        None,
        "threads, above 4 processes, that decode images (default: one a core, at most 16)",
        least=0,
        resumable=True,
    )
    cache: str = _data(
        "auto",
        "what is kept of the training images: nothing, decoded pixels, frozen features, or auto, which says what it "
        "chose and why",
        choices=("auto", "none", "pixels", "features"),
        resumable=True,
    )
    cache_dir: str | None = _data(
        None, "folder of caches on disk (default: $SPOT_FAST_CACHE or ~/.cache/spot_fast)", path="DIR", resumable=True
    )

    encoder: str = _encoder(
        "vit_base_patch16_224.dino",
        "preset or timm name of the ViT (presets bring their rates), or spot_scenes for the packaged one",
        inherited=True,
        shared="encoder",
    )
    encoder_weights: str | None = _encoder(
        None,
        "safetensors or .pth file of the ViT; hub = let timm download; none = random",
        path="FILE",
        keywords=("hub", "none"),
        resumable=True,
        inherited=True,
    )
    pos_resize: str = _encoder(
        "dino",
        "how position embeddings are resampled to another grid",
        choices=("dino", "timm"),
        inherited=True,
        shared="resampling of positions",
    )
    feature_norm: bool = _encoder(
        False, "layer-normalise the encoder's features (no parameters)", inherited=True, shared="feature_norm"
    )
    train_blocks: int = _encoder(
        4, "last encoder blocks that train in stage 2", source="D.2", least=0, only=("stage", (2,))
    )

    num_slots: int = _slots(7, "slots K", least=1, inherited=True, shared="number of slots")
    slot_dim: int = _slots(256, "slot width U", source="D.2", least=1, inherited=True)
    slot_mlp: int = _slots(1024, "hidden width of the slot MLP", source="D.2", least=1, inherited=True)
    slot_heads: int = _slots(1, "heads of slot attention", source="authors' code", least=1)
    slot_iterations: int = _slots(3, "slot-attention iterations", source="D.2", least=1, inherited=True)
    slot_init: str = _slots("gaussian", "initial slots", source="3.3", choices=("gaussian", "learned"))
    adaptive_slots: bool = _slots(
        False, "join slots that divide an object, so that an image uses as many as it needs", inherited=True
    )
    slot_variance: float = _slots(
        0.01,
        "share of the variance of an image's features that a slot has to explain to remain apart",
        least=0,
        inherited=True,
        only=("adaptive_slots", (True,)),
    )
    truncation: str = _slots(
        "none",
        "which iterations gradients pass through",
        source="authors' code",
        choices=("none", "fixed_point", "bi_level"),
    )
    implementation: str = _slots(
        "spot",
        "whose details slot encoder and decoder have: those of SPOT's authors, of OCBench, of OCLF's DINOSAUR or of "
        "VideoSAUR's (see spot_fast.convert)",
        choices=("spot", "ocbench", "dinosaur", "videosaur"),
        inherited=True,
    )

    decoder: str = _decoder(
        "transformer",
        "decoder: transformer (autoregressive), masked (a transformer that sees a random share of the tokens and fills "
        "in the rest; DIAS, SmoothSA) or mlp",
    )
    dec_blocks: int = _decoder(4, "transformer decoder blocks", source="D.2", least=1, only=_TRANSFORMERS)
    dec_heads: int = _decoder(
        6,
        "heads of its self-attention, and of the first cross-attention",
        source="D.2",
        least=1,
        only=_TRANSFORMERS,
    )
    dec_cross_heads: int = _decoder(
        0, "heads of the later cross-attentions, 0 = dec_heads", least=0, only=_TRANSFORMERS
    )
    dec_mlp_hidden: int = _decoder(2048, "hidden width of the MLP decoder", source="D.2", least=1, only=_MLP)
    mlp_slot_proj: bool = _decoder(True, "project slots to the feature width before the MLP decoder", only=_MLP)
    mlp_top_k: int = _decoder(
        0,
        "the MLP decoder decodes a token from so many slots, those with the largest slot attention (FT-DINOSAUR: 3), "
        "0 = all",
        least=0,
        only=_MLP,
    )
    masked_shown: float = _decoder(
        0.1,
        "share of its tokens that the masked decoder sees of an image in training, as in DIAS's code",
        least=0,
        most=1,
        only=_MASKED,
    )
    masked_drawn: float = _decoder(
        0.5,
        "probability that an image's share of seen tokens is drawn from [0, 1) instead, as in DIAS's code",
        least=0,
        most=1,
        only=_MASKED,
    )
    orders: str = _decoder(
        "spot9",
        "patch orders drawn in training (the masked and the MLP decoder have the standard one alone)",
        source="3.2, 4.2 (A)",
        choices=("spot9", "standard"),
    )
    cappa: float = _decoder(
        0.0, "probability of a parallel (CapPa) step, standard order only", least=0, only=("decoder", ("transformer",))
    )

    epochs: int = _optimisation(50, "passes over the training images", least=1)
    batch_size: int = _optimisation(
        64,
        "images a step, of all processes together; --lr stays what it is (the usual rule for Adam, not tried here: "
        "sqrt(k) times the rate for k times the images)",
        source="D.2",
        least=1,
        inherited=True,
    )
    accumulate: int = _optimisation(
        1,
        "parts of a process's share of a batch that go through the model one after another, for small memories; the "
        "gradient is the whole batch's but for rounding",
        least=1,
        resumable=True,
    )
    lr: float = _optimisation(4e-4, "peak learning rate", least=0)
    lr_low: float = _optimisation(4e-7, "learning rate approached at the end", least=0)
    initial_weights: str = _optimisation(
        "xavier",
        "weights that training starts from: xavier, as the authors' code; clustering, for short runs: slots begin as "
        "soft k-means of the features and the decoder by looking them up; teacher: the student begins as its teacher",
        choices=("xavier", "clustering", "teacher"),
    )
    init_from: str | None = _optimisation(
        None,
        "run whose weights training starts from instead, at this or another image size; of a run of the same stage all "
        "settings are taken, for a tenth of its epochs",
        path="RUN",
        resumable=True,
    )
    slot_rate: float = _optimisation(
        1.0, "learning rate of slot attention and its MLPs, as a factor of the others'", least=0
    )
    warmup_steps: int = _optimisation(10_000, "linear warm-up, rounded to whole epochs", source="D.2", least=0)
    clip: float = _optimisation(
        0.3, "largest infinity norm of the gradient, 0 = no clipping", source="authors' code", least=0
    )
    att_weight: float = _optimisation(
        0.005, "lambda, weight of L_ATT in stage 2", source="D.2", least=0, only=("stage", (2,))
    )
    att_weight_final: float | None = _optimisation(
        None, "lambda at the end of a cosine schedule (default: constant)", least=0, only=("stage", (2,))
    )
    att_warmup_steps: int = _optimisation(
        0, "steps before L_ATT, and with it the teacher, sets in", least=0, only=("stage", (2,))
    )
    online_teacher: bool = _optimisation(
        False,
        "the student's exponential moving average is its teacher, as --teacher ema says; without --init-from one run "
        "of stage 1's length",
        only=("stage", (2,)),
    )
    ema_momentum: float = _optimisation(
        0.996,
        "share of the online teacher's weights that remains in a step, at first; it rises to 1 along a cosine",
        least=0,
        most=1,
        only=("online_teacher", (True,)),
    )

    @property
    def recipe(self) -> str:
        """Data set and method as `--preset` takes them, without the method if it is spot."""
        return self.preset if self.method == "spot" else f"{self.preset}+{self.method}"

    def warmup_epochs(self, images: int) -> int:
        """Warm-up in whole epochs over so many images. As in the authors' code, images / batch is not rounded."""
        return int(self.warmup_steps / (images / self.batch_size))

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Config:
        """Config from `config.json`; raises ValueError on an unknown key or a value of the wrong type."""
        values = json.loads(text)
        unknown = sorted(set(values) - OPTIONS.keys())
        if unknown:
            raise ValueError(f"config has unknown keys {', '.join(unknown)}: it was written by another version")
        if (method := values.get("method", "spot")) not in recipes.METHODS:
            raise ValueError(f"method {method!r} is unknown: it was written by another version")
        for each in fields(cls):
            if each.name in values and not _fits(values[each.name], each.type):
                raise ValueError(f"{each.name} is {values[each.name]!r}, not {each.type}")
        return cls(**values)

    def fingerprint(self) -> str:
        """sha256 of the settings that decide the weights: all that a resumed run may not change."""
        settings = {name: value for name, value in asdict(self).items() if not OPTIONS[name].resumable}
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


OPTIONS: dict[str, Option] = {each.name: Option(**each.metadata) for each in fields(Config)}
# The defaults that have a source. Every preset has them unless it sets another value.
SOURCED_DEFAULTS: dict[str, recipes.Value] = {
    each.name: recipes.Value(each.default, OPTIONS[each.name].source)
    for each in fields(Config)
    if OPTIONS[each.name].source
}


def option_names(trait: str) -> tuple[str, ...]:
    """The fields whose `Option` has a trait such as "inherited", in the order of `Config`."""
    return tuple(name for name, option in OPTIONS.items() if getattr(option, trait))


def flag(name: str) -> str:
    """A field's command-line option."""
    return "--" + name.replace("_", "-")


def _fits(value: Any, annotation: str) -> bool:
    kinds = {"int": int, "float": (int, float), "str": str, "bool": bool, "None": type(None)}
    wanted = annotation.split(" | ")
    # To Python, True is an int.
    return "bool" in wanted if isinstance(value, bool) else any(isinstance(value, kinds[kind]) for kind in wanted)


def check_config(config: Config) -> Config:
    """`config` itself; UserError for senseless values. Encoder and data are checked where they are opened."""
    for name, option in OPTIONS.items():
        value = getattr(config, name)
        if option.least is not None and value is not None and not (math.isfinite(value) and value >= option.least):
            raise UserError(f"{flag(name)} is {value}: use {option.least} or more")
        if option.most is not None and value > option.most:
            raise UserError(f"{flag(name)} is {value}: use {option.most} or less")
    if 0 < config.spike <= 1:
        raise UserError(
            f"--spike {config.spike} takes ordinary losses for spikes: use more than 1, or 0 to accept every loss"
        )
    if config.lr == 0:
        raise UserError("--lr is 0: nothing would be learned, use more")
    if config.lr_low > config.lr:
        raise UserError(f"--lr-low {config.lr_low} is above the peak --lr {config.lr}: lower it")
    if config.slot_dim % config.slot_heads:
        raise UserError(f"--slot-heads {config.slot_heads} does not divide --slot-dim {config.slot_dim}: change one")
    check_orders(config)
    if config.initial_weights == "clustering" and (config.implementation != "spot" or config.slot_heads != 1):
        raise UserError(
            "--initial-weights clustering is for --implementation spot and --slot-heads 1: use --initial-weights xavier"
        )
    if config.initial_weights == "teacher" and config.stage == 1:
        raise UserError("--initial-weights teacher is for --stage 2: use xavier or clustering in stage 1")
    if config.online_teacher and config.stage == 1:
        raise UserError("--teacher ema belongs to stage 2: add --stage 2 or drop it")
    if config.online_teacher and config.initial_weights == "teacher" and config.init_from is None:
        raise UserError(
            "--initial-weights teacher needs a stage-1 run: add --init-from RUN to --teacher ema, or start from "
            "xavier or clustering"
        )
    if config.stage == 2 and config.slot_heads != 1:
        raise UserError(f"--slot-heads {config.slot_heads}: the student of stage 2 needs 1")
    return config


def check_orders(config: Config) -> None:
    """UserError for patch orders that the decoder does not have."""
    if config.orders != "standard" and (config.cappa > 0 or config.decoder in ONE_ORDER):
        refused = f"--cappa {config.cappa}" if config.cappa > 0 else f"--decoder {config.decoder}"
        raise UserError(f"{refused} works in the standard patch order only: add --orders standard")


def with_own_orders(config: Config, given: Container[str]) -> Config:
    """`config`, in the standard order where its decoder knows no other and `orders` is not among the fields given."""
    if config.decoder in ONE_ORDER and "orders" not in given:
        return replace(config, orders="standard")
    return config


def preset(name: str, stage: int = 1, **changes: Any) -> Config:
    """Config of a data set, method, encoder and size for one stage, with `changes` applied.

    name joins the four with + in any order, such as "coco", "coco+dinosaur" or "voc+spot_mlp+mae_vitb16+448px"; the
    rest is scenes, spot, and the data set's own encoder and size. `method`, `encoder` and `image_size` may be among
    the changes: an encoder that the presets know brings its rates under either of its names. UserError names what is
    unknown.
    """
    data, method, encoder, size = recipes.split(name)
    for option, named in (("method", method), ("encoder", encoder), ("image_size", size)):
        given = changes.get(option)
        if named and given and recipes.timm_name(named) != recipes.timm_name(given):
            what = option.replace("_", " ")
            raise UserError(f"--preset {name} and {flag(option)} {given} differ: give the {what} once")
    data, method = data or "scenes", method or changes.get("method") or "spot"
    encoder = encoder or changes.get("encoder")
    recipes.check_method(method, stage)
    known = recipes.encoder_recipe(encoder) if encoder else recipes.default_encoder(data)
    values = {name: value for name, (value, _) in recipes.values(data, method, known, stage, size).items()}
    if encoder:
        changes = changes | {"encoder": recipes.timm_name(encoder)}
    return with_own_orders(replace(Config(preset=data, method=method, stage=stage, **values), **changes), changes)
