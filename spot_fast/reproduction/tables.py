"""The tables of the paper (arXiv 2312.00648v3) as data: their rows, what each trains, and which masks it scores.

A row is a line: to add one, name what it trains as a `Recipe`. The same run in several rows and tables is trained once,
however it is written. In options, a number followed by x is so many times the preset's own: `--epochs 2x` is 100 on
COCO, as in Table 1 (d), and 16 on scenes. `--epochs sum` is those of both stages, `steps1` the steps of stage 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from spot_fast.published import BLOCK_MASKS, Figures, figures


@dataclass(frozen=True)
class Recipe:
    """What is trained, for any data set and seed.

    options: of spot_fast.train. parts: method and encoder that are joined to the preset. teacher, init_from: the runs
    of the same seed that are passed as --teacher and --init-from.
    """

    stage: int = 1
    options: str = ""
    parts: str = ""
    teacher: Recipe | None = None
    init_from: Recipe | None = None


@dataclass(frozen=True)
class Row:
    """A line of a table: the masks of a recipe's runs.

    masks: decoder (in order 0), ensemble (decoder, the mean over all its orders), slots, blocks (the layout of Table 6;
    where it has none, the best columns), one block, kmeans. paper: data set → what the paper prints.
    """

    title: str
    recipe: Recipe
    masks: str = "decoder"
    paper: Mapping[str, Figures] = field(default_factory=dict)


@dataclass(frozen=True)
class Table:
    """presets: the data sets that it is about; all if empty. note: a sentence below it. figure: it is drawn."""

    title: str
    rows: tuple[Row, ...]
    presets: tuple[str, ...] = ()
    note: str = ""
    figure: bool = False


_ONE_ORDER = "--orders standard"
PLAIN = Recipe(1, _ONE_ORDER)
PLAIN_LONG = Recipe(1, f"{_ONE_ORDER} --epochs 2x")
ORDERS = Recipe(1)
PLAIN_STUDENT = Recipe(2, teacher=PLAIN)
SPOT = Recipe(2, teacher=ORDERS)
MLP = Recipe(1, parts="spot_mlp")
MLP_STUDENT = Recipe(2, parts="spot_mlp", teacher=MLP)
TOP_K = Recipe(1, "--mlp-top-k 3", parts="spot_mlp")
MASKED = Recipe(1, parts="spot_masked")
MASKED_STUDENT = Recipe(2, parts="spot_masked", teacher=MASKED)
_ONLINE = "--teacher ema --ema-momentum 0.99"
ONE_RUN = Recipe(2, "--teacher ema --epochs sum --att-warmup-steps steps1")
_TWICE = "--image-size 2x --mask-size 2x"
_BI_LEVEL = Recipe(1, f"{_ONE_ORDER} --epochs 2x --slot-init learned --truncation bi_level")


def _pair(title: str, recipe: Recipe, source: str = "", decoder: str = "decoder") -> tuple[Row, Row]:
    """Decoder and slot masks of a row of the paper. decoder: or "ensemble"."""
    return tuple(
        Row(title, recipe, masks, figures(source, "slots" if masks == "slots" else "decoder") if source else {})
        for masks in (decoder, "slots")
    )


def _changed(options: str, stage: int = 2) -> Recipe:
    """SPOT's stage with other options."""
    return Recipe(stage, options, teacher=ORDERS if stage == 2 else None)


def _encoder_rows(title: str, encoder: str) -> tuple[Row, ...]:
    first = Recipe(1, parts=encoder)
    student = Recipe(2, parts=encoder, teacher=first)
    plain = Recipe(1, _ONE_ORDER, parts=encoder)
    named = {"encoder": encoder}
    return (
        Row(f"{title}, one order, no self-training", plain, "decoder", figures("10", method="dinosaur", **named)),
        Row(f"{title}, SPOT w/o ENS", student, "decoder", figures("10", method="spot", **named)),
        Row(f"{title}, SPOT w/ ENS", student, "ensemble", figures("10", method="spot_ens", **named)),
    )


