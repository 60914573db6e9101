"""What may be served together."""

import asyncio
import errno
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from albefs import decided_albef
from conftest import encode, make_picture, needs_int8

import clipserve
from clipserve import checkpoint
from clipserve.config import RerankScore
from clipserve.errors import CollectionClosed, ConfigError, DiskFull, IndexStoreError
from clipserve.images import make_thumbnail
from clipserve.model import create
from index.collection import Collection, Item
from index.rerank import candidates, pictures_of, rerank
from index.search import Searcher
from service.errors import (
    CollectionUnavailable,
    Forbidden,
    ModelFailed,
    NotFound,
    RequestError,
    error_fields,
    error_response,
)
from service.inputs import Picture, Text
from service.registry import Registry
from service.settings import load_settings


@pytest.fixture
def registry() -> Iterator[Registry]:
    made = Registry(load_settings())
    yield made
    made.close()


def load(path: Path) -> clipserve.Model:
    return clipserve.load(path, device="cpu", dtype="fp32")


def make_collection(path: Path, fingerprint: str) -> Path:
    Collection.create(path, fingerprint=fingerprint, model_name="m", embed_dim=16).close()
    return path


@needs_int8
def test_models_are_loaded_where_and_in_what_the_settings_say(model_dir):
    registry = Registry(load_settings(device="cpu", dtype="int8"))
    served = registry.load_model(model_dir)
    assert served.precision.startswith("int8, cosine to fp32 at least 0.99")
    assert served.model.device.type == "cpu"
    registry.close()


def test_a_collection_of_another_model_is_refused_naming_both(registry, model_dir, tmp_path):
    served = registry.add_model(load(model_dir))
    path = make_collection(tmp_path / "c", "f" * 64)
    with pytest.raises(IndexStoreError, match="f" * 12) as refused:
        registry.add_collection(path)
    assert served.fingerprint[:12] in str(refused.value)


def test_each_collection_is_bound_to_the_model_that_made_it(
    registry, model_dir, architecture, tmp_path
):
    torch.manual_seed(1)
    checkpoint.save(create(architecture), tmp_path / "other", name="tiny")
    first = registry.add_model(load(model_dir))
    second = registry.add_model(load(tmp_path / "other"))
    assert first.name == "tiny"
    assert second.name == f"tiny@{second.fingerprint[:12]}"
    for name, model in (("a", first), ("b", second)):
        path = make_collection(tmp_path / name, model.fingerprint)
        assert registry.add_collection(path).model is model
    assert registry.model(None) is first


def test_the_same_model_or_name_twice_is_refused(registry, model_dir, tmp_path):
    served = registry.add_model(load(model_dir))
    with pytest.raises(ConfigError, match="given twice"):
        registry.add_model(load(model_dir))
    registry.add_collection(make_collection(tmp_path / "x" / "c", served.fingerprint))
    with pytest.raises(ConfigError, match="'c'; rename"):
        registry.add_collection(make_collection(tmp_path / "y" / "c", served.fingerprint))


def test_a_model_that_was_never_saved_is_refused(registry, tiny_model):
    with pytest.raises(ConfigError, match="save it first"):
        registry.add_model(tiny_model)


def test_a_model_that_gives_no_vectors_is_found_before_it_is_served(registry, tiny_model, tmp_path):
    with torch.no_grad():
        tiny_model.network.visual.proj.fill_(float("nan"))
    checkpoint.save(tiny_model, tmp_path / "broken", name="broken")
    with pytest.raises(ModelFailed, match="not finite"):
        registry.add_model(load(tmp_path / "broken")).pipeline.warm_up()


@pytest.mark.parametrize("wanted", [True, False])
def test_a_served_collection_is_looked_after_unless_settings_say_no(
    wanted: bool, model_dir: Path, tmp_path: Path
) -> None:
    registry = Registry(load_settings(rebuild_indexes=wanted))
    served = registry.add_model(load(model_dir))
    registry.add_collection(make_collection(tmp_path / "c", served.fingerprint))
    assert ("maintainer" in [thread.name for thread in threading.enumerate()]) is wanted
    registry.close()
    assert "maintainer" not in [thread.name for thread in threading.enumerate()]


# Collections that come and go


@pytest.fixture
def rooted(model_dir: Path, tmp_path: Path) -> Iterator[Registry]:
    """A registry that may make collections."""
    (tmp_path / "root").mkdir()
    made = Registry(load_settings(collections_root=tmp_path / "root"))
    made.add_model(load(model_dir))
    yield made
    made.close()


