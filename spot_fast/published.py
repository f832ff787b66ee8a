"""Scores that the paper prints (arXiv 2312.00648v3), in percent, mean ± standard deviation of three seeds where given.

The ticks of Tables 1 and 7 say which row is which method: (a) one order, (b) nine orders, (c) nine orders averaged in
Table 1, both with self-training in Table 7; (d) is (a) for 100 epochs; (e) self-training with one order, (f) with nine,
(g) averaged over them (sections 4.2 and B.2; Table 9 repeats (d) as its DINOSAUR).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

METRICS = ("mBO_i", "mBO_c", "mIoU", "FG-ARI")
Figures = tuple[str, str, str, str]
# Images of the training sets (D.3), and of sets that are not in the paper.
IMAGES = {"coco": 118_287, "voc": 10_582, "movi_c": 87_633, "movi_e": 87_741}
OTHER_IMAGES = {"movi_c_256": IMAGES["movi_c"], "movi_e_256": IMAGES["movi_e"], "clevrtex": 40_000}
# Table 6: data set → masks → figures; `evaluation.baselines.PUBLISHED_BLOCKS` has their columns.
BLOCK_MASKS: dict[str, dict[int, Figures]] = {
    "coco": {7: ("16.8", "19.5", "15.9", "22.7")},
    "voc": {6: ("24.7", "25.9", "24.2", "13.9"), 1: ("19.1", "23.0", "17.4", "49.9")},
    "movi_c": {11: ("19.5", "-", "18.2", "42.7")},
    "movi_e": {24: ("20.4", "-", "18.8", "41.9")},
}


@dataclass(frozen=True)
class Score:
    """A row of a table: what was scored, and mBO_i, mBO_c, mIoU and FG-ARI as printed, "-" where there is none.

    encoder is a name of `recipes.ENCODERS`, or dino_vits8, which no preset has.
    """

    data: str
    method: str
    encoder: str
    stage: int
    masks: str
    figures: Figures
    source: str
    note: str = ""

    @property
    def tables(self) -> list[str]:
        """The tables that have it, such as "1 (f)" and "10"."""
        return self.source.removeprefix("Tab. ").split(", ")

    @property
    def means(self) -> tuple[float | None, ...]:
        return tuple(None if text == "-" else float(text.split("±")[0]) for text in self.figures)

    @property
    def deviations(self) -> tuple[float | None, ...]:
        return tuple(float(text.split("±")[1]) if "±" in text else None for text in self.figures)


# data · method · encoder · stage · masks | mBO_i mBO_c mIoU FG-ARI | source | note
_TABLES = """
coco spot dino_vitb16 2 decoder | 34.7±0.1 44.3±0.3 32.7±0.1 36.6±0.3 | Tab. 1 (f), 5, 6, 10
coco spot dino_vitb16 2 slots | 33.7±0.1 43.1±0.4 31.8±0.1 37.8±0.5 | Tab. 1 (f), 6
coco spot dino_vitb16 1 decoder | 32.7±0.2 40.9±0.5 30.8±0.1 35.6±0.5 | Tab. 1 (b), 3
coco spot dino_vitb16 1 slots | 31.1±0.1 38.9±0.3 29.4±0.1 33.4±0.4 | Tab. 1 (b)
coco spot dino_vitb16 2 decoder | 30.1±0.5 38.2±1.0 28.3±0.4 22.5±1.6 | Tab. 1 (e) | --orders standard in both stages
coco spot dino_vitb16 2 slots | 33.2±0.1 43.6±0.2 31.1±0.0 34.4±0.5 | Tab. 1 (e) | --orders standard in both stages
coco spot dino_vitb16 2 decoder | 30.7±2.2 - - - | Tab. 2 (a), 8 | --att-weight 0
coco spot dino_vitb16 2 decoder | 34.6±0.3 - - - | Tab. 2 (a) | --att-weight 0.002
coco spot dino_vitb16 2 decoder | 34.1±0.5 - - - | Tab. 2 (a) | --att-weight 0.01
coco spot dino_vitb16 2 decoder | 33.4±1.5 - - - | Tab. 2 (a) | --att-weight 0.02
coco spot dino_vitb16 2 decoder | 32.4±0.2 - - - | Tab. 2 (c) | --train-blocks 0
coco spot moco_vitb16 2 decoder | 32.7±0.2 41.7±0.4 30.7±0.2 34.4±0.2 | Tab. 10
coco spot mae_vitb16 2 decoder | 33.3±0.3 40.7±0.7 31.4±0.3 37.5±1.0 | Tab. 10
coco spot_ens dino_vitb16 2 decoder | 35.0±0.1 44.7±0.3 33.0±0.1 37.0±0.2 | Tab. 1 (g), 5, 6, 10
coco spot_ens dino_vitb16 2 slots | 33.7±0.1 43.1±0.4 31.8±0.1 37.8±0.5 | Tab. 1 (g), 6
coco spot_ens dino_vitb16 1 decoder | 32.9±0.2 41.2±0.5 31.0±0.1 36.0±0.5 | Tab. 1 (c)
coco spot_ens dino_vitb16 1 slots | 31.1±0.1 38.9±0.3 29.4±0.1 33.4±0.4 | Tab. 1 (c)
coco spot_ens moco_vitb16 2 decoder | 32.9±0.2 42.0±0.4 30.9±0.2 34.8±0.3 | Tab. 10
coco spot_ens mae_vitb16 2 decoder | 33.4±0.3 40.9±0.7 31.6±0.3 37.7±1.0 | Tab. 10
coco spot_mlp dino_vitb16 2 decoder | 28.4 32.4 27.0 42.5 | Tab. 4
coco dinosaur dino_vitb16 1 decoder | 32.3±0.3 42.1±0.2 30.2±0.3 31.8±0.9 | Tab. 1 (d), 9 | 100 epochs
coco dinosaur dino_vitb16 1 slots | 30.5±0.2 39.8±0.1 28.5±0.3 30.0±0.7 | Tab. 1 (d) | 100 epochs
coco dinosaur dino_vitb16 1 decoder | 32.0±0.1 41.4±0.3 30.0±0.1 32.3±0.6 | Tab. 1 (a), 3 | --epochs 50
coco dinosaur dino_vitb16 1 slots | 30.0±0.2 38.9±0.4 28.1±0.2 29.5±0.6 | Tab. 1 (a) | --epochs 50
coco dinosaur dino_vits8 1 decoder | 32.3±0.4 38.8±0.4 - 34.3±0.5 | Tab. 5, 6 | DINOSAUR's own, ViT-S/8, 270 epochs
coco dinosaur dino_vitb16 1 decoder | 31.6±0.7 39.7±0.9 - 34.1±1.0 | Tab. 10 | not said who trained it
coco dinosaur moco_vitb16 1 decoder | 31.4±0.2 38.5±0.5 - 35.2±0.2 | Tab. 10 | not said who trained it
coco dinosaur mae_vitb16 1 decoder | 30.2±1.8 33.2±1.8 - 32.8±3.7 | Tab. 10 | not said who trained it
coco dinosaur_mlp dino_vitb16 1 decoder | 26.7 30.3 25.6 38.7 | Tab. 4
coco dinosaur_mlp dino_vitb16 1 decoder | 27.7±0.2 30.9±0.2 - - | Tab. 5 | DINOSAUR's own
coco cappa dino_vitb16 1 decoder | 27.8 - 26.5 35.3 | Tab. 3
coco bo_qsa dino_vitb16 1 decoder | 31.5 39.7 - - | Tab. 9 | 100 epochs
voc spot dino_vitb16 2 decoder | 48.1±0.4 55.3±0.4 46.5±0.4 19.4±0.7 | Tab. 5, 6
voc spot dino_vitb16 2 slots | - - - 19.7±0.4 | Tab. 6
voc spot_ens dino_vitb16 2 decoder | 48.3±0.4 55.6±0.4 46.8±0.4 19.9±0.9 | Tab. 5, 6
voc spot_ens dino_vitb16 2 slots | - - - 19.7±0.4 | Tab. 6
voc dinosaur dino_vitb16 1 decoder | 44.0±1.9 51.2±1.9 - 24.8±2.2 | Tab. 5, 6 | DINOSAUR's own
voc dinosaur_mlp dino_vitb16 1 decoder | 39.5±0.1 40.9±0.1 - 24.6±0.2 | Tab. 5, 6 | DINOSAUR's own
movi_c spot dino_vitb16 2 decoder | 47.0±1.2 - 46.4±1.2 52.1±3.3 | Tab. 5, 6
movi_c spot dino_vitb16 2 slots | - - - 57.9±2.0 | Tab. 6
movi_c spot_ens dino_vitb16 2 decoder | 47.3±1.2 - 46.7±1.3 52.3±3.3 | Tab. 5, 6, 7 (c)
movi_c spot_ens dino_vitb16 2 slots | 46.2±0.8 - 45.4±0.7 57.9±2.0 | Tab. 6, 7 (c)
movi_c spot_ens dino_vitb16 1 decoder | 46.1±0.9 - 45.2±0.9 51.8±2.7 | Tab. 7 (b)
movi_c spot_ens dino_vitb16 1 slots | 42.5±0.1 - 41.6±0.1 57.6±0.7 | Tab. 7 (b)
movi_c dinosaur dino_vitb16 1 decoder | 45.3±1.8 - 44.6±1.7 50.6±4.3 | Tab. 7 (a)
movi_c dinosaur dino_vitb16 1 slots | 42.8±0.1 - 42.0±0.1 55.4±0.6 | Tab. 7 (a)
movi_c dinosaur dino_vitb16 1 decoder | 42.4 - - 55.7 | Tab. 5, 6 | DINOSAUR's own
movi_c dinosaur_mlp dino_vits8 1 decoder | 39.1±0.2 - - 68.6±0.4 | Tab. 5, 6 | DINOSAUR's own, ViT-S/8
movi_e spot dino_vitb16 2 decoder | 39.9±1.1 - 39.0±1.1 56.4±4.1 | Tab. 5, 6
movi_e spot dino_vitb16 2 slots | - - - 59.9±0.4 | Tab. 6
movi_e spot_ens dino_vitb16 2 decoder | 40.1±1.2 - 39.3±1.2 56.8±4.3 | Tab. 5, 6
movi_e spot_ens dino_vitb16 2 slots | - - - 59.9±0.4 | Tab. 6
movi_e dinosaur_mlp dino_vits8 1 decoder | 35.5±0.2 - - 65.1±1.2 | Tab. 5, 6 | DINOSAUR's own, ViT-S/8
"""


def _rows() -> list[Score]:
    rows = []
    for line in _TABLES.strip().splitlines():
        what, figures, source, *note = re.split(r" \| ", line)
        data, method, encoder, stage, masks = what.split()
        mbo_i, mbo_c, miou, fg_ari = figures.split()
        rows.append(Score(data, method, encoder, int(stage), masks, (mbo_i, mbo_c, miou, fg_ari), source, *note))
    return rows


SCORES = _rows()


def scores(data: str | None = None, method: str | None = None, encoder: str | None = None) -> list[Score]:
    """The rows of a data set, method and encoder; None takes all."""
    return [
        score
        for score in SCORES
        if data in (None, score.data) and method in (None, score.method) and encoder in (None, score.encoder)
    ]


def figures(table: str, masks: str = "decoder", **named: str) -> dict[str, Figures]:
    """Data set → the figures of a row of a table, such as "1 (f)". named: fields that tell it from others.

    ValueError without exactly one row for each data set.
    """
    named["masks"] = masks
    found = [
        row
        for row in SCORES
        if table in row.tables and all(getattr(row, name) == value for name, value in named.items())
    ]
    by_data = {row.data: row.figures for row in found}
    if not found or len(by_data) < len(found):
        raise ValueError(f"{len(found)} rows of table {table} have {named}: name one a data set")
    return by_data
