"""Images of a report, each with its bytes inside the page: galleries, masks by patch order, attention by iteration."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from markupsafe import Markup
from PIL import Image
from torch import Tensor

from spot_fast.evaluation.tables import percent
from spot_fast.reporting.figures import heat_colours, heat_map
from spot_fast.reporting.introspection import BACKGROUND, Introspection, PatchGradients, truth_colours, unevenness
from spot_fast.reporting.records import ImageRecord
from spot_fast.segmentation.overlays import labels_at, palette, tinted

PANEL = 256  # side of a panel in pixels; the page shows it smaller, and at full size when clicked
_QUALITY = 82
_GREY, _BLACK = (150, 150, 150), (18, 18, 18)
_LEVELS = 32  # of a soft map: its PNG takes a few hundred bytes
_MOST_OBJECTS = 254  # colours of an indexed PNG beside the background's and black
_SCALE_STEPS = 24
ORDER_NAMES = (
    "rows →, from the top",
    "columns ↓, from the left",
    "columns ↓, from the right",
    "rows ←, from the top",
    "columns ↑, from the right",
    "rows ←, from the bottom",
    "columns ↑, from the left",
    "rows →, from the bottom",
    "spiral from the centre",
)


@dataclass(frozen=True)
class EmbeddedImage:
    """An <img> with its bytes in `src`. pixelated: enlarged without smoothing."""

    src: str
    alt: str
    width: int
    height: int
    pixelated: bool = False


@dataclass(frozen=True)
class Panel:
    """An image or an <svg> with a caption below, of which `strong` comes first."""

    image: EmbeddedImage | Markup
    caption: str = ""
    strong: str = ""


# ---- panels of an image


def gallery_panels(record: ImageRecord, names: Sequence[str]) -> list[Panel]:
    """Image, truth, and decoder and slot masks of each run in `names`."""
    image, label = _to_image(record.pixels), record.choice.label
    panels = [Panel(_photo(image, f"{label}: the image"), "image")]
    if record.truth is not None:
        panels.append(Panel(truth_image(image, record.truth.instances, f"{label}: annotated objects"), "truth"))
    for name, of_run in zip(names, record.introspections, strict=True):
        for kind, masks, score in (
            ("decoder", of_run.decoder, of_run.decoder_score),
            ("slots", of_run.slots, of_run.iteration_scores[-1]),
        ):
            tinted_image = mask_image(image, masks, of_run.colours, f"{label}: {kind} masks of {name}")
            caption = f"{name}: {kind}" if len(names) > 1 else kind
            panels.append(Panel(tinted_image, caption if score is None else f"{caption} {percent(score)}"))
    return panels


def order_panels(label: str, pixels: Tensor, of_run: Introspection) -> list[Panel]:
    """Decoder masks of one image in every patch order, then their average."""
    image, panels = _to_image(pixels), []
    for order, (masks, score) in enumerate(zip(of_run.by_order, of_run.order_scores, strict=True)):
        alt = f"{label}: decoder masks in patch order {order}, {ORDER_NAMES[order]}"
        caption = f"{order}: {ORDER_NAMES[order]}{_scored(score)}"
        panels.append(Panel(mask_image(image, masks, of_run.colours, alt), caption))
    alt = f"{label}: decoder masks averaged over all patch orders"
    average = mask_image(image, of_run.decoder, of_run.colours, alt)
    return [*panels, Panel(average, _scored(of_run.decoder_score), strong="average")]


def iteration_rows(label: str, pixels: Tensor, of_run: Introspection) -> list[list[Panel]]:
    """Slot attention after each iteration: its label map on the image, and the soft map of every slot."""
    image = _to_image(pixels)
    largest = of_run.iterations.max().item()
    rows = []
    for count, (masks, score) in enumerate(zip(of_run.iterations, of_run.iteration_scores, strict=True), 1):
        alt = f"{label}: slot attention in iteration {count}"
        row = [Panel(mask_image(image, masks, of_run.colours, alt), f"iteration {count}{_scored(score)}")]
        for slot, mask in enumerate(masks.T):
            alt = f"{label}: iteration {count}, slot {slot + 1}"
            soft = soft_image(mask, largest, of_run.colours[slot], alt)
            row.append(Panel(soft, f"slot {slot + 1} · {percent(mask.mean().item())} %"))
        rows.append(row)
    return rows


def _scored(score: float | None) -> str:
    return "" if score is None else f" · {percent(score)}"


# ---- panels of gradients


def gradient_panels(name: str, gradients: PatchGradients) -> tuple[list[Panel], list[Panel]]:
    """Large maps of the norm in order 0 and averaged over the orders; small ones of each order, where there are
    several. All on one scale."""
    grid, orders = gradients.grid, len(gradients.by_order)
    largest = gradients.by_order.max().item()
    maps = {"order 0": gradients.by_order[0]}
    if orders > 1:
        maps[f"all {orders} orders"] = gradients.by_order.mean(0)
    large, small = [], []
    for title, norms in maps.items():
        ratio, variation = unevenness(norms)
        svg = heat_map(f"{name}: gradient norm per patch, {title}", norms.view(grid, grid), largest)
        evenness = f"the strongest patch has {ratio:.1f} times the weakest's norm, variation {100 * variation:.0f} %"
        large.append(Panel(svg, f": {evenness}", strong=title))
    for order, norms in enumerate(gradients.by_order if orders > 1 else ()):
        colours = Image.fromarray(heat_colours(norms.view(grid, grid).numpy(), largest))
        alt = f"{name}: gradient norm per patch in order {order}"
        small.append(Panel(_embedded(colours, alt, lossless=True), f"{order}: {ORDER_NAMES[order]}"))
    return large, small


def heat_scale() -> EmbeddedImage:
    """The colours of gradient maps, from 0 to the largest norm."""
    colours = heat_colours(np.linspace(0, 1, _SCALE_STEPS)[None], 1.0)
    return _embedded(Image.fromarray(colours), "colour scale from 0 to the largest norm", lossless=True)


# ---- images


def mask_image(image: Image.Image, masks: Tensor, colours: Sequence[int], alt: str) -> EmbeddedImage:
    """The image tinted by soft masks [N, K]."""
    labels = labels_at(masks, 2 * PANEL, 2 * PANEL)
    return _tinted(image, labels, _colours(colours), alt)


def truth_image(image: Image.Image, instances: Tensor, alt: str) -> EmbeddedImage:
    """The image tinted by a label map [M, M]: background grey, void black. Beyond 254 objects colours repeat."""
    of_label = truth_colours(instances)
    numbers = sorted(of_label)
    labels = torch.zeros_like(instances, dtype=torch.int64)
    for index, label in enumerate(numbers):
        labels[instances == label] = index if index <= _MOST_OBJECTS else 1 + (index - 1) % _MOST_OBJECTS
    del numbers[_MOST_OBJECTS + 1 :]
    labels[instances < 0] = len(numbers)
    colours = np.concatenate([_colours([of_label[n] for n in numbers]), np.array([_BLACK], np.uint8)])
    at = ((np.arange(2 * PANEL) + 0.5) * len(instances) / (2 * PANEL)).astype(int)  # nearest, as for labels
    return _tinted(image, labels.numpy().astype(np.uint8)[np.ix_(at, at)], colours, alt)


def soft_image(mask: Tensor, largest: float, colour: int, alt: str) -> EmbeddedImage:
    """A slot's soft mask [N], a pixel for each patch: black at 0, the slot's colour at `largest`."""
    grid = round(len(mask) ** 0.5)
    level = ((mask / largest).clamp(0, 1) * (_LEVELS - 1)).round().to(torch.uint8).view(grid, grid).numpy()
    indexed = Image.fromarray(level).convert("P")
    bright, dark = np.array(_colours([colour])[0], float), np.array(_BLACK, float)
    shades = [dark + (bright - dark) * i / (_LEVELS - 1) for i in range(_LEVELS)]
    indexed.putpalette(np.array(shades).round().astype(np.uint8).flatten().tolist())
    return _embedded(indexed, alt, lossless=True)


def _tinted(image: Image.Image, labels: np.ndarray, colours: np.ndarray, alt: str) -> EmbeddedImage:
    # Drawn at twice the size: outlines are two pixels wide.
    return _embedded(tinted(image, labels, colours).resize((PANEL, PANEL), Image.Resampling.BOX), alt)


def _photo(image: Image.Image, alt: str) -> EmbeddedImage:
    return _embedded(image.resize((PANEL, PANEL), Image.Resampling.LANCZOS), alt)


def _embedded(image: Image.Image, alt: str, *, lossless: bool = False) -> EmbeddedImage:
    """WebP, or PNG where every pixel counts, which is then shown pixelated."""
    buffer, kind = io.BytesIO(), "png" if lossless else "webp"
    image.save(buffer, kind, **({"optimize": True} if lossless else {"quality": _QUALITY, "method": 4}))
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    return EmbeddedImage(f"data:image/{kind};base64,{data}", alt, image.width, image.height, lossless)


def _to_image(pixels: Tensor) -> Image.Image:
    """uint8 [3, S, S] as an image."""
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())


def _colours(numbers: Sequence[int]) -> np.ndarray:
    table = palette(max([1, *(n + 1 for n in numbers)]))
    return np.array([_GREY if n == BACKGROUND else table[n] for n in numbers], np.uint8)
