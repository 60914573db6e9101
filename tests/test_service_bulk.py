"""What a bulk job does with its items: stored, named, fetched, tried again; after requests."""

import asyncio
import json
import logging
import threading
import tracemalloc
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from bulk_jobs import NDJSON, finish, held_model, job, texts
from served import COUNT, World, b64, serving

from service import bulk
from service.errors import InvalidBody
from service.logs import JsonFormatter
from service.notes import notes
from service.settings import load_settings


def test_a_job_stores_what_can_be_stored_and_names_the_rest(own_world: World):
    items: list[Any] = [
        {"id": "a", "image": b64(own_world.pictures[0]), "caption": "one"},
        {"id": "b", "image": b64(b"no picture")},
        {"id": "c", "text": "a red heart", "metadata": {"x": 1}},
        {"id": "", "text": "x"},
    ]
    made = own_world.post("/v1/jobs", collection="toys", items=items)
    assert made.status_code == 202
    assert made.json()["total"] == 4
    finish(own_world)
    done = job(own_world, made.json()["id"])
    assert (done["state"], done["done"], done["num_failed"]) == ("done", 4, 2)
    assert [one["index"] for one in done["failed"]] == [1, 3]
    assert done["failed"][0]["error"]["code"] == "invalid_image"
    assert done["seconds"] > 0
    assert done["items_per_second"] > 0
    assert own_world.get("/v1/collections/toys").json()["count"] == COUNT + 2
    assert own_world.get("/v1/collections/toys/items/c").json()["metadata"] == {"x": 1}
    found = own_world.post("/v1/search", image=b64(own_world.pictures[0]), k=2).json()["hits"]
    assert {hit["id"] for hit in found} == {"a", "toys/0"}


def test_lines_that_are_no_items_are_named_and_nothing_of_them_is_repeated(own_world: World):
    body = b'{"id": "a", "text": "x"}\nmArKeR\n\n{"id": "b", "mArKeR": "mArKeR"}\n[]\n'
    made = own_world.client.post("/v1/jobs?collection=toys", content=body, headers=NDJSON)
    finish(own_world)
    done = job(own_world, made.json()["id"])
    assert (done["total"], done["done"], done["num_failed"]) == (4, 4, 3)
    assert [one["index"] for one in done["failed"]] == [1, 2, 3]
    assert "mArKeR" not in json.dumps(done)
    assert own_world.get(f"/v1/jobs/{done['id']}", failed=1).json()["failed"] == done["failed"][:1]


HOSTILE = {
    "deep lists": b'{"id": "x", "text": "x", "metadata": {"a": '
    + b"[" * 5000
    + b"]" * 5000
    + b"}}",
    "many lists": b'{"id": "x", "text": "x", "metadata": {"a": [' + b"[]," * 99_999 + b"[]]}}",
    "many keys": b'{"id": "x", "text": "x", "metadata": {'
    + b",".join(b'"%d":0' % i for i in range(100_001))
    + b"}}",
    "many numbers": b'{"id": "x", "vector": [' + b"1," * 100_001 + b"1]}",
    "unknown fields": b'{"id": "x", "text": "x"'
    + b"".join(b',"%d":0' % i for i in range(200))
    + b"}",
    "a long number": b'{"id": "x", "text": "x", "metadata": {"a": ' + b"9" * 100_000 + b"}}",
    "a large number": b'{"id": "x", "text": "x", "metadata": {"a": 1e999}}',
    "a large vector": b'{"id": "x", "vector": [' + b"1e999," * 15 + b"1]}",
    "half a character": b'{"id": "x", "text": "\\ud800"}',
    "no text": b'{"id": "x", "text": "\xff"}',
    "a long line": b'{"id": "x", "text": "' + b"a" * (5 * 2**20) + b'"}',
}


