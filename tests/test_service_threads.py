"""Whether a pool of threads gets on."""

import asyncio
import threading
from collections.abc import Iterator

import pytest

from service.threads import Threads

WAIT_S = 30


@pytest.fixture
def one() -> Iterator[Threads]:
    made = Threads(1, "one")
    yield made
    made.shutdown()


async def begins(threads: Threads, within_s: float) -> bool:
    try:
        async with asyncio.timeout(within_s):
            await threads.begin_next()
    except TimeoutError:
        return False
    return True


def test_threads_with_nothing_to_do_get_on(one: Threads):
    assert asyncio.run(begins(one, WAIT_S))
    assert asyncio.run(begins(one, WAIT_S))


def test_threads_that_all_hang_do_not_and_are_sent_no_more_however_often_they_are_asked(
    one: Threads,
):
    go_on = threading.Event()
    one.submit(go_on.wait, WAIT_S)
    for _ in range(3):
        assert not asyncio.run(begins(one, 0.05))
    assert one._work_queue.qsize() == 1
    go_on.set()
    assert asyncio.run(begins(one, WAIT_S))


def test_threads_with_a_long_queue_get_on_when_they_begin_the_next_of_it(one: Threads):
    steps = [threading.Event() for _ in range(3)]
    waiting = [one.submit(step.wait, WAIT_S) for step in steps]

    async def scenario() -> None:
        asked = asyncio.ensure_future(begins(one, WAIT_S))
        await asyncio.sleep(0)
        steps[0].set()
        assert await asked
        assert not waiting[1].done()  # it was begun, and others are before the canary

    asyncio.run(scenario())
    for step in steps:
        step.set()


def test_what_is_called_gets_its_arguments_and_gives_its_result_or_error(one: Threads):
    assert one.submit(int, "11", base=2).result(WAIT_S) == 3
    with pytest.raises(ValueError, match="invalid literal"):
        one.submit(int, "x").result(WAIT_S)
