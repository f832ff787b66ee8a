"""The figures of a report: curves, scores by size, galleries, attention and gradient maps, as markup with captions.

Every function gives one <figure>, or None where the runs have nothing to show in it.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from spot_fast.evaluation.tables import BINS, percent
from spot_fast.reporting.introspection import BACKGROUND, Gradients, Look, truth_colours, unevenness
from spot_fast.reporting.markup import Markup, tag
from spot_fast.reporting.records import Log, values_of
from spot_fast.reporting.svg_chart import Line, heat_colour, heat_map, legend, line_chart, number
from spot_fast.segmentation.overlays import labels_at, palette, tinted

PANEL = 256  # side of a panel in pixels; the page shows it smaller, and as large as it is when clicked
_QUALITY = 82
_GREY, _BLACK = (150, 150, 150), (18, 18, 18)
_LEVELS = 32  # of a soft map: its PNG is a few hundred bytes
_MOST_OBJECTS = 254  # colours of an indexed PNG beside the background's and black
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


def figure(body: object, caption: object, *, source: str = "", class_: str | None = None) -> Markup:
    """A <figure> with a caption that says how to read it, and in small print where its numbers are from."""
    small = source and tag("small", source, class_="source")
    return tag("figure", body, tag("figcaption", caption, " " if small else None, small or None), class_=class_)


# ---- curves


def curves(title: str, lines: Sequence[Line], y_label: str, caption: str, *, log: bool = False) -> Markup | None:
    """A chart over training steps."""
    lines = [line for line in lines if any(not log or y > 0 for _, y in line.points())]
    if not lines:
        return None
    chart = line_chart(title, lines, x_label="step", y_label=y_label, log=log)
    return tag("figure", tag("h3", title), chart, len(lines) > 1 and legend(lines), tag("figcaption", caption))


def training_curves(runs: Sequence[tuple[str, int, Log]]) -> list[Markup]:
    """Losses, learning rate, gradient norm, pace, then validation scores, of (name, stage, log) of each run."""

    def lines(kind: str, key: str, scale: float = 1.0, suffix: str = "", dashed: bool = False) -> list[Line]:
        found = []
        for colour, (name, _, log) in enumerate(runs):
            records = getattr(log, kind)
            y = [None if v is None else scale * v for v in values_of(records, key)]
            found.append(Line(name + suffix, [r["step"] for r in records], y, colour, dashed, kind == "validation"))
        return found

    # Where `loss` is a sum of several terms, its part L_REC compares with other runs.
    reconstruction = [
        rec if any(y is not None for y in rec.y) else total
        for rec, total in zip(lines("train", "loss_rec"), lines("train", "loss"), strict=True)
    ]
    names = {name for _, _, log in runs for record in log.train for name in record if name.startswith("loss_")}
    further = sorted(names - {"loss_rec", "loss_att"})
    scores = [
        line
        for pair in zip(
            lines("validation", "mbo_i_decoder", 100, ", decoder"),
            lines("validation", "mbo_i_slots", 100, ", slots", True),
            strict=True,
        )
        for line in pair
    ]
    made = [
        curves(
            "Reconstruction loss",
            reconstruction,
            "L_REC",
            "Mean squared error of the predicted features in training, the mean between two lines of the log. Lower "
            "is better.",
        ),
        curves(
            "Attention loss",
            lines("train", "loss_att"),
            "L_ATT",
            "Stage 2 only: cross-entropy of the student's slot attention against the teacher's masks, before it is "
            "weighted by λ.",
        ),
        *(
            curves(f"Loss: {name.removeprefix('loss_')}", lines("train", name), name, "A loss of the decoder's own.")
            for name in further
        ),
        curves("Learning rate", lines("train", "lr"), "rate", "Warm-up, then a cosine."),
        curves(
            "Gradient norm",
            lines("train", "grad_norm"),
            "largest |g|",
            "Infinity norm of the gradient before clipping, on a logarithmic axis.",
            log=True,
        ),
        curves(
            "Pace",
            lines("train", "images_per_s"),
            "images/s",
            "Training images a second. Dips are validations and saved states, or other work on the machine.",
        ),
        curves(
            "Validation loss",
            lines("validation", "val_loss"),
            "L_REC",
            "Reconstruction loss in patch order 0 on the images of the quick validations in training.",
        ),
        curves(
            "Validation mBO_i",
            scores,
            "mBO_i, percent",
            "The quick validations in training: patch order 0, fewer images than the table of scores has.",
        ),
    ]
    return [part for part in made if part]


@dataclass(frozen=True)
class SizeRow:
    """mBO_i by the size of instances: a fraction for each of SIZE_BINS, None without an instance; deviations of runs
    that differ in their seed only, or None."""

    name: str
    means: Sequence[float | None]
    deviations: Sequence[float] | None = None
    colour: int = 0
    dashed: bool = False


def sizes_chart(rows: Sequence[SizeRow], instances: Sequence[int], source: str) -> Markup:
    """A line of points for each of `rows`, and how many instances there are of each size."""
    places = range(len(instances))
    lines = [
        Line(
            row.name.partition(" [")[0],
            places,
            [None if m is None else 100 * m for m in row.means],
            row.colour,
            row.dashed,
            markers=True,
            spread=row.deviations and [100 * d for d in row.deviations],
        )
        for row in rows
    ]
    names = [f"{name}\nn={count}" for name, count in zip(BINS, instances, strict=True)]
    chart = line_chart(
        "mBO_i by size of the instance",
        lines,
        x_label="size of the instance, percent of the image",
        y_label="mBO_i, percent",
        zero=True,
        names=names,
    )
    bars = " Bars are ± one standard deviation over the seeds." if any(row.deviations for row in rows) else ""
    caption = (
        "How well instances are found by how large they are (the paper's Fig. 7); n is how many there are, and "
        f"where there is no point there are none. Few instances make a noisy point.{bars}"
    )
    return figure([chart, legend(lines)], caption, source=source)


# ---- images


def inline_image(image: Image.Image, alt: str, *, lossless: bool = False, class_: str | None = None) -> Markup:
    """An <img> that carries its own bytes: WebP, or PNG where every pixel counts."""
    buffer = io.BytesIO()
    if lossless:
        image.save(buffer, "PNG", optimize=True)
    else:
        image.save(buffer, "WEBP", quality=_QUALITY, method=4)
    kind = "png" if lossless else "webp"
    data = f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
    # A click gives it the focus, with which the style sheet shows it large; the tab key passes it by.
    return tag("img", src=data, alt=alt, width=image.width, height=image.height, class_=class_, tabindex=-1)


def panel(image: Markup, *caption: object) -> Markup:
    """An image with a line below it; `panels` puts them side by side."""
    return tag("div", tag("div", image, class_="shot"), tag("span", *caption), class_="panel")


def panels(*parts: Markup | None) -> Markup:
    return tag("div", *parts, class_="panels")


def to_image(pixels: Tensor) -> Image.Image:
    """uint8 [3, S, S] as an image."""
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())


def _colours(numbers: Sequence[int]) -> np.ndarray:
    table = palette(max(1, *(n + 1 for n in numbers), 1))
    return np.array([_GREY if n == BACKGROUND else table[n] for n in numbers], np.uint8)


def photo(image: Image.Image, alt: str) -> Markup:
    return inline_image(image.resize((PANEL, PANEL), Image.Resampling.LANCZOS), alt)


def mask_image(image: Image.Image, masks: Tensor, colours: Sequence[int], alt: str) -> Markup:
    """The image tinted by soft masks [N, K]."""
    labels = labels_at(masks, 2 * PANEL, 2 * PANEL)
    return inline_image(tinted(image, labels, _colours(colours)).resize((PANEL, PANEL), Image.Resampling.BOX), alt)


def truth_image(image: Image.Image, instances: Tensor, alt: str) -> Markup:
    """The image tinted by a label map [M, M]: background grey, pixels that are not counted black. Of more than 254
    objects some share a colour."""
    of_label = truth_colours(instances)
    numbers = sorted(of_label)
    labels = torch.zeros_like(instances, dtype=torch.int64)
    for place, label in enumerate(numbers):
        labels[instances == label] = place if place <= _MOST_OBJECTS else 1 + (place - 1) % _MOST_OBJECTS
    del numbers[_MOST_OBJECTS + 1 :]
    labels[instances < 0] = len(numbers)
    colours = np.concatenate([_colours([of_label[n] for n in numbers]), np.array([_BLACK], np.uint8)])
    at = (np.arange(2 * PANEL) + 0.5) * len(instances) / (2 * PANEL)
    labels = labels.numpy().astype(np.uint8)[np.ix_(at.astype(int), at.astype(int))]
    return inline_image(tinted(image, labels, colours).resize((PANEL, PANEL), Image.Resampling.BOX), alt)


def soft_image(mask: Tensor, most: float, colour: int, alt: str) -> Markup:
    """A soft mask [N] of one slot, a pixel a patch: black is 0, the slot's colour `most`."""
    grid = round(len(mask) ** 0.5)
    level = ((mask / most).clamp(0, 1) * (_LEVELS - 1)).round().to(torch.uint8).view(grid, grid).numpy()
    indexed = Image.fromarray(level).convert("P")
    bright, dark = np.array(_colours([colour])[0], float), np.array(_BLACK, float)
    shades = [dark + (bright - dark) * i / (_LEVELS - 1) for i in range(_LEVELS)]
    indexed.putpalette(np.array(shades).round().astype(np.uint8).flatten().tolist())
    return inline_image(indexed, alt, lossless=True, class_="pixels")


