"""Commands and Python blocks of README.md and docs/*.md, and the folder of small data sets in which they run."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file

import golden_tensors
import tfrecord_files
from data_folders import make_clevrtex, make_coco, make_folder, make_voc, save
from spot_fast.checkpoints.encoder_weights import encoder_metadata, frozen_encoder
from spot_fast.checkpoints.runs import MODEL, save_tensors, write_config
from spot_fast.config import preset
from spot_fast.model.spot import Spot
from spot_fast.model.vits import build_vit

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
_PROGRAMS = "python pip bash pytest torchrun tensorboard docker gsutil git wget curl cmake".split()
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)


def commands() -> dict[str, list[str]]:
    """Command → the pages that have it: lines of blocks that begin with a program's name, and such `inline` code.

    Comments are cut off, lines joined by && are commands of their own.
    """
    pages: dict[str, list[str]] = {}
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        lines = [
            line
            for language, block in _BLOCK.findall(text)
            if language in ("", "bash", "sh", "console")
            for line in block.splitlines()
        ]
        lines += re.findall(r"`([^`\n]+)`", _BLOCK.sub("", text))
        for line in lines:
            for command in re.split(r"\s+#\s|$", line.strip().removeprefix("$ "))[0].split(" && "):
                if command.split(" ")[0] in _PROGRAMS and " " in command:
                    pages.setdefault(command.strip(), []).append(page.name)
    return pages


def python_blocks() -> list[tuple[str, int, str]]:
    """(page, running number, code) of all ```python blocks."""
    numbered = []
    for page in PAGES:
        blocks = [block for language, block in _BLOCK.findall(page.read_text(encoding="utf-8")) if language == "python"]
        numbered += [(page.name, number, block) for number, block in enumerate(blocks, start=1)]
    return numbered


def furnish(place: Path) -> None:
    """Everything that the commands name, a few small images each."""
    (place / "COCO").mkdir()
    make_coco(place / "COCO")
    make_voc(place)
    for split, names in (("train", "ab"), ("val", "c")):
        save(place / "SBD" / "dataset" / "img" / f"{names[0]}.jpg")
        (place / "SBD" / "dataset" / f"{split}.txt").write_text("\n".join(names))
    make_clevrtex(place / "CLEVRTEX")
    for folder, name, side in (("MOVI_C", "movi_c", 8), ("MOVI_E", "movi_e", 8), ("MOVI_E_256", "movi_e", 256)):
        frame, instances = Image.new("RGB", (side, side), "red"), Image.new("L", (side, side))
        one = tfrecord_files.clip([frame] * 10, [instances] * 10)
        for split in ("train", "validation"):
            tfrecord_files.write_shards(place / folder / "1.0.0", f"{name}-{split}.tfrecord", [[one]])
    for name in ("PHOTOS", "PATH", "BOXES"):
        make_folder(place / name)
    (place / "BOXES" / "boxes.csv").write_text("a.jpg,2,2,9,9\na.jpg,12,2,19,9\nb.jpg,2,2,9,9\n")
    save(place / "photo.jpg", Image.new("RGB", (40, 30), "blue"))
    (place / "docs").mkdir()
    small = preset("coco", encoder="vit_small_patch14_dinov2", image_size=28)
    save_file(build_vit(small).state_dict(), place / "dinov2_s14.safetensors")
    torch.save({"state_dict": {}}, place / "vit-b-300ep.pth.tar")
    torch.save({"model": golden_tensors.stage1_state_dict()}, place / "checkpoint.pt.tar")


def untrained(place: Path, name: str, number: int, stage: int = 2) -> Path:
    """A finished run of a preset that never trained, small: runs/<name>-stage<stage>-<number>."""
    config = replace(
        preset(name, stage),
        data=str(place / "COCO"),
        encoder="spot_scenes",
        image_size=32,
        mask_size=32,
        slot_dim=16,
        slot_mlp=16,
        dec_blocks=1,
        dec_heads=4,
        train_blocks=1,
        num_slots=3,
        seed=number,
    )
    folder = place / "runs" / f"{name}-stage{stage}-{number:03d}"
    folder.mkdir(parents=True)
    encoder = frozen_encoder(config)
    write_config(folder, config)
    save_tensors(folder / MODEL, Spot(config, encoder).learned_state_dict(), encoder_metadata(encoder, config))
    return folder
