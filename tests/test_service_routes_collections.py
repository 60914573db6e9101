"""/v1/collections: what is served, making, dropping, counting and building anew."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import encode, make_picture
from served import COUNT, World, b64, check_refusal, error, serving

from index.collection import Collection
from index.maintain import Maintainer
from service.settings import load_settings


def test_a_collection_is_described_with_its_index(world: World):
    one = world.get("/v1/collections/toys").json()
    assert (one["name"], one["count"], one["embed_dim"]) == ("toys", COUNT, 16)
    assert (one["index"], one["stale"], one["dtype"]) == (None, False, "float32")
    assert one["searched"] == {"indexed": 0, "fresh": COUNT, "dead": 0}
    assert world.get("/v1/collections").json()["data"] == [{name: one[name] for name in one}]


def test_a_collection_is_made_filled_searched_and_dropped(own_world: World, tmp_path: Path):
    made = own_world.client.put("/v1/collections/new.one")
    assert (made.status_code, made.json()["count"]) == (201, 0)
    picture = encode(make_picture(seed=40))
    item = {"id": "a", "image": b64(picture)}
    assert own_world.put("/v1/collections/new.one/items", items=[item]).status_code == 200
    hits = own_world.post("/v1/search", collection="new.one", image=b64(picture)).json()["hits"]
    assert [hit["id"] for hit in hits] == ["a"]
    with Collection.open(tmp_path / "new.one", read_only=True) as collection:
        assert collection.count() == 1
    dropped = own_world.client.delete("/v1/collections/new.one")
    assert (dropped.status_code, dropped.json()["dropped"]) == (200, True)
    assert not (tmp_path / "new.one").exists()
    assert own_world.get("/v1/collections/new.one").status_code == 404
    assert own_world.client.delete("/v1/collections/new.one").status_code == 404
    assert own_world.put("/v1/collections/new.one", model="tiny").status_code == 201


def test_an_unavailable_collection_is_listed_refused_with_its_reason_and_dropped(
    own_world: World, tmp_path: Path
):
    path = tmp_path / "old"
    Collection.create(path, fingerprint="f" * 64, model_name="older", embed_dim=16).close()
    own_world.registry.find_collection(path)
    listed = own_world.get("/v1/collections").json()
    assert [one["name"] for one in listed["data"]] == ["toys"]
    (lost,) = listed["unavailable"]
    assert (lost["name"], lost["model"], lost["fingerprint"]) == ("old", "older", "f" * 64)
    assert str(tmp_path) not in lost["reason"]
    for response in (
        own_world.get("/v1/collections/old"),
        own_world.post("/v1/search", text="x", collection="old"),
        own_world.put("/v1/collections/old/items", items=[{"id": "a", "text": "x"}]),
        own_world.post("/v1/jobs", collection="old", items=[{"id": "a", "text": "x"}]),
    ):
        assert error(response)["code"] == "collection_unavailable"
        check_refusal(response, 503, "f" * 12)
    assert own_world.post("/v1/search", text="x", collection="toys").status_code == 200
    dropped = own_world.client.delete("/v1/collections/old")
    assert (dropped.status_code, dropped.json()) == (200, {"collection": "old", "dropped": True})
    assert own_world.get("/v1/collections").json()["unavailable"] == []
    assert own_world.get("/v1/collections/old").status_code == 404


@pytest.mark.parametrize("name", [".hidden", "..", "a b", "a%00b", "%2e%2e%2fx", "x" * 300, "-x"])
def test_a_name_that_could_lead_elsewhere_makes_nothing(
    own_world: World, tmp_path: Path, name: str
):
    before = sorted(tmp_path.iterdir())
    assert own_world.client.put(f"/v1/collections/{name}").status_code in (400, 404, 405)
    assert sorted(tmp_path.iterdir()) == before


def test_a_name_that_is_taken_and_an_unknown_model_are_refused(own_world: World):
    taken = own_world.put("/v1/collections/toys")
    assert (taken.status_code, error(taken)["code"]) == (400, "collection_exists")
    check_refusal(own_world.put("/v1/collections/new", model="gpt"), 404, "no such model")
    check_refusal(own_world.put("/v1/collections/new", size=3), 422, "does not know")


def test_without_a_folder_for_them_none_is_made_or_dropped(world: World):
    check_refusal(world.client.put("/v1/collections/new"), 403, "CLIPSERVE_COLLECTIONS_ROOT")
    check_refusal(world.client.delete("/v1/collections/toys"), 403, "CLIPSERVE_COLLECTIONS_ROOT")


def test_items_are_counted_with_a_filter(world: World):
    assert world.get("/v1/collections/toys/count").json()["count"] == COUNT
    filtered = world.get("/v1/collections/toys/count", filter='{"n": {"gte": 4}, "even": true}')
    assert filtered.json()["count"] == 4
    wrong = world.get("/v1/collections/toys/count", filter='{"n": {"near": 4}}')
    check_refusal(wrong, 400, "filter.n: 'near' is not an operator")
    broken = world.get("/v1/collections/toys/count", filter="{secret")
    check_refusal(broken, 400, "is not JSON")
    assert (error(broken)["code"], "secret" in broken.text) == ("invalid_filter", False)
    assert world.get("/v1/collections/nope/count").status_code == 404


def test_items_of_texts_alone_are_counted_too(own_world: World):
    item = {"id": "t", "text": "x", "metadata": {"n": 99}}
    own_world.put("/v1/collections/toys/items", items=[item])
    filtered = own_world.get("/v1/collections/toys/count", filter='{"n": {"gte": 11}}')
    assert filtered.json()["count"] == 2


def test_an_index_is_built_anew_in_the_background(
    own_world: World, monkeypatch: pytest.MonkeyPatch
):
    built = threading.Event()
    rebuild = Maintainer.rebuild

    def noticed(maintainer: Maintainer) -> None:
        rebuild(maintainer)
        built.set()

    monkeypatch.setattr(Maintainer, "rebuild", noticed)
    started = own_world.client.post("/v1/collections/toys:rebuild")
    assert (started.status_code, started.json()["state"]) == (202, "rebuilding")
    assert built.wait(30)
    one = own_world.get("/v1/collections/toys").json()
    assert (one["index"]["kind"], one["index"]["count"]) == ("exact", COUNT)
    assert own_world.client.post("/v1/collections/nope:rebuild").status_code == 404


def test_a_read_only_service_changes_nothing(tmp_path: Path, model_dir: Path):
    settings = load_settings(read_only=True, collections_root=tmp_path, jobs_dir=tmp_path / "jobs")
    with serving(tmp_path, model_dir, settings) as world:
        items = [{"id": "a", "text": "b"}]
        answers = [
            world.put("/v1/collections/toys/items", items=items),
            world.client.delete("/v1/collections/toys/items/toys%2F1"),
            world.post("/v1/collections/toys/items:delete", ids=["toys/1"]),
            world.client.put("/v1/collections/new"),
            world.client.delete("/v1/collections/toys"),
            world.client.post("/v1/collections/toys:rebuild"),
            world.post("/v1/jobs", items=items),
        ]
        for answer in answers:
            assert (answer.status_code, error(answer)["code"]) == (403, "forbidden")
        assert world.get("/v1/collections/toys").json()["count"] == COUNT


def test_what_is_embedded_for_a_collection_that_is_dropped_meanwhile_finds_none(
    tmp_path, model_dir
):
    settings = load_settings(collections_root=tmp_path, jobs_dir=tmp_path / "jobs")
    reached, release = threading.Event(), threading.Event()

    def hold(*_: object) -> None:
        reached.set()
        assert release.wait(30)

    with serving(tmp_path, model_dir, settings) as world, ThreadPoolExecutor(2) as pool:
        world.model.network.transformer.register_forward_pre_hook(hold)
        items, other = [{"id": "a", "text": "one"}], [{"id": "b", "text": "two"}]
        job = world.post("/v1/jobs", collection="toys", items=items).json()
        assert reached.wait(30)
        late = [
            pool.submit(world.put, "/v1/collections/toys/items", items=other),
            pool.submit(world.post, "/v1/search", collection="toys", text="three"),
        ]
        batcher = world.registry.model("tiny").pipeline.batcher
        while batcher.open_items < 3:
            threading.Event().wait(0.01)
        assert world.client.delete("/v1/collections/toys").status_code == 200
        release.set()
        for answer in late:
            check_refusal(answer.result(30), 404, "the collection was dropped")

        async def finish() -> None:
            await asyncio.gather(*world.app.state.jobs._runners.values())

        world.client.portal.call(finish)
        ended = world.get(f"/v1/jobs/{job['id']}").json()
        assert (ended["state"], ended["error"]) == ("failed", "the collection was dropped")


def test_a_collection_that_is_being_dropped_is_not_listed(own_world: World):
    own_world.put("/v1/collections/other")
    own_world.registry.collections["other"].admit_no_more()
    listed = own_world.get("/v1/collections")
    assert listed.status_code == 200
    assert [one["name"] for one in listed.json()["data"]] == ["toys"]
