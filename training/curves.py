"""curves.png of a run directory: its losses, and its recalls at each validation, over the steps.

Drawn with Pillow from metrics.jsonl, so that it also shows what earlier sessions did. Start at
`draw_curves`.
"""

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from clipserve.files import write_atomic
from training.runs import read_metrics

Curve = Sequence[tuple[float, float]]
_SIZE = (1000, 800)
_COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b")
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 20, 34, 30
_MOST_POINTS = 2000
_RECALLS = ("i2t_r1", "t2i_r1", "i2t_r10", "t2i_r10")


def draw_curves(folder: Path) -> None:
    """Write `folder`/curves.png, if there is anything to show."""
    lines = read_metrics(folder)
    losses = _collect(lines, [n for n in _names(lines) if n == "loss" or n.startswith("loss/")])
    if len(losses) == 2:  # the sum of one term
        losses.pop("loss", None)
    recalls = _collect(lines, [f"val/{name}" for name in _RECALLS])
    panels = [(title, c) for title, c in (("loss", losses), ("recall", recalls)) if c]
    if not panels:
        return
    width, height = _SIZE[0], _SIZE[1] // 2
    image = Image.new("RGB", (width, height * len(panels)), "white")
    last = max(line["step"] for line in lines)
    for number, (title, curves) in enumerate(panels):
        values = [y for curve in curves.values() for _, y in curve]
        low, high = (0.0, 1.0) if title == "recall" else (min(0.0, *values), max(values))
        box = (_LEFT, number * height + _TOP, width - _RIGHT, (number + 1) * height - _BOTTOM)
        _draw_panel(
            ImageDraw.Draw(image), box, curves, (last, low, high if high > low else low + 1)
        )
    file = io.BytesIO()
    image.save(file, "PNG")
    write_atomic(folder / "curves.png", file.getvalue())


def _names(lines: Sequence[Mapping[str, float]]) -> list[str]:
    return list(dict.fromkeys(name for line in lines for name in line))


def _collect(lines: Sequence[Mapping[str, float]], names: Sequence[str]) -> dict[str, Curve]:
    """The curves that have points; of long runs every so many lines."""
    curves: dict[str, Curve] = {}
    for name in names:
        points = [(line["step"], line[name]) for line in lines if name in line]
        if points:
            curves[name] = points[:: math.ceil(len(points) / _MOST_POINTS)]
    return curves


def _draw_panel(
    draw: ImageDraw.ImageDraw,
    box: tuple[int, int, int, int],
    curves: Mapping[str, Curve],
    scale: tuple[float, float, float],
) -> None:
    """Curves in a frame; `scale` is the last step, and the lowest and highest value."""
    left, top, right, bottom = box
    last, low, high = scale
    font = ImageFont.load_default(13)
    for quarter in range(5):
        x = left + (right - left) * quarter / 4
        y = bottom - (bottom - top) * quarter / 4
        draw.line([(left, y), (right, y)], fill="#dddddd")
        draw.text(
            (left - 6, y), f"{low + (high - low) * quarter / 4:.3g}", "black", font, anchor="rm"
        )
        draw.text((x, bottom + 6), f"{last * quarter / 4:.0f}", "black", font, anchor="ma")
    legend = float(left)
    for (name, curve), colour in zip(curves.items(), _COLOURS, strict=False):
        points = [
            (
                left + (right - left) * step / last,
                bottom - (bottom - top) * (value - low) / (high - low),
            )
            for step, value in curve
        ]
        draw.line(points, fill=colour, width=2)
        for x, y in points if len(points) < 30 else points[-1:]:
            draw.ellipse((x - 3, y - 3, x + 3, y + 3), fill=colour)
        draw.text((legend, top - 20), name, colour, font)
        legend += draw.textlength(name, font) + 20
