"""Split weights: the run of one process, and checkpoints that any number of ranks goes on from."""

import contextlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import forked
import pytest
import ranks
import torch
from small_runs import SMALL, losses, weights
from torch import Tensor, nn

import clipserve
from clipserve import checkpoint
from clipserve.config import load_config
from clipserve.errors import ConfigError
from training import fsdp, state_files
from training.data import open_data
from training.distributed import ALONE
from training.recipe import prepare
from training.run_directory import RunDirectory
from training.shards import PackOptions, pack

STEPS = 20
SPLIT = [
    "contrastive with positives, in tiles",
    "sigmoid in a ring",
    "momentum contrast of CLIP",
    "distillation",
    "CoCa",
]
MORE = [
    "data.last_batch=keep",
    "model.architecture.vision_cfg.patch_dropout=0",
    "optim.schedule=constant",
    "optim.grad_clip=0.5",
    "train.ema=0.9",
]
FSDP = "train.sharding=fsdp"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """33 pictures to train on, 9 to validate on."""
    from conftest import encode, make_picture

    folder = tmp_path_factory.mktemp("data")
    for name, count in (("train", 33), ("val", 9)):
        source = folder / f"{name}-source"
        source.mkdir()
        lines = ["image,caption"]
        for i in range(count):
            (source / f"{i}.png").write_bytes(encode(make_picture(seed=i)))
            lines.append(f"{i}.png,picture number {i}")
        (source / "captions.csv").write_text("\n".join(lines) + "\n")
        pack(source / "captions.csv", folder / name, PackOptions(samples_per_shard=5))
    return folder


def settings(data: Path, out: Path, *more: str) -> list[str]:
    length = [] if any(m.startswith("train.steps") for m in more) else [f"train.steps={STEPS}"]
    return [f"out={out}", f"data.train={data / 'train'}", *SMALL, *MORE, *length, *more]


def run(size: int, data: Path, out: Path, *more: str) -> None:
    for rank in forked.train(size, out.with_name(f"{out.name}-logs"), settings(data, out, *more)):
        assert rank.code == 0, rank.said