def test_a_created_collection_is_empty_durable_and_bound_to_its_model(rooted, tmp_path):
    served = asyncio.run(rooted.create_collection("toys", "tiny"))
    assert served.model is rooted.model("tiny")
    assert not served.stale
    assert served.collection.count() == 0
    with Collection.open(tmp_path / "root" / "toys", read_only=True) as collection:
        assert collection.fingerprint == served.model.fingerprint


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/b", ".hidden", "a\n", "x" * 101, "-x"])
def test_a_name_cannot_leave_the_folder(rooted, name, tmp_path):
    with pytest.raises(RequestError, match="A-Z"):
        asyncio.run(rooted.create_collection(name, None))
    assert list((tmp_path / "root").iterdir()) == []


def test_a_name_that_is_taken_is_refused_served_or_not(rooted, tmp_path):
    asyncio.run(rooted.create_collection("toys", None))
    (tmp_path / "root" / "other").mkdir()
    for name in ("toys", "other"):
        with pytest.raises(RequestError) as refused:
            asyncio.run(rooted.create_collection(name, None))
        assert refused.value.code == "collection_exists"


def test_a_dropped_collection_is_gone_and_its_name_free(rooted, tmp_path):
    asyncio.run(rooted.create_collection("toys", None))

    async def scenario() -> None:
        entered, go_on = threading.Event(), threading.Event()

        def search() -> int:
            entered.set()
            assert go_on.wait(10)
            return served.collection.count()

        served = rooted.collection("toys")
        running = asyncio.ensure_future(rooted.in_store(served, search))
        await asyncio.to_thread(entered.wait, 10)
        dropping = asyncio.ensure_future(rooted.drop_collection("toys"))
        await asyncio.sleep(0)
        with pytest.raises(NotFound):
            rooted.collection("toys")
        go_on.set()
        assert await running == 0  # it was waited for
        await dropping

    asyncio.run(scenario())
    assert list((tmp_path / "root").iterdir()) == []
    assert asyncio.run(rooted.create_collection("toys", None)).collection.count() == 0


def test_what_lies_elsewhere_or_may_not_change_stays(registry, rooted, model_dir, tmp_path):
    served = registry.add_model(load(model_dir))
    path = make_collection(tmp_path / "c", served.fingerprint)
    registry.add_collection(path)
    with pytest.raises(Forbidden, match="CLIPSERVE_COLLECTIONS_ROOT"):
        asyncio.run(registry.create_collection("new", None))
    with pytest.raises(Forbidden, match="CLIPSERVE_COLLECTIONS_ROOT"):
        asyncio.run(registry.drop_collection("c"))
    rooted.add_collection(path)
    with pytest.raises(Forbidden, match="not below"):
        asyncio.run(rooted.drop_collection("c"))
    assert path.is_dir()


def test_a_service_that_changes_nothing_makes_no_collection(tmp_path):
    registry = Registry(load_settings(collections_root=tmp_path, read_only=True))
    with pytest.raises(Forbidden, match="CLIPSERVE_READ_ONLY"):
        asyncio.run(registry.create_collection("new", None))
    registry.close()


def test_both_fields_of_a_collection_can_be_searched(registry, model_dir, tmp_path):
    served = registry.add_model(load(model_dir))
    path = make_collection(tmp_path / "c", served.fingerprint)
    collection = registry.add_collection(path)

    async def scenario() -> None:
        assert await registry.searcher_of(collection, "image") is collection.searcher
        made = await registry.searcher_of(collection, "text")
        assert made.field == "text"
        assert await registry.searcher_of(collection, "text") is made

    asyncio.run(scenario())


def test_while_the_texts_of_a_collection_are_opened_its_pictures_are_searched(
    registry, model_dir, tmp_path, monkeypatch
):
    served = registry.add_model(load(model_dir))
    collection = registry.add_collection(make_collection(tmp_path / "c", served.fingerprint))
    opened, entered, go_on = [], threading.Event(), threading.Event()

    def slowly(*arguments, field, **options):
        opened.append(field)
        entered.set()
        assert go_on.wait(30)
        return Searcher(*arguments, field=field, **options)

    monkeypatch.setattr("service.served.Searcher", slowly)

    async def scenario() -> None:
        count = registry.settings.search_threads + 2  # who waits must take no thread
        searchers = (registry.searcher_of(collection, "text") for _ in range(count))
        *asked, gone = map(asyncio.ensure_future, searchers)
        await asyncio.to_thread(entered.wait, 30)
        gone.cancel()
        async with asyncio.timeout(30):
            searcher = await registry.searcher_of(collection, "image")
            query = np.ones((1, 16))
            assert await registry.in_store(collection, searcher.search, query, 1) == [[]]
        go_on.set()
        assert len(set(await asyncio.gather(*asked))) == 1

    asyncio.run(scenario())
    assert opened == ["text"]


