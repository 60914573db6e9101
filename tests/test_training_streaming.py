import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from clipserve.errors import DataError, SampleError
from clipserve.images import ImageTransform, TrainTransform
from clipserve.shards import Sample, ShardSet
from clipserve.text import Tokenizer
from training.distributed import ALONE, World
from training.mixture import Mixture, WeightedShards
from training.order import OrderSettings, Position
from training.shards import PackOptions, pack
from training.streaming import Batch, SampleSettings, Stream, _draw_caption

TRANSFORM = TrainTransform(ImageTransform((32, 32)), (0.5, 1.0), (0.75, 1.33))


@pytest.fixture
def shards(captioned: Any, tmp_path: Path) -> ShardSet:
    pack(captioned(23), tmp_path / "shards", PackOptions(samples_per_shard=7))
    return ShardSet.open(tmp_path / "shards")


def stream(
    *sets: ShardSet,
    batch_size: int = 5,
    text_multiple: int = 8,
    world: World = ALONE,
    **order: Any,
) -> Stream:
    return Stream(
        Mixture([WeightedShards(s) for s in sets]),
        SampleSettings(TRANSFORM),
        Tokenizer({"context_length": 16}),
        OrderSettings(batch_size, **order),
        text_multiple=text_multiple,
        world=world,
    )


def batches(source: Stream, count: int, workers: int = 0, start: Any = None) -> list[Batch]:
    return list(source.batches(start or Position(), count, workers))


def equal(one: Batch, other: Batch) -> bool:
    return (
        one.samples == other.samples
        and torch.equal(one.pixels, other.pixels)
        and torch.equal(one.ids, other.ids)
    )


def test_batches_do_not_depend_on_workers_or_on_where_one_starts(shards: ShardSet) -> None:
    alone = batches(stream(shards), 9)
    assert all(map(equal, alone, batches(stream(shards), 9, workers=2)))
    middle = Position(epoch=1, consumed=10)  # four batches an epoch
    assert all(map(equal, alone[6:], batches(stream(shards), 3, workers=1, start=middle)))


def test_ranks_take_stripes_of_the_same_batches(shards: ShardSet) -> None:
    order = {"batch_size": 7, "last_batch": "keep"}
    whole = batches(stream(shards, **order), 4)
    parts = [batches(stream(shards, world=World(rank, 3), **order), 4) for rank in range(3)]
    for b, batch in enumerate(whole):
        stripes = [part[b] for part in parts]
        assert sum((stripe.samples for stripe in stripes), []) == batch.samples
        assert torch.equal(torch.cat([stripe.pixels for stripe in stripes]), batch.pixels)
    assert [len(batch.samples) for batch in whole] == [7, 7, 7, 2]
    assert sorted(len(part[3].samples) for part in parts) == [0, 1, 1]  # an empty stripe is a batch


def test_the_seed_decides_order_and_crops(shards: ShardSet) -> None:
    (one,), (other,) = batches(stream(shards, seed=0), 1), batches(stream(shards, seed=1), 1)
    assert one.samples != other.samples
    a, b = batches(stream(shards, batch_size=23), 2)
    sample = a.samples[0]
    assert not torch.equal(a.pixels[0], b.pixels[b.samples.index(sample)])  # another epoch's crop


def test_batches_hold_pictures_and_captions_that_belong_together(shards: ShardSet) -> None:
    tokenizer = Tokenizer({"context_length": 16})
    for batch in batches(stream(shards), 4):
        assert batch.pixels.shape == (5, 3, 32, 32)
        assert batch.pixels.dtype == torch.uint8
        captions = [shards.read(i).captions[0] for i in batch.samples]
        width = batch.ids.shape[1]
        assert width % 8 == 0
        assert torch.equal(batch.ids, tokenizer(captions).ids[:, :width])


def test_uncut_texts_fill_the_context(shards: ShardSet) -> None:
    (batch,) = batches(stream(shards, text_multiple=0), 1)
    assert batch.ids.shape == (5, 16)


