"""The client's calls, against a service that is a function; the real one is asked further below."""

import asyncio
import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from conftest import encode, make_picture

import clipserve
from clipserve.errors import (
    ImageError,
    ItemRefused,
    NotThere,
    RequestRefused,
    ServiceUnreachable,
)

Answer = Callable[[str, Any], Any]


def refuse(message: str, code: str, param: str | None = None, status: int = 422) -> httpx.Response:
    fields = {"message": message, "type": "t", "param": param, "code": code}
    return httpx.Response(status, json={"error": fields})


class Fake:
    """A service that embeds a text of n letters as (n, 1) and a picture of n bytes as (n, 2)."""

    def __init__(self, max_items: int = 1000, bad: tuple[str, ...] = ()) -> None:
        self.max_items = max_items
        self.bad = bad
        self.sent: list[tuple[str, str, Any]] = []

    async def __call__(self, request: httpx.Request) -> httpx.Response:
        content = request.content
        is_lines = request.headers.get("content-type") == "application/x-ndjson"
        body = (
            [json.loads(line) for line in content.splitlines()]
            if is_lines
            else json.loads(content or b"null")
        )
        self.sent.append((request.method, request.url.raw_path.decode(), body))
        await asyncio.sleep(0)
        if request.url.path == "/v1/embeddings":
            return self.embed(body)
        if request.url.path == "/v1/classify":
            results = [self.classified(i, text) for i, text in enumerate(body["images"])]
            return httpx.Response(200, json={"results": results, "truncated_labels": []})
        if request.url.path == "/v1/match":
            count = max(len(body["images"]), len(body["texts"]))
            results = [
                {"image": 0, "text": 0, "probability": i / 10, "truncated": i == 2}
                for i in range(count)
            ]
            return httpx.Response(200, json={"results": results})
        return httpx.Response(404, json={})

    def embed(self, body: Any) -> httpx.Response:
        given = body["input"]
        if len(given) > self.max_items:
            return refuse("too many", "too_many_items", "input", 400)
        second = 2 if body["modality"] == "image" else 1
        data, errors = [], []
        for index, text in enumerate(given):
            length = len(base64.b64decode(text)) if second == 2 else len(text)
            vector = base64.b64encode(np.array([length, second], "<f4").tobytes()).decode()
            if text in self.bad:
                fields = {"message": "not good", "type": "t", "param": None, "code": "bad"}
                errors.append({"index": index, "error": fields})
            else:
                data.append({"index": index, "embedding": vector})
        if not data:
            return refuse("not good", "bad", "input[0]")
        return httpx.Response(200, json={"data": data, "errors": errors})

    def classified(self, index: int, text: str) -> Any:
        if text in self.bad:
            fields = {"message": "not good", "type": "t", "param": None, "code": "bad"}
            return {"index": index, "error": fields}
        predictions = [{"label": "cat", "label_index": 0, "probability": 0.75}]
        return {"index": index, "predictions": predictions}

    def client(self, **settings: Any) -> clipserve.Client:
        return clipserve.Client(transport=httpx.MockTransport(self), **settings)

    @property
    def sizes(self) -> list[int]:
        return [len(body["input"]) for _, path, body in self.sent if path == "/v1/embeddings"]


TEXTS = ["x" * n for n in range(1, 24)]
LENGTHS = [float(n) for n in range(1, 24)]


def test_texts_go_in_batches_and_come_back_in_order():
    fake = Fake()
    with fake.client(batch_size=5) as client:
        vectors = client.embed_texts(TEXTS)
    assert vectors.dtype == np.float32
    assert vectors[:, 0].tolist() == LENGTHS
    assert sorted(fake.sizes) == [3, 5, 5, 5, 5]


def test_batches_that_are_answered_out_of_order_are_in_order():
    fake = Fake()
    asked: list[httpx.Request] = []
    last = asyncio.Event()

    async def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request)
        if len(asked) == 5:
            last.set()
        if request is asked[0]:
            await last.wait()
        return await fake(request)

    with clipserve.Client(transport=httpx.MockTransport(answer), batch_size=5) as client:
        assert client.embed_texts(TEXTS)[:, 0].tolist() == LENGTHS


def test_no_more_requests_are_under_way_than_allowed():
    fake = Fake()
    running = 0
    most = 0

    async def answer(request: httpx.Request) -> httpx.Response:
        nonlocal running, most
        running += 1
        most = max(most, running)
        for _ in range(20):
            await asyncio.sleep(0)
        running -= 1
        return await fake(request)

    transport = httpx.MockTransport(answer)
    with clipserve.Client(transport=transport, batch_size=1, concurrency=3) as client:
        client.embed_texts(TEXTS)
    assert most == 3


