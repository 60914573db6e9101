import faulthandler
import multiprocessing
import os
import signal
import sys
from dataclasses import fields
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
import torch

from clipserve.errors import DataError, SampleError
from clipserve.images import ImageTransform, TrainTransform
from clipserve.shards import Sample, ShardSet
from clipserve.text import Tokenizer
from training.augment import ViewTransform
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
    samples: SampleSettings | None = None,
    **order: Any,
) -> Stream:
    return Stream(
        Mixture([WeightedShards(s) for s in sets]),
        samples or SampleSettings(TRANSFORM),
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
        and torch.equal(one.groups, other.groups)
        and one.captions == other.captions
    )


def test_batches_do_not_depend_on_workers_or_on_where_one_starts(shards: ShardSet) -> None:
    alone = batches(stream(shards), 9)
    assert all(map(equal, alone, batches(stream(shards), 9, workers=2)))
    middle = Position(epoch=1, consumed=10)  # four batches an epoch
    assert all(map(equal, alone[6:], batches(stream(shards), 3, workers=1, start=middle)))


def test_ranks_take_stripes_of_the_same_batches(shards: ShardSet) -> None:
    order: dict[str, Any] = {"batch_size": 7, "last_batch": "keep"}
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


# torch's signal handler may interrupt it while it opens files to find out why there is no batch.
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_killed_worker_is_one_clear_error(shards: ShardSet) -> None:
    before = set(multiprocessing.active_children())
    source = stream(shards).batches(Position(), 1000, workers=1)
    next(source)
    (worker,) = set(multiprocessing.active_children()) - before
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(DataError, match=r"worker was killed.*data\.workers"):
        list(source)


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_worker_killed_with_a_lock_in_its_hands_is_too(
    shards: ShardSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever lock of the loader it shares with its parent, it may be inside just then."""

    def read(self: ShardSet, index: int) -> Sample:
        frame: FrameType | None = sys._getframe()
        while frame is not None and "done_event" not in frame.f_locals:
            frame = frame.f_back
        assert frame is not None
        lock = getattr(frame.f_locals["done_event"], "_cond", None)
        if lock is not None:
            lock.acquire()
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError

    monkeypatch.setattr(ShardSet, "read", read)
    faulthandler.dump_traceback_later(60, exit=True)  # nothing else ends a wait for such a lock
    try:
        with pytest.raises(DataError, match="worker was killed"):
            batches(stream(shards), 1, 1)
    finally:
        faulthandler.cancel_dump_traceback_later()


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


@pytest.fixture
def alike(tmp_path: Path, encoded: Any, picture: Any) -> ShardSet:
    """Pictures, captions, labels and names of which some are equal."""
    folder = tmp_path / "alike"
    folder.mkdir()
    for i in range(3):
        (folder / f"{i}.png").write_bytes(encoded(picture(seed=i)))
    (folder / "same.png").write_bytes((folder / "0.png").read_bytes())
    rows = [
        "0.png,A red  Cat,cat,x",
        "same.png,a dog,dog,y",
        "1.png, a red cat ,cat,x",
        "2.png,a red cat.,,z",
        "1.png,STRASSE,,x",
        "2.png,stra\u00dfe,0,z",
    ]
    (folder / "t.csv").write_text("\n".join(["image,caption,label,name", *rows]))
    pack(folder / "t.csv", tmp_path / "alike-shards")
    return ShardSet.open(tmp_path / "alike-shards")


def columns(shards: ShardSet, count: int = 6, **settings: Any) -> list[list[int]]:
    """Numbers of picture, caption and label, of the samples in their order."""
    source = stream(shards, batch_size=count, samples=SampleSettings(TRANSFORM, **settings))
    (batch,) = batches(source, 1)
    assert batch.groups.dtype == torch.int64
    rows = dict(zip(batch.samples, batch.groups.tolist(), strict=True))
    return [list(column) for column in zip(*(rows[i] for i in range(count)), strict=True)]


def classes(numbers: list[int]) -> list[int]:
    """The same, numbered in the order in which they appear."""
    return [list(dict.fromkeys(numbers)).index(number) for number in numbers]


def test_equal_pictures_and_captions_have_equal_numbers(alike: ShardSet) -> None:
    """Of pictures the bytes count; of captions neither case nor spaces."""
    pictures, captions, _ = columns(alike)
    assert classes(pictures) == [0, 0, 1, 2, 1, 2]
    assert classes(captions) == [0, 1, 0, 2, 3, 3]
    assert min(pictures + captions) >= 0
    assert columns(alike)[:2] == [pictures, captions]


def test_labels_are_those_of_a_field_and_without_one_a_sample_is_alone(alike: ShardSet) -> None:
    *_, labels = columns(alike, label_field="label")
    assert classes(labels) == [0, 1, 0, 2, 3, 4]
    *_, none = columns(alike)
    assert none == [-1, -2, -3, -4, -5, -6]  # below every number made of a label
    *_, names = columns(alike, label_field="name")
    assert classes(names) == [0, 1, 0, 2, 0, 2]
    assert min(names) >= 0


def test_a_field_may_name_the_picture(alike: ShardSet) -> None:
    pictures, *_ = columns(alike, picture_field="name")
    assert classes(pictures) == [0, 1, 0, 2, 0, 2]
    absent, *_ = columns(alike, picture_field="nothing")
    assert absent == columns(alike)[0]


def test_batches_say_their_captions(alike: ShardSet) -> None:
    (batch,) = batches(stream(alike, batch_size=6), 1)
    assert batch.captions == [alike.read(i).captions[0] for i in batch.samples]
    assert torch.equal(
        batch.ids, Tokenizer({"context_length": 16})(batch.captions).ids[:, : batch.ids.shape[1]]
    )


def with_views() -> SampleSettings:
    return SampleSettings(TRANSFORM, views=ViewTransform(TRANSFORM))


def test_views_are_there_only_when_asked_for(shards: ShardSet) -> None:
    (without,) = batches(stream(shards), 1)
    assert without.views is None
    (batch,) = batches(stream(shards, samples=with_views()), 1)
    assert batch.views is not None
    assert batch.views.shape == (2, 5, 3, 32, 32)
    assert batch.views.dtype == torch.uint8
    assert not torch.equal(batch.views[0], batch.views[1])
    assert equal(without, batch)  # the crop that the text is compared with is the same as before


def test_views_belong_to_the_sample_whoever_draws_them(shards: ShardSet) -> None:
    alone = batches(stream(shards, samples=with_views()), 9)
    several = batches(stream(shards, samples=with_views()), 9, workers=2)
    parts = [
        batches(stream(shards, samples=with_views(), world=World(rank, 2)), 9) for rank in (0, 1)
    ]
    for one, other, first, second in zip(alone, several, *parts, strict=True):
        assert one.views is not None
        assert other.views is not None
        assert torch.equal(one.views, other.views)
        whole = [part.views for part in (first, second) if part.views is not None]
        assert torch.equal(torch.cat(whole, dim=1), one.views)
    sample = alone[0].samples[0]
    later = next(b for b in alone[4:] if sample in b.samples)  # in the next epoch
    assert later.views is not None
    assert alone[0].views is not None
    assert not torch.equal(later.views[:, later.samples.index(sample)], alone[0].views[:, 0])


def test_a_rank_without_samples_has_no_views_and_no_groups(shards: ShardSet) -> None:
    source = stream(
        shards, batch_size=24, last_batch="keep", world=World(0, 30), samples=with_views()
    )
    (batch,) = batches(source, 1)
    assert not batch.samples
    assert not batch.captions
    assert batch.views is None
    assert batch.groups.shape == (0, 3)
    assert batch.pixels.shape == (0, 3, 32, 32)


def test_a_batch_moves_with_all_its_tensors(
    shards: ShardSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    (batch,) = batches(stream(shards, samples=with_views()), 1)
    tensors = {field.name for field in fields(Batch) if "Tensor" in str(field.type)}
    assert tensors == {name for name, v in vars(batch).items() if isinstance(v, torch.Tensor)}
    moved = batch.to(torch.device("meta"))
    assert {name for name in tensors if getattr(moved, name).is_meta} == tensors
    pinned: list[torch.Tensor] = []

    def pin(tensor: torch.Tensor) -> torch.Tensor:
        pinned.append(tensor)
        return tensor.clone()

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    copied = batch.pin_memory()
    assert {id(tensor) for tensor in pinned} == {id(getattr(batch, name)) for name in tensors}
    for name, value in vars(batch).items():
        if name in tensors:
            assert torch.equal(getattr(copied, name), value)
        else:
            assert getattr(moved, name) == getattr(copied, name) == value
    (without,) = batches(stream(shards), 1)
    assert without.to(torch.device("meta")).views is None


def test_a_column_without_a_name_names_no_picture(alike: ShardSet, tmp_path: Path) -> None:
    """pandas writes its index as one."""
    table = tmp_path / "alike" / "index.csv"
    table.write_text(",image,caption\n0,0.png,a cat\n1,same.png,a dog\n")
    pack(table, tmp_path / "index-shards")
    pictures, _, labels = columns(ShardSet.open(tmp_path / "index-shards"), count=2)
    assert pictures[0] == pictures[1]
    assert labels == [-1, -2]


def test_only_captions_are_compared_where_no_objective_asks(alike: ShardSet) -> None:
    """The log says how often they repeat."""
    pictures, captions, labels = columns(alike, finds_groups=False, label_field="label")
    assert pictures == labels == [-1, -2, -3, -4, -5, -6]
    assert captions == columns(alike)[1]
