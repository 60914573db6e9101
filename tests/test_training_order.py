from collections import Counter
from itertools import islice
from typing import Any

import numpy as np
import pytest

from training.order import Dataset, Draw, OrderSettings, Position, SampleOrder


def dataset(*shard_sizes: int, weight: float = 1.0, fingerprint: str = "f") -> Dataset:
    return Dataset(fingerprint, np.cumsum([0, *shard_sizes]), weight)


def order(*datasets: Dataset, batch_size: int = 4, **settings: Any) -> SampleOrder:
    lengths = np.random.default_rng(7).integers(1, 90, 10_000)
    return SampleOrder(datasets, OrderSettings(batch_size, **settings), lambda i: lengths[i])


def epoch(source: SampleOrder, number: int = 0) -> list[list[Draw]]:
    return list(islice(source.batches(Position(number)), source.batches_per_epoch))


def numbers(batches: list[list[Draw]]) -> list[int]:
    return [draw.sample for batch in batches for draw in batch]


@pytest.mark.parametrize("window", [None, 1, 2, 100])
@pytest.mark.parametrize("buckets", [0, 2])
def test_an_epoch_is_exactly_one_pass(window: int | None, buckets: int) -> None:
    settings = {"last_batch": "keep", "shuffle_shards": window, "bucket_batches": buckets}
    source = order(dataset(5, 0, 7, 3), **settings)
    epochs = [numbers(epoch(source, number)) for number in range(3)]
    assert all(sorted(samples) == list(range(15)) for samples in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert [len(batch) for batch in epoch(source)] == [4, 4, 4, 3]


def test_the_last_batch_is_dropped_kept_or_padded() -> None:
    data = dataset(5, 5)
    assert [len(b) for b in epoch(order(data, last_batch="drop"))] == [4, 4]
    assert [len(b) for b in epoch(order(data, last_batch="keep"))] == [4, 4, 2]
    padded = epoch(order(data, last_batch="pad"))
    assert [len(b) for b in padded] == [4, 4, 4]
    assert padded[2][2:] == padded[0][:2]
    assert set(numbers(padded)) == set(range(10))
    few = epoch(order(dataset(3), batch_size=8, last_batch="pad"))
    assert Counter(numbers(few)) == {few[0][0].sample: 3, few[0][1].sample: 3, few[0][2].sample: 2}
    assert order(dataset(3), batch_size=8).batches_per_epoch == 0


def test_what_is_dropped_differs_from_epoch_to_epoch() -> None:
    source = order(dataset(9))
    left_out = {frozenset(range(9)) - set(numbers(epoch(source, e))) for e in range(12)}
    assert len(left_out) > 3


@pytest.mark.parametrize("last_batch", ["drop", "keep", "pad"])
@pytest.mark.parametrize("replacement", [False, True])
def test_any_position_continues_the_same_sequence(last_batch: Any, replacement: bool) -> None:
    sets = (dataset(5, 8), dataset(4, 3, weight=1.5, fingerprint="g"))
    source = order(
        *sets,
        last_batch=last_batch,
        replacement=replacement,
        shuffle_shards=1,
        bucket_batches=2,
        seed=3,
    )
    whole = list(islice(source.batches(Position()), 20))
    position = Position()
    for step in range(15):
        anew = order(*sets, **vars(source.settings))
        assert next(anew.batches(position)) == whole[step]
        assert len(whole[step]) == source.size_at(position)
        position = source.advance(position)
    assert position.epoch == 15 // source.batches_per_epoch


def test_weights_are_passes_per_epoch_and_favour_no_sample() -> None:
    source = order(dataset(10), dataset(20, weight=0.5), dataset(6, weight=1.5), last_batch="keep")
    assert source.epoch_size == 10 + 10 + 9
    four = Counter(sample for e in range(4) for sample in numbers(epoch(source, e)))
    assert {four[i] for i in range(10)} == {4}
    assert {four[i] for i in range(10, 30)} == {2}
    assert {four[i] for i in range(30, 36)} == {6}
    first = numbers(epoch(source))
    assert sorted(first) != first
    assert {sample // 10 for sample in first[:10]} > {0}  # the sets are mixed


def test_a_sample_seen_twice_is_seen_anew() -> None:
    for settings in ({}, {"replacement": True}):
        source = order(dataset(6, weight=3.0), batch_size=6, **settings)
        draws = [draw for e in range(3) for batch in epoch(source, e) for draw in batch]
        assert len(set(draws)) == len(draws) == 54


def test_replacement_draws_independently() -> None:
    source = order(dataset(50, 50), batch_size=10, replacement=True)
    assert len(set(numbers(epoch(source)))) < 90
    counts = Counter(sample for e in range(200) for sample in numbers(epoch(source, e)))
    assert set(counts) == set(range(100))
    assert max(counts.values()) < 270
    windowed = order(dataset(30, 60, 10), batch_size=10, replacement=True, shuffle_shards=1)
    counts = Counter(sample for e in range(200) for sample in numbers(epoch(windowed, e)))
    assert set(counts) == set(range(100))
    assert sum(counts[i] for i in range(30, 90)) == pytest.approx(12_000, rel=0.1)


def test_few_shards_are_needed_at_a_time() -> None:
    source = order(dataset(*[8] * 10), batch_size=8, shuffle_shards=2)
    for batches in (epoch(source), epoch(source, 1)):
        shards = [{sample // 8 for sample in numbers([batch])} for batch in batches]
        assert all(len(shards[i] | shards[i + 1]) <= 2 for i in range(0, 10, 2))


def test_buckets_hold_captions_of_like_length() -> None:
    lengths = np.random.default_rng(7).integers(1, 90, 10_000)

    def longest(source: SampleOrder) -> int:
        return sum(max(lengths[numbers([batch])]) for batch in epoch(source))

    data = dataset(160)
    assert longest(order(data, bucket_batches=10)) < 0.8 * longest(order(data))
    first = [max(lengths[numbers([batch])]) for batch in epoch(order(data, bucket_batches=40))]
    assert first != sorted(first)  # batches come in no order of length


def test_the_seed_and_the_manifest_decide() -> None:
    data = dataset(40)
    assert numbers(epoch(order(data, seed=1))) != numbers(epoch(order(data, seed=2)))
    assert order(data).identity != order(dataset(40, fingerprint="g")).identity
    assert order(data).identity != order(dataset(40, weight=2.0)).identity
    assert order(data).identity == order(dataset(20, 20)).identity  # the fingerprint tells those
    for change in ({"batch_size": 5}, {"last_batch": "pad"}, {"bucket_batches": 2}):
        assert order(data).identity != order(data, **change).identity


def test_a_million_samples_take_no_python_objects() -> None:
    source = order(dataset(*[10_000] * 100), batch_size=1000)
    samples, views = source.draws(0)
    assert samples.dtype == views.dtype == np.int64
    assert np.array_equal(np.sort(samples), np.arange(1_000_000))
