"""python -m spot_fast.convert: checkpoint files → run folders; a run → an authors' checkpoint or a folder to share."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from spot_fast import cli
from spot_fast.checkpoints import official, third_party
from spot_fast.checkpoints.encoder_weights import stored_weights
from spot_fast.checkpoints.runs import CONFIG, find_folder, load_run
from spot_fast.checkpoints.shared_folder import check_free, save_pretrained, unused_of
from spot_fast.checkpoints.unpickle import read_checkpoint
from spot_fast.config import Config, check_config, flag, preset_names
from spot_fast.errors import UserError
from spot_fast.files import atomic_write
from spot_fast.model.decoders import decoder_name
from spot_fast.model.spot import Spot
from spot_fast.recipes import needs_data

SOURCES = ("authors", *third_party.KINDS)
_SUFFIXES = (".pt", ".pth", ".tar")
_EPILOG = """sources (recognised by their tensors; --from insists on one):
  authors    gkakogeorgiou/spot, stage 1 and 2, transformer and MLP decoder
  ocbench    Genera1Z/SmoothSA, its SPOT and the distilled student: GELU, no LayerNorm after the decoder
  videosaur  martius-lab/videosaur, image models with the MLP decoder; the GRU starts from normalised slots
  dinosaur   amazon-science/object-centric-learning-framework, DINOSAUR with the MLP decoder
