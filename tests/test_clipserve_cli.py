"""The commands as a user runs them: most in this process, a few, by `spawn`, in their own."""

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import test_clipserve_cli_index
from conftest import encode, make_picture
from shard_sites import Site
from test_clipserve_cli_index import Done, Run

from clipserve import cli
from clipserve.cli import models
from clipserve.errors import ConfigError

run = test_clipserve_cli_index.run
"""a fixture: run(*arguments) in this process"""


@pytest.fixture
def spawn(tmp_path: Path) -> Run:
    """spawn(*arguments) in a new process, as from a shell: seconds, where torch is needed."""

    def spawn_it(*arguments: object) -> Done:
        command = [sys.executable, "-W", "error", "-m", "clipserve", *map(str, arguments)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=tmp_path, timeout=120, env=environment
        )
        return Done(done.returncode, done.stdout, done.stderr)

    return spawn_it


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train", "--unknown"], "No such option: --unknown; see: .*train --help"),
        (["bogus"], "No such command 'bogus'; see: .* --help"),
        (["search"], "Missing argument 'COLLECTION'; see: .*search --help"),
        (["index", "build", "x", "--memory", "abc"], "Invalid value for '--memory'.*--help"),
        (["classify", "--dtype"], "Option '--dtype' requires an argument"),
    ],
)
def test_what_the_parser_refuses_is_one_line_as_well(
    run: Run, arguments: list[str], said: str
) -> None:
    done = run(*arguments)
    assert (done.code, done.out) == (2, "")
    assert re.fullmatch(f"clipserve: {said}\n", done.err)


def test_a_command_that_needs_more_words_says_which(run: Run) -> None:
    done = run("index")
    assert done.code == 2
    assert "Usage: " in done.err
    assert "compact" in done.err


def test_the_main_job_from_csv_to_answers(
    run: Run, spawn: Run, captioned: Any, model_dir: Path
) -> None:
    table = captioned(6)
    packed = run("pack", table, "shards")
    assert packed.code == 0, packed.err
    assert "packed 6 in shards; 0 bad" in packed.out
    assert "6 samples, 0 bad" in run("verify", "shards").out
    embedded = run("embed", model_dir, "shards", "--collection", "items", "--json")
    assert embedded.json["added"] == 6
    again = run("embed", model_dir, "shards", "--collection", "items", "--json")
    report = again.json
    assert (report["added"], report["skipped"], report["bad"]) == (0, 6, [])
    built = run("index", "build", "items", "--json")
    assert built.json["kind"] == "exact"
    info = run("index", "info", "items", "--json").json
    assert (info["items"], info["embed_dim"]) == (6, 16)
    picture = table.parent / "4.png"
    search = ("search", "items", "--model", model_dir, "--image", picture, "-k", 2, "--json")
    hits = run(*search).json
    assert spawn(*search).json == hits  # of what is on disk
    assert hits[0]["caption"] == "picture number 4"
    assert hits[0]["score"] == pytest.approx(1.0, abs=1e-3)
    words = run("search", "items", "a picture", "--model", model_dir, "-k", 3)
    assert len(words.out.splitlines()) == 3
    classified = run("classify", model_dir, picture, "--labels", "red, blue,green", "--json")
    (answer,) = classified.json
    assert {entry["label"] for entry in answer["classes"]} == {"red", "blue", "green"}
    assert sum(entry["p"] for entry in answer["classes"]) == pytest.approx(1.0)


