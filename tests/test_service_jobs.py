"""Bulk jobs: /v1/jobs, what survives a crash, and what a job costs others."""

import asyncio
import errno
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from served import COUNT, World, b64, check_refusal, error, serving

from clipserve.errors import IndexStoreError
from service import bulk
from service import jobs as service_jobs
from service.errors import InvalidBody
from service.logs import JsonFormatter
from service.notes import notes
from service.routes import jobs as routes
from service.settings import load_settings
from service.spool import Spool

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


def test_several_requests_append_to_one_job_which_then_starts(own_world: World):
    made = own_world.post("/v1/jobs", collection="toys", start=False).json()
    place = f"/v1/jobs/{made['id']}"
    assert (made["state"], made["total"]) == ("open", 0)
    check_refusal(own_world.client.post(f"{place}:start"), 400, "no items")
    for start in (0, 100):
        body = lines(texts(100, start))
        answer = own_world.client.post(f"{place}:append", content=body, headers=NDJSON)
        assert (answer.status_code, answer.json()["appended"]) == (200, 100)
    finish(own_world)
    assert own_world.get("/v1/collections/toys").json()["count"] == COUNT
    assert own_world.client.post(f"{place}:start").json()["state"] == "queued"
    finish(own_world)
    assert job(own_world, made["id"])["done"] == 200
    assert own_world.get("/v1/collections/toys").json()["count"] == COUNT + 200
    late = own_world.client.post(f"{place}:append", content=lines(texts(1)), headers=NDJSON)
    assert (late.status_code, error(late)["code"]) == (400, "job_not_open")


def test_the_last_of_several_items_of_one_id_stays(own_world: World):
    items = [{"id": "a", "text": "x", "caption": str(i)} for i in range(150)]
    own_world.post("/v1/jobs", collection="toys", items=items)
    finish(own_world)
    assert own_world.get("/v1/collections/toys/items/a").json()["caption"] == "149"
    assert own_world.get("/v1/collections/toys").json()["count"] == COUNT + 1


def test_a_collection_has_one_job_at_a_time_and_others_their_own(own_world: World):
    own_world.put("/v1/collections/other")
    with held_model(own_world) as model:
        first = own_world.post("/v1/jobs", collection="toys", items=texts(3)).json()
        second = own_world.post("/v1/jobs", collection="toys", items=texts(3)).json()
        other = own_world.post("/v1/jobs", collection="other", items=texts(3)).json()
        assert model.reached.wait(30)
        listed = {one["id"]: one["state"] for one in own_world.get("/v1/jobs").json()["data"]}
        assert listed == {first["id"]: "running", second["id"]: "queued", other["id"]: "running"}
    finish(own_world)
    states = [job(own_world, one["id"])["state"] for one in (first, second, other)]
    assert states == ["done"] * 3


def test_a_cancelled_job_stops_and_the_next_has_its_turn(own_world: World, tmp_path: Path):
    with held_model(own_world) as model:
        first = own_world.post("/v1/jobs", collection="toys", items=texts(200)).json()["id"]
        second = own_world.post("/v1/jobs", collection="toys", items=texts(3)).json()["id"]
        assert model.reached.wait(30)
        cancelled = own_world.client.delete(f"/v1/jobs/{first}").json()
        assert cancelled["state"] == "cancelled"
    finish(own_world)
    assert job(own_world, second)["state"] == "done"
    assert job(own_world, first)["done"] < 200
    assert not (tmp_path / "jobs" / first / "lines").exists()
    assert own_world.client.delete(f"/v1/jobs/{first}").status_code == 200
    assert own_world.get(f"/v1/jobs/{first}").status_code == 404
    assert not (tmp_path / "jobs" / first).exists()


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


def test_a_job_for_a_collection_that_was_made_anew_fails(tmp_path: Path, model_dir: Path):
    settings = load_settings(jobs_dir=tmp_path / "jobs")
    with serving(tmp_path, model_dir, settings) as world:
        made = world.post("/v1/jobs", items=texts(3), start=False).json()
    shutil.rmtree(tmp_path / "toys")
    with serving(tmp_path, model_dir, settings) as world:
        world.client.post(f"/v1/jobs/{made['id']}:start")
        finish(world)
        failed = job(world, made["id"])
        assert failed["state"] == "failed"
        assert "made anew" in failed["error"]
        assert world.get("/v1/collections/toys").json()["count"] == COUNT


