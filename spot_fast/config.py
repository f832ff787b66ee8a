"""Everything that can be set about a run, as one flat dataclass, and how presets fill it.

A run is described by a `Config`: it is built from a preset (`preset("scenes", stage=1)`; `recipes` holds them), changed
from the command line, written to `config.json` in the run folder and read back from there. Field names are the
command-line names with underscores; `help` is what `--help` prints.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from spot_fast import recipes
from spot_fast.errors import UserError

# Encoders take images normalised by these, of values in [0, 1].
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def _option(default: Any, help: str, group: str, choices: tuple | None = None) -> Any:
    return field(default=default, metadata={"help": help, "group": group, "choices": choices})


@dataclass(frozen=True)
class Config:
    """One training run. Sizes in tokens, pixels or channels, rates per step; the defaults are SPOT's (section 4)."""

    preset: str = _option("scenes", "data set, with + a method and an encoder if you like", "run")
    method: str = _option("spot", "how it is trained", "run")
    stage: int = _option(1, "1: reconstruction; 2: a student taught by a stage-1 run", "run", (1, 2))
    seed: int = _option(0, "seed of weights, data order, patch orders and slot noise", "run")

    precision: str = _option(
        "auto",
        "float32, tf32 (a GPU rounds the factors of float32 products), bf16 (float32 "
        "weights), or auto: bf16 where the device multiplies it in hardware; config.json keeps "
        "the choice",
        "run",
        ("auto", "float32", "tf32", "bf16"),
    )
    float8: bool = _option(
        False,
        "the decoder multiplies in float8 (bf16 runs on GPUs of compute capability 8.9 or "
        "more; needs torchao); the run says how far its first batch is off",
        "run",
    )
    compile: str = _option(
        "auto",
        "compile forward and backward pass with torch.compile: yes, no, or auto: on a "
        "GPU; config.json keeps the choice",
        "run",
        ("auto", "yes", "no"),
    )
    cuda_graph: str = _option(
        "auto",
        "record the whole step as a CUDA graph and replay it: yes, no, or auto: on an "
        "NVIDIA GPU, in a run of one process",
        "run",
        ("auto", "yes", "no"),
    )
    on_bad_step: str = _option(
        "stop",
        "when loss or gradient is not finite or the loss leaps: stop, or skip the "
        "step's update (ten in a row stop the run)",
        "run",
        ("stop", "skip"),
    )
    spike: float = _option(
        5.0, "a loss leaps when it is so many times the mean of the last 100 or so; 0 = never", "run"
    )
    log_every: int = _option(20, "steps between lines of metrics.jsonl and TensorBoard", "run")
    save_every: int = _option(500, "steps between saved training states (every five minutes in any case)", "run")
    eval_every: int = _option(5, "epochs between quick validations, 0 = only at the end", "run")
    eval_images: int = _option(200, "validation images of a quick validation, 0 = none", "run")

    data: str | None = _option(None, "folder of the data set (scenes need none)", "data")
    train_images: int = _option(0, "how many training images to use, 0 = all (scenes: how many to generate)", "data")
    val_images: int = _option(0, "how many validation images to use, 0 = all (scenes: how many to generate)", "data")
    image_size: int = _option(224, "side of the square the encoder sees, pixels", "data")
    mask_size: int = _option(320, "side of the square on which masks are compared, pixels", "data")
    crop: str = _option(
        "center", "training crop after resizing the minor side", "data", ("center", "random", "stretch")
    )
    flip: bool = _option(True, "flip training images horizontally with probability 1/2", "data")
    sbd: str | None = _option(
        None, "folder of the SBD data set, from which VOC's trainaug list is made where VOC has none", "data"
    )
    loader: str = _option(
        "auto",
        "what decodes images: dali, torch (Pillow), or auto: DALI where it is installed and "
        "there is a GPU; config.json keeps the choice",
        "data",
        ("auto", "dali", "torch"),
    )
    workers: int | None = _option(
        None, "threads, above 4 processes, that decode images (default: one a core, at most 16)", "data"
    )
    cache: str = _option(
        "auto",
        "what is kept of the training images: nothing, decoded pixels, frozen features, or "
        "auto, which says what it chose and why",
        "data",
        ("auto", "none", "pixels", "features"),
    )
    cache_dir: str | None = _option(
        None, "folder of caches on disk (default: $SPOT_FAST_CACHE or ~/.cache/spot_fast)", "data"
    )

    encoder: str = _option(
        "vit_base_patch16_224.dino",
        "preset or timm name of the ViT (presets bring their rates), or spot_scenes for the packaged one",
        "encoder",
    )
    encoder_weights: str | None = _option(
        None, "safetensors or .pth file of the ViT; hub = let timm download; none = random", "encoder"
    )
    pos_resize: str = _option(
        "dino", "how position embeddings are resampled to another grid", "encoder", ("dino", "timm")
    )
    feature_norm: bool = _option(False, "layer-normalise the encoder's features (no parameters)", "encoder")
    train_blocks: int = _option(4, "last encoder blocks that train in stage 2", "encoder")

    num_slots: int = _option(7, "slots K", "slots")
    slot_dim: int = _option(256, "slot width U", "slots")
    slot_mlp: int = _option(1024, "hidden width of the slot MLP", "slots")
    slot_heads: int = _option(1, "heads of slot attention", "slots")
    slot_iterations: int = _option(3, "slot-attention iterations", "slots")
    slot_init: str = _option("gaussian", "initial slots", "slots", ("gaussian", "learned"))
    truncation: str = _option(
        "none", "which iterations gradients pass through", "slots", ("none", "fixed_point", "bi_level")
    )

    implementation: str = _option(
        "spot",
        "whose details slot encoder and decoder have: those of SPOT's authors, of "
        "OCBench, of OCLF's DINOSAUR or of VideoSAUR's (see spot_fast.convert)",
        "slots",
        ("spot", "ocbench", "dinosaur", "videosaur"),
    )

    decoder: str = _option("transformer", "decoder: transformer or mlp", "decoder")
    dec_blocks: int = _option(4, "transformer decoder blocks", "decoder")
    dec_heads: int = _option(6, "heads of its self-attention, and of the first cross-attention", "decoder")
    dec_cross_heads: int = _option(0, "heads of the later cross-attentions, 0 = dec_heads", "decoder")
    dec_mlp_hidden: int = _option(2048, "hidden width of the MLP decoder", "decoder")
    mlp_slot_proj: bool = _option(True, "project slots to the feature width before the MLP decoder", "decoder")
    orders: str = _option("spot9", "patch orders drawn in training", "decoder", ("spot9", "standard"))
    cappa: float = _option(0.0, "probability of a parallel (CapPa) step, standard order only", "decoder")

    epochs: int = _option(50, "passes over the training images", "optimisation")
    batch_size: int = _option(
        64,
        "images a step, of all processes together; --lr stays what it is (the usual rule for "
        "Adam, not tried here: sqrt(k) times the rate for k times the images)",
        "optimisation",
    )
    accumulate: int = _option(
        1,
        "parts of a process's share of a batch that go through the model one after another, "
        "for small memories; the gradient is the whole batch's but for rounding",
        "optimisation",
    )
    lr: float = _option(4e-4, "peak learning rate", "optimisation")
    lr_low: float = _option(4e-7, "learning rate approached at the end", "optimisation")
    warmup_steps: int = _option(10_000, "linear warm-up, rounded to whole epochs", "optimisation")
    clip: float = _option(0.3, "largest infinity norm of the gradient, 0 = no clipping", "optimisation")
    att_weight: float = _option(0.005, "lambda, weight of L_ATT in stage 2", "optimisation")
    att_weight_final: float | None = _option(
        None, "lambda at the end of a cosine schedule (default: constant)", "optimisation"
    )

    @property
    def recipe(self) -> str:
        """Data set and method as `--preset` takes them, the method where it is not spot."""
        return self.preset if self.method == "spot" else f"{self.preset}+{self.method}"

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Config:
        """Config from `config.json`; raises ValueError on an unknown key or a value of the wrong type."""
        values = json.loads(text)
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(f"config has unknown keys {', '.join(unknown)}: it was written by another version")
        if (method := values.get("method", "spot")) not in recipes.METHODS:
            raise ValueError(f"method {method!r} is unknown: it was written by another version")
        return cls(**values)


