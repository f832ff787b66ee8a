"""What a trained model sees in pictures, or what k-means makes of an encoder's features.

For each picture: NAME_overlay.png (picture, decoder masks, slot masks) and NAME_labels.png, the decoder's label map at
the picture's own size, indexed, pixel value = slot. Without --run the newest finished run is taken. With --encoder
instead of a run, the masks are k-means clusters of that encoder's features.

Pictures may have any size and shape. The model's decoder knows one square grid, so the whole picture is resized to
that square, which nothing is cut off from, and its soft masks are resized back to the picture's shape.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from . import checkpoint, pictures
from .baselines import kmeans_labels
from .config import preset
from .data import Scenes, transforms
from .data.folder import list_images
from .encoder import SCENES_ENCODER, normalise
from .errors import CorruptImage, UserError

# What segments: a uint8 square [1, 3, S, S] → (caption, soft masks [N, K]), the first of which makes the label map.
Masker = Callable[[Tensor], list[tuple[str, Tensor]]]
CLUSTER_SIZE = 448  # twice what most ViTs were trained at: finer clusters
MAX_SHEET_ROWS = 24
_SHEET_PANEL = 200


def run_masker(run: str | Path | None, *, orders: str, device: str, seed: int = 0) -> tuple[Masker, int, str]:
    """(masker, S, what it is) of a trained run. Gaussian slots start from the same noise for every picture."""
    found = checkpoint.load_run(checkpoint.find_folder(run) if run else checkpoint.find_run(), device)
    model, config = found.model, found.config
    noise = None
    if config.slot_init == "gaussian":
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(1, config.num_slots, config.slot_dim, generator=generator).to(device)

    def masks(square: Tensor) -> list[tuple[str, Tensor]]:
        output = model.segment(normalise(square.to(device)), orders=orders, noise=noise)
        return [("decoder masks", output.masks[0]), ("slot masks", output.slot_attn[0])]

    return masks, config.image_size, f"run {found.path}"


def cluster_masker(encoder_name: str, weights: str | None, *, clusters: int, size: int | None,
                   device: str) -> tuple[Masker, int, str]:
    """(masker, S, what it is) of k-means on an encoder's features, the ones that SPOT reconstructs."""
    config = preset("scenes") if encoder_name == SCENES_ENCODER else preset("coco", image_size=CLUSTER_SIZE)
    config = replace(config, encoder=encoder_name, encoder_weights=weights, image_size=size or config.image_size)
    encoder = checkpoint.frozen_encoder(config).to(device)
    if not 1 <= clusters <= min(encoder.num_tokens, pictures.MAX_LABELS):
        raise UserError(f"--clusters {clusters}: use 1 to {min(encoder.num_tokens, pictures.MAX_LABELS)}")

    @torch.no_grad()
    def masks(square: Tensor) -> list[tuple[str, Tensor]]:
        features = encoder(normalise(square.to(device)))
        members = F.one_hot(kmeans_labels(features, clusters, 0)[0], clusters).float()
        # How near each token is to each centre, rather than the labels: interpolated, it gives smooth outlines.
        tokens = F.normalize(features[0].float(), dim=-1)
        centres = members.T @ tokens / members.sum(0).clamp(min=1)[:, None]
        return [("feature clusters", 2 * tokens @ centres.T - centres.square().sum(-1))]

    return masks, config.image_size, f"{clusters} clusters of {encoder_name}'s features"


def segment_picture(image: Image.Image, masker: Masker, size: int) -> list[tuple[str, Tensor]]:
    """(caption, soft masks [N, K]) of an RGB picture of any shape, through the square of side `size`."""
    square = transforms.to_tensor(image.resize((size, size), Image.Resampling.BILINEAR))
    return masker(square[None])


def panels_of(image: Image.Image, found: Sequence[tuple[str, Tensor]],
              size: tuple[int, int]) -> list[tuple[str, Image.Image]]:
    """The picture and its overlays as captioned panels of `size` (width, height)."""
    return [("image", pictures.picture_panel(image, size)),
            *((caption, pictures.overlay(image, masks, size)) for caption, masks in found)]


def output_names(stems: Sequence[str], inputs: Sequence[Path], out: Path) -> list[str]:
    """A name for each picture's outputs: its stem, with -2, -3... where another picture has it.

    No output takes the place of one of the `inputs`, the files that are read. Case does not tell names apart, as on
    some file systems.
    """
    reserved = {str(path.resolve()).lower() for path in inputs}
    taken: set[str] = set()
    names = []
    for stem in stems:
        name, number = stem, 1
        while name.lower() in taken or reserved & {str(f.resolve()).lower() for f in _files(out, name)}:
            number += 1
            name = f"{stem}-{number}"
        taken.add(name.lower())
        names.append(name)
    return names


def _files(out: Path, name: str) -> tuple[Path, Path]:
    return out / f"{name}_overlay.png", out / f"{name}_labels.png"