def test_the_jobs_of_a_dropped_collection_end_and_make_room(tmp_path: Path, model_dir: Path):
    settings = load_settings(collections_root=tmp_path, jobs_dir=tmp_path / "jobs", max_jobs=3)
    with serving(tmp_path, model_dir, settings) as world, held_model(world) as model:
        world.put("/v1/collections/other")
        starts = (True, True, False)
        made = [
            world.post("/v1/jobs", collection="other", items=texts(3), start=start).json()["id"]
            for start in starts
        ]
        assert model.reached.wait(30)
        assert world.client.delete("/v1/collections/other").status_code == 200
        model.release.set()
        finish(world)
        for id in made:
            ended = job(world, id)
            assert (ended["state"], ended["error"]) == ("failed", "the collection was dropped")
            assert not (tmp_path / "jobs" / id / "lines").exists()
        kept = [json.loads((tmp_path / "jobs" / id / "job.json").read_bytes()) for id in made]
        assert [one["state"] for one in kept] == ["failed"] * 3
        response = world.client.post(f"/v1/jobs/{made[2]}:start")
        assert error(response)["code"] == "job_not_open"
        assert world.post("/v1/jobs", collection="toys", items=texts(1)).status_code == 202


def test_the_jobs_of_a_collection_that_comes_back_go_on(
    own_world: World, monkeypatch: pytest.MonkeyPatch
):
    own_world.put("/v1/collections/other")
    with held_model(own_world) as model, monkeypatch.context() as failing:
        first = own_world.post("/v1/jobs", collection="other", items=texts(3)).json()["id"]
        second = own_world.post("/v1/jobs", collection="other", items=texts(3)).json()["id"]
        assert model.reached.wait(30)
        failing.setattr(own_world.registry, "_erase", lambda path: path.rename(path / "below"))
        assert own_world.client.delete("/v1/collections/other").status_code == 500
        model.release.set()
        finish(own_world)
    assert [job(own_world, id)["state"] for id in (first, second)] == ["done", "done"]
    assert own_world.get("/v1/collections/other").json()["count"] == 3


def test_a_job_that_is_made_while_its_collection_is_dropped_is_refused_and_gone(
    tmp_path: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch
):
    settings = load_settings(collections_root=tmp_path, jobs_dir=tmp_path / "jobs")
    with serving(tmp_path, model_dir, settings) as world, ThreadPoolExecutor(1) as thread:
        world.put("/v1/collections/other")
        create, reached, dropped = Spool.create, threading.Event(), threading.Event()

        def slowly(spool: Spool, about: dict[str, Any]) -> None:
            reached.set()
            assert dropped.wait(30)
            create(spool, about)

        monkeypatch.setattr(Spool, "create", slowly)
        made = thread.submit(
            world.post, "/v1/jobs", collection="other", items=texts(3), start=False
        )
        assert reached.wait(30)
        assert world.client.delete("/v1/collections/other").status_code == 200
        dropped.set()
        assert error(made.result(30))["code"] == "job_not_open"
        assert world.get("/v1/jobs").json()["data"] == []
        assert not list((tmp_path / "jobs").glob("job-*"))


def test_cancelling_what_failed_meanwhile_leaves_it_failed(own_world: World):
    id = own_world.post("/v1/jobs", collection="toys", items=texts(3), start=False).json()["id"]
    jobs = own_world.app.state.jobs
    one = jobs.get(id)

    async def cancel_late() -> None:
        async with one.adding:
            cancelling = asyncio.create_task(jobs.cancel(one))
            await asyncio.sleep(0)
            one.state, one.error = "failed", "for a reason"
        await cancelling

    assert own_world.client.portal is not None
    own_world.client.portal.call(cancel_late)
    assert (job(own_world, id)["state"], job(own_world, id)["error"]) == ("failed", "for a reason")


