"""python -m spot_fast.presets: data sets, methods and encoders, what each sets, from where, and the paper's scores."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import fields
from typing import Any

from spot_fast import recipes
from spot_fast.config import Config, preset
from spot_fast.errors import UserError
from spot_fast.published import METRICS, Score, scores
from spot_fast.recipes import DATA_SETS, ENCODERS, METHODS, Value
from spot_fast.system import terminal

# What the data set of a command is called.
_PLACES = {"scenes": "", "coco": "COCO", "voc": "VOCdevkit", "movi_c": "MOVI_C", "movi_e": "MOVI_E", "folder": "PHOTOS"}


def main(argv: Sequence[str] | None = None) -> int:
    terminal.any_character()
    args = _parser().parse_args(argv)
    try:
        if args.name is None:
            found = _everything()
            print(json.dumps(found, indent=2, ensure_ascii=False) if args.json else _list())
        else:
            found = describe(args.name)
            print(json.dumps(found, indent=2, ensure_ascii=False) if args.json else _page(found))
    except UserError as error:
        print(f"error: {str(error).replace('--preset ', '', 1)}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m spot_fast.presets",
        description="Lists what --preset of python -m spot_fast.train takes: a data set, a method and an encoder, each "
        "optional, joined with +, such as coco+dinosaur+mae_vitb16; with the paper's scores.",
    )
    parser.add_argument(
        "name",
        nargs="?",
        metavar="NAME",
        help="show one in full, a part or a combination: every "
        "value with its source, both training commands, all scores",
    )
    parser.add_argument("--json", action="store_true", help="the same as JSON; scores in percent")
    return parser


def describe(name: str) -> dict[str, Any]:
    """A preset in full, as plain data: its parts, settings of each stage with sources, commands, scores and notes.

    UserError names what is unknown.
    """
    data, method, encoder = recipes.split(name)
    named = {"data": data, "method": method, "encoder": encoder}
    whole = (data or "coco", method or "spot", encoder or (None if data == "scenes" else "dino_vitb16"))
    if data is None:  # a method or an encoder alone is shown on COCO, where the paper has most of it
        whole = ("coco", *whole[1:])
    stages = [1] if METHODS[whole[1]].stage2 is None else [1, 2]
    notes = [*METHODS[whole[1]].notes] if method else []
    about = {}
    if data:
        about["data"] = DATA_SETS[data].about
    if method:
        about["method"] = METHODS[method].about
    if encoder:
        vit = ENCODERS[encoder]
        about["encoder"] = f"{vit.about} ({vit.licence}); weights: {vit.weights}"
        notes += vit.notes
    rows = scores(data, method, encoder)
    if whole[0] in ("scenes", "folder"):
        rows = []
    elif not rows:
        notes.append("the paper has no scores of this combination")
    return {
        "name": name,
        "about": about,
        "named": named,
        "shown": dict(zip(("data", "method", "encoder"), whole, strict=True)),
        "settings": {f"stage {stage}": settings(*whole, stage) for stage in stages},
        "commands": commands(*whole),
        "notes": notes,
        "scores": [_score(row) for row in rows],
    }


def settings(data: str, method: str, encoder: str | None, stage: int) -> dict[str, dict[str, Any]]:
    """Every value that the paper or this package chose: field → value and source."""
    found = recipes.COMMON | recipes.values(data, method, encoder, stage)
    config = preset("+".join(filter(None, (data, method, encoder))), stage)
    skipped = _irrelevant(config)
    order = [field.name for field in fields(Config) if field.name in found and field.name not in skipped]
    assert all(getattr(config, name) == found[name].value for name in order)
    return {name: _value(found[name]) for name in order}


def _irrelevant(config: Config) -> set[str]:
    """Fields that change nothing in such a run."""
    # A registered decoder may read any of them.
    others = {"transformer": {"dec_mlp_hidden"}, "mlp": {"dec_blocks", "dec_heads", "cappa"}}
    decoder = others.get(config.decoder, set())
    return decoder | ({"att_weight", "train_blocks"} if config.stage == 1 else set())


def _value(value: Value) -> dict[str, Any]:
    return {"value": value.value, "source": value.source}


def commands(data: str, method: str, encoder: str | None) -> list[str]:
    """The training commands of both stages, and evaluation."""
    parts = [data, *([method] if method != "spot" else [])]
    parts += [encoder] if encoder and (data == "scenes" or encoder != "dino_vitb16") else []
    words = ["python -m spot_fast.train"]
    if parts != ["scenes"]:
        words.append(f"--preset {'+'.join(parts)}")
    if place := _PLACES[data]:
        words.append(f"--data {place}")
    if encoder == "moco_vitb16":
        words.append("--encoder-weights vit-b-300ep.pth.tar")
    line = " ".join(words)
    stages = [line] if METHODS[method].stage2 is None else [line, f"{line} --stage 2"]
    return [*stages, "python -m spot_fast.evaluate"]


def _score(row: Score) -> dict[str, Any]:
    figures = {
        metric: {"mean": mean, "std": deviation}
        for metric, mean, deviation in zip(METRICS, row.means, row.deviations, strict=True)
    }
    return {
        "data": row.data,
        "method": row.method,
        "encoder": row.encoder,
        "stage": row.stage,
        "masks": row.masks,
        "percent": figures,
        "source": row.source,
        "note": row.note,
    }


def _everything() -> dict[str, Any]:
    return {
        "data": {name: {"about": one.about} for name, one in DATA_SETS.items()},
        "methods": {
            name: {"about": one.about, "stages": 1 if one.stage2 is None else 2, "notes": list(one.notes)}
            for name, one in METHODS.items()
        },
        "encoders": {
            name: {
                "about": one.about,
                "timm": one.timm,
                "licence": one.licence,
                "weights": one.weights,
                "notes": list(one.notes),
            }
            for name, one in ENCODERS.items()
        },
        "scores": [_score(row) for row in scores()],
    }


def _list() -> str:
    lines = [
        "python -m spot_fast.train --preset DATA+METHOD+ENCODER, in any order. Left out they are scenes, spot and "
        "dino_vitb16;",
        "scenes have an encoder of their own.",
        "",
    ]
    lines += _section("data sets", ((name, one.about) for name, one in DATA_SETS.items()))
    lines += _section(
        "methods",
        ((name, one.about + ("" if one.stage2 is not None else "; stage 1 alone")) for name, one in METHODS.items()),
    )
    lines += _section("encoders", ((name, _about_encoder(name)) for name in ENCODERS))
    lines.append("scores of the paper, percent, decoder masks, mean ± standard deviation of 3 seeds where it has them")
    lines += _table(main_scores(), with_data=True)
    lines += [
        "",
        "python -m spot_fast.presets NAME shows one in full: every value with its source, commands, all scores.",
    ]
    return "\n".join(lines)


def main_scores() -> list[Score]:
    """The paper's own scores of decoder masks of what the presets train."""
    return [row for row in scores() if row.masks == "decoder" and _as_preset(row)]