def test_pack_lists_bad_rows_and_ends_by_their_fraction(run: Run, captioned: Any) -> None:
    table = captioned(9)
    with table.open("a") as file:
        file.write("nowhere.png,lost,\n")
    within = run("pack", table, "a", "--max-bad-fraction", 0.1)
    assert within.code == 0
    assert "bad: captions.csv row 11: missing_image: " in within.out
    beyond = run("pack", table, "b", "--max-bad-fraction", 0.05)
    assert beyond.code == 1
    assert "10.0% of the samples are bad" in beyond.err
    assert "9 samples, 0 bad" in run("verify", "b").out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["pack", "no.csv", "out"], "no.csv does not exist"),
        (["train", "out=x", "data.trian=y", "train.epochs=1"], "did you mean 'train'"),
        (["train", "no.toml"], "no.toml does not exist"),
        (["classify", "nowhere", "x.png", "--labels", "a"], "x.png does not exist"),
        (["search", "nowhere", "words"], "--model MODEL is required"),
        (["search", "nowhere", "words", "--model", "m"], "nowhere"),
        (["index", "info", "nowhere"], "nowhere"),
        (["pack", "t.csv", "t.csv/sub"], "t.csv"),
        (["train", "runs/lr=3/c.toml"], "runs/lr=3/c.toml does not exist"),
        (["pack", "--nonsense"], "--nonsense"),
    ],
)
def test_a_users_mistake_is_one_line_and_code_two(
    run: Run, arguments: list[str], words: str, tmp_path: Path
) -> None:
    (tmp_path / "t.csv").write_text("image,caption\n")
    check_mistake(run(*arguments), words)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["train", "out=x", "data.train=nowhere", "train.epochs=1"],
            "source nowhere does not exist",
        ),
        (["demo", "--out", "."], "holds something else"),
        (["serve", "nowhere", "--port", "0"], "nowhere is not a model directory"),
        (["serve", "x", "--dtype", "int4"], "dtype 'int4': input should be 'auto', 'fp32'"),
        (["frobnicate"], "frobnicate"),
    ],
)
def test_a_mistake_in_a_process_of_its_own(
    spawn: Run, arguments: list[str], words: str, tmp_path: Path
) -> None:
    (tmp_path / "t.csv").write_text("image,caption\n")
    check_mistake(spawn(*arguments), words)


def test_a_device_to_serve_on_that_is_not_here_is_one_line(spawn: Run, model_dir: Path) -> None:
    done = spawn("serve", model_dir, "--port", "0", "--device", "cuda:99")
    check_mistake(done, "device 'cuda:99'")


def check_mistake(done: Done, words: str) -> None:
    assert done.code == 2
    if "Usage" not in done.err:  # the parser shows how it is used, in a few lines
        assert done.err.count("\n") == 1
    assert words in done.err
    assert "Traceback" not in done.err
    assert done.out == ""


def test_an_interrupt_is_one_line_and_code_130(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "t.csv")
    start = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from clipserve.cli import main; main()"
    )  # a shell may have started us with it ignored
    process = subprocess.Popen(
        [sys.executable, "-c", start, "pack", "t.csv", "out"],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
    )
    with (tmp_path / "t.csv").open("w"):  # waits until it is being read
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=120)
    assert (process.returncode, error) == (130, "clipserve: interrupted\n")


def test_columns_of_a_csv_are_filtered_as_the_numbers_they_are_named(
    run: Run, captioned: Any, model_dir: Path
) -> None:
    table = captioned(4)
    header, *lines = table.read_text().splitlines()
    priced = [f"{header},price", *(f"{line},{10 * i}" for i, line in enumerate(lines))]
    table.write_text("\n".join(priced) + "\n")
    embed = ("embed", model_dir, table, "--collection", "items")
    search = ("search", "items", "--like", "captions/000000000")
    cheap = (*search, "--filter", '{"price": {"lt": 25}}', "--json")
    assert run(*embed).code == 0
    refused = run(*cheap)
    check_mistake(refused, "'price' with the number 25, but no item has a number there")
    assert "embed again with --overwrite --number-columns price" in refused.err
    assert run(*embed, "--overwrite", "--number-columns", "price").code == 0
    assert sorted(run(*cheap).ids()) == ["captions/000000001", "captions/000000002"]
    assert [hit["metadata"]["price"] for hit in run(*cheap).json] in ([10, 20], [20, 10])
    assert run("pack", table, "shards", "--number-columns", "price").code == 0
    run("embed", model_dir, "shards", "--collection", "packed")
    of_shards = run("search", "packed", "--like", "000000/000000000", *cheap[-3:])
    assert sorted(hit["metadata"]["price"] for hit in of_shards.json) == [10, 20]
    check_mistake(run(*embed, "--number-columns", "prise"), "did you mean 'price'?")


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
    assert run("embed", model_dir, captioned(2), "--collection", "items").code == 0
    for command in (
        ("search", "items", "words", "--model", "other"),
        ("embed", "other", tmp_path / "source" / "captions.csv", "--collection", "items"),
    ):
        refused = run(*command)
        assert refused.code == 2
        assert mine[:12] in refused.err
        assert other[:12] in refused.err


