"""The batcher against an encoder that is told what to do; nothing here knows a model."""

import threading
from collections.abc import Iterator

import numpy as np
import pytest

from service.batching import Batcher, Job
from service.errors import ModelFailed, NotReady, Overloaded

WAIT_S = 10


class FakeEncoder:
    """Doubles numbers, notes its batches, and stops at a gate while that is closed."""

    def __init__(self) -> None:
        self.batches: list[tuple[str, list[float]]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()

    def encode(self, kind: str, items: list[float]) -> np.ndarray:
        self.batches.append((kind, list(items)))
        self.entered.set()
        assert self.gate.wait(WAIT_S)
        for error in (RuntimeError("out of memory"), SystemExit(1)):
            if type(error).__name__ in items:
                raise error
        return np.array([[2.0 * item] for item in items], dtype=np.float32)


class FakeObserver:
    def __init__(self) -> None:
        self.restarted = threading.Event()

    def batch(self, kind: str, size: int, seconds: float, waited_s: float) -> None:
        assert seconds >= 0
        assert waited_s >= 0

    def restart(self) -> None:
        self.restarted.set()


@pytest.fixture
def encoder() -> FakeEncoder:
    return FakeEncoder()


@pytest.fixture
def observer() -> FakeObserver:
    return FakeObserver()


@pytest.fixture
def batcher(encoder: FakeEncoder, observer: FakeObserver) -> Iterator[Batcher]:
    made = Batcher(
        {
            "image": lambda items: encoder.encode("image", items),
            "text": lambda items: encoder.encode("text", items),
        },
        max_batch={"image": 4, "text": 8},
        max_items=20,
        observer=observer,
    )
    yield made
    encoder.gate.set()
    made.close()


def submit(batcher: Batcher, *items: object, kind: str = "text", urgent: bool = False) -> Job:
    job = batcher.admit(len(items), urgent=urgent)
    for index, item in enumerate(items):
        batcher.put(job, index, kind, item, urgent=urgent)
    return job


def hold(batcher: Batcher, encoder: FakeEncoder) -> Job:
    """Let the model run one item, and keep it there."""
    encoder.gate.clear()
    encoder.entered.clear()
    job = submit(batcher, 0.0)
    assert encoder.entered.wait(WAIT_S)
    return job


def test_what_arrives_while_the_model_runs_leaves_in_one_batch(batcher, encoder):
    hold(batcher, encoder)
    jobs = [submit(batcher, float(i)) for i in range(1, 6)]
    encoder.gate.set()
    for i, job in enumerate(jobs, 1):
        job.done.result(WAIT_S)
        assert job.results[0].tolist() == [2.0 * i]
    assert encoder.batches[1] == ("text", [1.0, 2.0, 3.0, 4.0, 5.0])


@pytest.mark.parametrize(("first", "second"), [("image", "text"), ("text", "image")])
def test_pictures_and_texts_go_apart_and_the_longest_waiting_first(batcher, encoder, first, second):
    hold(batcher, encoder)
    last = [
        submit(batcher, 1.0, kind=first),
        submit(batcher, 2.0, kind=second),
        submit(batcher, 3.0, kind=first),
    ]
    encoder.gate.set()
    for job in last:
        job.done.result(WAIT_S)
    assert encoder.batches[1:] == [(first, [1.0, 3.0]), (second, [2.0])]


def test_a_batch_is_never_larger_than_its_limit(batcher, encoder):
    hold(batcher, encoder)
    job = submit(batcher, *[float(i) for i in range(6)], kind="image")
    encoder.gate.set()
    job.done.result(WAIT_S)
    assert [len(items) for _, items in encoder.batches[1:]] == [4, 2]


def test_an_exception_fails_the_items_of_its_batch_alone(batcher, encoder):
    hold(batcher, encoder)
    bad = submit(batcher, "RuntimeError", kind="image")
    good = submit(batcher, 1.0, kind="text")
    encoder.gate.set()
    bad.done.result(WAIT_S)
    good.done.result(WAIT_S)
    assert isinstance(bad.results[0], ModelFailed)
    assert "out of memory" not in str(bad.results[0])  # the log's, not the client's
    assert good.results[0].tolist() == [2.0]
    assert batcher.open_items == 0


def test_a_dead_thread_fails_what_it_held_and_another_takes_over(batcher, encoder, observer):
    job = submit(batcher, "SystemExit")
    job.done.result(WAIT_S)
    assert isinstance(job.results[0], ModelFailed)
    assert observer.restarted.wait(WAIT_S)
    again = submit(batcher, 3.0)
    again.done.result(WAIT_S)
    assert again.results[0].tolist() == [6.0]


def test_slots_are_given_all_or_none(batcher, encoder):
    hold(batcher, encoder)
    batcher.admit(18)
    with pytest.raises(Overloaded, match="at most 20") as refused:
        batcher.admit(2)
    assert int(refused.value.headers["Retry-After"]) >= 1
    batcher.admit(1)
    assert batcher.open_items == 20


def test_an_abandoned_job_leaves_the_queue_and_frees_its_slots(batcher, encoder):
    held = hold(batcher, encoder)
    gone = submit(batcher, 7.0, 8.0)
    kept = submit(batcher, 9.0)
    late = batcher.admit(1)
    batcher.abandon(gone)
    batcher.abandon(late)
    batcher.put(late, 0, "text", 10.0)  # its preparation ends after the client has left
    assert batcher.open_items == 2
    encoder.gate.set()
    held.done.result(WAIT_S)
    kept.done.result(WAIT_S)
    assert encoder.batches == [("text", [0.0]), ("text", [9.0])]
    assert batcher.open_items == 0


def test_a_vector_that_is_not_finite_fails_alone(batcher):
    job = submit(batcher, 1.0, float("nan"), 2.0)
    job.done.result(WAIT_S)
    assert isinstance(job.results[1], ModelFailed)
    assert [job.results[i].tolist() for i in (0, 2)] == [[2.0], [4.0]]


def test_an_urgent_item_needs_no_slot_and_goes_first(batcher, encoder):
    hold(batcher, encoder)
    waiting = submit(batcher, *[float(i) for i in range(19)])
    canary = submit(batcher, 99.0, urgent=True)
    encoder.gate.set()
    canary.done.result(WAIT_S)
    waiting.done.result(WAIT_S)
    assert encoder.batches[1][1][0] == 99.0


def test_closing_settles_what_waits(batcher, encoder):
    held = hold(batcher, encoder)
    waiting = submit(batcher, 1.0)
    closer = threading.Thread(target=batcher.close)
    closer.start()
    with batcher._changed:
        assert batcher._changed.wait_for(lambda: batcher._closing, WAIT_S)
    encoder.gate.set()
    closer.join(WAIT_S)
    assert held.results[0].tolist() == [0.0]  # the running batch is finished
    assert isinstance(waiting.results[0], NotReady)
    with pytest.raises(NotReady):
        batcher.admit(1)


def test_a_job_of_nothing_is_done(batcher):
    assert batcher.admit(0).done.done()
