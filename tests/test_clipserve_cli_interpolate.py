import json
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from conftest import tiny_architecture
from shard_sites import Site

from clipserve import checkpoint
from clipserve.cli.interpolate import interpolate
from clipserve.errors import ConfigError
from clipserve.model import create
from clipserve.shards import ShardSet
from training.evaluate.report import evaluate
from training.shards import pack


@pytest.fixture
def tuned(tmp_path: Path) -> Path:
    torch.manual_seed(1)
    checkpoint.save(create(tiny_architecture()), tmp_path / "tuned", name="tuned")
    return tmp_path / "tuned"


def run(*words: object) -> None:
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(interpolate)
    app([str(word) for word in words], standalone_mode=False)


def test_a_sweep_prints_and_writes_the_recall_on_every_task(
    model_dir: Path,
    tuned: Path,
    captioned: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    pack(captioned(12, "a"), old)
    pack(captioned(9, "b"), new)
    file = tmp_path / "reports" / "sweep.json"
    capsys.readouterr()
    given = ["--sweep", "0,0.5,1", "--data", old, "--data", new, "--dtype", "fp32"]
    run(model_dir, tuned, *given, "--out", file)
    report = json.loads(file.read_text())
    assert [row["alpha"] for row in report["rows"]] == [0, 0.5, 1]
    for row, folder in ((report["rows"][0], model_dir), (report["rows"][2], tuned)):
        model = checkpoint.load(folder, device="cpu", dtype="fp32")
        for recall, shards in zip(row["recall"], (old, new), strict=True):
            expected = evaluate(model, ShardSet.open(shards), ["retrieval"], "caption", "none")
            assert recall == expected["retrieval"]
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split() == ["alpha", str(old), "R@1", str(old), "R@10"] + [
        word for rate in ("R@1", "R@10") for word in (str(new), rate)
    ]
    middle = report["rows"][1]["recall"]
    shown = [f"{middle[i][key]:.1%}" for i in (0, 1) for key in ("mean_r1", "mean_r10")]
    assert lines[1].split() == ["0.5", *shown]


def test_a_sweep_measures_on_shards_from_elsewhere_too(
    model_dir: Path, tuned: Path, captioned: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pack(captioned(4), tmp_path / "shards")
    capsys.readouterr()
    with Site.serving() as site:
        places = [str(tmp_path / "shards"), site.share(tmp_path / "shards")]
        secret = places[1].replace("http://", "http://me:secret@")
        run(model_dir, tuned, "--sweep", "0,1", "--data", places[0], "--data", secret)
    head, *rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert head[1::2] == [places[0], places[0], places[1], places[1]]
    assert all(row[1:3] == row[3:5] for row in rows)


def test_one_alpha_writes_a_model(
    model_dir: Path, tuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(model_dir, tuned, "--alpha", 0.5, "--out", tmp_path / "mixed")
    fingerprint = checkpoint.verify(tmp_path / "mixed")["fingerprint"]
    assert capsys.readouterr().out == f"model: {tmp_path / 'mixed'} ({fingerprint[:12]})\n"


def test_without_out_the_model_is_written_beside_the_second(
    model_dir: Path, tuned: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(model_dir, tuned, "--alpha", 0.5)
    out = tuned.with_name("tuned-alpha-0.5")
    assert capsys.readouterr().out.startswith(f"model: {out} (")
    assert checkpoint.verify(out)["training"]["alpha"] == 0.5
    with pytest.raises(ConfigError, match="is there already"):
        run(model_dir, tuned, "--alpha", 0.5)


def test_a_sweep_writes_over_nothing_and_without_out_no_file(
    model_dir: Path,
    tuned: Path,
    captioned: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pack(captioned(4), tmp_path / "shards")
    given = [model_dir, tuned, "--sweep", "0,1", "--data", tmp_path / "shards"]
    (tmp_path / "mine.json").write_text("mine")
    with pytest.raises(ConfigError, match="is there already"):
        run(*given, "--out", tmp_path / "mine.json")
    assert (tmp_path / "mine.json").read_text() == "mine"
    before = sorted(tmp_path.iterdir())
    capsys.readouterr()
    run(*given)
    assert len(capsys.readouterr().out.splitlines()) == 3
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([], "either --alpha"),
        (["--alpha", "0.5", "--sweep", "0,1"], "either --alpha"),
        (["--alpha", "0.5", "--data", "x"], "are for --sweep"),
        (["--alpha", "0.5", "--dtype", "fp32"], "are for --sweep"),
        (["--alpha", "0.5", "--device", "cpu"], "are for --sweep"),
        (["--sweep", "0,1"], "--sweep needs --data"),
        (["--sweep", "0,2", "--data", "x"], "numbers from 0 to 1"),
        (["--sweep", "half", "--data", "x"], "numbers from 0 to 1"),
    ],
)
def test_options_that_contradict_each_other_are_refused(
    model_dir: Path, tuned: Path, tmp_path: Path, given: list[str], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        run(model_dir, tuned, *given, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()