@pytest.mark.parametrize("line", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_line_fails_alone_and_costs_little_more_than_its_bytes(
    tmp_path: Path, model_dir: Path, line: bytes
):
    settings = load_settings(jobs_dir=tmp_path / "jobs", max_image_bytes=2**20)
    body = b'{"id": "a", "text": "x"}\n' + line + b'\n{"id": "b", "text": "y"}\n'
    with serving(tmp_path, model_dir, settings) as world:
        made = world.client.post("/v1/jobs?collection=toys", content=body, headers=NDJSON)
        finish(world)
        done = job(world, made.json()["id"])
        assert (done["state"], done["done"], done["num_failed"]) == ("done", 3, 1)
        assert done["failed"][0]["index"] == 1
        assert world.registry.collections["toys"].collection.count() == COUNT + 2
    tracemalloc.start()
    try:
        bulk._parse([line], 2**20 * 4 // 3 + bulk._LINE_BYTES)
        assert tracemalloc.get_traced_memory()[1] < 20 * 2**20
    finally:
        tracemalloc.stop()


def test_a_line_that_is_too_long_is_not_parsed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("service.bodies._parse_json", lambda *_: pytest.fail("it was parsed"))
    (refused,) = bulk._parse([b"{}" * 6], 11)
    assert isinstance(refused, InvalidBody)
    assert refused.code == "line_too_long"


@pytest.fixture
def queued(own_world: World, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """What comes to the queue: `puts` counts, `priorities` says how."""
    batcher = own_world.registry.models["tiny"].pipeline.batcher
    seen = SimpleNamespace(puts=threading.Semaphore(0), priorities=[])
    put = batcher.put

    def noticed(*arguments: Any) -> None:
        put(*arguments)
        seen.priorities.append(arguments[3])
        seen.puts.release()

    monkeypatch.setattr(batcher, "put", noticed)
    return seen


def test_requests_go_before_a_job(own_world: World, queued: SimpleNamespace):
    sizes: list[int] = []
    own_world.model.network.transformer.register_forward_pre_hook(
        lambda _, given: sizes.append(len(given[0]))
    )
    asked = {"args": ("/v1/embeddings",), "kwargs": {"input": "a cat"}}
    with held_model(own_world) as model:
        own_world.post("/v1/jobs", collection="toys", items=texts(150))
        assert model.reached.wait(30)
        request = threading.Thread(target=own_world.post, **asked)
        request.start()
        for _ in range(3):  # two batches of the job and the request
            assert queued.puts.acquire(timeout=30)
    request.join(30)
    finish(own_world)
    assert sizes[:2] == [64, 1]
    assert own_world.get("/v1/collections/toys").json()["count"] == COUNT + 150


@pytest.mark.parametrize("priority", ["bulk", "interactive"])
def test_a_jobs_items_and_those_of_a_request_that_says_so_are_bulk(
    own_world: World, queued: SimpleNamespace, priority: str
):
    own_world.post("/v1/embeddings", input="a cat", priority=priority)
    picture = {"image": b64(own_world.pictures[0])}
    own_world.post("/v1/embeddings", input=[picture], priority=priority)
    assert queued.priorities == [priority] * 2
    items = [{"id": "a", "text": "x"}, {"id": "b", **picture}]
    own_world.post("/v1/jobs", collection="toys", items=items)
    finish(own_world)
    assert queued.priorities[2:] == ["bulk"] * 2


def test_a_job_waits_while_the_queue_is_full(own_world: World, monkeypatch: pytest.MonkeyPatch):
    batcher = own_world.registry.models["tiny"].pipeline.batcher
    blocking = batcher.admit(own_world.registry.settings.max_queue_items)
    waits: list[float] = []

    async def sleep(delay: float) -> None:
        waits.append(delay)
        batcher.abandon(blocking)

    patched = SimpleNamespace(**{**vars(asyncio), "sleep": sleep})
    monkeypatch.setattr(bulk, "asyncio", patched)
    own_world.post("/v1/jobs", collection="toys", items=texts(3))
    finish(own_world)
    assert waits
    assert waits[0] >= 1
    assert own_world.get("/v1/collections/toys").json()["count"] == COUNT + 3


def test_a_batch_that_the_model_failed_at_is_tried_again(own_world: World):
    failures = iter([RuntimeError("once")])

    def fail_once(*_: object) -> None:
        if error := next(failures, None):
            raise error

    handle = own_world.model.network.transformer.register_forward_pre_hook(fail_once)
    made = own_world.post("/v1/jobs", collection="toys", items=texts(3)).json()
    finish(own_world)
    handle.remove()
    assert job(own_world, made["id"])["num_failed"] == 0
    assert own_world.get("/v1/collections/toys").json()["count"] == COUNT + 3


def test_failures_are_counted_and_the_first_are_named(
    own_world: World, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(bulk, "FAILED_KEPT", 3)
    made = own_world.post("/v1/jobs", collection="toys", items=[{"id": "a"}] * 100).json()
    finish(own_world)
    done = job(own_world, made["id"])
    assert (done["num_failed"], [one["index"] for one in done["failed"]]) == (100, [0, 1, 2])


class Site:
    """Has a picture behind every address, and counts it as the real fetcher does."""

    def __init__(self, picture: bytes) -> None:
        self.picture = picture
        self.opened = asyncio.Event()
        self.logged: list[dict[str, Any]] = []

    async def get(self, url: str, param: str) -> bytes:
        await self.opened.wait()
        record = logging.LogRecord("site", logging.INFO, "", 0, "fetched", None, None)
        self.logged.append(json.loads(JsonFormatter().format(record)))
        notes().hold(len(self.picture))
        return self.picture


def linked(count: int) -> list[dict[str, Any]]:
    return [{"id": f"p{i}", "image": f"https://x.org/{i}.png"} for i in range(count)]


def test_what_a_job_fetches_is_not_counted_for_the_request_that_began_it(own_world: World):
    site = Site(own_world.pictures[0])
    own_world.registry.fetcher = site
    made = own_world.post("/v1/jobs", collection="toys", items=linked(3)).json()
    assert own_world.client.portal is not None
    own_world.client.portal.call(site.opened.set)  # now that the request has ended
    finish(own_world)
    assert job(own_world, made["id"])["num_failed"] == 0
    assert "clipserve_inflight_bytes 0.0" in own_world.get("/metrics").text
    assert len(site.logged) == 3
    assert not any("request_id" in line for line in site.logged)


def test_a_batch_of_large_pictures_is_fetched_in_parts(
    own_world: World, monkeypatch: pytest.MonkeyPatch
):
    site = Site(own_world.pictures[0])
    site.opened.set()
    own_world.registry.fetcher = site
    monkeypatch.setattr(bulk, "_FETCHED_BYTES", int(2.5 * len(site.picture)))
    sizes: list[int] = []
    prepare = bulk.prepare

    async def observe(items: Any, *arguments: Any, **options: Any) -> Any:
        answer = await prepare(items, *arguments, **options)
        sizes.append(len(items))
        return answer

    monkeypatch.setattr(bulk, "prepare", observe)
    made = own_world.post("/v1/jobs", collection="toys", items=linked(7)).json()
    finish(own_world)
    assert (job(own_world, made["id"])["done"], job(own_world, made["id"])["num_failed"]) == (7, 0)
    assert sizes == [1, 2, 2, 2]


def test_a_picture_that_is_over_the_limit_of_a_batch_is_alone_in_it(
    own_world: World, monkeypatch: pytest.MonkeyPatch
):
    site = Site(own_world.pictures[0])
    site.opened.set()
    own_world.registry.fetcher = site
    monkeypatch.setattr(bulk, "_FETCHED_BYTES", 1)
    made = own_world.post("/v1/jobs", collection="toys", items=linked(3)).json()
    finish(own_world)
    assert (job(own_world, made["id"])["done"], job(own_world, made["id"])["num_failed"]) == (3, 0)


def test_a_number_that_is_none_is_refused_by_the_job_too(own_world: World):
    items = [{"id": "a", "text": "x", "metadata": {"a": float("nan")}}]
    body = json.dumps({"collection": "toys", "items": items})
    headers = {"Content-Type": "application/json"}
    made = own_world.client.post("/v1/jobs", content=body, headers=headers).json()
    finish(own_world)
    assert job(own_world, made["id"])["num_failed"] == 1
