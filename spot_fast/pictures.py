"""Segmentations to look at: label maps from soft masks, overlays, rows of panels and contact sheets. Pillow only."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from torch import Tensor

MAX_LABELS = 256  # an indexed PNG has no more
PANEL_SIDES = (320, 640)  # the longer side of a panel is the picture's, kept between these, pixels
_GAP, _MARGIN, _CAPTION = 8, 10, 22
_INK, _PAPER = (70, 70, 70), (255, 255, 255)
_TINT = 0.5
_SUPERSAMPLE = 2

# Neighbours in this list are far apart in hue and lightness, so the first few slots are told apart at a glance.
_HAND_PICKED = (
    (230, 57, 70), (29, 120, 216), (255, 190, 11), (42, 157, 90), (155, 70, 214), (0, 190, 205),
    (255, 122, 0), (240, 98, 180), (128, 185, 24), (90, 60, 40), (25, 45, 120), (190, 190, 190),
)


def palette(count: int = MAX_LABELS) -> np.ndarray:
    """uint8 [count, 3]: the colour of each label, always the same. Beyond twelve, hues a golden angle apart."""
    colours = list(_HAND_PICKED[:count])
    for i in range(len(colours), count):
        red, green, blue = colorsys.hsv_to_rgb(i * 0.618034 % 1, (0.85, 0.55)[i % 2], (0.95, 0.7, 0.5)[i % 3])
        colours.append((int(255 * red), int(255 * green), int(255 * blue)))
    return np.array(colours, np.uint8).reshape(-1, 3)


def labels_at(masks: Tensor, height: int, width: int) -> np.ndarray:
    """Soft masks of one picture [N, K] on a square grid → uint8 label map [height, width].

    Bilinear (no align-corners) and argmax, the lower slot where two are equal; one slot at a time, so that a large
    photo needs memory for two maps only.
    """
    tokens, slots = masks.shape
    grid = round(tokens**0.5)
    if grid * grid != tokens or not 1 <= slots <= MAX_LABELS:
        raise ValueError(f"masks has shape {list(masks.shape)}: expected [G * G, K] with K at most {MAX_LABELS}")
    maps = masks.detach().float().cpu().T.reshape(slots, 1, 1, grid, grid)
    best = F.interpolate(maps[0], (height, width), mode="bilinear")[0, 0]
    labels = torch.zeros(height, width, dtype=torch.uint8)
    for slot in range(1, slots):
        values = F.interpolate(maps[slot], (height, width), mode="bilinear")[0, 0]
        larger = values > best
        labels[larger] = slot
        best = torch.where(larger, values, best)
    return labels.numpy()


def indexed_png(labels: np.ndarray) -> Image.Image:
    """A label map uint8 [height, width] as an indexed image: pixel values are labels, colours are `palette`'s."""
    image = Image.fromarray(labels).convert("P")  # grey to palette keeps the values
    image.putpalette(palette().flatten().tolist())
    return image


def panel_size(width: int, height: int) -> tuple[int, int]:
    """(width, height) of a panel for a picture of that size, of the same shape up to a pixel."""
    low, high = PANEL_SIDES
    scale = min(max(max(width, height), low), high) / max(width, height)
    return max(1, round(width * scale)), max(1, round(height * scale))


def picture_panel(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    return image.resize(size, Image.Resampling.LANCZOS)


def overlay(image: Image.Image, masks: Tensor, size: tuple[int, int]) -> Image.Image:
    """`image` tinted by the label map of `masks` [N, K], with outlines, as a panel of `size` (width, height)."""
    width, height = (_SUPERSAMPLE * side for side in size)
    return tinted(image, labels_at(masks, height, width), palette()).resize(size, Image.Resampling.BOX)


def tinted(image: Image.Image, labels: np.ndarray, colours: np.ndarray) -> Image.Image:
    """`image` at the size of the label map [height, width], each label in its row of `colours` [labels, 3], with
    outlines."""
    height, width = labels.shape
    colours = colours[labels].astype(np.float32)
    base = np.asarray(image.resize((width, height), Image.Resampling.LANCZOS), np.float32)
    # Half of the picture's colour goes, all of its light and shade stays.
    grey = base.mean(-1, keepdims=True)
    mixed = (1 - _TINT) * (0.6 * base + 0.4 * grey) + _TINT * colours
    mixed[_outlines(labels)] = 255
    return Image.fromarray(mixed.clip(0, 255).astype(np.uint8))


def _outlines(labels: np.ndarray) -> np.ndarray:
    """bool, True within a pixel or so of where labels change."""
    edge = np.zeros(labels.shape, bool)
    edge[:, 1:] |= labels[:, 1:] != labels[:, :-1]
    edge[1:] |= labels[1:] != labels[:-1]
    return np.asarray(Image.fromarray(edge.astype(np.uint8) * 255).filter(ImageFilter.MaxFilter(3))) > 0


def panel_row(panels: Sequence[tuple[str, Image.Image]]) -> Image.Image:
    """(caption, panel) side by side on white, each caption above its panel."""
    return contact_sheet([panels])


def contact_sheet(rows: Sequence[Sequence[tuple[str, Image.Image]]], columns: int = 1) -> Image.Image:
    """Rows of (caption, panel), `columns` of them side by side; captions stand above the first line alone where every
    row has the same, of the same size."""
    if not rows or not rows[0]:
        raise ValueError("a contact sheet needs at least one row of panels")
    once = len({tuple((caption, panel.size) for caption, panel in row) for row in rows}) == 1
    font = ImageFont.load_default(13)
    lines = [rows[i:i + columns] for i in range(0, len(rows), columns)]
    widths = [sum(_row_width(row) + 2 * _GAP for row in line) - 2 * _GAP for line in lines]
    heights = [max(panel.height for row in line for _, panel in row) for line in lines]
    captions = [_CAPTION if i == 0 or not once else 0 for i in range(len(lines))]
    sheet = Image.new("RGB", (
        2 * _MARGIN + max(widths),
        2 * _MARGIN - _GAP + sum(heights) + sum(captions) + _GAP * len(lines),
    ), _PAPER)
    draw = ImageDraw.Draw(sheet)
    top = _MARGIN
    for line, height, caption_height in zip(lines, heights, captions, strict=True):
        left = _MARGIN
        for row in line:
            for caption, panel in row:
                if caption_height:
                    middle = (left + panel.width // 2, top + caption_height // 2 - 2)
                    draw.text(middle, caption, _INK, font, anchor="mm")
                sheet.paste(panel, (left, top + caption_height))
                left += panel.width + _GAP
            left += _GAP
        top += height + caption_height + _GAP
    return sheet


def _row_width(row: Sequence[tuple[str, Image.Image]]) -> int:
    return sum(panel.width for _, panel in row) + _GAP * (len(row) - 1)