@pytest.fixture(scope="module")
def alone(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("alone") / "run"
    run(1, data, out, f"data.val={data / 'val'}")
    return out


@pytest.fixture(scope="module")
def begun(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten steps of two ranks with split weights."""
    out = tmp_path_factory.mktemp("begun") / "run"
    run(2, data, out, FSDP, "train.steps=10")
    return out


def check_same(out: Path, other: Path, steps: int = STEPS) -> None:
    """Losses of all steps, the averaged weights, and those that are trained."""
    found, expected = losses(out), losses(other)
    assert sorted(found) == sorted(expected) == list(range(1, steps + 1))
    assert all(found[step] == pytest.approx(expected[step], rel=1e-4) for step in found)
    for kind in (weights, trained):
        own, others = kind(out / "latest"), kind(other / "latest")
        assert own.keys() == others.keys()
        for name in own:
            assert (own[name] - others[name]).abs().max() <= 1e-5, (kind, name)


def trained(checkpoint: Path) -> dict[str, Tensor]:
    """The weights that the average follows, from whoever's parts they were written as."""
    return state_files.read(checkpoint / "state", "network", lambda name: None)


@pytest.mark.parametrize("sharding", ["none", "fsdp"])
def test_two_ranks_learn_the_weights_of_one(
    alone: Path, data: Path, tmp_path: Path, sharding: str
) -> None:
    out = tmp_path / "run"
    run(2, data, out, f"train.sharding={sharding}", f"data.val={data / 'val'}")
    check_same(out, alone)
    state = {path.name for path in (out / "latest" / "state").iterdir()}
    assert {"optimizer", "network"} <= state if sharding == "fsdp" else "optimizer" not in state
    vectors = clipserve.load(out / "latest", "cpu", "fp32").embed_texts(["a picture"])
    assert vectors.shape == (1, 16)


@pytest.mark.parametrize(
    "more",
    [
        ["optim.freeze=['image.*', 'text.transformer.resblocks.0.attn.*']"],
        ["optim.freeze=['*', '!*proj*', '!logit_scale']", "optim.unfreeze_after_steps=3"],
        ["train.grad_checkpointing=true"],
    ],
    ids=["frozen", "frozen for three steps", "layers computed twice"],
)
def test_two_ranks_with_split_weights_train_what_one_does(
    data: Path, tmp_path: Path, more: list[str]
) -> None:
    calm = "optim.eps=1e-4"  # else AdamW makes a step of what is but rounding, as of a key's bias
    for size in (1, 2):
        run(size, data, tmp_path / str(size), FSDP, "train.steps=6", calm, *more)
    check_same(tmp_path / "2", tmp_path / "1", 6)


@pytest.mark.parametrize(("size", "sharding"), [(1, "fsdp"), (3, "fsdp"), (2, "none")])
def test_a_split_checkpoint_goes_on_on_any_number_of_ranks(
    alone: Path, begun: Path, data: Path, tmp_path: Path, size: int, sharding: str
) -> None:
    shutil.copytree(begun, tmp_path / "run", symlinks=True)
    run(size, data, tmp_path / "run", f"train.sharding={sharding}")
    check_same(tmp_path / "run", alone)


def test_a_whole_checkpoint_goes_on_with_split_weights(
    alone: Path, data: Path, tmp_path: Path
) -> None:
    run(1, data, tmp_path / "run", "train.steps=10")
    run(2, data, tmp_path / "run", FSDP)
    check_same(tmp_path / "run", alone)


def test_a_damaged_part_is_refused_by_name(begun: Path, data: Path, tmp_path: Path) -> None:
    shutil.copytree(begun, tmp_path / "run", symlinks=True)
    part = next((tmp_path / "run" / "latest" / "state" / "optimizer").glob("*00002*"))
    content = bytearray(part.read_bytes())
    content[-1] ^= 1
    part.write_bytes(content)
    (ended,) = forked.train(1, tmp_path / "logs", settings(data, tmp_path / "run"))
    assert ended.code == 2
    assert re.search(rf"optimizer/{part.name} is damaged", ended.said)


def test_a_killed_rank_ends_the_other_and_the_run_goes_on_from_its_checkpoint(
    alone: Path, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    given = settings(data, out, FSDP, "train.checkpoint_every_steps=3")
    first, second = forked.train(2, tmp_path / "logs", given, kill=(1, 9))
    assert second.code == -9
    assert first.code == 1, first.said
    assert "another process of this run is gone" in first.said
    assert "split weights are saved by all processes together" in first.said
    assert f"the last one is {(out / 'latest').resolve()}" in first.said
    assert "Traceback" not in first.said
    assert (out / "latest").resolve().name == "step-000000006"
    run(2, data, out, FSDP)
    check_same(out, alone)


@contextlib.contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[None]:
    """A file system of its own under `folder`."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small file system cannot be mounted here")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.parametrize(
    ("size", "sharding"), [(1, "none"), pytest.param(2, "fsdp", marks=pytest.mark.slow)]
)
def test_a_full_disk_leaves_the_checkpoint_before_and_names_it(
    alone: Path, data: Path, tmp_path: Path, size: int, sharding: str
) -> None:
    with small_disk(tmp_path / "disk", 45):  # a checkpoint has 26
        out = tmp_path / "disk" / "run"
        given = [f"train.sharding={sharding}", "train.checkpoint_every_steps=3"]
        ended = forked.train(size, tmp_path / "logs", settings(data, out, *given))
        assert ended[0].code == 2, ended[0].said
        assert "checkpoint step-000000005 cannot be written: No space left" in ended[0].said
        assert f"{out / 'checkpoints' / 'step-000000003'} is whole" in ended[0].said
        assert all("Traceback" not in rank.said for rank in ended)
        checkpoint.verify(out / "latest")
        remount = ["mount", "-o", "remount,size=300m", str(tmp_path / "disk")]
        subprocess.run(remount, check=True)
        run(size, data, out, *given)
        check_same(out, alone)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, int], Any]:
    folder = tmp_path_factory.mktemp("ranks")
    subprocess.run(
        [sys.executable, ranks.__file__, str(folder), "split", *SPLIT],
        check=True,
        cwd=Path(ranks.__file__).parent.parent,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": "."},
        timeout=600,
    )
    return {(size, rows): torch.load(folder / f"{size}-{rows}.pt") for size, rows in ranks.RUNS}


@pytest.mark.parametrize(("size", "rows"), [run for run in ranks.RUNS if run[0] > 1])
@pytest.mark.parametrize("name", SPLIT)
@pytest.mark.parametrize("how", ["", ranks.IN_PARTS])
def test_gradients_of_split_weights_are_sums_over_the_ranks(
    found: dict[tuple[int, int], dict[str, dict[str, Tensor]]],
    name: str,
    how: str,
    size: int,
    rows: int,
) -> None:
    """Also where ranks have different numbers of micro-batches, one having no row at all."""
    one, many = found[1, rows][name], found[size, rows][name + how]
    assert one.keys() == many.keys()
    for key, expected in one.items():
        assert torch.allclose(many[key], expected, rtol=1e-4, atol=2e-6), key


def test_on_one_process_nothing_is_split_and_nothing_refused(data: Path, tmp_path: Path) -> None:
    given = settings(data, tmp_path / "run", FSDP, "train.compile=on", "optim.name=lion")
    config = load_config(None, given)
    prepared = prepare(config, open_data(config, RunDirectory(tmp_path / "run", 1)), ALONE)
    assert prepared.networks.forward is not prepared.networks.model  # it is compiled
    assert not prepared.state.is_split


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ("objectives=[{name='contrastive'}, {name='simclr'}]", "fsdp does not go with .* simclr"),
        ("optim.name=lion", "fsdp goes with optim.name = adamw, not lion"),
        ("train.compile=on", "fsdp does not go with train.compile = on"),
    ],
)
def test_what_does_not_go_with_split_weights_is_refused(more: str, words: str) -> None:
    given = ["out=a", "data.train=b", "train.steps=1", "model.preset=tiny", FSDP]
    with pytest.raises(ConfigError, match=words):
        fsdp.check(load_config(None, [*given, more]))


def test_adapters_do_not_go_with_split_weights() -> None:
    given = ["out=a", "data.train=b", "train.steps=1", "model.pretrained=c", "lora={rank=2}", FSDP]
    with pytest.raises(ConfigError, match=r"fsdp does not go with \[lora\]"):
        fsdp.check(load_config(None, given))


def test_clipping_alone_is_torchs_own() -> None:
    torch.manual_seed(0)
    one, other = nn.Linear(3, 2), nn.Linear(3, 2)
    for ours, theirs in zip(one.parameters(), other.parameters(), strict=True):
        ours.grad = torch.randn_like(ours)
        theirs.grad = ours.grad.clone()
    norm = fsdp.gradient_norm(one.parameters(), ALONE)
    fsdp.clip_gradients(one.parameters(), 0.1, norm)
    assert norm == torch.nn.utils.clip_grad_norm_(other.parameters(), 0.1)
    for ours, theirs in zip(one.parameters(), other.parameters(), strict=True):
        assert ours.grad is not None
        assert theirs.grad is not None
        assert torch.equal(ours.grad, theirs.grad)