_BLOCKS = {data: next(iter(rows.values())) for data, rows in BLOCK_MASKS.items()}
_ONE_BLOCK = {data: rows[1] for data, rows in BLOCK_MASKS.items() if 1 in rows}
_COLLAPSE = {"coco": ("collapse", "-", "-", "-")}

PAPER: dict[str, Table] = {
    "1": Table(
        "Table 1: patch orders (SP), self-training (ST), the mean over nine orders (ENS)",
        (
            Row("block masks", ORDERS, "blocks"),
            Row("k-means of each image's features", ORDERS, "kmeans"),
            *_pair("(a) neither", PLAIN, "1 (a)"),
            *_pair("(b) SP", ORDERS, "1 (b)"),
            *_pair("(c) SP, ENS", ORDERS, "1 (c)", "ensemble"),
            *_pair("(d) neither, twice the epochs", PLAIN_LONG, "1 (d)"),
            *_pair("(e) ST", PLAIN_STUDENT, "1 (e)"),
            *_pair("(f) SP, ST", SPOT, "1 (f)"),
            *_pair("(g) SP, ST, ENS", SPOT, "1 (g)", "ensemble"),
        ),
    ),
    "2": Table(
        "Table 2: λ of self-training, and whether the encoder is fine-tuned",
        (
            Row("(a) λ = 0", _changed("--att-weight 0"), paper=figures("2 (a)", note="--att-weight 0")),
            Row("(a) λ × 0.4", _changed("--att-weight 0.4x"), paper=figures("2 (a)", note="--att-weight 0.002")),
            Row("(a) λ as the preset's", SPOT, paper=figures("1 (f)")),
            Row("(a) λ × 2", _changed("--att-weight 2x"), paper=figures("2 (a)", note="--att-weight 0.01")),
            Row("(a) λ × 4", _changed("--att-weight 4x"), paper=figures("2 (a)", note="--att-weight 0.02")),
            Row("(c) no encoder block trains", _changed("--train-blocks 0"), paper=figures("2 (c)")),
            Row("(c) the last blocks train", SPOT, paper=figures("1 (f)")),
        ),
        note="λ is 0.005 on COCO and 0.02 on scenes; 4 encoder blocks train on COCO and 2 on scenes. Section (b), a "
        "teacher in the default order alone, is no option here.",
    ),
    "3": Table(
        "Table 3: ways to train the autoregressive decoder, stage 1",
        (
            Row("Transformer", PLAIN, paper=figures("1 (a)")),
            Row(
                "Transformer w/ PA (CapPa)", Recipe(1, f"{_ONE_ORDER} --cappa 0.25"), paper=figures("3", method="cappa")
            ),
            Row("Transformer w/ SP", ORDERS, paper=figures("1 (b)")),
        ),
    ),
    "4": Table(
        "Table 4: self-training with the MLP decoder",
        (
            Row("MLP", MLP, paper=figures("4", method="dinosaur_mlp")),
            Row("MLP, ST", MLP_STUDENT, paper=figures("4", method="spot_mlp")),
        ),
    ),
    "6": Table(
        "Tables 5 and 6: block masks and SPOT",
        (
            Row("block masks, as many as slots", SPOT, "blocks", _BLOCKS),
            Row("1-block mask", SPOT, "one block", _ONE_BLOCK),
            Row("SPOT w/o ENS", SPOT, "decoder", figures("6", method="spot")),
            Row("SPOT w/ ENS", SPOT, "ensemble", figures("6", method="spot_ens")),
            Row("SPOT", SPOT, "slots", figures("6", "slots", method="spot")),
        ),
    ),
    "7": Table(
        "Table 7: patch orders with ENS (SP) and self-training (ST), in the paper on MOVi-C",
        (
            *(_pair("(a) neither", PLAIN, "7 (a)")),
            *(_pair("(b) SP", ORDERS, "7 (b)", "ensemble")),
            *(_pair("(c) SP, ST", SPOT, "7 (c)", "ensemble")),
        ),
    ),
    "8": Table(
        "Table 8: whether training the encoder stays stable; stage 2, nine orders",
        (
            Row(
                "neither BO-QSA nor ST",
                _changed("--att-weight 0 --slot-init gaussian --truncation none"),
                paper=_COLLAPSE,
            ),
            Row("BO-QSA", _changed("--att-weight 0"), paper=figures("8")),
            Row("BO-QSA, ST", SPOT, paper=figures("1 (f)")),
        ),
    ),
    "9": Table(
        "Table 9: learned initial slots and bi-level gradients without self-training (BO), twice the epochs",
        (
            Row("DINOSAUR", PLAIN_LONG, paper=figures("9", method="dinosaur")),
            Row("DINOSAUR w/ BO", _BI_LEVEL, paper=figures("9", method="bo_qsa")),
            Row("SPOT w/o ENS", SPOT, paper=figures("1 (f)")),
            Row("SPOT w/ ENS", SPOT, "ensemble", figures("1 (g)")),
        ),
    ),
    "10": Table(
        "Table 10: encoders",
        (
            *_encoder_rows("DINO", "dino_vitb16"),
            *_encoder_rows("MoCo-v3", "moco_vitb16"),
            *_encoder_rows("MAE", "mae_vitb16"),
        ),
        note="The paper does not say who trained its DINOSAUR rows: here they are stage 1 in one order.",
    ),
    "figure3": Table(
        "Figure 3: gradient norm of each patch's loss with respect to the slots",
        (Row("(a) decoder without permutations", PLAIN), Row("(b) decoder with permutations", ORDERS)),
        figure=True,
    ),
    "figure7": Table(
        "Figure 7: mBO_i by size of the instance",
        (Row("SPOT w/o ENS", SPOT), Row("SPOT w/ ENS", SPOT, "ensemble"), Row("SPOT", SPOT, "slots")),
        figure=True,
    ),
}