def gallery_image(
    why: str,
    label: str,
    score: float | None,
    pixels: Tensor,
    instances: Tensor | None,
    looks: Sequence[tuple[str, Look]],
) -> Markup:
    """Image, truth, and of every run decoder and slot masks. score is what the image was chosen by."""
    image = to_image(pixels)
    many = len(looks) > 1
    shown = [panel(photo(image, f"{label}: the image"), "image")]
    if instances is not None:
        shown.append(panel(truth_image(image, instances, f"{label}: annotated objects"), "truth"))
    for name, found in looks:
        for what, masks, value in (
            ("decoder", found.decoder, found.decoder_score),
            ("slots", found.slots, found.iteration_scores[-1]),
        ):
            alt = f"{label}: {what} masks of {name}"
            shown.append(
                panel(
                    mask_image(image, masks, found.colours, alt),
                    many and f"{name}: ",
                    what,
                    value is not None and f" {percent(value)}",
                )
            )
    chosen = f"{why}, mBO_i {percent(score)}" if score is not None else why
    return tag("figure", tag("figcaption", tag("strong", chosen), " · ", label), panels(*shown), class_="image")


def order_masks(label: str, pixels: Tensor, found: Look) -> Markup | None:
    """Decoder masks of one image in every patch order, and their average."""
    if len(found.by_order) < 2:
        return None
    image = to_image(pixels)
    shown = []
    for order, (masks, score) in enumerate(zip(found.by_order, found.order_scores, strict=True)):
        alt = f"{label}: decoder masks in patch order {order}, {ORDER_NAMES[order]}"
        shown.append(
            panel(
                mask_image(image, masks, found.colours, alt),
                f"{order}: {ORDER_NAMES[order]}",
                score is not None and f" · {percent(score)}",
            )
        )
    alt = f"{label}: decoder masks averaged over all patch orders"
    shown.append(
        panel(
            mask_image(image, found.decoder, found.colours, alt),
            tag("strong", "average"),
            found.decoder_score is not None and f" · {percent(found.decoder_score)}",
        )
    )
    return tag("figure", tag("figcaption", label), panels(*shown), class_="image orders")