def test_what_could_not_be_opened_is_opened_by_the_next_who_asks(
    registry, model_dir, tmp_path, monkeypatch
):
    served = registry.add_model(load(model_dir))
    collection = registry.add_collection(make_collection(tmp_path / "c", served.fingerprint))
    with monkeypatch.context() as failing:
        failing.setattr("service.served.Searcher", deny)
        with pytest.raises(PermissionError):
            asyncio.run(registry.searcher_of(collection, "text"))
    assert asyncio.run(registry.searcher_of(collection, "text")).field == "text"


# Collections that cannot be served


def test_a_collection_that_cannot_be_served_leaves_the_others_served(rooted, tmp_path, caplog):
    root, fingerprint = tmp_path / "root", rooted.model("tiny").fingerprint
    make_collection(root / "a", "f" * 64)
    make_collection(root / "b", fingerprint)
    (make_collection(root / "c", fingerprint) / "collection.sqlite3").write_bytes(b"SECRET" * 999)
    for name in "abc":
        rooted.find_collection(root / name)
    assert list(rooted.collections) == ["b"]
    assert list(rooted.unavailable) == ["a", "c"]
    for name, says in (("a", "f" * 12), ("a", fingerprint[:12]), ("c", "the server's log")):
        with pytest.raises(CollectionUnavailable, match=says) as refused:
            rooted.collection(name)
        assert str(root) not in str(refused.value)
        assert str(root / name) in caplog.text
    with pytest.raises(
        NotFound, match="name a collection"
    ):  # "b" was not meant when all were there
        rooted.collection(None)


@pytest.mark.parametrize("name", ["a", "c"])
def test_a_collection_that_is_not_served_is_dropped_and_its_name_free(rooted, tmp_path, name):
    path = make_collection(tmp_path / "root" / name, "f" * 64)
    if name == "c":
        (path / "collection.sqlite3").write_bytes(b"")
    rooted.find_collection(path)
    told = []
    rooted.watch_collections(lambda *change: told.append(change))
    with pytest.raises(RequestError, match="take another"):
        asyncio.run(rooted.create_collection(name))
    asyncio.run(rooted.drop_collection(name))
    assert told[0][0] == name
    assert not path.exists()
    with pytest.raises(NotFound):
        rooted.collection(name)
    assert asyncio.run(rooted.create_collection(name)).collection.count() == 0


def test_what_is_not_served_and_cannot_be_dropped_stays_listed(rooted, tmp_path, monkeypatch):
    path = make_collection(tmp_path / "root" / "a", "f" * 64)
    elsewhere = make_collection(tmp_path / "e", "f" * 64)
    rooted.find_collection(path)
    rooted.find_collection(elsewhere)
    with pytest.raises(Forbidden, match="not below"):
        asyncio.run(rooted.drop_collection("e"))
    monkeypatch.setattr(rooted, "_erase", deny)
    with pytest.raises(PermissionError):
        asyncio.run(rooted.drop_collection("a"))
    assert sorted(rooted.unavailable) == ["a", "e"]


def test_a_named_collection_is_unavailable_only_if_its_model_moved_on(rooted, tmp_path):
    moved_on = Collection.create(
        tmp_path / "moved-on", fingerprint="f" * 64, model_name="tiny", embed_dim=16
    )
    moved_on.close()
    rooted.find_collection(tmp_path / "moved-on", is_named=True)
    assert list(rooted.unavailable) == ["moved-on"]
    wrong = make_collection(tmp_path / "wrong", "f" * 64)
    for path, says in ((wrong, "embed the collection anew"), (tmp_path / "none", "no collection")):
        with pytest.raises(IndexStoreError, match=says):
            rooted.find_collection(path, is_named=True)
    assert list(rooted.unavailable) == ["moved-on"]
    with pytest.raises(ConfigError, match="'moved-on'; rename"):
        rooted.find_collection(make_collection(tmp_path / "x" / "moved-on", "f" * 64))


def test_a_collection_names_its_model_as_a_start_without_its_namesake_finds_it(
    rooted, architecture, tmp_path
):
    torch.manual_seed(1)
    checkpoint.save(create(architecture), tmp_path / "other", name="tiny")
    again = rooted.add_model(load(tmp_path / "other"))
    assert again.name != "tiny"
    made = asyncio.run(rooted.create_collection("toys", again.name))
    assert made.collection.model_name == "tiny"


# Reading pictures and texts together


