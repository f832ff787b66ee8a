"""python -m spot_fast.presets: data sets, methods and encoders, what each sets, from where, and the paper's scores."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from spot_fast import cli, recipes
from spot_fast.config import OPTIONS, SOURCED_DEFAULTS, Config, Option, preset
from spot_fast.errors import UserError
from spot_fast.published import METRICS, Score, scores
from spot_fast.recipes import DATA_SETS, ENCODERS, METHODS


@cli.command("nothing was written")
def main(argv: Sequence[str] | None = None) -> None:
    args = _parser().parse_args(argv)
    try:
        about = _everything() if args.name is None else describe(args.name)
    except UserError as error:
        # Here the name is no value of an option.
        raise UserError(str(error).replace("--preset ", "", 1)) from None
    if args.json:
        print(json.dumps(about, indent=2, ensure_ascii=False))
    else:
        print(_list() if args.name is None else _page(about))


def _parser() -> argparse.ArgumentParser:
    parser = cli.Parser(
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
    # A method or an encoder alone is shown on COCO, where the paper has most of it.
    shown_data = data or "coco"
    whole = (shown_data, method or "spot", encoder or recipes.default_encoder(shown_data))
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
    if scores(whole[0]) and not rows:
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
    chosen = SOURCED_DEFAULTS | recipes.values(data, method, encoder, stage)
    config = preset("+".join(filter(None, (data, method, encoder))), stage)
    return {
        name: {"value": getattr(config, name), "source": chosen[name].source}
        for name, option in OPTIONS.items()
        if name in chosen and _has_effect(option, config)
    }


def _has_effect(option: Option, config: Config) -> bool:
    """Whether an option changes anything in such a run; a registered decoder may read every option of decoders."""
    if option.only is None:
        return True
    field, value = option.only
    registered = field == "decoder" and config.decoder not in ("transformer", "mlp")
    return registered or getattr(config, field) == value


def commands(data: str, method: str, encoder: str | None) -> list[str]:
    """The training commands of both stages, and evaluation."""
    parts = [data, *([method] if method != "spot" else [])]
    parts += [encoder] if encoder and encoder != recipes.default_encoder(data) else []
    words = ["python -m spot_fast.train"]
    if parts != ["scenes"]:
        words.append(f"--preset {'+'.join(parts)}")
    if folder := DATA_SETS[data].folder:
        words.append(f"--data {folder}")
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
    vit = ENCODERS[name]
    own = SOURCED_DEFAULTS | DATA_SETS["coco"].values | vit.values | vit.rates
    lr, lr_low, lam = (own[setting].value for setting in ("lr", "lr_low", "att_weight"))
    paper = "; not in the paper" if any("not in the paper" in note for note in vit.notes) else ""
    return f"{vit.about}; lr {lr:g} to {lr_low:g}, lambda {lam:g}{paper}"


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


def _page(about: dict[str, Any]) -> str:
    lines = [f"{about['named'][kind]}: {text}" for kind, text in about["about"].items()]
    if left_out := [kind for kind, value in about["named"].items() if value is None and about["shown"][kind]]:
        lines.append("shown with " + " and ".join(f"{kind} {about['shown'][kind]}" for kind in left_out))
    lines += [
        "",
        *(f"  {command}" for command in about["commands"]),
        "",
        "Sources on the right are sections and tables of the paper, arXiv 2312.00648v3.",
        "",
    ]
    first, *rest = about["settings"].values()
    lines += ["settings (stage 1)" if rest else "settings", *(_setting(*item) for item in first.items())]
    if rest:
        changed = {name: value for name, value in rest[0].items() if first.get(name) != value}
        lines += ["", "stage 2 changes", *(_setting(*item) for item in changed.items())]
    if about["notes"]:
        lines += ["", "notes", *(f"  {note}" for note in about["notes"])]
    if about["scores"]:
        lines += ["", "scores of the paper, percent", *_table(_rows_of(about), with_data=False)]
    return "\n".join(lines)


def _rows_of(about: dict[str, Any]) -> list[Score]:
    named = about["named"]
    return scores(named["data"], named["method"], named["encoder"])


def _setting(name: str, value: dict[str, Any]) -> str:
    shown = {True: "yes", False: "no"}[value["value"]] if isinstance(value["value"], bool) else value["value"]
    shown = f"{shown:g}" if isinstance(shown, float) else shown
    return f"  --{name.replace('_', '-'):<18} {shown!s:<32} {value['source']}"


if __name__ == "__main__":
    sys.exit(cli.run(main))
