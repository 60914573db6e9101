"""Vectors by content: kept within bounds, computed once, never another model's."""

import threading

import numpy as np

from service.caches import Entry, Key, Turn, VectorCache, digest
from service.errors import ModelFailed, RequestError
from service.scheduler import Abandoned


def key(content: str | bytes = "a cat", maker: str = "model/bf16") -> Key:
    return Key(maker, digest(content))


def entry(value: float = 1.0, size: int = 4) -> Entry:
    return Entry(np.full(size, value, dtype=np.float32), 3, False)


def never(outcome):
    raise AssertionError("told although it does not wait")


def fill(cache: VectorCache, one: Key, value: float = 1.0) -> None:
    assert cache.ask(one, never) is Turn.YOURS
    cache.tell(one, entry(value))


def test_what_was_told_is_found_again():
    cache = VectorCache(10_000)
    fill(cache, key())
    found = cache.ask(key(), never)
    assert found.vector.tolist() == [1.0] * 4
    assert found.num_tokens == 3


def test_another_content_model_or_precision_is_another_key():
    cache = VectorCache(10_000)
    fill(cache, key())
    for other in (key("a dog"), key(b"a cat."), key(maker="model/fp32"), key(maker="x/bf16")):
        assert cache.ask(other, never) is Turn.YOURS


def test_the_least_recently_used_goes_when_the_bytes_are_spent():
    cache = VectorCache(2 * (16 + 400))
    for content in ("a", "b"):
        fill(cache, key(content))
    cache.ask(key("a"), never)
    fill(cache, key("c"))
    assert len(cache) == 2
    assert cache.num_bytes <= 2 * (16 + 400)
    assert cache.ask(key("b"), never) is Turn.YOURS
    assert isinstance(cache.ask(key("a"), never), Entry)


def test_a_vector_larger_than_the_cache_is_not_kept():
    cache = VectorCache(100)
    fill(cache, key())
    assert (len(cache), cache.num_bytes) == (0, 0)


def test_a_kept_row_neither_holds_its_batch_nor_can_be_changed():
    cache, batch = VectorCache(10_000), np.ones((32, 4), dtype=np.float32)
    assert cache.ask(key(), never) is Turn.YOURS
    cache.tell(key(), Entry(batch[3]))
    batch[3] = 7
    kept = cache.ask(key(), never).vector
    assert kept.base is None
    assert not kept.flags.writeable
    assert kept.tolist() == [1.0] * 4


def test_who_asks_meanwhile_is_told_the_same():
    cache, told = VectorCache(10_000), []
    assert cache.ask(key(), never) is Turn.YOURS
    assert [cache.ask(key(), told.append) for _ in range(3)] == [Turn.LATER] * 3
    cache.tell(key(), entry(5.0))
    assert [outcome.vector[0] for outcome in told] == [5.0] * 3


def test_a_failure_is_told_to_each_on_its_own_and_forgotten():
    cache, told = VectorCache(10_000), []
    assert cache.ask(key(), never) is Turn.YOURS
    for _ in range(2):
        cache.ask(key(), told.append)
    error = RequestError("bad", code="invalid_image")
    cache.tell(key(), error)
    error.param = "input[7]"  # its own request's place
    assert [(str(one), one.code, one.param) for one in told] == [("bad", "invalid_image", None)] * 2
    assert told[0] is not told[1]
    assert cache.ask(key(), never) is Turn.YOURS


def test_when_the_first_is_gone_the_next_takes_over_for_the_rest():
    cache, told = VectorCache(10_000), []
    assert cache.ask(key(), never) is Turn.YOURS
    for name in ("second", "third"):
        cache.ask(key(), lambda outcome, name=name: told.append((name, outcome)) or True)
    cache.tell(key(), Abandoned("gone"))
    assert told == [("second", Turn.YOURS)]
    cache.tell(key(), ModelFailed("no"))
    assert [name for name, _ in told] == ["second", "third"]
    assert isinstance(told[1][1], ModelFailed)


def test_those_who_are_gone_too_are_passed_over_however_many():
    cache, told = VectorCache(10_000), []
    assert cache.ask(key(), never) is Turn.YOURS
    for _ in range(5000):
        cache.ask(key(), lambda outcome: False)
    cache.ask(key(), lambda outcome: told.append(outcome) or True)
    cache.tell(key(), Abandoned("gone"))
    assert told == [Turn.YOURS]


def test_when_all_are_gone_the_key_is_free():
    cache = VectorCache(10_000)
    assert cache.ask(key(), never) is Turn.YOURS
    cache.tell(key(), Abandoned("gone"))
    assert cache.ask(key(), never) is Turn.YOURS


class Interrupted:
    """A lock, between whose uses another thread may come; `call` is that thread, once."""

    def __init__(self, call) -> None:
        self._lock, self._call = threading.Lock(), call

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_) -> None:
        self._lock.release()
        call, self._call = self._call, lambda: None
        call()


def test_who_asks_while_the_last_one_leaves_is_not_told_that_it_left():
    cache, turns = VectorCache(10_000), []
    assert cache.ask(key(), never) is Turn.YOURS
    cache._lock = Interrupted(lambda: turns.append(cache.ask(key(), never)))
    cache.tell(key(), Abandoned("gone"))
    assert turns == [Turn.YOURS]
    cache.tell(key(), entry())
    assert isinstance(cache.ask(key(), never), Entry)


def test_no_bytes_is_no_cache():
    cache = VectorCache(0)
    fill(cache, key())
    assert cache.ask(key(), never) is Turn.YOURS
    assert cache.ask(key(), never) is Turn.YOURS  # nobody is made to wait either


def test_of_many_threads_that_ask_at_once_one_computes():
    cache, start = VectorCache(10_000), threading.Barrier(8)
    computed, answers, done = [], [], threading.Semaphore(0)

    def answer(outcome):
        answers.append(outcome.vector[0])
        done.release()

    def ask():
        start.wait(10)
        told = cache.ask(key(), answer)
        if told is Turn.YOURS:
            computed.append(1)
            cache.tell(key(), entry(9.0))
            done.release()
        elif isinstance(told, Entry):
            answer(told)

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for _ in threads:
        assert done.acquire(timeout=10)
    assert (len(computed), answers) == (1, [9.0] * 7)
