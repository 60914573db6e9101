"""Bulk jobs after a restart or a kill, and what is found in their folder."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from bulk_jobs import finish, held_model, job, texts
from served import COUNT, World, check_refusal, serving

from service.settings import load_settings


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


def test_jobs_of_an_unavailable_collection_wait_and_end_when_it_is_dropped(
    tmp_path: Path, model_dir: Path
):
    settings = load_settings(jobs_dir=tmp_path / "jobs", collections_root=tmp_path)
    with serving(tmp_path, model_dir, settings) as world, held_model(world) as model:
        world.put("/v1/collections/other")
        id = world.post("/v1/jobs", collection="other", items=texts(3)).json()["id"]
        assert model.reached.wait(30)
        stop_jobs(world)
    for file in (tmp_path / "other").iterdir():  # so that not even its identity is known
        file.write_bytes(b"")
    with serving(tmp_path, model_dir, settings) as world:
        world.registry.find_collection(tmp_path / "other")
        finish(world)
        assert (job(world, id)["state"], job(world, id)["total"]) == ("queued", 3)
        assert "not served" in job(world, id)["error"]
        assert world.client.delete("/v1/collections/other").status_code == 200
        assert world.client.portal is not None
        world.client.portal.call(ended, world, id)
        assert job(world, id)["error"] == "the collection was dropped"


async def ended(world: World, id: str) -> None:
    task = world.app.state.jobs.get(id).task
    if task is not None:
        await task


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


GOOD = {
    **{"id": "job-1", "collection": "toys", "identity": "x", "created": 1.5, "state": "open"},
    **{"total": 0, "done": 0, "done_before": 0, "num_failed": 0, "seconds": 0.0, "error": None},
}


def test_a_job_that_is_found_at_the_start_has_another_day(tmp_path: Path, model_dir: Path):
    settings = load_settings(jobs_dir=tmp_path / "jobs", max_jobs=1)
    (tmp_path / "jobs" / "job-1" / "lines").mkdir(parents=True)
    (tmp_path / "jobs" / "job-1" / "job.json").write_text(json.dumps(GOOD))
    with serving(tmp_path, model_dir, settings) as world:
        assert world.post("/v1/jobs", start=False).status_code == 429


def test_a_folder_of_jobs_belongs_to_one_process(tmp_path: Path, model_dir: Path):
    settings = load_settings(jobs_dir=tmp_path / "jobs")
    with serving(tmp_path, model_dir, settings) as first:
        id = first.post("/v1/jobs", items=texts(1), start=False).json()["id"]
        with serving(tmp_path, model_dir, settings) as second:
            check_refusal(second.post("/v1/jobs", items=texts(1)), 403, "another process")
            assert second.get(f"/v1/jobs/{id}").status_code == 404
        assert first.get(f"/v1/jobs/{id}").status_code == 200


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
        (folder / id / "lines").mkdir(parents=True)
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