def test_a_job_whose_start_cannot_be_stored_can_be_started_later(
    own_world: World, monkeypatch: pytest.MonkeyPatch
):
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    id = own_world.post("/v1/jobs", collection="toys", items=texts(2), start=False).json()["id"]
    with monkeypatch.context() as full:
        full.setattr("service.spool.write_atomic", fail)
        refused = own_world.client.post(f"/v1/jobs/{id}:start")
    assert (refused.status_code, error(refused)["code"]) == (503, "disk_full")
    assert job(own_world, id)["state"] == "open"
    more = lines(texts(1, 9))
    appended = own_world.client.post(f"/v1/jobs/{id}:append", content=more, headers=NDJSON)
    assert appended.status_code == 200
    assert own_world.client.post(f"/v1/jobs/{id}:start").status_code == 202
    finish(own_world)
    assert (job(own_world, id)["state"], job(own_world, id)["done"]) == ("done", 3)


def test_a_damaged_collection_fails_the_job_without_its_path(
    own_world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def fail(*_: Any, **__: Any) -> None:
        raise IndexStoreError(f"{tmp_path} is damaged")

    made = own_world.post("/v1/jobs", collection="toys", items=texts(3), start=False).json()
    monkeypatch.setattr(own_world.registry.collections["toys"].collection, "upsert", fail)
    own_world.client.post(f"/v1/jobs/{made['id']}:start")
    finish(own_world)
    failed = job(own_world, made["id"])
    assert failed["state"] == "failed"
    assert "the server's log says why" in failed["error"]
    assert str(tmp_path) not in json.dumps(failed)


def test_the_next_process_takes_up_what_waits(tmp_path: Path, model_dir: Path):
    settings = load_settings(jobs_dir=tmp_path / "jobs")
    with serving(tmp_path, model_dir, settings) as world, held_model(world) as model:
        running = world.post("/v1/jobs", items=texts(150)).json()["id"]
        queued = world.post("/v1/jobs", items=texts(2, 500)).json()["id"]
        waiting = world.post("/v1/jobs", items=texts(1, 900), start=False).json()["id"]
        assert model.reached.wait(30)
        stop_jobs(world)
    with serving(tmp_path, model_dir, settings) as world:
        finish(world)
        states = {one["id"]: one["state"] for one in world.get("/v1/jobs").json()["data"]}
        assert states == {running: "done", queued: "done", waiting: "open"}
        assert job(world, running)["done"] == 150
        world.client.post(f"/v1/jobs/{waiting}:start")
        finish(world)
        assert world.get("/v1/collections/toys").json()["count"] == COUNT + 153


def stop_jobs(world: World) -> None:
    assert world.client.portal is not None
    world.client.portal.call(world.app.state.jobs.close)


KILLED = """
import os, signal, sys
from pathlib import Path
import service.bulk as bulk
from served import serving
from service.settings import load_settings
folder, model_dir, when = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
store, stored = bulk.store, []

def killing(*arguments):
    stored.append(1)
    if len(stored) == 3 and when == "before":
        os.kill(os.getpid(), signal.SIGKILL)
    store(*arguments)
    if len(stored) == 3:
        os.kill(os.getpid(), signal.SIGKILL)

bulk.store = killing
with serving(folder, model_dir, load_settings(jobs_dir=folder / "jobs")) as world:
    lines = [f'{{"id": "t{i}", "text": "text {i}"}}' for i in range(400)]
    lines[70] = "no item"
    lines[130] = "no item"
    lines[350] = "no item"
    headers = {"Content-Type": "application/x-ndjson"}
    world.client.post("/v1/jobs", content="\\n".join(lines).encode(), headers=headers)
    signal.pause()
"""


@pytest.mark.parametrize(("when", "stored"), [("before", 2 * 64), ("after", 3 * 64)])
def test_after_a_kill_no_item_is_stored_twice_or_passed_over(
    tmp_path: Path, model_dir: Path, when: str, stored: int
):
    command = [sys.executable, "-c", KILLED, str(tmp_path), str(model_dir), when]
    tests = Path(__file__).parent
    paths = os.pathsep.join([str(tests), str(tests.parent)])
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    with serving(tmp_path, model_dir, load_settings(jobs_dir=tmp_path / "jobs")) as world:
        finish(world)
        (one,) = world.get("/v1/jobs").json()["data"]
        one = job(world, one["id"])
        assert (one["state"], one["done"], one["total"]) == ("done", 400, 400)
        assert (one["num_failed"], [f["index"] for f in one["failed"]]) == (3, [70, 130, 350])
        collection = world.registry.collections["toys"].collection
        assert collection.count() == COUNT + 397
        # A row number is never used twice: an item stored again would have moved the last one.
        assert collection.rowids().max() == COUNT + 397
        rowids = collection.rowids_of(["t0", "t200", "t399"])
        vectors = collection.vectors_of(np.array(list(rowids.values())))
        want = world.model.embed_texts(["text 0", "text 200", "text 399"])
        np.testing.assert_allclose(vectors, want, atol=1e-5)


def test_a_nearly_full_disk_takes_no_job(own_world: World, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2**20))
    response = own_world.post("/v1/jobs", collection="toys", items=texts(3))
    check_refusal(response, 503, "disk")
    assert own_world.get("/v1/jobs").json()["data"] == []
    assert list((own_world.folder / "jobs").glob("job-*")) == []


