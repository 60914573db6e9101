"""Evaluation by several ranks: the vectors and the numbers of one."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import forked
import numpy as np
import pytest
import torch
from albefs import CAPTIONS, tiny_albef
from conftest import encode, make_picture

from clipserve.shards import ShardSet
from clipserve.sources import SourceOptions
from training.distributed import ALONE, World
from training.evaluate import gallery, rerank
from training.evaluate.gallery import embed_shards
from training.evaluate.retrieval import evaluate_retrieval
from training.shards import PackOptions, pack

COUNT = 11


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Eleven pictures, of which one does not decode; every other one has two captions."""
    folder = tmp_path / "source"
    folder.mkdir()
    lines = ["image,caption"]
    for i in range(COUNT):
        (folder / f"{i}.png").write_bytes(encode(make_picture(seed=i)))
        words = [f"{CAPTIONS[i % 6]} {'cat ' * i}", f"{CAPTIONS[(i + 1) % 6]} {'dog ' * i}"]
        lines += [f"{i}.png,{text}" for text in words[: 1 + i % 2]]
    (folder / "captions.csv").write_text("\n".join(lines))
    pack(
        folder / "captions.csv",
        tmp_path / "shards",
        PackOptions(source=SourceOptions(group_by="image"), samples_per_shard=4),
    )
    return tmp_path / "shards"


def measure(world: World, shards: Path, folder: Path) -> None:
    """Batches of four pictures and three texts, pictures matched two at a time; one is bad."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = tiny_albef(folder / f"words-{world.rank}-{world.size}").eval()
    gallery._TEXT_BATCH, rerank._IMAGES_AT_A_TIME = 3, 2
    opened = ShardSet.open(shards)
    real = ShardSet.read

    def read(self: ShardSet, i: int) -> Any:
        sample = real(self, i)
        return replace(sample, image=b"none") if i == 5 else sample

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ShardSet, "read", read)
        found = embed_shards(model, opened, 4, world)
        scores = evaluate_retrieval(model, opened, gallery=found, rerank=3, world=world)
    torch.save((tuple(found), scores), folder / f"{world.rank}-of-{world.size}.pt")


@pytest.mark.parametrize("size", [2, 3, 4])
def test_ranks_find_the_vectors_and_the_scores_of_one(
    shards: Path, tmp_path: Path, size: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gallery, "_TEXT_BATCH", 3)
        patch.setattr(rerank, "_IMAGES_AT_A_TIME", 2)
        measure(ALONE, shards, tmp_path)
    expected, scores = torch.load(tmp_path / "0-of-1.pt", weights_only=False)
    assert len(expected[0]) == COUNT - 1
    forked.call(size, measure, shards, tmp_path)
    for rank in range(size):
        found, own = torch.load(tmp_path / f"{rank}-of-{size}.pt", weights_only=False)
        assert found[2] == expected[2]
        assert all(np.array_equal(found[i], expected[i]) for i in (0, 1, 3))
        assert own == (scores if rank == 0 else {})
    assert "reranked_mean_r1" in scores