def preset_names() -> list[str]:
    """The data sets, which are what `Config.preset` holds."""
    return list(recipes.DATA_SETS)


def preset(name: str, stage: int = 1, **changes: Any) -> Config:
    """Config of a data set, method and encoder for one stage, with `changes` applied.

    name joins the three with + in any order, such as "coco", "coco+dinosaur" or "voc+spot_mlp+mae_vitb16"; scenes,
    spot and the data set's own encoder stand for what it leaves out. `method` and `encoder` may be among the changes:
    an encoder that the presets know brings its rates under either of its names. UserError names what is unknown.
    """
    data, method, encoder = recipes.split(name)
    for option, named in (("method", method), ("encoder", encoder)):
        given = changes.get(option)
        if named and given and recipes.timm_name(named) != recipes.timm_name(given):
            raise UserError(f"--preset {name} and --{option} {given} differ: give the {option} once")
    data, method = data or "scenes", method or changes.get("method") or "spot"
    encoder = encoder or changes.get("encoder")
    recipes.check_method(method, stage)
    own = "dino_vitb16" if data != "scenes" else None
    found = recipes.values(data, method, recipes.encoder_recipe(encoder) if encoder else own, stage)
    values = {field: value for field, (value, _) in found.items()}
    if encoder:
        changes = changes | {"encoder": recipes.timm_name(encoder)}
    return replace(Config(preset=data, method=method, stage=stage, **values), **changes)
