"""The command line of `spot_fast.train`: every field of `Config` is an option, with the preset's value as default."""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NoReturn

from spot_fast.config import Config, preset, preset_names
from spot_fast.errors import UserError
from spot_fast.recipes import METHODS, split, timm_name

_GROUPS = {
    "run": "run",
    "data": "data",
    "encoder": "encoder (frozen ViT)",
    "slots": "slot attention",
    "decoder": "decoder",
    "optimisation": "optimisation",
}
_METAVARS = {"int": "N", "float": "X", "str": "NAME"}
_EPILOG = """presets: scenes (generated, needs no data), coco, voc, movi_c, movi_e, folder (need --data PATH); with + a
method and an encoder where they are not SPOT's own: coco+dinosaur, coco+mae_vitb16, voc+spot_mlp+moco_vitb16.
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
    """A parsed command line. `given` holds the Config fields that were on it, preset and stage included."""

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
    def stage(self) -> int:
        return self.given.get("stage", 1)

    def config(self, preset_name: str | None = None, **defaults: Any) -> Config:
        """The preset's Config with what was given; defaults stand for method and encoder where they were not."""
        return preset(preset_name or self.preset, self.stage, **(defaults | self.changes))

    @property
    def changes(self) -> dict[str, Any]:
        """What was given beside preset and stage."""
        return {name: value for name, value in self.given.items() if name not in ("preset", "stage")}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One sentence instead of the usage, which has a screenful of options."""
        print(f"error: {message} (see --help)", file=sys.stderr)
        sys.exit(2)


def parse(argv: Sequence[str] | None = None) -> Arguments:
    """Arguments of a command line; exits with code 2 and a sentence where an option is unknown or malformed.

    UserError where preset or method is unknown, or has no such stage.
    """
    # What decides the defaults that --help shows comes first.
    first = _Parser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", default="scenes")
    first.add_argument("--method", default=argparse.SUPPRESS)
    first.add_argument("--encoder", default=argparse.SUPPRESS)
    first.add_argument("--stage", default="1")
    known = vars(first.parse_known_args(argv)[0])
    defaults = preset(known.pop("preset"), 2 if known.pop("stage") == "2" else 1, **known)
    values = vars(_parser(defaults).parse_args(argv))
    own = {f.name for f in fields(Arguments)} - {"given"}
    given = {name: value for name, value in values.items() if name not in own}
    for name in ("precision", "compile", "loader"):
        if given.get(name) == "auto":  # asks for the default, also of a run that has settled on one
            del given[name]
    given = _absolute(_named_parts(given, has_data=values["teacher"] is not None or values["resume"] is not None))
    return Arguments(given=given, **{name: values[name] for name in own})


def _named_parts(given: dict[str, Any], *, has_data: bool) -> dict[str, Any]:
    """`given` with the parts of --preset as preset, method and encoder, each only where it was named.

    has_data: another run tells which data set it is. UserError where --data is of a set that nothing names.
    """
    name = given.get("preset", "scenes")
    data, method, encoder = split(name)
    if data is None and not has_data and given.get("data") is not None:
        raise UserError(
            f"--preset {name} names no data set for --data {given['data']}: write the set before it, such "
            f"as --preset coco+{name}"
        )
    encoder = encoder or given.get("encoder")
    parts = {"method": method, "encoder": encoder and timm_name(encoder)}
    rest = {key: value for key, value in given.items() if key != "preset"}
    if "preset" in given and data is not None:
        rest["preset"] = data
    return rest | {key: value for key, value in parts.items() if value is not None}


def _absolute(given: dict[str, Any]) -> dict[str, Any]:
    """Paths that also hold when the run is used from another folder."""
    paths = {
        name: os.path.abspath(given[name])
        for name in ("data", "encoder_weights", "sbd", "cache_dir")
        if given.get(name) not in (None, "hub", "none")
    }
    return given | paths


def _parser(defaults: Config) -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m spot_fast.train",
        allow_abbrev=False,
        epilog=_EPILOG,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=32, width=110),
        usage="python -m spot_fast.train [--preset NAME] [--stage 1|2] [option ...]",
        description="Trains SPOT: stage 1 reconstructs frozen features from slots, stage 2 trains a student that is "
        "also taught by a stage-1 run.",
    )
    groups = {name: parser.add_argument_group(title) for name, title in _GROUPS.items()}
    run = groups["run"]
    every = {field.name: field for field in fields(Config)}
    for name in ("preset", "stage", "seed"):
        _add_field(run, every.pop(name), getattr(defaults, name))
    run.add_argument(
        "--teacher",
        metavar="RUN",
        help="stage-1 run, or checkpoint file of the authors, that teaches stage 2 (default: the newest "
        "finished run of the preset)",
    )
    run.add_argument(
        "--resume",
        metavar="RUN",
        nargs="?",
        const="",
        help="go on with a stopped run, exactly (default: the newest unfinished one of preset and stage)",
    )
    run.add_argument(
        "--runs",
        metavar="DIR",
        type=Path,
        default=Path("runs"),
        help="where run folders are made and looked for (default: runs)",
    )
    run.add_argument("--out", metavar="DIR", type=Path, help="run folder (default: the next free one in --runs)")
    run.add_argument("--device", metavar="NAME", help="cpu, cuda or cuda:N (default: cuda where there is one)")
    run.add_argument(
        "--threads",
        metavar="N",
        type=int,
        help="CPU threads (default: one a core, fewer while other programs use it; a resumed run keeps its number)",
    )
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
        metavar="N",
        type=int,
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
    for name, field in every.items():
        _add_field(groups[field.metadata["group"]], field, getattr(defaults, name))
    return parser


def _add_field(group: argparse._ArgumentGroup, field: Any, default: Any) -> None:
    option = "--" + field.name.replace("_", "-")
    kind = field.type.split(" | ")[0]
    text = field.metadata["help"]
    if default is not None:
        text += f" (default: { ({True: 'yes', False: 'no'}[default] if kind == 'bool' else default) })"
    if kind == "bool":
        group.add_argument(option, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=text)
        return
    choices = field.metadata["choices"]
    metavar = "{" + ",".join(map(str, choices)) + "}" if choices else _METAVARS[kind]
    if field.name == "preset":
        text = f"{field.metadata['help']}: {', '.join(preset_names())} (default: scenes)"
    if field.name == "method":
        text = f"{field.metadata['help']}: {', '.join(METHODS)} (default: spot)"
    if field.name in ("data", "sbd", "cache_dir"):
        metavar = "DIR"
    group.add_argument(
        option,
        type={"int": int, "float": float, "str": str}[kind],
        choices=choices,
        metavar=metavar,
        default=argparse.SUPPRESS,
        help=text.replace("%", "%%"),
    )


# Name → smallest value; numbers also have to be finite.
_AT_LEAST: dict[str, float] = {
    "seed": 0,
    "log_every": 1,
    "save_every": 1,
    "eval_every": 0,
    "eval_images": 0,
    "train_images": 0,
    "val_images": 0,
    "image_size": 1,
    "mask_size": 1,
    "workers": 0,
    "train_blocks": 0,
    "num_slots": 1,
    "slot_dim": 1,
    "slot_mlp": 1,
    "slot_heads": 1,
    "slot_iterations": 1,
    "dec_blocks": 1,
    "dec_heads": 1,
    "dec_cross_heads": 0,
    "dec_mlp_hidden": 1,
    "cappa": 0,
    "epochs": 1,
    "batch_size": 1,
    "accumulate": 1,
    "lr": 0,
    "lr_low": 0,
    "warmup_steps": 0,
    "clip": 0,
    "att_weight": 0,
    "att_weight_final": 0,
    "spike": 0,
}


def check_config(config: Config) -> Config:
    """`config` itself; UserError that names the option, its value and the remedy where it makes no sense.

    What depends on the encoder or the data is checked where they are opened.
    """
    for name, least in _AT_LEAST.items():
        value = getattr(config, name)
        if value is not None and not (math.isfinite(value) and value >= least):
            raise UserError(f"{_option(name)} is {value}: use {least} or more")
    if 0 < config.spike <= 1:
        raise UserError(f"--spike {config.spike} calls ordinary losses leaps: use more than 1, or 0 for never")
    if config.lr == 0:
        raise UserError("--lr is 0: nothing would be learned, use more")
    if config.lr_low > config.lr:
        raise UserError(f"--lr-low {config.lr_low} is above the peak --lr {config.lr}: lower it")
    if config.slot_dim % config.slot_heads:
        raise UserError(f"--slot-heads {config.slot_heads} does not divide --slot-dim {config.slot_dim}: change one")
    if config.orders != "standard" and (config.cappa > 0 or config.decoder == "mlp"):
        option = f"--cappa {config.cappa}" if config.cappa > 0 else "--decoder mlp"
        raise UserError(f"{option} works in the standard patch order only: add --orders standard")
    if config.stage == 2 and config.slot_heads != 1:
        raise UserError(f"--slot-heads {config.slot_heads}: the student of stage 2 needs 1")
    return config


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def conflicts(config: Config, given: dict[str, Any], free: Sequence[str]) -> list[str]:
    """Sentences about options on the command line that differ from a run's `config` and are not `free` to change."""
    return [
        f"{_option(name)} is {value} but the run has {getattr(config, name)}"
        for name, value in given.items()
        if name not in free and getattr(config, name) != value
    ]


def with_free(config: Config, given: dict[str, Any], free: Sequence[str]) -> Config:
    """A run's `config` with the `free` options of the command line."""
    return replace(config, **{name: value for name, value in given.items() if name in free})
