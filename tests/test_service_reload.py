"""A new checkpoint in the place of a model that serves."""

import asyncio
import gc
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import needs_int8

import clipserve
from clipserve import checkpoint
from clipserve.embed import precision
from clipserve.errors import CheckpointError, ConfigError
from clipserve.model import create
from index.collection import Collection, Item
from service import reload
from service.errors import ModelFailed, NotFound
from service.inputs import Text
from service.registry import Registry
from service.reload import Reloader
from service.settings import load_settings

WAIT_S = 10


@pytest.fixture
def registry() -> Iterator[Registry]:
    made = Registry(load_settings())
    yield made
    made.close()


@pytest.fixture
def paths(tmp_path: Path, architecture: dict[str, object]) -> list[Path]:
    """Two checkpoints of one name."""
    made = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        made.append(tmp_path / f"step-{seed}")
        checkpoint.save(create(architecture), made[-1], name="m")
    return made


def add_collection(registry: Registry, path: Path) -> None:
    served = registry.model(None)
    with Collection.create(
        path, fingerprint=served.fingerprint, model_name="m", embed_dim=16
    ) as collection:
        collection.upsert([Item("a")], np.ones((1, 16), np.float32) / 4)
    registry.add_collection(path)


def threads_named(name: str) -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == name]


def test_the_new_model_takes_the_name_and_the_order(registry, paths):
    old = registry.load_model(paths[0])
    result = asyncio.run(registry.reload("m", paths[1]))
    new = registry.model(None)
    assert result.old_fingerprint == old.fingerprint
    assert result.new_fingerprint == new.fingerprint != old.fingerprint
    assert (new.name, new.path) == ("m", paths[1])
    assert new.created == int((paths[1] / checkpoint.MANIFEST).stat().st_mtime)


def test_without_a_path_the_models_own_directory_is_read_again(registry, paths, tmp_path):
    link = tmp_path / "latest"
    link.symlink_to(paths[0])
    registry.load_model(link)
    link.unlink()
    link.symlink_to(paths[1])
    result = asyncio.run(registry.reload("m"))
    assert result.new_fingerprint == checkpoint.read_description(paths[1])["fingerprint"]


def test_a_link_that_moves_while_a_model_is_loaded_gives_one_model_and_stays_its_path(
    registry, paths, tmp_path, monkeypatch
):
    link = tmp_path / "best"
    link.symlink_to(paths[0])
    verified, moved = [], threading.Event()

    def move_and_verify(path: Path) -> None:
        link.unlink()
        link.symlink_to(paths[1])
        moved.set()
        verified.append(checkpoint.verify(path)["fingerprint"])

    load = reload.load

    def load_later(*arguments, **options):
        assert moved.wait(WAIT_S)
        return load(*arguments, **options)

    monkeypatch.setattr(reload, "verify", move_and_verify)
    monkeypatch.setattr(reload, "load", load_later)
    served = registry.load_model(link)
    first = checkpoint.read_description(paths[0])["fingerprint"]
    assert (verified, served.fingerprint) == ([first], first)
    assert served.path == link


def computes_bf16(device: torch.device) -> bool:
    return True


@pytest.mark.parametrize(
    "dtype",
    [
        "fp32",
        "bf16",
        "auto",
        pytest.param("int8", marks=needs_int8),
    ],
)
@pytest.mark.parametrize("turn", [0, 1])
def test_the_new_model_is_loaded_in_the_dtype_of_the_old_one(
    registry, paths, monkeypatch, dtype, turn
):
    monkeypatch.setattr("clipserve.embed.computes_bf16", computes_bf16)
    old = clipserve.load(paths[0], device="cpu", dtype=dtype)
    registry.add_model(old, paths[0])
    asyncio.run(registry.reload("m", paths[turn]))
    new = registry.model("m").model
    assert new is not old
    assert precision(new) == precision(old)
    assert (new.fp32_cosine is None) == (dtype not in ("auto", "int8"))


