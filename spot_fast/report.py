"""python -m spot_fast.report [RUN ...]: one HTML file about trained runs that opens from disk, without a network."""

from __future__ import annotations

import argparse
import datetime
import platform
import shlex
import sys
from collections.abc import Sequence

import torch
from tqdm import tqdm

from spot_fast import __version__, cli
from spot_fast.checkpoints.runs import Run, open_runs
from spot_fast.data.base import ImageSet
from spot_fast.errors import UserError
from spot_fast.evaluation.options import add_scoring_options, open_val_set, score
from spot_fast.evaluation.protocols import chosen
from spot_fast.evaluation.tables import seed_groups
from spot_fast.files import atomic_write, writable_target
from spot_fast.model.spot import Spot
from spot_fast.precision import resolve
from spot_fast.reporting.introspection import Introspection, PatchGradients, introspect, patch_gradients, read_image
from spot_fast.reporting.page import SET_PARTS, page
from spot_fast.reporting.records import (
    ImageRecord,
    Report,
    RunRecord,
    SetRecord,
    choose_images,
    read_log,
    state_metadata,
)
from spot_fast.system.cpu_threads import computing, side_by_side
from spot_fast.system.devices import usable_device
from spot_fast.system.optional import required

_GRADIENT_IMAGES = 16
# A backward pass for each patch and order: more than this many patches take minutes an image on a CPU.
_FEW_PATCHES, _FEW_IMAGES = 100, 2


def _parser() -> argparse.ArgumentParser:
    parser = cli.Parser(
        prog="python -m spot_fast.report",
        description="Writes one self-contained HTML file about trained runs: what was trained and how fast, curves, "
        "scores beside baselines under every protocol, mBO_i by instance size, a gallery, masks by patch order, "
        "attention by iteration, gradient norm per patch. Runs that differ in their seed only also get mean ± "
        "standard deviation.",
    )
    add_scoring_options(
        parser, protocol="all", protocol_note="; spot is among them in any case, images are chosen by it"
    )
    parser.add_argument("--out", default="report.html", metavar="FILE", help="what to write (default: report.html)")
    parser.add_argument(
        "--images",
        action=cli.Number,
        least=1,
        default=3,
        help="images of each part of the gallery: best, median, worst, random (default: 3)",
    )
    parser.add_argument(
        "--gradient-images",
        action=cli.Number,
        least=0,
        help="images that the gradient norm is a mean over, 0 = leave it out (default: "
        f"{_GRADIENT_IMAGES}; {_FEW_IMAGES} on a CPU with more than {_FEW_PATCHES} patches an image)",
    )
    cli.add_precision(parser, "float32", "of the model, but for gradients, which are float32")
    cli.add_seed(parser, "slot noise, k-means and the random images")
    return parser


@cli.command("no file was written")
def main(argv: Sequence[str] | None = None) -> None:
    args = _parser().parse_args(argv)
    required("matplotlib.figure", "a report", "matplotlib")  # drawing comes last: a missing package must show now
    command = shlex.join(["python", "-m", "spot_fast.report", *(sys.argv[1:] if argv is None else argv)])
    # Images are chosen by their scores under SPOT's protocol.
    args.protocols = list(dict.fromkeys(["spot", *(protocol.name for protocol in chosen(args.protocol))]))
    out = writable_target("out", args.out)
    device = usable_device(args.device)
    runs = open_runs(args.runs, args.root)
    if len({run.path.resolve() for run in runs}) < len(runs):
        raise UserError(f"a run is named twice in {' '.join(args.runs)}: name each once")
    opened: dict[str, ImageSet] = {}
    image_sets = [open_val_set(run.config, args.data, opened) for run in runs]
    report = Report(
        command=command,
        data=args.data,
        limit=args.limit,
        runs=[RunRecord(run.name, run, read_log(run.path), state_metadata(run.path)) for run in runs],
        sets=[],
        settings=_settings(args, device),
        about=_about(device),
    )
    for image_set in opened.values():
        indices = [index for index, own in enumerate(image_sets) if own is image_set]
        groups = seed_groups([runs[index].config for index in indices])
        report.sets.append(SetRecord(image_set, indices, [[indices[i] for i in group] for group in groups]))
    with computing(args.threads, device):
        for shown in report.sets:
            _measure(report, shown, args, device)
        with tqdm(total=1 + len(SET_PARTS) * len(report.sets), unit="part", disable=None) as bar:

            def begin(part: str) -> None:
                bar.set_description(f"{out.name}: {part}")
                bar.update()

            text = page(report, begin)
    atomic_write(out, lambda partial: partial.write_text(text, encoding="utf-8"))
    print(f"{out.resolve()}  {out.stat().st_size / 1e6:.1f} MB, open it in a browser")


