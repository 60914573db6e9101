import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from training.curves import draw_curves

BLUE = (0x1F, 0x77, 0xB4)


def draw(folder: Path, lines: list[dict[str, Any]]) -> np.ndarray:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    draw_curves(folder)
    return np.asarray(Image.open(folder / "curves.png"))


def heights(pixels: np.ndarray, colour: tuple[int, int, int]) -> tuple[float, float]:
    """Mean row of a curve's colour in the left and the right half, below the legend."""
    rows, columns = np.nonzero((pixels[34:] == colour).all(axis=2))
    half = pixels.shape[1] / 2
    return float(rows[columns < half].mean()), float(rows[columns > half].mean())


def test_a_falling_loss_is_drawn_falling(tmp_path: Path) -> None:
    lines = [{"step": step, "loss": 5 - step / 20} for step in range(1, 100)]
    pixels = draw(tmp_path, lines)
    left, right = heights(pixels, BLUE)
    assert right > left + 50  # downwards
    assert pixels.shape == (400, 1000, 3)


def test_recalls_have_a_panel_of_their_own(tmp_path: Path) -> None:
    lines: list[dict[str, Any]] = [{"step": step, "loss": 1.0} for step in range(1, 100)]
    lines += [{"step": step, "val/i2t_r10": step / 100} for step in (10, 50, 99)]
    pixels = draw(tmp_path, lines)
    assert pixels.shape == (800, 1000, 3)
    left, right = heights(pixels[400:], BLUE)
    assert right < left - 50


def test_of_a_very_long_run_not_every_point_is_drawn_but_all_of_its_course(tmp_path: Path) -> None:
    lines = [{"step": step, "loss": float(step > 25_000)} for step in range(1, 50_001)]
    left, right = heights(draw(tmp_path, lines), BLUE)
    assert left - right > 200


def test_a_run_with_nothing_to_show_has_no_picture(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("")
    draw_curves(tmp_path)
    assert not (tmp_path / "curves.png").exists()
