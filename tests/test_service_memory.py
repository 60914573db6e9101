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
    budget = Budget(100)
    first, second = ask(budget, 60), ask(budget, 40)
    assert first[0].wait(WAIT_S)
    assert second[0].wait(WAIT_S)
    large = ask(budget, 1000)  # more than there is
    assert not large[0].wait(0.05)
    small = ask(budget, 1)
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
    with budget.hold(100):  # all of it is back
        pass


def test_a_large_picture_is_one_piece() -> None:
    before = Image.core.get_block_size()
    try:
        give_back_pictures()
        Image.core.reset_stats()
        Image.new("RGB", (4000, 4000))
        assert Image.core.get_stats()["allocated_blocks"] == 1
    finally:
        Image.core.set_block_size(before)
