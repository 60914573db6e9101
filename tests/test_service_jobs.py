"""Bulk jobs: /v1/jobs, from being made to being dropped, and how many there may be."""

import asyncio
import errno
import json
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from bulk_jobs import NDJSON, finish, held_model, job, lines, texts
from served import COUNT, World, check_refusal, error, serving

from clipserve.errors import DiskFull, IndexStoreError
from service import bulk
from service import jobs as service_jobs
from service.routes import jobs as routes
from service.settings import load_settings
from service.spool import Spool


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


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The waits of jobs between their attempts: each ends with a `go_on`; `told` has its length."""
    made = SimpleNamespace(told=[], begun=threading.Semaphore(0), go_on=threading.Semaphore(0))

    async def sleep(seconds: float) -> None:
        made.told.append(seconds)
        made.begun.release()
        while not made.go_on.acquire(blocking=False):
            await asyncio.sleep(0.001)

    monkeypatch.setattr(
        service_jobs, "asyncio", SimpleNamespace(**vars(asyncio) | {"sleep": sleep})
    )
    return made


@pytest.mark.parametrize(
    ("failure", "says"),
    [
        (DiskFull("SECRET is full"), "there is room"),
        (IndexStoreError("SECRET is damaged"), "the server's log says why"),
        (OSError(errno.EIO, "SECRET cannot be read"), "the server's log says why"),
    ],
)
def test_a_job_waits_for_a_failure_of_the_store_to_pass_and_loses_nothing(
    own_world: World,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    pauses: SimpleNamespace,
    failure: Exception,
    says: str,
):
    store, stored = bulk.store, []

    def fail_after_one(*arguments: Any) -> int:
        if len(stored) == 1:
            raise failure
        stored.append(store(*arguments))
        return stored[-1]

    items = [{"id": "", "text": "x"}, *texts(149)]
    with monkeypatch.context() as failing:
        failing.setattr(bulk, "store", fail_after_one)
        id = own_world.post("/v1/jobs", collection="toys", items=items).json()["id"]
        for _ in range(8):
            assert pauses.begun.acquire(timeout=30)
            waiting = job(own_world, id)
            assert (waiting["state"], waiting["done"]) == ("running", 64)
            assert says in waiting["error"]
            assert "SECRET" not in json.dumps(waiting)
            assert (tmp_path / "jobs" / id / "lines").exists()
            pauses.go_on.release()
        assert pauses.begun.acquire(timeout=30)
    pauses.go_on.release()
    finish(own_world)
    done = job(own_world, id)
    assert (done["state"], done["done"], done["error"]) == ("done", 150, None)
    assert (done["num_failed"], [one["index"] for one in done["failed"]]) == (1, [0])
    assert own_world.get("/v1/collections/toys").json()["count"] == COUNT + 149
    assert pauses.told == [1, 2, 4, 8, 16, 32, 60, 60, 60]


def test_a_job_waits_for_its_lines_while_they_are_out_of_reach(
    own_world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pauses: SimpleNamespace
):
    def lose_the_volume(*arguments: Any) -> int:
        (lines,) = tmp_path.glob("jobs/*/lines")
        lines.rename(tmp_path / "away")
        raise OSError(errno.EIO, "no volume")

    with monkeypatch.context() as failing:
        failing.setattr(bulk, "store", lose_the_volume)
        id = own_world.post("/v1/jobs", collection="toys", items=texts(3)).json()["id"]
        assert pauses.begun.acquire(timeout=30)
    pauses.go_on.release()
    assert pauses.begun.acquire(timeout=30)
    assert (job(own_world, id)["state"], job(own_world, id)["done"]) == ("running", 0)
    (tmp_path / "away").rename(tmp_path / "jobs" / id / "lines")
    pauses.go_on.release()
    finish(own_world)
    assert (job(own_world, id)["state"], job(own_world, id)["done"]) == ("done", 3)
    assert own_world.get("/v1/collections/toys").json()["count"] == COUNT + 3


def test_a_job_whose_last_write_was_kept_but_not_acknowledged_ends_without_error(
    own_world: World, monkeypatch: pytest.MonkeyPatch, pauses: SimpleNamespace
):
    def store_but_fail(*arguments: Any) -> None:
        store(*arguments)
        raise DiskFull("kept, but not acknowledged")

    store = bulk.store
    monkeypatch.setattr(bulk, "store", store_but_fail)
    id = own_world.post("/v1/jobs", collection="toys", items=texts(3)).json()["id"]
    assert pauses.begun.acquire(timeout=30)
    assert "there is room" in job(own_world, id)["error"]
    pauses.go_on.release()
    finish(own_world)
    done = job(own_world, id)
    assert (done["state"], done["done"], done["error"]) == ("done", 3, None)


def test_a_job_that_waits_for_room_is_cancelled_or_left_to_the_next_process(
    tmp_path: Path,
    model_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    pauses: SimpleNamespace,
):
    def fail(*_: Any) -> None:
        raise DiskFull("no room")

    settings = load_settings(jobs_dir=tmp_path / "jobs")
    with monkeypatch.context() as full, serving(tmp_path, model_dir, settings) as world:
        full.setattr(bulk, "store", fail)
        first, second = (
            world.post("/v1/jobs", collection="toys", items=texts(3, start)).json()["id"]
            for start in (0, 10)
        )
        assert pauses.begun.acquire(timeout=30)
        cancelled = world.client.delete(f"/v1/jobs/{first}").json()
        assert (cancelled["state"], cancelled["error"]) == ("cancelled", None)
        assert pauses.begun.acquire(timeout=30)  # the other one has its turn
    with serving(tmp_path, model_dir, settings) as world:
        finish(world)
        assert job(world, first)["state"] == "cancelled"
        assert (job(world, second)["state"], job(world, second)["done"]) == ("done", 3)
        assert world.get("/v1/collections/toys").json()["count"] == COUNT + 3


def test_a_job_whose_collection_is_dropped_while_it_waits_for_room_fails(
    own_world: World, monkeypatch: pytest.MonkeyPatch, pauses: SimpleNamespace
):
    def fail(*_: Any) -> None:
        raise DiskFull("no room")

    own_world.put("/v1/collections/other")
    monkeypatch.setattr(bulk, "store", fail)
    id = own_world.post("/v1/jobs", collection="other", items=texts(3)).json()["id"]
    assert pauses.begun.acquire(timeout=30)
    assert own_world.client.delete("/v1/collections/other").status_code == 200
    pauses.go_on.release()
    finish(own_world)
    assert job(own_world, id)["state"] == "failed"


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
        ({"items": [{"text": "x"}]}, 422, "items[0].id"),
        ({"items": [{"id": "a", "sound": "x"}]}, 422, "does not know"),
        ({"lines": []}, 422, "does not know"),
    ],
)
def test_a_wrong_job_says_what_is_wrong_and_is_not_made(own_world: World, body, status, word):
    check_refusal(own_world.client.post("/v1/jobs", json=body), status, word)
    assert own_world.get("/v1/jobs").json()["data"] == []
    wrong = own_world.client.post("/v1/jobs", content=b"x", headers={"Content-Type": "text/csv"})
    assert wrong.status_code == 415