def test_items_are_read_as_they_are_needed():
    fake = Fake(bad=("x",))
    read = []

    def texts() -> Any:
        for text in TEXTS:
            read.append(text)
            yield text

    with fake.client(batch_size=1, concurrency=1) as client, pytest.raises(ItemRefused):
        client.embed_texts(texts())
    assert len(read) <= 2


def test_progress_is_told_after_each_batch():
    told: list[tuple[int, int | None]] = []
    with Fake().client(batch_size=10, concurrency=1) as client:
        client.embed_texts(TEXTS, progress=lambda done, total: told.append((done, total)))
        client.embed_texts(iter("ab"), progress=lambda done, total: told.append((done, total)))
    assert told == [(10, 23), (20, 23), (23, 23), (2, None)]


def test_a_batch_that_is_too_large_for_the_service_is_halved():
    fake = Fake(max_items=6)
    with fake.client(batch_size=23, concurrency=1) as client:
        assert client.embed_texts(TEXTS)[:, 0].tolist() == LENGTHS
    assert fake.sizes == [23, 11, 5, 6, 12, 6, 6]


def test_large_pictures_are_spread_over_requests():
    fake = Fake()
    picture = bytes(9 * 2**20)
    with fake.client() as client:
        vectors = client.embed_images([picture, picture, b"small"])
    assert vectors.tolist() == [[9 * 2**20, 2], [9 * 2**20, 2], [5, 2]]
    assert fake.sizes == [1, 2]


def test_paths_bytes_and_pil_pictures_are_sent(tmp_path: Path):
    data = encode(make_picture(), "JPEG")
    (tmp_path / "a.jpg").write_bytes(data)
    fake = Fake()
    with fake.client() as client:
        client.embed_images([tmp_path / "a.jpg", str(tmp_path / "a.jpg"), data, make_picture()])
    ((_, _, body),) = fake.sent
    sent = [base64.b64decode(text) for text in body["input"]]
    assert sent[:3] == [data] * 3
    assert sent[3].startswith(b"\x89PNG")


def test_the_first_item_that_is_refused_is_raised_with_its_place():
    with Fake(bad=("x" * 8,)).client(batch_size=5) as client, pytest.raises(ItemRefused) as caught:
        client.embed_texts(TEXTS)
    assert caught.value.index == 7
    assert caught.value.code == "bad"
    assert str(caught.value) == "item 7: not good"


def test_refused_items_are_returned_when_a_place_for_them_is_given():
    errors: dict[int, Any] = {}
    with Fake(bad=("x" * 8, "x" * 23)).client(batch_size=5) as client:
        vectors = client.embed_texts(TEXTS, errors=errors)
    assert sorted(errors) == [7, 22]
    assert np.flatnonzero(np.isnan(vectors).any(axis=1)).tolist() == [7, 22]


def test_a_batch_of_which_nothing_is_good_names_every_item():
    errors: dict[int, Any] = {}
    with Fake(bad=tuple(TEXTS)).client(batch_size=5) as client:
        vectors = client.embed_texts(TEXTS, errors=errors)
    assert sorted(errors) == list(range(23))
    assert vectors.shape == (23, 0)


def test_a_missing_file_is_an_item_and_the_others_are_sent(tmp_path: Path):
    errors: dict[int, Any] = {}
    with Fake().client() as client:
        vectors = client.embed_images([b"abc", tmp_path / "none.jpg"], errors=errors)
        with pytest.raises(ItemRefused, match="item 0: .*none.jpg"):
            client.embed_images([tmp_path / "none.jpg"])
        with pytest.raises(ImageError):
            client.search(image=tmp_path / "none.jpg")
    assert list(errors) == [1]
    assert vectors[0].tolist() == [3, 2]


def test_an_error_of_the_whole_request_is_not_an_items():
    def answer(request: httpx.Request) -> httpx.Response:
        return refuse("no such model", "model_not_found", "model", 404)

    errors: dict[int, Any] = {}
    transport = httpx.MockTransport(answer)
    with clipserve.Client(transport=transport) as client, pytest.raises(NotThere):
        client.embed_texts(["a", "b"], errors=errors)
    assert not errors


@pytest.mark.parametrize(
    ("code", "param"),
    [
        ("answer_too_large", "k"),
        ("body_too_large", None),
        ("too_many_items", None),
        ("too_many_items", "batch"),
        ("too_many_items", "k_test"),
        ("too_many_items", "with_vectors"),
    ],
)
def test_queries_that_are_too_much_together_are_asked_apart(code: str, param: str | None):
    sizes: list[int] = []

    def answer(request: httpx.Request) -> httpx.Response:
        queries = json.loads(request.content)["batch"]
        sizes.append(len(queries))
        if len(queries) > 2:
            return refuse("too much", code, param, 400)
        found = {"query": {"kind": "text", "truncated": False}, "hits": []}
        return httpx.Response(200, json={"results": [found] * len(queries)})

    with clipserve.Client(transport=httpx.MockTransport(answer)) as client:
        assert client.search_many(["a"] * 7) == [[]] * 7
    assert sizes == [7, 3, 1, 2, 4, 2, 2]