def test_a_model_without_fusion_layers_matches_nothing(registry, model_dir):
    served = registry.add_model(load(model_dir))
    with pytest.raises(RequestError) as refused:
        asyncio.run(served.match([Picture(b"")], [Text("a")]))
    assert refused.value.code == "no_matching"


@pytest.mark.parametrize("score", get_args(RerankScore))
def test_an_albef_matches_and_orders_hits_as_the_command_does(tmp_path, score, caplog):
    checkpoint.save(decided_albef(tmp_path), tmp_path / "albef", name="albef")
    registry = Registry(load_settings(device="cpu", max_image_batch=3))
    served = registry.add_model(load(tmp_path / "albef"))
    pictures, texts = [make_picture(seed=i) for i in range(8)], ["a red cat", "two dogs"]
    path = make_collection(tmp_path / "c", served.fingerprint)
    thumbnails: list[bytes | None] = [make_thumbnail(picture) for picture in pictures]
    thumbnails[2:4] = None, make_thumbnail(pictures[3])[:100]
    with Collection.open(path) as collection:
        items = [Item(str(i)) for i in range(8)]
        collection.upsert(items, served.model.embed_images(pictures), thumbnails)
    found = registry.add_collection(path)
    hits = found.searcher.search(served.model.embed_texts(texts), 8)
    kept = pictures_of(found.collection, candidates(hits, 7))

    async def scenario():
        images = [Picture(encode(picture)) for picture in pictures]
        return (
            await served.match(images, [Text("a red cat")] * 8),
            await served.rerank(texts, hits, kept, k_test=7, score=score),
        )

    matches, reranked = asyncio.run(scenario())
    assert "picture kept of item '3' is not matched" in caplog.text
    want = served.model.match(pictures, ["a red cat"] * 8)
    np.testing.assert_allclose(matches.probabilities, want, atol=1e-5)
    want = rerank(served.model, texts, hits, found.collection, k_test=7, score=score)
    assert reranked != hits
    for one, other in zip(reranked, want.hits, strict=True):
        assert [hit.id for hit in one] == [hit.id for hit in other]
        matching = [[hit.matching or -1 for hit in own] for own in (one, other)]
        np.testing.assert_allclose(*matching, atol=1e-5)
    registry.close()


def test_a_collection_is_made_off_the_event_loop(rooted, monkeypatch):
    makers = []
    create_one = Collection.create

    def noticed(*args, **kwargs):
        makers.append(threading.current_thread())
        return create_one(*args, **kwargs)

    monkeypatch.setattr(Collection, "create", noticed)
    asyncio.run(rooted.create_collection("toys", None))
    assert makers != [threading.main_thread()]


def test_of_two_who_make_one_name_at_once_one_is_told_it_is_taken(rooted):
    async def scenario() -> list[object]:
        both = [rooted.create_collection("toys", None) for _ in range(2)]
        return await asyncio.gather(*both, return_exceptions=True)

    made, refused = asyncio.run(scenario())
    assert made is rooted.collection("toys")
    assert isinstance(refused, RequestError)
    assert refused.code == "collection_exists"


def test_who_comes_too_late_to_a_dropped_collection_is_told_so(rooted):
    served = asyncio.run(rooted.create_collection("toys", None))

    async def scenario() -> list[object]:
        dropping = asyncio.ensure_future(rooted.drop_collection("toys"))
        await asyncio.sleep(0)
        late = [
            rooted.in_store(served, served.collection.count),
            rooted.in_store(served, served.searcher.search, np.ones((1, 16)), 1),
            rooted.searcher_of(served, "text"),
            rooted.searcher_of(served, "image"),
            rooted.in_store(served, served.collection.upsert, [Item("a")], np.ones((1, 16)) / 4),
        ]
        found = await asyncio.gather(*late, return_exceptions=True)
        await dropping
        return found

    for refused in asyncio.run(scenario()):
        assert isinstance(refused, CollectionClosed)
        assert error_response(refused).status_code == 404
        assert error_fields(refused)["message"] == "the collection was dropped"


def test_dropping_a_collection_holds_up_no_other_and_lets_nobody_in(rooted):
    dropped = asyncio.run(rooted.create_collection("toys", None))
    other = asyncio.run(rooted.create_collection("others", None))

    async def scenario() -> None:
        entered, go_on = threading.Event(), threading.Event()

        def search() -> int:
            entered.set()
            assert go_on.wait(10)
            return dropped.collection.count()

        running = asyncio.ensure_future(rooted.in_store(dropped, search))
        await asyncio.to_thread(entered.wait, 10)
        dropping = asyncio.ensure_future(rooted.drop_collection("toys"))
        await asyncio.sleep(0)
        async with asyncio.timeout(10):
            assert await rooted.in_store(other, other.collection.count) == 0
            with pytest.raises(CollectionClosed):
                await rooted.in_store(dropped, dropped.collection.count)
        go_on.set()
        assert await running == 0
        await dropping

    asyncio.run(scenario())


