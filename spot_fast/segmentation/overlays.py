"""Draws segmentations with Pillow: label maps from soft masks, overlays, rows of panels and contact sheets."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageFont
from torch import Tensor

from spot_fast.segmentation.colours import MAX_LABELS, palette

PANEL_SIDES = (320, 640)  # bounds of a panel's longer side, which otherwise is the image's, pixels
_BAND = 1 << 20  # pixels of a label map computed at a time
_GAP, _MARGIN, _CAPTION = 8, 10, 22
_INK, _PAPER = (70, 70, 70), (255, 255, 255)
_TINT, _SATURATION = 0.5, 0.6
_SOFTEN = ImageFilter.Kernel((3, 3), (1, 2, 1, 2, 8, 2, 1, 2, 1))


def labels_at(masks: Tensor, height: int, width: int, grid: tuple[int, int] | None = None) -> np.ndarray:
    """Soft masks of one image [N, K] on a grid of (height, width) patches → uint8 label map [height, width].

    Without `grid` the N patches are a square. Bilinear (corners not aligned), then argmax, the lower slot of equals.
    ValueError where N does not fit the grid, or K is 0 or above MAX_LABELS.
    """
    tokens, slots = masks.shape
    rows, columns = grid or (round(tokens**0.5),) * 2
    if rows * columns != tokens or not 1 <= slots <= MAX_LABELS:
        expected = "[G * G, K]" if grid is None else f"[{rows} * {columns}, K]"
        raise ValueError(f"masks has shape {list(masks.shape)}: expected {expected} with K at most {MAX_LABELS}")
    maps = masks.detach().float().cpu().T.reshape(slots, rows, columns)
    labels = torch.zeros(height, width, dtype=torch.uint8)
    # A band of rows and a slot at a time: a large photo needs little more memory than its label map.
    band = max(1, _BAND // max(width, slots * columns))
    for top in range(0, height, band):
        part = labels[top : top + band]
        tall = _rows_at(maps, top, len(part), height)
        best = F.interpolate(tall[:1], width, mode="linear")[0]
        for slot in range(1, slots):
            values = F.interpolate(tall[slot : slot + 1], width, mode="linear")[0]
            part.masked_fill_(values > best, slot)
            torch.maximum(best, values, out=best)
    return labels.numpy()


def _rows_at(maps: Tensor, top: int, count: int, height: int) -> Tensor:
    """Rows `top` and on of maps [K, h, w] resized bilinearly to `height` rows: [K, count, w]."""
    rows = maps.shape[1]
    # Pixel centres of the label map in units of rows of `maps`, as F.interpolate places them.
    position = ((torch.arange(top, top + count, dtype=torch.float64) + 0.5) * rows / height - 0.5).clamp(min=0)
    above = position.long()
    below = (above + 1).clamp(max=rows - 1)
    weight = (position - above).float()[:, None]
    return maps[:, above] * (1 - weight) + maps[:, below] * weight


def indexed_png(labels: np.ndarray, colours: np.ndarray | None = None) -> Image.Image:
    """A label map uint8 [height, width] as an indexed image: label k has row k of `colours`, uint8 [labels, 3]
    (default: palette())."""
    image = Image.frombuffer("P", labels.shape[::-1], np.ascontiguousarray(labels), "raw", "P", 0, 1)  # not a copy
    image.putpalette((palette() if colours is None else colours).tobytes())
    return image


def panel_size(width: int, height: int) -> tuple[int, int]:
    """(width, height) of a panel for an image of that size, of the same aspect ratio up to a pixel."""
    low, high = PANEL_SIDES
    scale = min(max(max(width, height), low), high) / max(width, height)
    return max(1, round(width * scale)), max(1, round(height * scale))


def image_panel(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    return image.resize(size, Image.Resampling.LANCZOS)


def overlay(
    image: Image.Image,
    masks: Tensor,
    size: tuple[int, int],
    *,
    grid: tuple[int, int] | None = None,
    colours: np.ndarray | None = None,
) -> Image.Image:
    """`image` tinted by the label map of `masks` [N, K], with outlines, as a panel of `size` (width, height).

    grid as in `labels_at`, colours as in `indexed_png`.
    """
    return tinted(image, labels_at(masks, size[1], size[0], grid), colours)


def tinted(image: Image.Image, labels: np.ndarray, colours: np.ndarray | None = None) -> Image.Image:
    """`image` at the size of a label map [height, width], each label in its row of `colours`, with outlines."""
    size = labels.shape[::-1]
    panel = image if image.size == size else image_panel(image, size)
    tint = indexed_png(labels, colours).convert("RGB")
    # Less saturated, so that the tint is read as the label's colour; light and shade stay.
    mixed = Image.blend(ImageEnhance.Color(panel).enhance(_SATURATION), tint, _TINT)
    mixed.paste(_PAPER, mask=_outlines(labels))
    return mixed


def _outlines(labels: np.ndarray) -> Image.Image:
    """Grey image, bright on both sides of each label boundary, with soft edges."""
    edge = np.zeros(labels.shape, np.uint8)
    across, down = labels[:, 1:] != labels[:, :-1], labels[1:] != labels[:-1]
    edge[:, 1:] |= across
    edge[:, :-1] |= across
    edge[1:] |= down
    edge[:-1] |= down
    edge *= 255
    return Image.fromarray(edge).filter(_SOFTEN)


def panel_row(panels: Sequence[tuple[str, Image.Image]]) -> Image.Image:
    """(caption, panel) side by side on white, each caption above its panel."""
    return contact_sheet([panels])


def contact_sheet(rows: Sequence[Sequence[tuple[str, Image.Image]]], columns: int = 1) -> Image.Image:
    """Rows of (caption, panel), `columns` of them side by side. Only the first line has captions where all rows have
    the same captions and sizes."""
    if not rows or not rows[0]:
        raise ValueError("a contact sheet needs at least one row of panels")
    once = len({tuple((caption, panel.size) for caption, panel in row) for row in rows}) == 1
    font = ImageFont.load_default(13)
    lines = [rows[i : i + columns] for i in range(0, len(rows), columns)]
    widths = [sum(_row_width(row) + 2 * _GAP for row in line) - 2 * _GAP for line in lines]
    heights = [max(panel.height for row in line for _, panel in row) for line in lines]
    captions = [_CAPTION if i == 0 or not once else 0 for i in range(len(lines))]
    sheet = Image.new(
        "RGB",
        (
            2 * _MARGIN + max(widths),
            2 * _MARGIN - _GAP + sum(heights) + sum(captions) + _GAP * len(lines),
        ),
        _PAPER,
    )
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