def test_too_many_labels_are_not_cured_by_fewer_pictures():
    asked = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request)
        return refuse("too many labels", "too_many_items", "labels", 400)

    transport = httpx.MockTransport(answer)
    with clipserve.Client(transport=transport) as client, pytest.raises(RequestRefused) as caught:
        client.classify([b"a", b"b"], ["x"] * 3000)
    assert type(caught.value) is RequestRefused
    assert len(asked) == 1


def test_nothing_is_asked_for_nothing():
    fake = Fake()
    with fake.client() as client:
        assert client.embed_texts([]).shape == (0, 0)
    assert not fake.sent


def test_predictions_are_in_the_order_of_the_pictures():
    bad = base64.b64encode(b"bad").decode()
    fake = Fake(bad=(bad,))
    errors: dict[int, Any] = {}
    with fake.client() as client:
        found = client.classify([b"a", b"bad"], ["cat", "dog"], top_k=1, errors=errors)
    assert found == [[clipserve.client.Prediction("cat", 0.75)], []]
    assert list(errors) == [1]
    ((_, _, body),) = fake.sent
    assert body["labels"] == ["cat", "dog"]
    assert sorted(body) == ["images", "labels", "top_k"]


def test_one_picture_is_sent_once_for_many_texts():
    fake = Fake()
    with fake.client() as client:
        cut: set[int] = set()
        found = client.match([b"a"], ["x", "y", "z"], truncated=cut)
        assert found.tolist() == pytest.approx([0, 0.1, 0.2])
        assert cut == {2}
        assert client.match([b"a", b"b"], ["x"]).shape == (2,)
        assert client.match([b"a", b"b"], ["x", "y"]).shape == (2,)
        with pytest.raises(RequestRefused, match="no pairs"):
            client.match([b"a", b"b"], ["x", "y", "z"])
    bodies = [(len(body["images"]), body["texts"]) for _, _, body in fake.sent]
    assert bodies == [(1, ["x", "y", "z"]), (2, ["x", "x"]), (2, ["x", "y"])]


def test_the_asynchronous_client_answers_the_same():
    async def run() -> np.ndarray:
        transport = httpx.MockTransport(Fake())
        async with clipserve.AsyncClient(transport=transport, batch_size=4) as client:
            return await client.embed_texts(TEXTS)

    assert asyncio.run(run())[:, 0].tolist() == LENGTHS


def test_both_clients_have_the_same_calls():
    def calls(kind: type) -> set[str]:
        return {name for name in dir(kind) if not name.startswith("_")}

    assert calls(clipserve.Client) == calls(clipserve.AsyncClient)


def test_the_client_is_used_without_torch():
    import subprocess
    import sys

    code = "import sys, clipserve; clipserve.Client().close(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize(
    "change",
    [
        lambda client: client.create_collection("new"),
        lambda client: client.drop_collection("new"),
        lambda client: client.delete("new", ["a"]),
    ],
)
def test_what_would_be_answered_otherwise_the_second_time_is_sent_once(change: Any):
    sent = []

    def answer(request: httpx.Request) -> httpx.Response:
        sent.append(request.method)
        raise httpx.ReadError("the answer was lost")

    with (
        clipserve.Client(transport=httpx.MockTransport(answer)) as client,
        pytest.raises(ServiceUnreachable),
    ):
        change(client)
    assert len(sent) == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda client: client.create_collection("new", exist_ok=True),
        lambda client: client.drop_collection("new", missing_ok=True),
    ],
)
def test_what_may_be_done_already_is_sent_again(change: Any):
    sent = []

    def answer(request: httpx.Request) -> httpx.Response:
        sent.append(request.method)
        if len(sent) == 1:
            raise httpx.ReadError("the answer was lost")
        if len(sent) == 2 and request.method == "PUT":
            return refuse("there is one", "collection_exists", "name", 400)
        if request.method == "DELETE":
            return refuse("no such collection", "collection_not_found", "collection", 404)
        return httpx.Response(200, json={"name": "new", "model": "tiny"})

    with clipserve.Client(transport=httpx.MockTransport(answer)) as client:
        change(client)
    assert len(sent) >= 2


def test_a_collection_of_another_model_will_not_do():
    def answer(request: httpx.Request) -> httpx.Response:
        if request.method == "PUT":
            return refuse("there is one", "collection_exists", "name", 400)
        return httpx.Response(200, json={"name": "new", "model": "other"})

    with (
        clipserve.Client(transport=httpx.MockTransport(answer)) as client,
        pytest.raises(RequestRefused, match="of the model other, not of tiny"),
    ):
        client.create_collection("new", model="tiny", exist_ok=True)
