"""The batcher against an encoder that is told what to do; nothing here knows a model."""

import contextvars
import threading
from collections.abc import Iterator

import numpy as np
import pytest

from service.batching import Batcher, Job, TooLate
from service.caches import Key, Turn, VectorCache
from service.errors import ModelFailed, NotReady, Overloaded, error_response
from service.notes import start

WAIT_S = 10


class FakeEncoder:
    """Doubles numbers, notes its batches, and stops at a gate while that is closed."""

    def __init__(self) -> None:
        self.batches: list[tuple[str, list[float]]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Semaphore(0)

    def encode(self, kind: str, items: list[float]) -> np.ndarray:
        self.batches.append((kind, list(items)))
        gate = self.gate
        self.entered.release()
        assert gate.wait(WAIT_S)
        for error in (RuntimeError("out of memory"), SystemExit(1)):
            if type(error).__name__ in items:
                raise error
        return np.array([[2.0 * item] for item in items], dtype=np.float32)


class FakeObserver:
    def __init__(self) -> None:
        self.restarts = threading.Semaphore(0)
        self.waits: list[float] = []

    def batch(self, kind: str, size: int, seconds: float, waited_s: float) -> None:
        assert seconds >= 0
        self.waits.append(waited_s)

    def restart(self) -> None:
        self.restarts.release()


class FakeClock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def encoder() -> FakeEncoder:
    return FakeEncoder()


@pytest.fixture
def observer() -> FakeObserver:
    return FakeObserver()


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def batcher(encoder: FakeEncoder, observer: FakeObserver, clock: FakeClock) -> Iterator[Batcher]:
    made = make(encoder, observer, clock)
    yield made
    encoder.gate.set()
    made.close()


def make(
    encoder: FakeEncoder, observer: FakeObserver, clock: FakeClock, threads: int = 1
) -> Batcher:
    return Batcher(
        {
            "image": lambda items: encoder.encode("image", items),
            "text": lambda items: encoder.encode("text", items),
        },
        max_batch={"image": 4, "text": 8, "match": 4, "call": 1},
        max_items=20,
        observer=observer,
        threads=threads,
        max_call_s=60.0,
        clock=clock,
    )


def submit(
    batcher: Batcher, *items: object, kind: str = "text", priority: str = "interactive"
) -> Job:
    job = batcher.admit(len(items), priority=priority)
    batcher.put(job, kind, enumerate(items), priority)
    return job


def hold(batcher: Batcher, encoder: FakeEncoder) -> Job:
    """Let the model run one item, and keep it there."""
    encoder.gate.clear()
    job = submit(batcher, 0.0)
    assert encoder.entered.acquire(timeout=WAIT_S)
    return job


def rows(job: Job) -> list[object]:
    """The answers, when they are all there."""
    job.done.result(WAIT_S)
    return [one if isinstance(one, Exception) else one.tolist() for one in job.results]


def test_what_arrives_while_the_model_runs_leaves_in_one_batch(batcher, encoder):
    hold(batcher, encoder)
    jobs = [submit(batcher, float(i)) for i in range(1, 6)]
    encoder.gate.set()
    assert [rows(job) for job in jobs] == [[[2.0 * i]] for i in range(1, 6)]
    assert encoder.batches[1] == ("text", [1.0, 2.0, 3.0, 4.0, 5.0])


@pytest.mark.parametrize("end", ["put", "settled", "left out"])
def test_an_idle_model_waits_for_what_is_being_prepared_of_a_request(batcher, encoder, end):
    job = batcher.admit(3)
    job.prepare("text", range(3))
    batcher.put(job, "text", [(0, 0.0)])
    batcher.put(job, "text", [(1, 1.0)])
    assert not encoder.entered.acquire(timeout=0.1)
    if end == "put":
        batcher.put(job, "text", [(2, 2.0)])
    elif end == "settled":
        job.settle(2, ValueError("cannot be read"))
    else:
        batcher.leave_out(job, 2)
    assert encoder.entered.acquire(timeout=WAIT_S)
    assert encoder.batches == [("text", [0.0, 1.0, 2.0] if end == "put" else [0.0, 1.0])]


def test_what_is_prepared_too_long_is_not_waited_for(batcher, encoder, clock):
    job = batcher.admit(2)
    job.prepare("text", range(2))
    batcher.put(job, "text", [(0, 0.0)])
    assert not encoder.entered.acquire(timeout=0.1)  # the clock stands still
    clock.now += 1.0
    assert encoder.entered.acquire(timeout=WAIT_S)
    assert encoder.batches == [("text", [0.0])]


def test_an_abandoned_request_holds_nobody_up(batcher, encoder):
    gone, job = batcher.admit(2), batcher.admit(2)
    for one in (gone, job):
        one.prepare("text", range(2))
        batcher.put(one, "text", [(0, 1.0)])
    batcher.abandon(gone)
    batcher.put(job, "text", [(1, 2.0)])
    assert rows(job) == [[2.0], [4.0]]
    assert encoder.batches == [("text", [1.0, 2.0])]


def test_interactive_items_overtake_bulk(batcher, encoder):
    hold(batcher, encoder)
    bulk = submit(batcher, *[100.0 + i for i in range(6)], priority="bulk")
    mine = submit(batcher, 1.0)
    encoder.gate.set()
    rows(bulk), rows(mine)
    assert encoder.batches[1] == ("text", [1.0])
    assert encoder.batches[2] == ("text", [100.0, 101.0])  # small: another might come


def test_a_bad_item_fails_alone_and_the_other_kind_is_not_touched(batcher, encoder):
    hold(batcher, encoder)
    bad = submit(batcher, 1.0, "RuntimeError", 3.0, kind="image")
    good = submit(batcher, 1.0, kind="text")
    encoder.gate.set()
    first, error, third = rows(bad)
    assert (first, third) == ([2.0], [6.0])
    assert isinstance(error, ModelFailed)
    assert "out of memory" not in str(error)  # the log's, not the client's
    assert rows(good) == [[2.0]]
    assert batcher.open_items == 0


def test_a_dead_thread_fails_what_it_held_and_another_takes_over_at_once(
    batcher, encoder, observer
):
    assert isinstance(rows(submit(batcher, "SystemExit"))[0], ModelFailed)
    assert observer.restarts.acquire(timeout=WAIT_S)
    assert rows(submit(batcher, 3.0)) == [[6.0]]  # the clock stands still: no delay has passed


def test_a_thread_that_dies_again_and_again_is_replaced_ever_later(batcher, observer, clock):
    for _ in range(2):
        rows(submit(batcher, "SystemExit"))
        assert observer.restarts.acquire(timeout=WAIT_S)
    waiting = submit(batcher, 3.0)
    batcher.inspect()
    assert not waiting.done.done()  # nobody is there to take it
    clock.now += 0.1
    batcher.inspect()
    assert rows(waiting) == [[6.0]]


def test_a_call_that_hangs_is_given_up_and_its_late_answer_ignored(
    batcher, encoder, observer, clock
):
    hung, gate = hold(batcher, encoder), encoder.gate
    waiting = submit(batcher, 3.0)
    clock.now += 59.0
    batcher.inspect()
    assert not hung.done.done()
    encoder.gate = threading.Event()  # that of the thread to come
    clock.now += 1.0
    batcher.inspect()
    assert isinstance(rows(hung)[0], ModelFailed)
    assert observer.restarts.acquire(timeout=WAIT_S)
    encoder.gate.set()
    assert rows(waiting) == [[6.0]]
    gate.set()  # the old thread comes back, finds itself struck off, and ends
    assert rows(submit(batcher, 4.0)) == [[8.0]]
    assert isinstance(hung.results[0], ModelFailed)
    assert batcher.open_items == 0


def test_the_supervisor_itself_notices_a_call_that_hangs(encoder, observer):
    """By the real clock, and a bound that has passed at once."""
    batcher = Batcher(
        {"text": lambda items: encoder.encode("text", items)},
        max_batch={"image": 4, "text": 8, "match": 4, "call": 1},
        max_items=20,
        observer=observer,
        max_call_s=0.01,
    )
    hung = hold(batcher, encoder)
    assert isinstance(rows(hung)[0], ModelFailed)
    encoder.gate.set()
    batcher.close()


def test_with_two_threads_one_batch_runs_and_one_is_prepared(encoder, observer, clock):
    batcher = make(encoder, observer, clock, threads=2)
    first, second = hold(batcher, encoder), hold(batcher, encoder)
    third, fourth = submit(batcher, 1.0), submit(batcher, 2.0)
    encoder.gate.set()
    for job in (first, second, third, fourth):
        rows(job)
    assert encoder.batches[2] == ("text", [1.0, 2.0])
    batcher.close()


def test_slots_are_given_all_or_none(batcher, encoder):
    hold(batcher, encoder)
    batcher.admit(18)
    with pytest.raises(Overloaded, match="at most 20"):
        batcher.admit(2)
    batcher.admit(1)
    assert batcher.open_items == 20


def test_who_is_refused_hears_when_the_queue_will_be_empty(batcher, encoder, clock):
    job = hold(batcher, encoder)
    clock.now += 0.75  # what an item takes
    encoder.gate.set()
    rows(job)
    batcher.admit(20)
    with pytest.raises(Overloaded) as refused:
        batcher.admit(1)
    assert refused.value.headers["Retry-After"] == "15"


def teach(batcher: Batcher, encoder: FakeEncoder, clock: FakeClock, **seconds: float) -> None:
    """Full batches of these kinds were run, at so many seconds an item."""
    for kind, pace in seconds.items():
        encoder.gate.clear()
        job = submit(batcher, *[1.0] * 8, kind=kind)
        for _ in range(8 // {"text": 8, "image": 4}[kind]):
            assert encoder.entered.acquire(timeout=WAIT_S)
            gate, encoder.gate = encoder.gate, threading.Event()
            clock.now += pace * {"text": 8, "image": 4}[kind]
            gate.set()
        encoder.gate.set()
        rows(job)


def submit_by(batcher: Batcher, deadline_s: float, *items: object, **options: str) -> Job:
    """As `submit`, for a client that waits until then."""

    def request() -> Job:
        start("").deadline_s = deadline_s
        return submit(batcher, *items, **options)

    return contextvars.Context().run(request)


def test_what_cannot_be_done_by_its_deadline_is_refused_at_once(batcher, encoder, clock):
    teach(batcher, encoder, clock, text=0.5)
    hold(batcher, encoder)
    waiting = [submit(batcher, 1.0) for _ in range(9)]
    late = submit_by(batcher, clock.now + 3.0, 2.0)  # its turn ends after 5 s
    (error,) = rows(late)
    assert isinstance(error, Overloaded)
    assert (error.code, error.headers["Retry-After"]) == ("deadline", "2")
    assert error_response(error).status_code == 429
    assert batcher.open_items == 10
    near = submit_by(batcher, clock.now + 4.0, 3.0)  # that is not clearly too late
    encoder.gate.set()
    assert [rows(job) for job in [*waiting, near]] == [[[2.0]]] * 9 + [[[6.0]]]


def test_a_deadline_counts_what_goes_first_and_nothing_else(batcher, encoder, clock):
    teach(batcher, encoder, clock, text=0.5, image=2.0)
    hold(batcher, encoder)
    submit(batcher, *[1.0] * 4, kind="image")
    submit(batcher, *[1.0] * 4, priority="bulk")
    submit(batcher, *[1.0] * 5)  # takes turns with a shorter one
    mine = submit_by(batcher, clock.now + 0.8, 2.0)
    late = submit_by(batcher, clock.now + 0.8, 2.0, kind="image")
    assert isinstance(rows(late)[0], Overloaded)
    canary = submit_by(batcher, clock.now + 0.01, 3.0, priority="urgent")
    encoder.gate.set()
    assert rows(mine) == [[4.0]]
    assert rows(canary) == [[6.0]]  # whose answer others wait for


def test_small_batches_say_nothing_of_how_fast_a_queue_is_emptied(batcher, encoder, clock):
    job = hold(batcher, encoder)
    clock.now += 50.0
    encoder.gate.set()
    rows(job)
    assert rows(submit_by(batcher, clock.now + 1.0, 2.0)) == [[4.0]]


def test_who_waits_for_the_same_vector_is_not_refused_with_it():
    cache, told = VectorCache(1000), []
    key = Key("model", b"digest")
    assert cache.ask(key, lambda outcome: False) is Turn.YOURS
    assert cache.ask(key, lambda outcome: told.append(outcome) or True) is Turn.LATER
    cache.tell(key, TooLate("too late"))
    assert told == [Turn.YOURS]


def test_without_a_deadline_everything_is_queued(batcher, encoder, clock):
    teach(batcher, encoder, clock, text=5.0)
    assert rows(submit(batcher, 2.0)) == [[4.0]]


def test_the_wait_in_the_queue_is_measured(batcher, encoder, observer, clock):
    held = hold(batcher, encoder)
    waiting = submit(batcher, 1.0)
    clock.now += 5.0
    encoder.gate.set()
    rows(held), rows(waiting)
    assert observer.waits == [0.0, 5.0]


def test_an_abandoned_job_leaves_the_queue_and_frees_its_slots(batcher, encoder):
    held = hold(batcher, encoder)
    gone = submit(batcher, 7.0, 8.0)
    kept = submit(batcher, 9.0)
    late = batcher.admit(1)
    batcher.abandon(gone)
    batcher.abandon(late)
    batcher.put(late, "text", [(0, 10.0)])  # its preparation ends after the client has left
    assert batcher.open_items == 2
    encoder.gate.set()
    rows(held), rows(kept)
    assert encoder.batches == [("text", [0.0]), ("text", [9.0])]
    assert batcher.open_items == 0


def test_an_urgent_item_needs_no_slot_and_goes_first(batcher, encoder):
    hold(batcher, encoder)
    waiting = submit(batcher, *[float(i) for i in range(19)])
    canary = submit(batcher, 99.0, priority="urgent")
    encoder.gate.set()
    rows(canary), rows(waiting)
    assert encoder.batches[1][1][0] == 99.0


def test_closing_settles_what_waits(batcher, encoder):
    held = hold(batcher, encoder)
    waiting = submit(batcher, 1.0)
    closer = threading.Thread(target=batcher.close)
    closer.start()
    assert isinstance(rows(waiting)[0], NotReady)
    encoder.gate.set()
    closer.join(WAIT_S)
    assert rows(held) == [[0.0]]  # the running batch is finished
    with pytest.raises(NotReady):
        batcher.admit(1)


def test_four_times_too_much_work_leaves_the_model_fully_busy(batcher, encoder):
    kept, refused = [hold(batcher, encoder)], 0
    for _ in range(50):  # while the model runs a batch of 8 texts, 32 more come
        for item in range(32):
            try:
                kept.append(submit(batcher, float(item)))
            except Overloaded:
                refused += 1
        assert batcher.open_items == 20
        gate, encoder.gate = encoder.gate, threading.Event()
        gate.set()
        assert encoder.entered.acquire(timeout=WAIT_S)
    sizes = [len(items) for _, items in encoder.batches]
    assert sizes == [1] + [8] * 50
    assert refused > 0.7 * 50 * 32
    encoder.gate.set()
    assert all(isinstance(row, list) for job in kept for row in rows(job))
    assert rows(submit(batcher, 5.0)) == [[10.0]]
    assert batcher.open_items == 0


def test_a_thread_that_is_lost_ever_again_is_still_replaced(batcher, clock, observer):
    batcher._losses = 5000
    lost = submit(batcher, "SystemExit")
    lost.done.result(WAIT_S)
    assert isinstance(lost.results[0], ModelFailed)
    assert observer.restarts.acquire(timeout=WAIT_S)
    clock.now += 5
    batcher.inspect()
    assert rows(submit(batcher, 3.0)) == [[6.0]]