def score_name(row: Score) -> str:
    """The preset of a row; an encoder that none has is in the row's note."""
    encoder = [row.encoder] if row.encoder in ENCODERS and row.encoder != "dino_vitb16" else []
    return "+".join([row.data, row.method, *encoder])


def _as_preset(row: Score) -> bool:
    """What the preset trains to the end, as the paper's authors did: no ablation, no numbers of others."""
    last = 1 if METHODS[row.method].stage2 is None else 2
    return row.stage == last and row.note in ("", "100 epochs") and row.encoder in ENCODERS


def _about_encoder(name: str) -> str:
    vit, rates = ENCODERS[name], ENCODERS[name].rates
    lam = vit.values.get("att_weight", recipes.COMMON["att_weight"]).value
    paper = "; not in the paper" if any("not in the paper" in note for note in vit.notes) else ""
    return f"{vit.about}; lr {rates['lr'].value:g} to {rates['lr_low'].value:g}, lambda {lam:g}{paper}"


def _section(title: str, rows: Iterable[tuple[str, str]]) -> list[str]:
    return [title, *(f"  {name:<14} {text}" for name, text in rows), ""]


def _table(rows: Sequence[Score], *, with_data: bool) -> list[str]:
    """Aligned columns; stage and masks where they differ from row to row."""
    head = ["preset", *([] if with_data else ["stage", "masks"]), *METRICS, "source", ""]
    body = []
    for row in rows:
        place = [] if with_data else [str(row.stage), row.masks]
        body.append([score_name(row), *place, *row.figures, row.source, row.note])
    widths = [max(len(line[column]) for line in [head, *body]) for column in range(len(head))]
    return [
        "  " + "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip()
        for line in [head, *body]
    ]


def _page(found: dict[str, Any]) -> str:
    lines = [f"{found['named'][kind]}: {text}" for kind, text in found["about"].items()]
    if left_out := [kind for kind, value in found["named"].items() if value is None and found["shown"][kind]]:
        lines.append("shown with " + " and ".join(f"{kind} {found['shown'][kind]}" for kind in left_out))
    lines += [
        "",
        *(f"  {command}" for command in found["commands"]),
        "",
        "Sources on the right are sections and tables of the paper, arXiv 2312.00648v3.",
        "",
    ]
    first, *rest = found["settings"].values()
    lines += ["settings (stage 1)" if rest else "settings", *(_setting(*item) for item in first.items())]
    if rest:
        changed = {name: value for name, value in rest[0].items() if first.get(name) != value}
        lines += ["", "stage 2 changes", *(_setting(*item) for item in changed.items())]
    if found["notes"]:
        lines += ["", "notes", *(f"  {note}" for note in found["notes"])]
    if found["scores"]:
        lines += ["", "scores of the paper, percent", *_table(_rows_of(found), with_data=False)]
    return "\n".join(lines)


def _rows_of(found: dict[str, Any]) -> list[Score]:
    named = found["named"]
    return scores(named["data"], named["method"], named["encoder"])


def _setting(name: str, value: dict[str, Any]) -> str:
    shown = {True: "yes", False: "no"}[value["value"]] if isinstance(value["value"], bool) else value["value"]
    shown = f"{shown:g}" if isinstance(shown, float) else shown
    return f"  --{name.replace('_', '-'):<18} {shown!s:<32} {value['source']}"


if __name__ == "__main__":
    sys.exit(terminal.run(main))
