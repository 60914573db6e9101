"""The pool of decoders and tokenizers, with tasks that do what they are told."""

import threading
import time
import weakref
from collections.abc import Callable, Iterator

import pytest

from service.errors import ImageError, ModelFailed, NotReady
from service.pool import Pool
from service.scheduler import Job

WAIT_S = 10


class FakeClock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Gate:
    """A task that stops until it is opened."""

    def __init__(self) -> None:
        self.entered, self.opened = threading.Event(), threading.Event()
        self.left = threading.Event()

    def __call__(self) -> None:
        self.entered.set()
        assert self.opened.wait(WAIT_S)
        self.left.set()


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def pool(clock: FakeClock) -> Iterator[Pool]:
    made = Pool(1, "decode", 60, clock)
    yield made
    made.close()


def job(size: int = 1) -> Job:
    return Job(size, lambda: None)


def hold(pool: Pool) -> tuple[Job, Gate]:
    """Its thread is busy until the gate is opened."""
    held, gate = job(), Gate()
    pool.submit(held, [0], gate)
    assert gate.entered.wait(WAIT_S)
    return held, gate


def run(pool: Pool, call: Callable[[], None] = lambda: None, size: int = 1) -> list[object]:
    """What a job of one task comes to; "done" where that settles nothing."""
    one = job(size)

    def work() -> None:
        call()
        for index in range(size):
            one.settle(index, "done")

    pool.submit(one, range(size), work)
    one.done.result(WAIT_S)
    return one.results


def test_interactive_goes_before_bulk_and_requests_take_turns(pool):
    _, gate = hold(pool)
    order: list[str] = []
    bulk, long, short = job(3), job(3), job(1)
    for name, one, priority in (
        ("bulk", bulk, "bulk"),
        ("long", long, "interactive"),
        ("short", short, "interactive"),
    ):
        for index in range(len(one.results)):

            def work(name: str = name, one: Job = one, index: int = index) -> None:
                order.append(name)
                one.settle(index, "done")

            pool.submit(one, [index], work, priority)
    gate.opened.set()
    for one in (bulk, long, short):
        one.done.result(WAIT_S)
    assert order == ["long", "short", "long", "long", "bulk", "bulk", "bulk"]


def test_what_a_task_raises_is_the_error_of_its_items_and_the_thread_lives_on(pool):
    def bad() -> None:
        raise ImageError("not a picture")

    def panic() -> None:
        raise SystemExit

    assert [type(one) for one in run(pool, bad, size=2)] == [ImageError, ImageError]
    assert [type(one) for one in run(pool, panic)] == [ModelFailed]
    assert run(pool) == ["done"]


def test_a_thread_that_hangs_is_replaced_and_its_late_end_changes_nothing(pool, clock):
    hung, gate = hold(pool)
    (left_behind,) = pool._workers.values()
    waiting = job()
    pool.submit(waiting, [0], lambda: waiting.settle(0, "done"))
    clock.now += 59
    pool.inspect()
    assert not hung.done.done()
    clock.now += 1
    pool.inspect()
    hung.done.result(WAIT_S)
    assert isinstance(hung.results[0], ModelFailed)
    waiting.done.result(WAIT_S)
    gate.opened.set()
    left_behind.join(WAIT_S)
    assert not left_behind.is_alive()
    assert run(pool) == ["done"]


def test_hanging_threads_are_not_replaced_without_end(pool, clock):
    before = threading.active_count()
    gates = []
    for _ in range(4):
        gates.append(hold(pool)[1])
        clock.now += 60
        pool.inspect()
    waiting = job()
    pool.submit(waiting, [0], lambda: waiting.settle(0, "done"))
    assert threading.active_count() - before <= 5  # four times the size, and who supervises them
    assert not pool._workers
    (*_, left_behind) = pool._left_behind
    gates[-1].opened.set()
    left_behind.join(WAIT_S)
    pool.inspect()
    waiting.done.result(WAIT_S)
    for gate in gates:
        gate.opened.set()


def test_who_waits_for_a_hanging_threads_memory_does_not_hang(clock):
    pool = Pool(2, "decode", 60, clock)
    hung, gate = job(), Gate()

    def large(then: Callable[[], None]) -> Callable[[], None]:
        def task() -> None:
            with pool.memory.hold(2**40):
                then()

        return task

    pool.submit(hung, [0], large(gate))
    assert gate.entered.wait(WAIT_S)
    waiting = job()
    pool.submit(waiting, [0], large(lambda: waiting.settle(0, "done")))
    while not any(map(pool.memory.is_waiting, pool._workers.values())):
        time.sleep(0.01)
    clock.now += 60
    pool.inspect()
    waiting.done.result(WAIT_S)
    assert isinstance(hung.results[0], ModelFailed)
    assert waiting.results == ["done"]
    gate.opened.set()
    pool.close()


def test_a_thread_that_died_is_replaced(pool, monkeypatch):
    def die(item: object) -> None:
        raise KeyboardInterrupt  # whatever a task raises is caught: this stands for our own fault

    assert run(pool) == ["done"]
    (thread,) = pool._workers.values()
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    with monkeypatch.context() as faulty:
        faulty.setattr("service.pool._run", die)
        lost = job()
        pool.submit(lost, [0], lambda: None)
        thread.join(WAIT_S)
    pool.inspect()
    lost.done.result(WAIT_S)
    assert isinstance(lost.results[0], ModelFailed)
    assert run(pool) == ["done"]


def test_it_is_noticed_without_being_looked_for():
    pool = Pool(1, "decode", 0.01)
    hung, gate = job(), Gate()
    pool.submit(hung, [0], gate)
    hung.done.result(WAIT_S)
    assert isinstance(hung.results[0], ModelFailed)
    gate.opened.set()
    pool.close()


class Held:
    """What a task holds on to."""

    def __call__(self) -> None:
        raise AssertionError("nobody waits for this")


def test_what_is_for_a_job_that_is_over_is_forgotten_and_not_kept_again(pool):
    _, gate = hold(pool)
    over, other, tasks = job(2), job(), [Held() for _ in range(3)]
    gone = [weakref.ref(task) for task in tasks]
    for index in range(2):
        pool.submit(over, [index], tasks.pop())
        over.settle(index, "abandoned")
    pool.submit(other, [0], lambda: other.settle(0, "done"))
    assert [one() is None for one in gone] == [False, False, False]
    pool.drop(over)
    pool.submit(over, [0], tasks.pop())
    assert [one() for one in gone] == [None, None, None]
    gate.opened.set()
    other.done.result(WAIT_S)
    assert over.results == ["abandoned", "abandoned"]


def test_closing_settles_what_waits_and_refuses_the_rest(pool):
    held, gate = hold(pool)
    waiting, late = job(2), job()
    pool.submit(waiting, [0, 1], lambda: None)
    pool.shut()
    assert all(isinstance(one, NotReady) for one in waiting.results)
    pool.submit(late, [0], lambda: None)
    assert isinstance(late.results[0], NotReady)
    gate.opened.set()
    pool.close()
    assert gate.left.is_set()
    assert not held.done.done()  # it was finished; what it comes to is the next step's
