import csv
import json
import socket
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from rich.console import Console

from clipserve import demo, pictures
from clipserve.errors import ClipserveError, ConfigError


@pytest.fixture
def quiet() -> Console:
    return Console(quiet=True)


def rows(file: Path) -> list[dict[str, str]]:
    with file.open(encoding="utf-8") as handle:
        return list(csv.DictReader(handle))


def test_without_the_font_digits_take_its_place_and_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "find_emoji_font", lambda: None)
    demo._check_folder(tmp_path)
    assert demo._draw(tmp_path, Console(width=200)) == "digits"
    assert "fonts-noto-color-emoji" in capsys.readouterr().out
    train, val, everything = (rows(tmp_path / f"{n}.csv") for n in ("train", "val", "captions"))
    assert len(val) == 400
    assert len(train) + len(val) == len(everything) == 1797
    assert {r["image"] for r in train}.isdisjoint(r["image"] for r in val)
    assert len({row["caption"] for row in val}) == 10
    with Image.open(tmp_path / train[0]["image"]) as picture:
        assert picture.size == (64, 64)


@pytest.mark.skipif(pictures.find_emoji_font() is None, reason="no colour emoji font here")
def test_emoji_are_drawn_in_colour_once_each_and_split_by_name(
    tmp_path: Path, quiet: Console
) -> None:
    demo._check_folder(tmp_path)
    assert demo._draw(tmp_path, quiet) == "emoji"
    train, val = rows(tmp_path / "train.csv"), rows(tmp_path / "val.csv")
    assert len(val) == 400
    assert 3300 < len(train) < 3700
    captions = [row["caption"] for row in train + val]
    assert len(set(captions)) == len(captions)
    assert {"red heart", "grinning face"} <= set(captions)
    heart = next(row for row in train + val if row["caption"] == "red heart")
    with Image.open(tmp_path / heart["image"]) as picture:
        red, green, blue = picture.convert("RGB").resize((1, 1)).getpixel((0, 0))
    assert red > green + 40
    assert red > blue + 40
    before = (tmp_path / "val.csv").stat().st_mtime_ns
    demo._draw(tmp_path, quiet)  # drawn already
    assert (tmp_path / "val.csv").stat().st_mtime_ns == before


def test_the_summary_has_every_promised_field(tmp_path: Path) -> None:
    training = {"seconds": 100.0, "samples": 20_000, "device": "cpu"}
    versions = {"torch": "2"}
    (tmp_path / "clipserve.json").write_text(
        json.dumps({"training": training, "versions": versions})
    )
    ways = [f"{way}_r{k}" for way in ("t2i", "i2t", "mean") for k in (1, 5, 10)]
    scores: dict[str, Any] = {
        "retrieval": dict.fromkeys(ways, 0.5),
        "zeroshot": {"acc1": 0.25},
        "num_images": 400,
    }
    summary = demo._summarize("emoji", tmp_path, 110.0, scores)
    promised = "dataset train_seconds samples_per_second t2i_r1 t2i_r5 t2i_r10 i2t_r1 i2t_r10"
    assert set(promised.split()) <= set(summary)
    assert {"zero_shot_acc1", "num_val", "device", "versions"} <= set(summary)
    assert summary["samples_per_second"] == 200.0


def test_a_folder_with_something_else_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "holiday.jpg").write_text("precious")
    with pytest.raises(ConfigError, match="holds something else"):
        demo.run(tmp_path, stay=False, port=0)
    assert (tmp_path / "pictures" / "holiday.jpg").read_text() == "precious"


def test_a_taken_port_is_known_before_any_work(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port {port} is taken"):
            demo.run(tmp_path / "demo", stay=True, port=port)
    assert not (tmp_path / "demo").exists()


def test_a_step_that_fails_ends_the_demo(quiet: Console) -> None:
    with pytest.raises(ClipserveError, match="clipserve verify failed with exit code 2"):
        demo._clipserve(quiet, "verify", "nowhere")


@pytest.mark.slow
def test_the_whole_demo_runs_on_digits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "find_emoji_font", lambda: None)
    demo.run(tmp_path / "demo", stay=False, port=0)
    summary = json.loads((tmp_path / "demo" / "summary.json").read_text())
    assert summary["dataset"] == "digits"
    assert summary["zero_shot_acc1"] > 0.5  # of ten classes
    demo.run(tmp_path / "demo", stay=False, port=0)  # again: nothing is trained anew
