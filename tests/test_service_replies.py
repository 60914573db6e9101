"""Where answers are written."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from served import World, b64, serving

from service import replies
from service.compat import vectors
from service.settings import load_settings

TEXTS = [f"text {i}" for i in range(10)]
DOCUMENTS = [{"text": text} for text in TEXTS]
LARGE = "large"


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> Iterator[World]:
    """A service with an item that takes long to write."""
    with serving(tmp_path_factory.mktemp("replies"), model_dir, load_settings()) as world:
        item = {"id": LARGE, "text": "a", "metadata": {"x": "y" * 5000}}
        item["image"] = b64(world.pictures[0])
        assert world.put("/v1/collections/toys/items", items=[item]).status_code == 200
        yield world


@pytest.fixture
def written_by(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The thread of every answer."""
    threads, to_json = [], replies.to_json

    def noticed(value: Any) -> bytes:
        threads.append(threading.current_thread().name)
        return to_json(value)

    for module in (replies, vectors):
        monkeypatch.setattr(module, "to_json", noticed)
    monkeypatch.setattr(replies, "_SMALL", 100)
    return threads


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/embeddings", {"input": TEXTS}),
        ("/v1/classify", {"texts": ["a", "b"], "labels": [*map(str, range(60))], "top_k": 1}),
        ("/v1/search", {"text": "a", "field": "text", "k": 1}),
        ("/knn-service", {"text": "a", "modality": "text", "num_images": 1}),
        ("/metadata", {"ids": [LARGE]}),
        ("/embed", {"inputs": TEXTS}),
        ("/vectorize", {"texts": TEXTS}),
        ("/v2/embed", {"texts": TEXTS}),
        ("/post", {"data": DOCUMENTS}),
        ("/post", {"data": [{"text": "a", "matches": DOCUMENTS}], "execEndpoint": "/rank"}),
        ("/rerank", {"query": "a", "documents": ["b" * 5000], "return_documents": True}),
        ("/rerank", {"query": "a", "texts": ["b" * 5000], "return_text": True}),
    ],
)
def test_what_takes_long_to_write_is_written_beside_the_event_loop(
    filled: World, written_by: list[str], path: str, body: dict[str, Any]
):
    assert filled.post(path, **body).status_code == 200
    assert len(written_by) == 1
    assert written_by[0].startswith("bodies")


def test_a_page_of_large_items_and_the_vectors_of_pictures_are_written_so_too(
    filled: World, written_by: list[str]
):
    assert filled.get("/v1/collections/toys/items", limit=1).status_code == 200
    pictures = [b64(picture) for picture in filled.pictures]
    assert filled.post("/embeddings_image", input=pictures).status_code == 200
    assert len(written_by) == 2
    assert all(thread.startswith("bodies") for thread in written_by)


def test_what_is_short_to_write_is_written_at_once(filled: World, written_by: list[str]):
    assert filled.post("/embed", inputs=["a"]).status_code == 200
    assert not written_by[0].startswith("bodies")
