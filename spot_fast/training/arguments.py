"""The command line of `spot_fast.train`: every field of `Config` is an option, by default with the preset's value."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import Field, dataclass, fields, replace
from pathlib import Path
from typing import Any

from spot_fast import cli
from spot_fast.config import OPTIONS, Config, flag, option_names, preset
from spot_fast.errors import UserError
from spot_fast.recipes import DATA_SETS, encoder_recipe, needs_data, split, timm_name

_EPILOG = """presets: {without} (generated, needs no data),
{with_data} (need --data PATH);
with + a method, an encoder and a size where they are not SPOT's own: coco+dinosaur, coco+dinov2_vitb14+518px.
All of them with their sources and the paper's numbers: python -m spot_fast.presets
The defaults above are those of the chosen preset and stage: try --preset coco --stage 2 --help.

examples:
  python -m spot_fast.train                              stage 1 on generated scenes
  python -m spot_fast.train --stage 2                    its student; the newest stage-1 run is the teacher
  python -m spot_fast.train --stage 2 --resume           go on after a stop, bit for bit
  python -m spot_fast.train --preset coco --data /data/coco
  torchrun --standalone --nproc-per-node 8 -m spot_fast.train --preset coco --data /data/coco
"""


@dataclass(frozen=True)
class Arguments:
    """A parsed command line. given: the Config fields that were on it."""

    given: dict[str, Any]
    teacher: str | None
    resume: str | None
    runs: Path
    out: Path | None
    device: str | None
    threads: int | None
    tensorboard: bool
    measure_peak: bool
    profile: int
    print_config: bool

    @property
    def preset(self) -> str:
        return self.given.get("preset", "scenes")

    @property
    def preset_name(self) -> str:
        """Data set, method and encoder as `config.preset` takes them."""
        parts = (self.preset, self.given.get("method"), encoder_recipe(self.given.get("encoder", "")))
        return "+".join(filter(None, parts))

    @property
    def stage(self) -> int:
        return self.given.get("stage", 1)

    def config(self, preset_name: str | None = None, **defaults: Any) -> Config:
        """The preset's Config with the given fields; `defaults` replace those not given."""
        changes = {name: value for name, value in self.given.items() if name not in ("preset", "stage")}
        return preset(preset_name or self.preset, self.stage, **(defaults | changes))


def parse(argv: Sequence[str] | None = None) -> Arguments:
    """Arguments of a command line; exits with code 2 for an unknown or malformed option.

    UserError if preset or method is unknown or lacks the stage.
    """
    # --help shows the defaults of a preset, so the options that select one are parsed first.
    first = cli.Parser(add_help=False)
    first.add_argument("--preset", default="scenes")
    first.add_argument("--method", default=argparse.SUPPRESS)
    first.add_argument("--encoder", default=argparse.SUPPRESS)
    first.add_argument("--image-size", type=int, default=argparse.SUPPRESS)
    first.add_argument("--stage", default="1")
    known = vars(first.parse_known_args(argv)[0])
    defaults = preset(known.pop("preset"), 2 if known.pop("stage") == "2" else 1, **known)
    values = vars(_parser(defaults).parse_args(argv))
    given = {name: values.pop(name) for name in list(values) if name in OPTIONS}
    for name in option_names("keeps_auto"):
        if given.get(name) == "auto":  # asks for the default, also of a run that has settled on one
            del given[name]
    if values["teacher"] == "ema":
        values["teacher"], given["online_teacher"] = None, True
    if given.get("init_from"):
        below = values["runs"] / given["init_from"]
        if below.is_dir() and not os.path.exists(given["init_from"]):
            given["init_from"] = str(below)
    given = _named_parts(given, has_data=_names_a_run(values, given))
    for name in option_names("path"):  # absolute, so that they also hold when the run is used from another folder
        if given.get(name) is not None and given[name] not in OPTIONS[name].keywords:
            given[name] = os.path.abspath(given[name])
    return Arguments(given=given, **values)


def _names_a_run(values: dict[str, Any], given: dict[str, Any]) -> bool:
    """Whether another run determines the data set."""
    return any(run is not None for run in (values["teacher"], values["resume"], given.get("init_from")))


