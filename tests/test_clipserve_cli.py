"""The commands as a user runs them, in processes of their own."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import encode, make_picture

from clipserve import cli
from clipserve.errors import ConfigError

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    def run_it(*arguments: object) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-W", "error", "-m", "clipserve", *map(str, arguments)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        return subprocess.run(
            command, capture_output=True, text=True, cwd=tmp_path, timeout=120, env=environment
        )

    return run_it


def test_the_main_job_from_csv_to_answers(
    run: Run, captioned: Any, model_dir: Path, tmp_path: Path
) -> None:
    table = captioned(6)
    packed = run("pack", table, "shards")
    assert packed.returncode == 0, packed.stderr
    assert "packed 6 in shards; 0 bad" in packed.stdout
    assert "6 samples, 0 bad" in run("verify", "shards").stdout
    embedded = run("embed", model_dir, "shards", "--collection", "items", "--json")
    assert json.loads(embedded.stdout)["added"] == 6
    again = run("embed", model_dir, "shards", "--collection", "items", "--json")
    assert json.loads(again.stdout) == {"added": 0, "skipped": 6, "bad": []}
    built = run("index", "build", "items", "--json")
    assert json.loads(built.stdout)["kind"] == "exact"
    info = json.loads(run("index", "info", "items", "--json").stdout)
    assert (info["items"], info["embed_dim"]) == (6, 16)
    picture = table.parent / "4.png"
    search = ("search", "items", "--model", model_dir, "--image", picture, "-k", 2, "--json")
    hits = json.loads(run(*search).stdout)
    assert hits[0]["caption"] == "picture number 4"
    assert hits[0]["score"] == pytest.approx(1.0, abs=1e-3)
    words = run("search", "items", "a picture", "--model", model_dir, "-k", 3)
    assert len(words.stdout.splitlines()) == 3
    classified = run("classify", model_dir, picture, "--labels", "red, blue,green", "--json")
    (answer,) = json.loads(classified.stdout)
    assert {entry["label"] for entry in answer["classes"]} == {"red", "blue", "green"}
    assert sum(entry["p"] for entry in answer["classes"]) == pytest.approx(1.0)


def test_pack_lists_bad_rows_and_ends_by_their_fraction(
    run: Run, captioned: Any, tmp_path: Path
) -> None:
    table = captioned(9)
    with table.open("a") as file:
        file.write("nowhere.png,lost,\n")
    within = run("pack", table, "a", "--max-bad-fraction", 0.1)
    assert within.returncode == 0
    assert "bad: captions.csv row 11: missing_image: " in within.stdout
    beyond = run("pack", table, "b", "--max-bad-fraction", 0.05)
    assert beyond.returncode == 1
    assert "10.0% of the samples are bad" in beyond.stderr
    assert "9 samples, 0 bad" in run("verify", "b").stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["pack", "no.csv", "out"], "no.csv does not exist"),
        (
            ["train", "out=x", "data.train=nowhere", "train.epochs=1"],
            "source nowhere does not exist",
        ),
        (["train", "out=x", "data.trian=y", "train.epochs=1"], "did you mean 'train'"),
        (["train", "no.toml"], "no.toml does not exist"),
        (["classify", "nowhere", "x.png", "--labels", "a"], "x.png does not exist"),
        (["search", "nowhere", "words"], "--model MODEL is required"),
        (["search", "nowhere", "words", "--model", "m"], "nowhere"),
        (["serve", "nowhere"], "nowhere"),
        (["index", "info", "nowhere"], "nowhere"),
        (["pack", "t.csv", "t.csv/sub"], "t.csv"),
        (["train", "runs/lr=3/c.toml"], "runs/lr=3/c.toml does not exist"),
        (["demo", "--out", "."], "holds something else"),
        (["frobnicate"], "frobnicate"),
        (["pack", "--nonsense"], "--nonsense"),
    ],
)
def test_a_users_mistake_is_one_line_and_code_two(
    run: Run, arguments: list[str], words: str, tmp_path: Path
) -> None:
    (tmp_path / "t.csv").write_text("image,caption\n")
    done = run(*arguments)
    assert done.returncode == 2
    if "Usage" not in done.stderr:  # the parser shows how it is used, in a few lines
        assert done.stderr.count("\n") == 1
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_a_collection_of_another_model_is_refused_before_loading(
    run: Run, captioned: Any, model_dir: Path, tmp_path: Path
) -> None:
    import torch

    from clipserve import checkpoint
    from clipserve.model import create

    torch.manual_seed(1)
    architecture = checkpoint.read_description(model_dir)["architecture"]
    other = checkpoint.save(create(architecture), tmp_path / "other", name="other")
    mine = checkpoint.read_description(model_dir)["fingerprint"]
    assert run("embed", model_dir, captioned(2), "--collection", "items").returncode == 0
    for command in (
        ("search", "items", "words", "--model", "other"),
        ("embed", "other", tmp_path / "source" / "captions.csv", "--collection", "items"),
    ):
        refused = run(*command)
        assert refused.returncode == 2
        assert mine[:12] in refused.stderr
        assert other[:12] in refused.stderr


def test_a_bad_picture_is_named(run: Run, model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encode(make_picture())[:80])
    done = run("classify", model_dir, "a.png", "--labels", "x,y")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "a.png: damaged or truncated PNG" in done.stderr


def test_verify_finds_a_damaged_model(run: Run, model_dir: Path, tmp_path: Path) -> None:
    import shutil

    copy = Path(shutil.copytree(model_dir, tmp_path / "model"))
    assert run("verify", copy).returncode == 0
    weights = copy / "open_clip_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-5] ^= 16
    weights.write_bytes(data)
    damaged = run("verify", copy)
    assert damaged.returncode == 1
    assert "open_clip_model.safetensors is damaged" in damaged.stderr


def test_doctor_and_help_config_answer(run: Run) -> None:
    facts = json.loads(run("doctor", "--json").stdout)
    assert facts["cpus"] >= 1
    assert facts["findings"]
    assert "optim.warmup_steps" in run("train", "--help-config").stdout


def test_another_owner_of_our_package_names_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.metadata

    owners = {"training": ["clipserve", "somebody-else"], "index": ["clipserve"]}
    monkeypatch.setattr(importlib.metadata, "packages_distributions", lambda: owners)
    with pytest.raises(ConfigError, match=r"somebody-else also installs a module named 'training'"):
        cli._check_ownership()


def test_labels_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "labels.txt").write_text("a cat\n\n dog, wild \n")
    assert cli._read_labels(f"@{tmp_path / 'labels.txt'}") == ["a cat", "dog, wild"]
    assert cli._read_labels("a, b,,c") == ["a", "b", "c"]
    with pytest.raises(ConfigError, match="none"):
        cli._read_labels("@none")


def test_an_albef_checkpoint_goes_in_and_out(run: Run, tmp_path: Path) -> None:
    from test_clipserve_convert import SMALL, assert_same, bert_folder, published, read_back, write

    tensors = published()
    file = write(tensors, tmp_path / "ALBEF.pth")
    refused = run("import", file, tmp_path / "model")
    assert refused.returncode == 2
    assert "name the folder of a local bert-base-uncased" in refused.stderr
    assert len(refused.stderr.splitlines()) == 1
    words = bert_folder(tmp_path / "bert", SMALL.vocab)
    done = run("import", file, tmp_path / "model", "--tokenizer", words)
    assert done.returncode == 0, done.stderr
    assert run("export", tmp_path / "model", tmp_path / "again.pth").returncode == 0
    assert_same(read_back(tmp_path / "again.pth"), tensors)
    refused = run("export", tmp_path / "model", tmp_path / "x", "--to", "onnx")
    assert refused.returncode == 2
    assert "'onnx'" in refused.stderr


def test_reranking_that_cannot_be_meant_is_refused(
    run: Run, model_dir: Path, captioned: Any, tmp_path: Path
) -> None:
    run("pack", captioned(2), tmp_path / "shards")
    for options, reason in (
        (["--rerank", 5], "no fusion layers"),
        (["--rerank-score", "matching+cosine"], "needs --rerank"),
        (["--rerank", 5, "--rerank-score", "best"], "'best' is not one of matching, "),
        (["--rerank", 5, "--tasks", "zeroshot"], "add it to --tasks"),
    ):
        refused = run("evaluate", model_dir, "--data", tmp_path / "shards", *options)
        assert refused.returncode == 2
        assert reason in refused.stderr
        assert len(refused.stderr.splitlines()) == 1