def _settings(args: argparse.Namespace, device: torch.device) -> dict[str, str]:
    return {"seed": str(args.seed), "precision": resolve(args.precision, device)}


def _about(device: torch.device) -> dict[str, str]:
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    if device.type == "cpu" and torch.get_num_threads() == 1:
        where = "CPU, 1 thread"
    return {
        "date": datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z").strip(),
        "versions": f"spot_fast {__version__}, torch {torch.__version__}, Python {platform.python_version()}",
        "device": where,
    }


def _measure(report: Report, shown: SetRecord, args: argparse.Namespace, device: torch.device) -> None:
    """Fills in the scores of the runs on one set, the images to show with each run's introspection, gradient norms."""
    image_set = shown.image_set
    records = [report.runs[index] for index in shown.run_indices]
    if image_set.has_masks:
        for record in records:
            record.evaluation = score(record.run.model, image_set, args.protocols, args, device, record.name)
    if not len(image_set):
        return
    picks = choose_images(
        image_set, [r.evaluation for r in records if r.evaluation], each=args.images, seed=args.seed, limit=args.limit
    )
    read = [(pick, image) for pick in picks if (image := read_image(image_set, pick.index)) is not None]
    shown.images = [ImageRecord(pick, pixels, truth) for pick, (pixels, truth) in read]
    for record in records:
        model = record.run.model.to(device)

        def masks(image: ImageRecord, model: Spot = model) -> Introspection:
            return introspect(
                model, image.pixels, image.truth, index=image.choice.index, seed=args.seed, precision=args.precision
            )

        name = f"{record.name}: gallery, patch orders and attention"
        with tqdm(total=len(shown.images), desc=name, unit="image", disable=None) as bar:
            for image, found in zip(shown.images, side_by_side(masks, shown.images, device), strict=True):
                image.introspections.append(found)
                bar.update()
        model.to("cpu")
    for index in shown.distinct:
        record = report.runs[index]
        record.gradients = gradients(
            record.run, image_set, device, args.gradient_images, args.limit, seed=args.seed, batch_size=args.batch_size
        )


def gradients(
    run: Run,
    image_set: ImageSet,
    device: torch.device,
    images: int | None = None,
    limit: int = 0,
    *,
    seed: int = 0,
    batch_size: int = 32,
) -> PatchGradients | None:
    """Gradient norm per patch of a run, a mean over `images` (default: few on a slow device), at most `limit`."""
    patches = run.model.encoder.num_tokens
    if images is None:
        few = device.type == "cpu" and patches > _FEW_PATCHES
        images = _FEW_IMAGES if few else _GRADIENT_IMAGES
    images = min(images, limit or images, len(image_set))
    if not images:
        return None
    model = run.model.to(device)
    batches = -(-images // batch_size)
    with tqdm(
        total=batches * patches * model.num_orders, desc=f"{run.name}: gradient norm", unit="patch", disable=None
    ) as bar:
        norms = patch_gradients(model, image_set, images=images, seed=seed, batch=batch_size, done=bar.update)
    model.to("cpu")
    return norms


if __name__ == "__main__":
    sys.exit(cli.run(main))