def _named_parts(given: dict[str, Any], *, has_data: bool) -> dict[str, Any]:
    """`given` with the named parts of --preset as preset, method, encoder and image_size.

    has_data: another run determines the data set. UserError for --data of a set that nothing names.
    """
    name = given.get("preset", "scenes")
    data, method, encoder, size = split(name)
    if data is None and not has_data and given.get("data") is not None:
        raise UserError(
            f"--preset {name} names no data set for --data {given['data']}: write the set before it, such "
            f"as --preset coco+{name}"
        )
    encoder = encoder or given.get("encoder")
    parts = {
        "preset": data if "preset" in given else None,
        "method": method,
        "encoder": encoder and timm_name(encoder),
        "image_size": size,
    }
    rest = {key: value for key, value in given.items() if key != "preset"}
    return rest | {key: value for key, value in parts.items() if value is not None}


def _parser(defaults: Config) -> argparse.ArgumentParser:
    parser = cli.Parser(
        prog="python -m spot_fast.train",
        epilog=_EPILOG.format(
            without=", ".join(name for name in DATA_SETS if not needs_data(name)),
            with_data=", ".join(filter(needs_data, DATA_SETS)),
        ),
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=32, width=110),
        usage="python -m spot_fast.train [--preset NAME] [--stage 1|2] [option ...]",
        description="Trains SPOT: stage 1 reconstructs frozen features from slots, stage 2 trains a student that is "
        "also taught by a stage-1 run.",
    )
    groups = {name: parser.add_argument_group(name) for name in dict.fromkeys(o.group for o in OPTIONS.values())}
    by_name = {each.name: each for each in fields(Config)}
    for name in ("preset", "stage", "seed"):
        _add_field(groups["run"], by_name.pop(name), getattr(defaults, name))
    _add_own_options(groups["run"])
    for name, each in by_name.items():
        _add_field(groups[OPTIONS[name].group], each, getattr(defaults, name))
    return parser


def _add_own_options(run: argparse._ArgumentGroup) -> None:
    """The options that are no fields of `Config`."""
    run.add_argument(
        "--teacher",
        metavar="RUN",
        help="stage-1 run, or checkpoint file of the authors, that teaches stage 2 (default: the newest "
        "finished run of the preset); ema: the student's own moving average",
    )
    run.add_argument(
        "--resume",
        metavar="RUN",
        nargs="?",
        const="",
        help="go on with a stopped run, exactly (default: the newest unfinished one of preset and stage)",
    )
    cli.add_runs_folder(
        run, type=Path, default=Path("runs"), help="where run folders are made and looked for (default: runs)"
    )
    run.add_argument("--out", metavar="DIR", type=Path, help="run folder (default: the next free one in --runs)")
    cli.add_device(run)
    cli.add_threads(run, "; a resumed run keeps its number")
    run.add_argument(
        "--tensorboard",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="write TensorBoard events (default: yes)",
    )
    run.add_argument(
        "--measure-peak",
        action="store_true",
        help="measure the device's FLOP/s, against which MFU is shown (default: a table of GPUs; MFU is "
        "not shown on a CPU)",
    )
    run.add_argument(
        "--profile",
        action=cli.Number,
        least=0,
        default=0,
        help="profile N steps after the first few: profile.json (a trace) and profile.txt (a table) in the run folder",
    )
    run.add_argument(
        "--print-config",
        "--dry-run",
        action="store_true",
        dest="print_config",
        help="print the configuration as JSON and leave",
    )


def _add_field(group: argparse._ArgumentGroup, each: Field, default: Any) -> None:
    option, kind = OPTIONS[each.name], each.type.split(" | ")[0]
    text = option.help + "; config.json keeps the choice" * option.keeps_auto
    if option.names is not None:
        text += f": {', '.join(option.names())}"
        default = each.default  # not what this very command line has chosen
    if default is not None:
        shown = ("yes" if default else "no") if kind == "bool" else default
        text += f" (default: {shown})"
    text = text.replace("%", "%%")
    if kind == "bool":
        group.add_argument(flag(each.name), action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=text)
        return
    kind, metavar = {"int": (int, "N"), "float": (float, "X"), "str": (str, "NAME")}[kind]
    if option.choices:
        metavar = "{" + ",".join(map(str, option.choices)) + "}"
    group.add_argument(
        flag(each.name),
        type=kind,
        choices=option.choices,
        metavar=option.path or metavar,
        default=argparse.SUPPRESS,
        help=text,
    )


def conflicts(config: Config, given: dict[str, Any]) -> list[str]:
    """Sentences about given options that a resumed run of `config` may not change."""
    return [
        f"{flag(name)} is {value} but the run has {getattr(config, name)}"
        for name, value in given.items()
        if not OPTIONS[name].resumable and getattr(config, name) != value
    ]


def with_resumable(config: Config, given: dict[str, Any]) -> Config:
    """A run's `config` with those given options that a resumed run may change."""
    return replace(config, **{name: value for name, value in given.items() if OPTIONS[name].resumable})