def test_twenty_reloads_under_load_fail_no_request_and_mix_no_models(registry, paths):
    registry.load_model(paths[0])
    texts = [f"text number {i}" for i in range(5)]
    want = {}
    for path in paths:
        model = clipserve.load(path, dtype="auto")
        want[model.info.fingerprint] = model.embed_texts(texts)
    answered = []

    async def client(done: asyncio.Event) -> None:
        turn = 0
        while not done.is_set():
            served, turn = registry.model("m"), turn + 1
            fresh = Text(f"only now {turn} {id(done)}")
            answer = await served.pipeline.embed([*map(Text, texts), fresh])
            np.testing.assert_allclose(answer.rows()[:5], want[served.fingerprint], atol=2e-2)
            other = next(rows for maker, rows in want.items() if maker != served.fingerprint)
            assert np.abs(answer.rows()[:5] - other).max() > 0.1
            answered.append(served.fingerprint)

    async def scenario() -> None:
        done = asyncio.Event()
        clients = [asyncio.ensure_future(client(done)) for _ in range(4)]
        for turn in range(20):
            await registry.reload("m", paths[(turn + 1) % 2])
        done.set()
        await asyncio.gather(*clients)

    asyncio.run(scenario())
    assert set(answered) == set(want)


def test_the_old_models_thread_ends_with_its_last_holder(registry, paths):
    old = registry.load_model(paths[0])
    (thread,) = threads_named("m")
    asyncio.run(registry.reload("m", paths[1]))
    assert asyncio.run(old.pipeline.embed([Text("a cat")])).rows().shape == (1, 16)
    del old
    gc.collect()
    thread.join(WAIT_S)
    assert not thread.is_alive()
    assert len(threads_named("m")) == 1


def test_a_collection_of_the_old_model_stays_with_it_and_says_so(registry, paths, tmp_path):
    registry.load_model(paths[0])
    add_collection(registry, tmp_path / "toys")
    old = registry.collection("toys").model.fingerprint
    result = asyncio.run(registry.reload("m", paths[1]))
    served = registry.collection("toys")
    assert (result.collections_kept, result.collections_stale) == ([], ["toys"])
    assert served.stale
    assert served.model.fingerprint == old
    gc.collect()
    query = asyncio.run(served.model.pipeline.embed([Text("a cat")])).rows()
    assert served.searcher.search(query, 1)[0][0].id == "a"


def test_a_collection_comes_back_to_the_model_that_made_it(registry, paths, tmp_path):
    registry.load_model(paths[0])
    add_collection(registry, tmp_path / "toys")
    asyncio.run(registry.reload("m", paths[1]))
    result = asyncio.run(registry.reload("m", paths[0]))
    served = registry.collection("toys")
    assert (result.collections_kept, result.collections_stale) == (["toys"], [])
    assert not served.stale
    assert served.model is registry.model("m")


def test_a_collection_of_no_served_model_is_served_when_a_reload_brings_its_model(
    registry, paths, tmp_path
):
    first = registry.load_model(paths[0]).fingerprint
    second = checkpoint.read_description(paths[1])["fingerprint"]
    for name, fingerprint in (("toys", second), ("gone", second), ("others", "f" * 64)):
        Collection.create(
            tmp_path / name, fingerprint=fingerprint, model_name="m", embed_dim=16
        ).close()
        registry.find_collection(tmp_path / name)
    shutil.rmtree(tmp_path / "gone")
    told = []
    registry.watch_collections(lambda *change: told.append(change))
    result = asyncio.run(registry.reload("m", paths[1]))
    assert (result.old_fingerprint, result.new_fingerprint) == (first, second)
    assert (result.collections_kept, result.collections_stale) == (["toys"], [])
    served = registry.collection("toys")
    assert served.model is registry.model("m")
    assert not served.stale
    assert told == [("toys", served.collection.identity)]
    assert list(registry.unavailable) == ["gone", "others"]


