"""Bulk jobs for tests: their items, and waiting until they are done."""

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

from served import World

NDJSON = {"Content-Type": "application/x-ndjson"}


def texts(count: int, start: int = 0) -> list[dict[str, Any]]:
    return [{"id": f"t{i}", "text": f"text {i}"} for i in range(start, start + count)]


def lines(items: list[Any]) -> bytes:
    return "\n".join(json.dumps(item) for item in items).encode()


def finish(world: World) -> None:
    """Wait until there is nothing left to do."""

    async def idle() -> None:
        runners = world.app.state.jobs._runners
        await asyncio.gather(*runners.values())

    assert world.client.portal is not None
    world.client.portal.call(idle)


def job(world: World, id: str) -> dict[str, Any]:
    found: dict[str, Any] = world.get(f"/v1/jobs/{id}").json()
    return found


@contextmanager
def held_model(world: World) -> Iterator[SimpleNamespace]:
    """The model's thread stops at the next text until `release` is set."""
    events = SimpleNamespace(reached=threading.Event(), release=threading.Event())

    def hold(*_: object) -> None:
        events.reached.set()
        events.release.wait(30)

    handle = world.model.network.transformer.register_forward_pre_hook(hold)
    try:
        yield events
    finally:
        events.release.set()
        handle.remove()