@pytest.mark.parametrize("same", [True, False])
def test_a_collection_made_during_a_reload_says_whether_its_model_stayed(
    rooted, monkeypatch, model_dir, architecture, tmp_path, same
):
    checkpoint.save(create(architecture), tmp_path / "new", name="tiny")
    old, make = rooted.model("tiny"), rooted._make
    new = rooted.prepare(load(model_dir if same else tmp_path / "new"), "tiny", None)

    def reloaded_meanwhile(*arguments):
        rooted.models["tiny"] = new
        return make(*arguments)

    monkeypatch.setattr(rooted, "_make", reloaded_meanwhile)
    served = asyncio.run(rooted.create_collection("toys", "tiny"))
    assert served.stale is not same
    assert served.model is (new if same else old)
    old.pipeline.close()


def test_a_collection_is_dropped_while_its_new_index_is_loaded(rooted, monkeypatch, caplog):
    served = asyncio.run(rooted.create_collection("toys", None))
    served.collection.upsert([Item("a")], np.ones((1, 16)) / 4)
    entered, go_on = threading.Event(), threading.Event()
    load = served.searcher._load

    def held(generation: int) -> object:
        entered.set()
        assert go_on.wait(10)
        return load(generation)

    monkeypatch.setattr(served.searcher, "_load", held)
    served.start_rebuild()
    assert served.is_rebuilding
    assert entered.wait(30)

    async def scenario() -> None:
        dropping = asyncio.ensure_future(rooted.drop_collection("toys"))
        await asyncio.sleep(0.05)
        assert not dropping.done()
        go_on.set()
        await dropping

    asyncio.run(scenario())
    again = asyncio.run(rooted.create_collection("toys", None))
    assert not again.is_rebuilding
    assert again.collection.count() == 0
    assert "not built anew" not in caplog.text


def test_what_cannot_be_dropped_is_served_again(rooted, monkeypatch):
    asyncio.run(rooted.create_collection("toys", None))
    told = []
    rooted.watch_collections(lambda *change: told.append(change))
    for name in ("rename", "unlink"):
        old = rooted.collection("toys")
        old.collection.upsert([Item(name)], np.ones((1, 16)) / 4)
        with monkeypatch.context() as failing:
            failing.setattr(Path, name, deny)
            if name == "unlink":
                failing.setattr(Path, "rename", lambda path, to: os.rename(path, to))
            with pytest.raises(PermissionError):
                asyncio.run(rooted.drop_collection("toys"))
        again = rooted.collection("toys")
        assert again is not old
        assert told.pop() == ("toys", again.collection.identity)
        assert asyncio.run(rooted.in_store(again, again.collection.contains, [name])) == {name}
    asyncio.run(rooted.drop_collection("toys"))
    with pytest.raises(NotFound):
        rooted.collection("toys")


def deny(*_: object, **__: object) -> None:
    raise PermissionError(13, "Permission denied")


def test_what_can_neither_be_dropped_nor_opened_keeps_its_name(rooted, monkeypatch, tmp_path):
    served = asyncio.run(rooted.create_collection("toys", None))
    with monkeypatch.context() as failing:
        failing.setattr(rooted, "_erase", deny)
        failing.setattr(rooted, "_open", deny)
        with pytest.raises(PermissionError):
            asyncio.run(rooted.drop_collection("toys"))
    assert rooted.collection("toys") is served
    asyncio.run(rooted.drop_collection("toys"))
    assert list((tmp_path / "root").iterdir()) == []


def test_a_collection_that_cannot_be_made_leaves_its_name_free(rooted, monkeypatch, tmp_path):
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as full:
        full.setattr("index.acknowledged.write", fail)
        with pytest.raises(DiskFull):
            asyncio.run(rooted.create_collection("toys", None))
    assert list((tmp_path / "root").iterdir()) == []
    assert asyncio.run(rooted.create_collection("toys", None)).collection.count() == 0


def test_who_names_no_collection_that_is_there_is_told_of_none(rooted):
    for name in ("secret", "other"):
        asyncio.run(rooted.create_collection(name, None))
    for name, says in ((None, "name a collection"), ("none", "no such collection")):
        with pytest.raises(NotFound, match=says) as refused:
            rooted.collection(name)
        assert "secret" not in str(refused.value)