def attention_iterations(label: str, pixels: Tensor, found: Look) -> Markup:
    """Slot attention after each iteration: its label map on the image, and every slot's soft map."""
    image = to_image(pixels)
    most = found.iterations.max().item()
    rows = []
    for count, (masks, score) in enumerate(zip(found.iterations, found.iteration_scores, strict=True), 1):
        alt = f"{label}: slot attention in iteration {count}"
        shown = [
            panel(
                mask_image(image, masks, found.colours, alt),
                f"iteration {count}",
                score is not None and f" · {percent(score)}",
            )
        ]
        for slot in range(masks.shape[1]):
            soft = soft_image(masks[:, slot], most, found.colours[slot], f"{label}: iteration {count}, slot {slot + 1}")
            shown.append(panel(soft, f"slot {slot + 1} · {percent(masks[:, slot].mean().item())} %"))
        rows.append(panels(*shown))
    return tag("figure", tag("figcaption", label, f" · full colour is {number(most)}"), rows, class_="image iterations")


# ---- gradients

GRADIENTS_EXPLAINED = (
    "L1 norm of the gradient of each patch's reconstruction loss with respect to the slots that the decoder reads, "
    "summed over slots, channels and decoder blocks, mean over images (the paper's Fig. 3). Bright patches teach the "
    "slots most. One would expect them where an order begins, where there is little else to go by, and an even map "
    "over all orders. Variation is the standard deviation over the mean; every run has a scale of its own."
)