def test_a_bad_picture_is_named(run: Run, model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encode(make_picture())[:80])
    done = run("classify", model_dir, "a.png", "--labels", "x,y")
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert "a.png: damaged or truncated PNG" in done.err


def test_verify_finds_a_damaged_model(run: Run, model_dir: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(model_dir, tmp_path / "model"))
    assert run("verify", copy).code == 0
    weights = copy / "open_clip_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-5] ^= 16
    weights.write_bytes(data)
    damaged = run("verify", copy)
    assert damaged.code == 1
    assert "open_clip_model.safetensors is damaged" in damaged.err


def test_runs_are_listed_as_a_table_and_as_json(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "mine"
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text('[train]\nbest_metric = "val/mean_r1"\n')
    (folder / "metrics.jsonl").write_text(
        '{"step": 7, "loss": 1.25}\n{"step": 7, "val/mean_r1": 0.5}\n'
    )
    (folder / "run.json").write_text('{"state": "stopped", "total_steps": 9, "reason": "SIGTERM"}')
    head, row, why = run("runs", tmp_path / "runs").out.splitlines()
    assert head.split()[:5] == ["run", "state", "step", "of", "loss"]
    assert row.split()[1:8] == ["stopped", "7", "9", "1.2500", "val/mean_r1", "50.0%", "7"]
    assert why.endswith("mine stopped: SIGTERM")
    (found,) = run("runs", tmp_path / "runs", "--json").json
    assert (found["best"], found["best_step"], found["samples_per_second"]) == (0.5, 7, None)
    assert run("runs", tmp_path / "none").code == 2


def test_doctor_and_help_config_answer(run: Run) -> None:
    facts = run("doctor", "--json").json
    assert facts["cpus"] >= 1
    assert facts["findings"]
    assert "optim.warmup_steps" in run("train", "--help-config").out


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("top_level.txt", "other\ntraining\n"),
        ("RECORD", "a.py,sha256=x,1\ntraining/loop.py,sha256=x,1\n"),
        ("RECORD", "training.py,sha256=x,1\r\n"),
    ],
)
def test_another_owner_of_our_package_names_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, content: str
) -> None:
    install("somebody-else", file, content, tmp_path, monkeypatch)
    with pytest.raises(ConfigError, match=r"somebody-else also installs a module named 'training'"):
        cli._check_ownership()


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("top_level.txt", "trainings\nmy_index\n"),
        ("RECORD", "other/service/app.py,sha256=x,1\nindex/page.html,sha256=x,1\nindex.pyi,,\n"),
    ],
)
def test_names_that_only_look_like_our_packages_are_nobodys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, content: str
) -> None:
    install("somebody-else", file, content, tmp_path, monkeypatch)
    cli._check_ownership()