Models without a counterpart (video models, OCLF's autoregressive decoder) are refused with the reason.

examples:
  python -m spot_fast.convert checkpoint.pt.tar runs/spot-coco       evaluate, segment and --teacher take it
  python -m spot_fast.convert checkpoint.pt.tar runs/spot-voc --preset voc
  python -m spot_fast.convert runs/coco-stage2-001 back.pt.tar       for the authors' code
  python -m spot_fast.convert runs/coco-stage2-001 shared/spot-coco  one folder with a model card, to share
"""


def _parser() -> argparse.ArgumentParser:
    parser = cli.Parser(
        prog="python -m spot_fast.convert",
        argument_default=argparse.SUPPRESS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=_EPILOG,
        description="Reads a checkpoint without running code in it and writes a folder that every command takes as a\n"
        "run; or writes a run as a checkpoint of the authors' implementation, or as one folder to share.",
    )
    parser.add_argument("source", metavar="SOURCE", help="checkpoint file, run folder, or owner/name on the hub")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to make, or a .pt.tar file for the authors' code")
    parser.add_argument(
        "--from", dest="kind", choices=("auto", *SOURCES), default="auto", help="whose checkpoint it is (default: auto)"
    )
    parser.add_argument(
        "--to",
        choices=("auto", "folder", "authors"),
        default="auto",
        help="folder, or authors: a .pt.tar (default: by the suffix of OUT)",
    )
    assumed = parser.add_argument_group("settings that the tensors of a checkpoint do not show")
    assumed.add_argument(
        "--preset",
        choices=preset_names(),
        help="data set and recipe (default: coco, or the one with as many learned slots)",
    )
    assumed.add_argument(
        "--num-slots", action=cli.Number, least=1, metavar="K", help="gaussian slots (default: the preset's)"
    )
    assumed.add_argument(
        "--slot-iterations", action=cli.Number, least=1, metavar="N", help="slot-attention iterations (default: 3)"
    )
    assumed.add_argument(
        "--dec-heads",
        action=cli.Number,
        least=1,
        metavar="N",
        help="heads of the transformer decoder (default: 6; ocbench below width 768: 4)",
    )
    assumed.add_argument(
        "--dec-cross-heads",
        action=cli.Number,
        least=1,
        metavar="N",
        help="heads of its later cross-attentions (default: as many)",
    )
    assumed.add_argument(
        "--cappa",
        action=cli.Number,
        least=0,
        type=float,
        metavar="P",
        help="probability of a parallel step of a CapPa decoder; "
        "from 1 on it always decodes in parallel (default: 0.25)",
    )
    assumed.add_argument(
        "--encoder",
        metavar="NAME",
        help="timm name of the ViT, for its licence too (default: DINO's "
        "or DINOv2's of the shape; MAE's where positions are fixed sines)",
    )
    assumed.add_argument(
        "--encoder-heads",
        action=cli.Number,
        least=1,
        metavar="N",
        help="heads of a ViT without a name (default: one per 64 channels)",
    )
    return parser


@cli.command("OUT is whole or not there")
def main(argv: Sequence[str] | None = None) -> None:
    print("\n".join(_convert(_parser().parse_args(argv))))


def _convert(args: argparse.Namespace) -> list[str]:
    """Converts as the command line says; returns the lines to print."""
    out = args.out
    given = {name: value for name, value in vars(args).items() if name not in ("source", "out", "kind", "to")}
    check_free(out)
    source = find_folder(args.source)
    to = args.to if args.to != "auto" else "authors" if out.suffix in _SUFFIXES else "folder"
    if source.is_file():
        if to == "authors":
            raise UserError(f"{source} is a checkpoint file already: give OUT the name of a folder")
        return _from_file(source, out, args.kind, given)
    if not source.exists():
        raise UserError(f"{args.source} is no file, folder or run: give a checkpoint file, or a run to write")
    if args.kind != "auto" or given:
        option = "--from" if args.kind != "auto" else flag(next(iter(given)))
        raise UserError(
            f"{option} belongs to checkpoint files, but {source} is a run, whose {CONFIG} has all settings: "
            "leave the option out"
        )
    model = load_run(source).model
    if to == "authors":
        return _to_authors(model, source, out)
    save_pretrained(model, out, origin=source)
    return [f"{source}: {describe(model.config)}", *_written(out), *_next(out, model.config)]


def _from_file(source: Path, out: Path, kind: str, given: Mapping[str, Any]) -> list[str]:
    contents = read_checkpoint(source)
    recognised = third_party.recognise(contents) or "authors"
    if kind not in ("auto", recognised):
        raise UserError(f"--from {kind}: {source} looks like a checkpoint of {recognised}, drop the option")
    if recognised == "authors":
        converted, owner, title = official.convert(contents, **given), "the authors", "the authors' SPOT"
    else:
        converted, owner, title = third_party.convert(recognised, contents, **given), recognised, recognised
    config = check_config(converted.config)
    save_pretrained(
        converted.model(),
        out,
        vit=converted.vit,
        unused=converted.unused,
        source=f"`{source.name}`, a checkpoint of {owner}",
        scores={},
    )
    lines = [f"{source}: {title}, {describe(config)}", "not shown by the tensors, so assumed unless given:"]
    lines += [f"  {line}" for line in official.assumptions(config)]
    lines += [f"note: {note}" for note in converted.notes]
    return [*lines, *_written(out), *_next(out, config)]


def describe(config: Config) -> str:
    """A model in one line."""
    decoder = decoder_name(config)
    if config.decoder == "transformer":
        decoder += " in 9 orders" if config.orders == "spot9" else " in standard order"
        decoder += ", CapPa" if config.cappa else ""
    return (
        f"stage {config.stage}, {decoder}, {config.num_slots} {config.slot_init} slots of width {config.slot_dim}, "
        f"encoder {config.encoder} at {config.image_size} px"
    )


def _to_authors(model: Spot, source: Path, out: Path) -> list[str]:
    config = model.config
    if not out.parent.is_dir():
        raise UserError(f"OUT {out} lies in {out.parent}, which is not a folder: make it, or choose another")
    state = official.authors_state_dict(model, stored_weights(config)) | unused_of(source)
    atomic_write(out, lambda partial: torch.save({"model": state}, partial))
    return [
        f"{source}: {describe(config)}",
        f"wrote {out}: {len(state)} tensors under `model`, {out.stat().st_size / 1e6:.1f} MB",
        f"for the authors' eval_spot.py: {_authors_options(config)}",
    ]


def _authors_options(config: Config) -> str:
    """The options of the authors' evaluation that build the model, without its encoder."""
    options = dict(
        num_slots=config.num_slots,
        slot_size=config.slot_dim,
        mlp_hidden_size=config.slot_mlp,
        num_iterations=config.slot_iterations,
        image_size=config.image_size,
        val_image_size=config.image_size,
        init_method="shared_gaussian" if config.slot_init == "gaussian" else "embedding",
        dec_type=config.decoder,
        train_permutations="random" if config.orders == "spot9" else "standard",
        use_second_encoder=config.stage == 2,
    )
    if config.decoder == "mlp":
        options |= dict(mlp_dec_hidden=config.dec_mlp_hidden, use_slot_proj=config.mlp_slot_proj)
    else:
        options |= dict(
            num_dec_blocks=config.dec_blocks,
            num_heads=config.dec_heads,
            cappa=config.cappa or -1,
            num_cross_heads=config.dec_cross_heads or config.dec_heads,
        )
    return " ".join(f"--{name} {value}" for name, value in options.items())


def _written(out: Path) -> list[str]:
    sizes = [f"{file.name} {file.stat().st_size / 1e6:.1f} MB" for file in sorted(out.iterdir())]
    return [f"wrote {out}: {', '.join(sizes)}"]


def _next(out: Path, config: Config) -> list[str]:
    data = " --data DATA" if needs_data(config.preset) else ""
    lines = ["next:", f"  python -m spot_fast.evaluate {out}{data}", f"  python -m spot_fast.segment IMAGE --run {out}"]
    if config.stage == 1:
        lines.append(f"  python -m spot_fast.train --stage 2 --preset {config.preset}{data} --teacher {out}")
    return lines


if __name__ == "__main__":
    sys.exit(cli.run(main))
