"""python -m spot_fast.presets: data sets, methods, encoders and sizes, what each sets, from where, and scores."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from spot_fast import cli, recipes
from spot_fast.config import ONE_ORDER, OPTIONS, SOURCED_DEFAULTS, Config, Option, flag, preset
from spot_fast.errors import UserError
from spot_fast.published import METRICS, Score, scores
from spot_fast.recipes import DATA_SETS, ENCODERS, METHODS, SIZES

_NAME = 18  # width of the column of names
_SIZE = (
    "FT-DINOSAUR (arXiv 2408.09162) first trains at 224 pixels and then goes on at 518; here both stages train at the "
    "size from their start"
)


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
        description="Lists what --preset of python -m spot_fast.train takes: a data set, a method, an encoder and a "
        "size, each optional, joined with +, such as coco+dinosaur+mae_vitb16; with the paper's scores.",
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
    """A preset in full, as plain data; UserError names what is unknown."""
    data, method, encoder, size = recipes.split(name)
    # What names no data set is shown on COCO, where the paper has most of it.
    shown_data, shown_method = data or "coco", method or "spot"
    shown_encoder = encoder or recipes.default_encoder(shown_data)
    whole = recipes.Parts(shown_data, shown_method, shown_encoder, size)
    notes, about = [], {}
    if data:
        about["data"] = DATA_SETS[data].about
    if method:
        about["method"] = METHODS[method].about
        notes += METHODS[method].notes
    if encoder:
        vit = ENCODERS[encoder]
        about["encoder"] = f"{vit.about} ({vit.licence}); weights: {vit.weights}"
        notes += vit.notes
    if size:
        about["size"] = f"the encoder sees {size} x {size} pixels{_tokens(shown_encoder, size)}; all else as at 224"
        notes.append(_SIZE)
    rows = [] if size else scores(data, method, encoder)
    if scores(shown_data) and not rows:
        notes.append("the paper has no scores of this combination")
    return {
        "name": name,
        "about": about,
        "named": {"data": data, "method": method, "encoder": encoder, "size": size},
        "shown": whole._asdict(),
        "settings": {f"stage {stage}": settings(*whole, stage) for stage in range(1, _stages(shown_method) + 1)},
        "commands": commands(*whole),
        "notes": notes,
        "scores": [_score(row) for row in rows],
    }


def _tokens(encoder: str | None, size: int) -> str:
    patch = ENCODERS[encoder].patch if encoder else None
    return f", {size // patch} x {size // patch} tokens" if patch else ""


def settings(data: str, method: str, encoder: str | None, size: int | None, stage: int) -> dict[str, dict[str, Any]]:
    """Every value that the paper or a preset chose: field → value and source."""
    chosen = SOURCED_DEFAULTS | recipes.values(data, method, encoder, stage, size)
    config = preset("+".join(filter(None, (data, method, encoder, size and f"{size}px"))), stage)
    return {
        name: {"value": getattr(config, name), "source": chosen[name].source}
        for name, option in OPTIONS.items()
        if name in chosen and _has_effect(option, config)
    }


def _has_effect(option: Option, config: Config) -> bool:
    """Whether an option has an effect in a run; a registered decoder may read every option of decoders."""
    if option.only is None:
        return True
    field, values = option.only
    registered = field == "decoder" and config.decoder not in ("transformer", *ONE_ORDER)
    return registered or getattr(config, field) in values


def commands(data: str, method: str, encoder: str | None, size: int | None = None) -> list[str]:
    """The training commands of both stages, and evaluation."""
    parts = [data, *([method] if method != "spot" else [])]
    parts += [encoder] if encoder and encoder != recipes.default_encoder(data) else []
    parts += [f"{size}px"] if size else []
    words = ["python -m spot_fast.train"]
    if parts != ["scenes"]:
        words.append(f"--preset {'+'.join(parts)}")
    if folder := DATA_SETS[data].folder:
        words.append(f"--data {folder}")
    if encoder == "moco_vitb16":
        words.append("--encoder-weights vit-b-300ep.pth.tar")
    line = " ".join(words)
    stages = [line, f"{line} --stage 2"][: _stages(method)]
    return [*stages, "python -m spot_fast.evaluate"]


def _stages(method: str) -> int:
    return 1 if METHODS[method].stage2 is None else 2


def _score(row: Score) -> dict[str, Any]:
    return {
        "data": row.data,
        "method": row.method,
        "encoder": row.encoder,
        "stage": row.stage,
        "masks": row.masks,
        "percent": {
            metric: {"mean": mean, "std": deviation}
            for metric, mean, deviation in zip(METRICS, row.means, row.deviations, strict=True)
        },
        "source": row.source,
        "note": row.note,
    }


def _everything() -> dict[str, Any]:
    return {
        "data": {name: {"about": one.about} for name, one in DATA_SETS.items()},
        "methods": {
            name: {"about": one.about, "stages": _stages(name), "notes": list(one.notes)}
            for name, one in METHODS.items()
        },
        "encoders": {
            name: {field: getattr(vit, field) for field in ("about", "timm", "licence", "weights")}
            | {"notes": list(vit.notes)}
            for name, vit in ENCODERS.items()
        },
        "sizes": SIZES,
        "scores": [_score(row) for row in scores()],
    }


def _list() -> str:
    lines = [
        "python -m spot_fast.train --preset DATA+METHOD+ENCODER+SIZE, in any order. Left out they are scenes, spot, "
        "dino_vitb16",
        "and 224 pixels; scenes have an encoder and a size of their own.",
        "",
    ]
    lines += _section("data sets", ((name, one.about) for name, one in DATA_SETS.items()))
    lines += _section(
        "methods", ((name, one.about + "; stage 1 alone" * (_stages(name) == 1)) for name, one in METHODS.items())
    )
    lines += _section("encoders", ((name, _about_encoder(name)) for name in ENCODERS))
    lines += _section("sizes", ((name, _about_size(side)) for name, side in SIZES.items()))
    lines.append("scores of the paper, percent, decoder masks, mean ± standard deviation of 3 seeds where it has them")
    lines += _table(main_scores())
    lines += [
        "",
        "python -m spot_fast.presets NAME shows one in full: every value with its source, commands, all scores.",
    ]
    return "\n".join(lines)


def main_scores() -> list[Score]:
    """The paper's own scores of the decoder masks that presets train."""
    return [row for row in scores() if row.masks == "decoder" and _as_preset(row)]