def test_a_reload_by_path_warns_of_the_next_restart(registry, paths, caplog):
    registry.load_model(paths[0])
    asyncio.run(registry.reload("m"))
    assert "restart" not in caplog.text
    asyncio.run(registry.reload("m", paths[1]))
    (warning,) = [r for r in caplog.records if "restart" in r.getMessage()]
    assert warning.levelname == "WARNING"
    assert str(paths[1]) in warning.getMessage()


@pytest.mark.parametrize("damage", ["missing", "broken", "hollow"])
def test_what_cannot_be_loaded_leaves_everything_as_it_was(
    registry, paths, tmp_path, damage, architecture
):
    old = registry.load_model(paths[0])
    add_collection(registry, tmp_path / "toys")
    if damage == "broken":
        (paths[1] / checkpoint.WEIGHTS).write_bytes(b"no")
    elif damage == "hollow":
        model = create(architecture)
        with torch.no_grad():
            model.network.visual.proj.fill_(float("nan"))
        checkpoint.save(model, paths[1], name="m")
    path = tmp_path / "nowhere" if damage == "missing" else paths[1]
    expected = ModelFailed if damage == "hollow" else CheckpointError
    with pytest.raises(expected):
        asyncio.run(registry.reload("m", path))
    assert registry.model("m") is old
    assert not registry.collection("toys").stale
    assert asyncio.run(old.pipeline.embed([Text("a cat")])).rows().shape == (1, 16)


def test_what_is_served_under_another_name_or_not_at_all_is_refused(registry, paths, model_dir):
    registry.load_model(paths[0])
    registry.add_model(clipserve.load(model_dir))
    with pytest.raises(ConfigError, match="served already, as 'm'"):
        asyncio.run(registry.reload("tiny", paths[0]))
    with pytest.raises(ConfigError, match="say which to load"):
        asyncio.run(registry.reload("tiny"))
    with pytest.raises(NotFound):
        asyncio.run(registry.reload("nobody"))


def test_a_reload_that_nobody_waits_for_is_finished_and_no_other_runs_beside_it(
    registry, paths, monkeypatch
):
    old = registry.load_model(paths[0])
    begun, go_on = threading.Semaphore(0), threading.Event()
    load = Reloader._load
    loads = []

    def slow(*args):
        loads.append(args)
        begun.release()
        assert go_on.wait(WAIT_S)
        return load(*args)

    monkeypatch.setattr(Reloader, "_load", slow)

    async def scenario() -> None:
        first = asyncio.ensure_future(registry.reload("m", paths[1]))
        assert await asyncio.to_thread(begun.acquire, True, WAIT_S)
        others = [asyncio.ensure_future(registry.reload("m", paths[1])) for _ in range(3)]
        await asyncio.sleep(0)
        for task in (first, *others):
            task.cancel()
        await asyncio.wait({first, *others})
        assert len(loads) == 1
        assert registry._reloader._lock.locked()
        assert registry.model("m") is old
        go_on.set()
        await registry.reload("m", paths[1])  # in its turn, after the first

    asyncio.run(scenario())
    assert len(loads) == 2
    assert loads[1][1] is not old  # the first one was taken in
    assert registry.model("m").fingerprint != old.fingerprint


def test_a_reload_that_fails_with_nobody_there_is_logged(registry, paths, tmp_path, caplog):
    registry.load_model(paths[0])

    async def scenario() -> None:
        gone = asyncio.ensure_future(registry.reload("m", tmp_path / "nowhere"))
        while not registry._reloader._lock.locked():
            await asyncio.sleep(0)
        await asyncio.sleep(0)
        gone.cancel()
        async with registry._reloader._lock:
            await asyncio.sleep(0)

    asyncio.run(scenario())
    assert "nobody waited for" in caplog.text
    assert "nowhere" in caplog.text