def save(image: Image.Image, path: Path) -> None:
    """Writes a PNG, whole or not at all, and makes its folder where there is none."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"folder {path.parent} cannot be made ({error.strerror}): choose another") from None
    checkpoint.atomic_write(path, lambda partial: image.save(partial, format="PNG"))


def _read(paths: Sequence[Path], scenes: int, size: int) -> Iterator[Image.Image | CorruptImage]:
    """The pictures of `paths`, or why one cannot be read, then as many validation scenes of side `size`."""
    for path in paths:
        try:
            yield transforms.open_rgb(path, upright=True)
        except CorruptImage as error:
            yield error
    for pixels in Scenes(scenes, "val", size=size).images:
        yield Image.fromarray(pixels.permute(1, 2, 0).numpy())


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m spot_fast.segment", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="*", metavar="IMAGE", help="image files, or folders to search for images")
    parser.add_argument("--run", metavar="RUN", help="run folder, checkpoint file of the authors, "
                        "or owner/name on the hub (default: the newest finished run under runs/)")
    parser.add_argument("--out", type=Path, default=Path("segments"), metavar="DIR",
                        help="where to write (default: segments)")
    parser.add_argument("--orders", choices=("0", "all"), default="0",
                        help="patch order 0, or the average over all nine (default: 0)")
    parser.add_argument("--scenes", type=int, default=0, metavar="N",
                        help="also segment N generated validation scenes; needs no picture")
    parser.add_argument("--sheet", type=Path, metavar="FILE",
                        help=f"also write one PNG with the first {MAX_SHEET_ROWS} pictures and their masks")
    parser.add_argument("--encoder", metavar="NAME", help="without a run: cluster the features of this timm ViT")
    parser.add_argument("--encoder-weights", metavar="FILE", help="its weights (default: timm's own, from the hub)")
    parser.add_argument("--clusters", type=int, default=6, metavar="K", help="clusters for --encoder (default: 6)")
    parser.add_argument("--size", type=int, metavar="S",
                        help=f"side of the square for --encoder (default: {CLUSTER_SIZE}, {SCENES_ENCODER}: 64)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1... (default: cuda if there is one)")
    return parser.parse_args(argv)


def _check(args: argparse.Namespace) -> None:
    if args.scenes < 0:
        raise UserError(f"--scenes {args.scenes}: use 0 or more")
    if not args.images and not args.scenes:
        raise UserError("nothing to segment: name images or folders, or ask for generated pictures with --scenes N")
    if args.run and args.encoder:
        raise UserError(f"--run {args.run} has its own encoder: drop --encoder {args.encoder} or --run")
    if not args.encoder and (args.size or args.encoder_weights):
        option = "--size" if args.size else "--encoder-weights"
        raise UserError(f"{option} belongs to --encoder NAME: a run keeps the encoder and the size it was trained with")
    if args.encoder and args.size is not None and args.size < 1:
        raise UserError(f"--size {args.size}: use a multiple of the encoder's patch size")


def _device(name: str | None) -> str:
    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name} cannot be used ({str(error).splitlines()[0]}): try --device cpu") from None
    return name


def run(args: argparse.Namespace) -> int:
    """Segments what `args` name; the number of pictures that could not be read."""
    _check(args)
    paths = list_images(args.images) if args.images else []
    device = _device(args.device)
    if args.encoder:
        masker, size, what = cluster_masker(args.encoder, args.encoder_weights, clusters=args.clusters, size=args.size,
                                            device=device)
    else:
        masker, size, what = run_masker(args.run, orders=args.orders, device=device)
    print(f"{what}, {size} px, {device}", flush=True)
    stems = [path.stem for path in paths] + [f"scene_{index:03d}" for index in range(args.scenes)]
    corrupt, rows = 0, []
    for name, image in zip(output_names(stems, paths, args.out), _read(paths, args.scenes, size), strict=True):
        if isinstance(image, CorruptImage):
            corrupt += 1
            print(f"skipped: {image}", file=sys.stderr, flush=True)
            continue
        found = segment_picture(image, masker, size)
        overlay_file, labels_file = _files(args.out, name)
        save(pictures.panel_row(panels_of(image, found, pictures.panel_size(*image.size))), overlay_file)
        save(pictures.indexed_png(pictures.labels_at(found[0][1], image.height, image.width)), labels_file)
        print(f"{overlay_file}  {labels_file.name}  {image.width} x {image.height}", flush=True)
        if args.sheet and len(rows) < MAX_SHEET_ROWS:
            scale = _SHEET_PANEL / image.height
            rows.append(panels_of(image, found, (max(1, round(image.width * scale)), _SHEET_PANEL)))
    if rows:
        save(pictures.contact_sheet(rows, columns=1 if len(rows) < 4 else 2), args.sheet)
        print(args.sheet)
    return corrupt


def main(argv: Sequence[str] | None = None) -> int:
    try:
        corrupt = run(_parse(argv))
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if corrupt:
        print(f"error: {corrupt} {'image' if corrupt == 1 else 'images'} could not be read and had to be skipped",
              file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