def install(
    name: str, file: str, content: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What importlib.metadata takes for a distribution, with one list of what it installed."""
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / file).write_text(content, newline="")
    monkeypatch.syspath_prepend(str(folder))


def test_labels_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "labels.txt").write_text("a cat\n\n dog, wild \n")
    assert models._read_labels(f"@{tmp_path / 'labels.txt'}") == ["a cat", "dog, wild"]
    assert models._read_labels("a, b,,c") == ["a", "b", "c"]
    with pytest.raises(ConfigError, match="none"):
        models._read_labels("@none")


def test_an_albef_checkpoint_goes_in_and_out(run: Run, tmp_path: Path) -> None:
    from test_clipserve_convert import SMALL, assert_same, bert_folder, published, read_back, write

    tensors = published()
    file = write(tensors, tmp_path / "ALBEF.pth")
    refused = run("import", file, tmp_path / "model")
    assert refused.code == 2
    assert "name the folder of a local bert-base-uncased" in refused.err
    assert len(refused.err.splitlines()) == 1
    words = bert_folder(tmp_path / "bert", SMALL.vocab)
    done = run("import", file, tmp_path / "model", "--tokenizer", words)
    assert done.code == 0, done.err
    refused = run("export", tmp_path / "model", tmp_path / "again.pth")
    assert refused.code == 2
    written = run("export", tmp_path / "model", tmp_path / "again.pth", "--to", "albef")
    assert written.code == 0, written.err
    assert written.out.splitlines()[0].startswith("least cosine: pictures 1.0")
    assert_same(read_back(tmp_path / "again.pth"), tensors)
    refused = run("export", tmp_path / "model", tmp_path / "x", "--to", "gguf")
    assert refused.code == 2
    assert "'gguf' is not one of albef, open_clip, transformers, onnx" in refused.err


@pytest.mark.parametrize(
    "form", ["open_clip", "transformers", pytest.param("onnx", marks=pytest.mark.slow)]
)
def test_a_model_goes_out_with_its_proof_and_comes_in_again(
    form: str, run: Run, model_dir: Path, tmp_path: Path
) -> None:
    done = run("export", model_dir, tmp_path / "theirs", "--to", form)
    assert done.code == 0, done.err
    *notes, proof, written = done.out.splitlines()
    assert all(note.startswith("otherwise there: ") for note in notes)
    assert len(notes) == {"open_clip": 1, "transformers": 3, "onnx": 1}[form]
    assert re.fullmatch(r"least cosine: pictures [01]\.\d+, texts [01]\.\d+", proof)
    assert written == f"written: {tmp_path / 'theirs'}"
    again = run("export", model_dir, tmp_path / "theirs", "--to", form)
    assert (again.code, len(again.err.splitlines())) == (2, 1)
    if form == "onnx":
        return
    back = run("import", tmp_path / "theirs", tmp_path / "back", "--context-length", 24)
    assert back.code == 0, back.err
    note, model = back.out.splitlines()
    assert note == "text positions 16 -> 24: stretched, linearly"
    assert model.startswith(f"model: {tmp_path / 'back'} (")
    refused = run("import", tmp_path / "nowhere", tmp_path / "x")
    assert refused.code == 2
    assert "hf-hub:OWNER/NAME" in refused.err


def test_a_clip_is_not_written_as_an_albef(run: Run, model_dir: Path, tmp_path: Path) -> None:
    refused = run("export", model_dir, tmp_path / "x", "--to", "albef")
    assert refused.code == 2
    assert "--to open_clip, transformers or onnx" in refused.err


def test_a_model_is_measured_on_shards_from_elsewhere_too(
    run: Run, model_dir: Path, captioned: Any, tmp_path: Path
) -> None:
    run("pack", captioned(4), tmp_path / "shards")
    here = run("evaluate", model_dir, "--data", tmp_path / "shards")
    with Site.serving() as site:
        there = run("evaluate", model_dir, "--data", site.share(tmp_path / "shards"))
    assert there.code == 0, there.err
    assert there.json["retrieval"] == here.json["retrieval"]


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
        assert refused.code == 2
        assert reason in refused.err
        assert len(refused.err.splitlines()) == 1