def test_so_many_jobs_are_known_and_no_more(tmp_path: Path, model_dir: Path):
    settings = load_settings(jobs_dir=tmp_path / "jobs", max_jobs=2)
    with serving(tmp_path, model_dir, settings) as world:
        ids = [world.post("/v1/jobs", items=texts(1)).json()["id"]]
        finish(world)
        ids += [world.post("/v1/jobs", start=False).json()["id"] for _ in range(2)]
        assert [one["id"] for one in world.get("/v1/jobs").json()["data"]] == ids[1:]
        response = world.post("/v1/jobs", start=False)
        assert (response.status_code, error(response)["code"]) == (429, "overloaded")


def test_a_job_that_nobody_started_in_a_day_makes_room(tmp_path: Path, model_dir: Path):
    settings = load_settings(jobs_dir=tmp_path / "jobs", max_jobs=2)
    clock = SimpleNamespace(now=1000.0)
    with serving(tmp_path, model_dir, settings) as world:
        world.app.state.jobs._now = lambda: clock.now
        ids = [world.post("/v1/jobs", start=False).json()["id"] for _ in range(2)]
        clock.now += 3600
        place = f"/v1/jobs/{ids[0]}"
        world.client.post(f"{place}:append", content=lines(texts(1)), headers=NDJSON)
        clock.now += service_jobs._FORSAKEN_S - 3601
        assert world.post("/v1/jobs", start=False).status_code == 429
        clock.now += 1  # a day after the second was made, not after the first was added to
        third = world.post("/v1/jobs", start=False)
        assert third.status_code == 202
        known = [one["id"] for one in world.get("/v1/jobs").json()["data"]]
        assert known == [ids[0], third.json()["id"]]
        assert world.post("/v1/jobs", start=False).status_code == 429


def test_a_job_that_is_found_at_the_start_has_another_day(tmp_path: Path, model_dir: Path):
    settings = load_settings(jobs_dir=tmp_path / "jobs", max_jobs=1)
    (tmp_path / "jobs" / "job-1").mkdir(parents=True)
    (tmp_path / "jobs" / "job-1" / "job.json").write_text(json.dumps(GOOD))
    with serving(tmp_path, model_dir, settings) as world:
        assert world.post("/v1/jobs", start=False).status_code == 429


def test_items_are_written_off_the_event_loop(own_world: World, monkeypatch: pytest.MonkeyPatch):
    threads = []
    write = routes._write_lines

    def observe(items: Any) -> bytes:
        threads.append(threading.get_ident())
        return write(items)

    monkeypatch.setattr(routes, "_write_lines", observe)
    own_world.post("/v1/jobs", collection="toys", items=texts(3))
    assert own_world.client.portal is not None
    assert threads
    assert own_world.client.portal.call(threading.get_ident) not in threads


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