def _ours(title: str, recipe: Recipe) -> tuple[Row, ...]:
    """Decoder masks averaged over all orders, and slot masks."""
    return Row(title, recipe, "ensemble"), Row(title, recipe, "slots")


OURS: dict[str, Table] = {
    "options": Table(
        "Options that are not in the paper, beside SPOT",
        (
            *_ours("SPOT", SPOT),
            *_ours("online teacher, from the stage-1 model", Recipe(2, _ONLINE, init_from=ORDERS)),
            *_ours("online teacher, one run", ONE_RUN),
            *_ours("adaptive slots", _changed("--adaptive-slots")),
            *_ours("fine-tuned at twice the resolution", Recipe(2, _TWICE, init_from=SPOT)),
            *_ours("masked decoder", MASKED_STUDENT),
            *_ours("masked decoder, stage 1", MASKED),
            *_ours("MLP decoder, stage 1", MLP),
            *_ours("MLP decoder, top-k, stage 1", TOP_K),
        ),
        note="One run is as long as both stages and begins self-training where the second would. Top-k decodes each "
        "token from three slots, as FT-DINOSAUR does. The run at twice the resolution has a tenth of the student's "
        "epochs and is scored at its own size.",
    ),
    "ablations": Table(
        "What each setting of the scenes recipe brings: the same run without it",
        (
            *_ours("stage 1, the recipe", ORDERS),
            *_ours("stage 1, one patch order", PLAIN),
            *_ours("stage 1, SPOT's start", _changed("--initial-weights xavier", 1)),
            *_ours("stage 1, SPOT's start, one order", _changed(f"--initial-weights xavier {_ONE_ORDER}", 1)),
            *_ours("stage 1, a quarter of the epochs", _changed("--epochs 0.25x", 1)),
            *_ours(
                "stage 1, SPOT's start, a quarter of the epochs",
                _changed("--initial-weights xavier --epochs 0.25x", 1),
            ),
            *_ours("stage 1, slots learn as fast as the rest", _changed("--slot-rate 1", 1)),
            *_ours("stage 1, 3 slot-attention iterations", _changed("--slot-iterations 3", 1)),
            *_ours("stage 1, 1 decoder block", _changed("--dec-blocks 1", 1)),
            *_ours("stage 2, the recipe", SPOT),
            *_ours("stage 2, a student that starts afresh", _changed("--initial-weights xavier")),
            *_ours("stage 2, no encoder block trains", _changed("--train-blocks 0")),
        ),
        presets=("scenes",),
    ),
}
TABLES = PAPER | OURS