def gradient_figure(name: str, found: Gradients, source: str) -> Markup:
    """Gradient norm per patch in order 0, averaged over the orders, and in each of them, on one scale.

    What it means is said once, above all of them: GRADIENTS_EXPLAINED.
    """
    grid, orders = found.grid, len(found.by_order)
    average = found.by_order.mean(0)
    most = found.by_order.max().item()
    large = []
    for title, norms in [("order 0", found.by_order[0]), (f"all {orders} orders", average)][: 1 + (orders > 1)]:
        ratio, variation = unevenness(norms)
        map_ = heat_map(f"{name}: gradient norm per patch, {title}", norms.view(grid, grid).tolist(), most)
        large.append(
            panel(
                map_,
                tag("strong", title),
                f": the strongest patch has {ratio:.1f} times the weakest's norm, variation {100 * variation:.0f} %",
            )
        )
    small = None
    if orders > 1:
        small = panels(
            *(
                panel(
                    _heat_image(norms.view(grid, grid), most, f"{name}: gradient norm per patch in order {order}"),
                    f"{order}: {ORDER_NAMES[order]}",
                )
                for order, norms in enumerate(found.by_order)
            )
        )
    steps = 24
    scale = Image.new("RGB", (steps, 1))
    scale.putdata([_rgb(i / (steps - 1)) for i in range(steps)])
    bar = tag(
        "div",
        "0 ",
        inline_image(scale, "colour scale from 0 to the largest norm", lossless=True, class_="scale"),
        f" {number(most)}",
        class_="scale-line",
    )
    maps = [tag("h3", name), tag("div", *large, class_="panels large"), bar, small]
    alone = orders == 1 and "This run was trained in the standard order only: there are no others to show."
    return figure(maps, alone, source=source, class_="gradients")


def _rgb(value: float) -> tuple[int, int, int]:
    colour = heat_colour(value)
    return tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5))


def _heat_image(norms: Tensor, most: float, alt: str) -> Markup:
    shown = Image.new("RGB", (norms.shape[1], norms.shape[0]))
    shown.putdata([_rgb(value / most if most > 0 else 0.0) for value in norms.flatten().tolist()])
    return inline_image(shown, alt, lossless=True, class_="pixels")
