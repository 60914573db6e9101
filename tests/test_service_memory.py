"""Bytes that threads share."""

import threading

from PIL import Image

from service.memory import Budget, give_back_pictures

WAIT_S = 10


def ask(budget: Budget, size: int) -> tuple[threading.Event, threading.Event, threading.Thread]:
    """A thread that wants so much, that it has it, and what lets it go on."""
    has, goes_on = threading.Event(), threading.Event()

    def work() -> None:
        with budget.hold(size):
            has.set()
            assert goes_on.wait(WAIT_S)

    thread = threading.Thread(target=work)
    thread.start()
    return has, goes_on, thread


def test_who_asks_for_more_than_is_left_waits_and_who_comes_later_waits_behind() -> None:
    budget = Budget(1000)
    first, second = ask(budget, 600), ask(budget, 400)
    assert first[0].wait(WAIT_S)
    assert second[0].wait(WAIT_S)
    large = ask(budget, 5000)  # more than there is
    assert not large[0].wait(0.05)
    small = ask(budget, 20)
    first[1].set()
    assert not large[0].wait(0.05)
    assert not small[0].wait(0.05)
    second[1].set()
    assert large[0].wait(WAIT_S)
    assert not small[0].wait(0.05)
    large[1].set()
    assert small[0].wait(WAIT_S)
    small[1].set()
    for *_, thread in (first, second, large, small):
        thread.join(WAIT_S)
    with budget.hold(1000):  # all of it is back
        pass


def test_little_is_had_at_once_whoever_waits() -> None:
    budget = Budget(1000)
    first = ask(budget, 1000)
    assert first[0].wait(WAIT_S)
    second = ask(budget, 1000)
    assert not second[0].wait(0.05)
    with budget.hold(10):
        pass
    for _, goes_on, thread in (first, second):
        goes_on.set()
        thread.join(WAIT_S)


def test_what_a_hanging_thread_holds_is_taken_back_once() -> None:
    budget = Budget(1000)
    has, goes_on, thread = ask(budget, 1000)
    assert has.wait(WAIT_S)
    waiting = ask(budget, 1000)
    assert not waiting[0].wait(0.05)
    assert budget.is_waiting(waiting[2])
    assert not budget.is_waiting(thread)
    budget.take_back(thread)
    assert waiting[0].wait(WAIT_S)
    third = ask(budget, 1000)
    goes_on.set()
    thread.join(WAIT_S)
    assert not third[0].wait(0.05)  # its late end gives nothing back a second time
    for _, goes_on, thread in (waiting, third):
        goes_on.set()
        thread.join(WAIT_S)


def test_a_large_picture_is_one_piece() -> None:
    before = Image.core.get_block_size()
    try:
        give_back_pictures()
        Image.core.reset_stats()
        Image.new("RGB", (4000, 4000))
        assert Image.core.get_stats()["allocated_blocks"] == 1
    finally:
        Image.core.set_block_size(before)