def score_name(row: Score) -> str:
    """The preset of a row, whose note names an encoder without one."""
    encoder = [row.encoder] if row.encoder in ENCODERS and row.encoder != "dino_vitb16" else []
    return "+".join([row.data, row.method, *encoder])


def _as_preset(row: Score) -> bool:
    """Whether a preset trains what the row scores: its last stage, no ablation, no numbers of others."""
    return row.stage == _stages(row.method) and row.note in ("", "100 epochs") and row.encoder in ENCODERS


def _about_encoder(name: str) -> str:
    vit = ENCODERS[name]
    own = SOURCED_DEFAULTS | DATA_SETS["coco"].values | vit.values | vit.rates
    lr, lr_low, lam = (own[setting].value for setting in ("lr", "lr_low", "att_weight"))
    paper = "; not in the paper" if any("not in the paper" in note for note in vit.notes) else ""
    return f"{vit.about}; lr {lr:g} to {lr_low:g}, lambda {lam:g}{paper}"


def _about_size(side: int) -> str:
    """Tokens with the patches of the known encoders."""
    patches = sorted({vit.patch for vit in ENCODERS.values() if vit.patch and side % vit.patch == 0})
    return "; ".join(f"{side // patch} x {side // patch} tokens of /{patch} encoders" for patch in patches)


def _section(title: str, rows: Iterable[tuple[str, str]]) -> list[str]:
    return [title, *(f"  {name:<{_NAME}} {text}" for name, text in rows), ""]


def _table(rows: Sequence[Score], *, with_stages: bool = False) -> list[str]:
    """Aligned columns. with_stages: also stage and masks, which differ from row to row."""
    lines = [["preset", *(["stage", "masks"] if with_stages else []), *METRICS, "source", ""]]
    for row in rows:
        stage = [str(row.stage), row.masks] if with_stages else []
        lines.append([score_name(row), *stage, *row.figures, row.source, row.note])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  " + "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip() for line in lines
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
        named = (about["named"][kind] for kind in ("data", "method", "encoder"))
        lines += ["", "scores of the paper, percent", *_table(scores(*named), with_stages=True)]
    return "\n".join(lines)


def _setting(name: str, value: dict[str, Any]) -> str:
    shown = value["value"]
    if isinstance(shown, bool):
        shown = "yes" if shown else "no"
    elif isinstance(shown, float):
        shown = f"{shown:g}"
    return f"  {flag(name):<20} {shown!s:<32} {value['source']}"


if __name__ == "__main__":
    sys.exit(cli.run(main))