def test_sets_are_mixed_and_numbered_through(
    shards: ShardSet, captioned: Any, tmp_path: Path
) -> None:
    pack(captioned(8, "other"), tmp_path / "second")
    second = ShardSet.open(tmp_path / "second")
    source = stream(shards, second, batch_size=31)
    (batch,) = batches(source, 1)
    assert sorted(batch.samples) == list(range(31))
    for i in (0, 22, 23, 30):
        own, number = (shards, i) if i < 23 else (second, i - 23)
        sample = own.read(number)
        assert source.data.read(i) == sample
        assert source.data.key(i) == (f"{own.location}/{sample.shard}", sample.key)
    lengths = [len(source.data.read(i).captions[0]) for i in (0, 30)]
    assert source.data.text_bytes(np.array([0, 30])).tolist() == lengths
    assert source.data.shards_of(np.array([0, 7, 22, 23])).tolist() == [0, 1, 3, 4]


def test_a_set_that_gives_nothing_is_refused(shards: ShardSet) -> None:
    with pytest.raises(DataError, match=r"23 samples, which with weight 0\.01 gives none"):
        Mixture([WeightedShards(shards, 0.01)])


def test_a_picture_that_broke_since_packing_is_reported_not_swallowed(
    shards: ShardSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = ShardSet.read

    def read(self: ShardSet, i: int) -> Any:
        if i == 5:
            raise SampleError("shard 0.tar: sample 5 changed", "changed")
        sample = real(self, i)
        if i == 3:
            object.__setattr__(sample, "image", sample.image[:60])
        return sample

    monkeypatch.setattr(ShardSet, "read", read)
    (batch,) = batches(stream(shards, batch_size=23), 1)
    assert len(batch.samples) == len(batch.pixels) == len(batch.ids) == 21
    assert {3, 5}.isdisjoint(batch.samples)
    found = {(bad.kind, bad.key) for bad in batch.bad}
    assert found == {("bad_image", shards.key(3)[1]), ("changed", shards.key(5)[1])}


def test_bytes_that_changed_since_the_manifest_are_noticed(
    shards: ShardSet, tmp_path: Path
) -> None:
    file = tmp_path / "shards" / "000001.tar"
    data = bytearray(file.read_bytes())
    place = data.index(b"IDAT") + 9
    data[place] ^= 1  # size and time may stay; the picture might even decode
    file.write_bytes(data)
    (batch,) = batches(stream(shards, batch_size=23), 1)
    assert [(bad.kind, bad.shard) for bad in batch.bad] == [("changed", "000001.tar")]
    assert len(batch.samples) == 22


def test_a_missing_shard_stops_the_stream(shards: ShardSet, tmp_path: Path) -> None:
    (tmp_path / "shards" / "000002.tar").unlink()
    for workers in (0, 1):
        with pytest.raises(DataError, match=r"000002\.tar"):
            batches(stream(shards, batch_size=23), 1, workers)


def test_a_killed_worker_is_one_clear_error(shards: ShardSet) -> None:
    before = set(multiprocessing.active_children())
    source = stream(shards).batches(Position(), 1000, workers=1)
    next(source)
    (worker,) = set(multiprocessing.active_children()) - before
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(DataError, match=r"worker was killed.*data\.workers"):
        list(source)


def test_too_few_samples_say_which_batch_size_fits(shards: ShardSet) -> None:
    with pytest.raises(DataError, match=r"23 samples an epoch, fewer than .* 24; use 23 or less"):
        stream(shards, batch_size=24)
    (batch,) = batches(stream(shards, batch_size=24, last_batch="keep"), 1)
    assert len(batch.samples) == 23


def test_captions_are_drawn_by_their_weights() -> None:
    metadata = {"title": "a title", "long": ["one", " two "], "empty": "", "number": 3}
    sample = Sample("s", "k", b"", ("packed",), metadata)
    random = np.random.default_rng(0)

    def share(fields: dict[str, float] | None) -> dict[str, float]:
        drawn = [_draw_caption(sample, fields, random) for _ in range(2000)]
        return {text: drawn.count(text) / 2000 for text in set(drawn)}

    assert share(None) == {"packed": 1.0}
    found = share({"caption": 1.0, "title": 3.0, "empty": 9.0, "absent": 9.0})
    assert found == {"packed": pytest.approx(0.25, abs=0.05), "a title": pytest.approx(0.75, 0.1)}
    assert share({"long": 1.0}) == {"one": pytest.approx(0.5, 0.2), "two": pytest.approx(0.5, 0.2)}
    assert share({"absent": 1.0, "number": 1.0}) == {"": 1.0}