def test_a_folder_of_jobs_belongs_to_one_process(tmp_path: Path, model_dir: Path):
    settings = load_settings(jobs_dir=tmp_path / "jobs")
    with serving(tmp_path, model_dir, settings) as first:
        id = first.post("/v1/jobs", items=texts(1), start=False).json()["id"]
        with serving(tmp_path, model_dir, settings) as second:
            check_refusal(second.post("/v1/jobs", items=texts(1)), 403, "another process")
            assert second.get(f"/v1/jobs/{id}").status_code == 404
        assert first.get(f"/v1/jobs/{id}").status_code == 200


GOOD = {
    **{"id": "job-1", "collection": "toys", "identity": "x", "created": 1.5, "state": "open"},
    **{"total": 0, "done": 0, "done_before": 0, "num_failed": 0, "seconds": 0.0, "error": None},
}


@pytest.mark.parametrize(
    "about",
    [
        "",
        "{}",
        "[]",
        "[" * 100_000,
        *(
            json.dumps(GOOD | change)
            for change in (
                {"id": "job-2"},
                {"color": "red"},
                {"state": "paused"},
                {"created": "today"},
                {"created": float("nan")},
            )
        ),
    ],
    ids=lambda about: about[:20] + about[-20:],
)
def test_a_damaged_job_is_set_aside_and_harms_no_other(
    tmp_path: Path, model_dir: Path, about: str, caplog: pytest.LogCaptureFixture
):
    folder = tmp_path / "jobs"
    for id, content in {"job-0": json.dumps(GOOD | {"id": "job-0"}), "job-1": about}.items():
        (folder / id).mkdir(parents=True)
        (folder / id / "job.json").write_text(content)
    with serving(tmp_path, model_dir, load_settings(jobs_dir=folder)) as world:
        assert [one["id"] for one in world.get("/v1/jobs").json()["data"]] == ["job-0"]
        assert world.post("/v1/jobs", collection="toys", items=texts(1)).status_code == 202
        finish(world)
    assert (folder / "damaged-job-1" / "job.json").read_text() == about
    assert not (folder / "job-1").exists()
    (line,) = [r.getMessage() for r in caplog.records if r.name == "service.jobs"]
    assert "job-1" in line
    assert "\n" not in line


def test_a_job_that_cannot_be_read_now_stays_where_it_is(tmp_path: Path, model_dir: Path):
    (tmp_path / "jobs" / "job-1" / "job.json").mkdir(parents=True)
    with serving(tmp_path, model_dir, load_settings(jobs_dir=tmp_path / "jobs")) as world:
        assert world.get("/v1/jobs").json()["data"] == []
    assert (tmp_path / "jobs" / "job-1" / "job.json").exists()


def test_without_a_folder_there_are_no_jobs(world: World):
    response = world.post("/v1/jobs", items=texts(1))
    check_refusal(response, 403, "CLIPSERVE_JOBS_DIR")
    assert world.get("/v1/jobs").json()["data"] == []


@pytest.mark.parametrize("id", ["nope", "..%2F..%2Fetc", "%00", "job-*"])
def test_an_id_is_a_job_or_nothing(own_world: World, id: str):
    for response in (
        own_world.client.get(f"/v1/jobs/{id}"),
        own_world.client.delete(f"/v1/jobs/{id}"),
        own_world.client.post(f"/v1/jobs/{id}:start"),
        own_world.client.post(f"/v1/jobs/{id}:append", content=b"{}", headers=NDJSON),
    ):
        assert response.status_code in (404, 405)


@pytest.mark.parametrize(
    ("body", "status", "word"),
    [
        ({"collection": "nope", "items": [{"id": "a", "text": "x"}]}, 404, "no such collection"),
        ({"items": []}, 400, "no items"),
        ({"items": [{"text": "x"}]}, 422, "items.0.id"),
        ({"items": [{"id": "a", "sound": "x"}]}, 422, "does not know"),
        ({"lines": []}, 422, "does not know"),
    ],
)
def test_a_wrong_job_says_what_is_wrong_and_is_not_made(own_world: World, body, status, word):
    check_refusal(own_world.client.post("/v1/jobs", json=body), status, word)
    assert own_world.get("/v1/jobs").json()["data"] == []
    wrong = own_world.client.post("/v1/jobs", content=b"x", headers={"Content-Type": "text/csv"})
    assert wrong.status_code == 415
