from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from clipserve.errors import DataError
from clipserve.images import ImageTransform, TrainTransform
from clipserve.shards import ShardSet
from clipserve.text import Tokenizer
from training.shards import PackOptions, pack
from training.streaming import Batch, Stream


@pytest.fixture
def shards(captioned: Any, tmp_path: Path) -> ShardSet:
    pack(captioned(23), tmp_path / "shards", PackOptions(samples_per_shard=7))
    return ShardSet.open(tmp_path / "shards")


def stream(shards: ShardSet, batch_size: int = 5, seed: int = 0, text_multiple: int = 8) -> Stream:
    return Stream(
        shards,
        TrainTransform(ImageTransform((32, 32)), (0.5, 1.0), (0.75, 1.33)),
        Tokenizer({"context_length": 16}),
        batch_size=batch_size,
        seed=seed,
        text_multiple=text_multiple,
    )


def batches(source: Stream, start: int, stop: int, workers: int = 0) -> list[Batch]:
    return list(source.batches(start, stop, workers))


def equal(one: Batch, other: Batch) -> bool:
    return (
        one.samples == other.samples
        and torch.equal(one.pixels, other.pixels)
        and torch.equal(one.ids, other.ids)
    )


def test_an_epoch_visits_no_sample_twice_and_orders_differ(shards: ShardSet) -> None:
    source = stream(shards)
    assert source.batches_per_epoch == 4
    epochs = [[i for b in batches(source, 4 * e, 4 * e + 4) for i in b.samples] for e in range(3)]
    for samples in epochs:
        assert len(set(samples)) == 20
    assert epochs[0] != epochs[1] != epochs[2]
    assert set().union(*epochs) == set(range(23))


def test_batches_do_not_depend_on_workers_or_on_where_one_starts(shards: ShardSet) -> None:
    alone = batches(stream(shards), 0, 9)
    assert all(map(equal, alone, batches(stream(shards), 0, 9, workers=2)))
    assert all(map(equal, alone[6:], batches(stream(shards), 6, 9, workers=1)))


def test_the_seed_decides_order_and_crops(shards: ShardSet) -> None:
    first, other = stream(shards, seed=0), stream(shards, seed=1)
    assert not np.array_equal(first.order(0), other.order(0))
    (a,), (b,) = batches(stream(shards, 23), 0, 1), batches(stream(shards, 23), 1, 2)
    sample = a.samples[0]
    assert not torch.equal(a.pixels[0], b.pixels[b.samples.index(sample)])  # another epoch's crop


def test_batches_hold_pictures_and_captions_that_belong_together(shards: ShardSet) -> None:
    tokenizer = Tokenizer({"context_length": 16})
    for batch in batches(stream(shards), 0, 4):
        assert batch.pixels.shape == (5, 3, 32, 32)
        assert batch.pixels.dtype == torch.uint8
        captions = [shards.read(i).captions[0] for i in batch.samples]
        width = batch.ids.shape[1]
        assert width % 8 == 0
        assert torch.equal(batch.ids, tokenizer(captions).ids[:, :width])


def test_uncut_texts_fill_the_context(shards: ShardSet) -> None:
    (batch,) = batches(stream(shards, text_multiple=0), 0, 1)
    assert batch.ids.shape == (5, 16)


def test_a_picture_that_broke_since_packing_is_reported_not_swallowed(
    shards: ShardSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = ShardSet.read

    def read(self: ShardSet, i: int) -> Any:
        sample = real(self, i)
        if i == 3:
            object.__setattr__(sample, "image", sample.image[:60])
        return sample

    monkeypatch.setattr(ShardSet, "read", read)
    (batch,) = batches(stream(shards, 23), 0, 1)
    assert len(batch.samples) == 22
    assert 3 not in batch.samples
    assert [(bad.kind, bad.key) for bad in batch.bad] == [("bad_image", shards.key(3)[1])]


def test_too_few_samples_say_which_batch_size_fits(shards: ShardSet) -> None:
    with pytest.raises(
        DataError, match=r"23 samples, fewer than data.batch_size 24; use 23 or less"
    ):
        stream(shards, 24)
