"""A saved model's card: settings, how to load it, scores, and the licence of its encoder's weights."""

from __future__ import annotations

from collections.abc import Mapping

from spot_fast.config import Config
from spot_fast.model.decoders import decoder_name
from spot_fast.model.vits import SCENES_ENCODER

_NAMES = {
    "mbo_i_decoder": "mBO_i, decoder masks",
    "mbo_i_slots": "mBO_i, slot masks",
    "val_loss": "reconstruction loss",
}
_PAPER = "[SPOT, CVPR 2024](https://arxiv.org/abs/2312.00648)"


def encoder_licence(name: str) -> tuple[str, str]:
    """The licence of an encoder's weights: the hub's identifier, and a phrase with publisher and licence.

    Source: the publishers' repositories and timm's model cards.
    """
    for part, identifier, licence, owner in (
        # "dino" is part of the names above it
        ("dinov3", "other", "DINOv3 License", "Meta's DINOv3"),
        ("dinov2", "apache-2.0", "Apache License 2.0", "Meta's DINOv2"),
        ("dino", "apache-2.0", "Apache License 2.0", "Meta's DINO"),
        ("mae", "cc-by-nc-4.0", "CC BY-NC 4.0: no commercial use", "Meta's MAE"),
        ("moco", "cc-by-nc-4.0", "CC BY-NC 4.0: no commercial use", "Meta's MoCo v3"),
    ):
        if part in name.lower():
            return identifier, f"{owner}, published under {licence}"
    if name == SCENES_ENCODER:
        return "apache-2.0", "spot_fast's own, Apache License 2.0"
    return "other", "of a licence that is not known here: ask their publisher"


def card(config: Config, scores: Mapping[str, float], sha256: str, *, included: bool, source: str | None) -> str:
    """The text of README.md. included: whether the encoder's weights are in the folder. source: of the model."""
    identifier, licence = encoder_licence(config.encoder)
    assumed = " (identified by their shapes or by hand)" if included else ""
    where = "in `encoder.safetensors`" if included else "not in this folder: spot_fast finds them by that name"
    parts = [
        "---",
        f"license: {identifier}",
        "library_name: spot_fast",
        "pipeline_tag: image-segmentation",
        "tags: [object-centric-learning, slot-attention, unsupervised-segmentation]",
        "---",
        "",
        f"# SPOT, stage {config.stage}, {config.preset}",
        "",
        f"Takes images apart into {config.num_slots} slots without labels ({_PAPER}): frozen ViT `{config.encoder}` "
        f"at {config.image_size} px, {config.slot_init} slots of width {config.slot_dim}, {decoder_name(config)}.",
    ]
    if source:
        parts.append(f"Converted from {source}.")
    if config.implementation != "spot":
        parts.append(f"Details as in {config.implementation}, not as in the authors' SPOT.")
    parts += [
        "",
        "```python",
        "import spot_fast",
        "from PIL import Image",
        'model = spot_fast.load("PATH or owner/name on the hub")',
        'result = model.segment_images([Image.open("photo.jpg")])',
        "result.labels[0], result.masks[0], result.slots[0]  # [H, W], [K, H, W], [K, U]",
        "```",
        "",
        "On the command line: `python -m spot_fast.segment photo.jpg --run PATH`, `python -m spot_fast.evaluate PATH "
        "--data DATA`.",
        "",
        "## Scores",
        "",
    ]
    if scores:
        parts += [
            f"Last validation of the run (preset {config.preset}, its first images; "
            "`python -m spot_fast.evaluate` gives the whole table):",
            "",
            "| | |",
            "|---|---|",
        ]
        parts += [f"| {_NAMES.get(name, name)} | {value:.4f} |" for name, value in scores.items()]
    else:
        parts.append("None are known: `python -m spot_fast.evaluate PATH --data DATA` measures them.")
    parts += [
        "",
        "## Encoder and licence",
        "",
        f"The frozen encoder's weights are {licence}{assumed}. They are {where}; sha256 of the loaded weights: "
        f"`{sha256}`.",
    ]
    if config.stage == 2:
        parts.append(
            f"This model also holds a trained copy of its last {config.train_blocks} blocks, which derives from them."
        )
    return "\n".join(parts) + "\n"
