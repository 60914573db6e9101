"""POST /v1/embeddings."""

import base64
import io

import numpy as np
import pytest
from conftest import encode, make_picture
from served import World, b64, check_refusal, data_uri, error

from service.errors import RequestError


def test_texts_get_the_vectors_the_model_gives(world: World):
    texts = ["a cat", "a dog " * 50, "x"]
    body = world.post("/v1/embeddings", model="tiny", input=texts).json()
    assert [item["index"] for item in body["data"]] == [0, 1, 2]
    got = np.array([item["embedding"] for item in body["data"]])
    np.testing.assert_allclose(got, world.model.embed_texts(texts), atol=1e-5)
    assert [item["truncated"] for item in body["data"]] == [False, True, False]
    assert [item["num_tokens"] for item in body["data"]] == [4, 16, 3]
    assert body["usage"] == {"prompt_tokens": 4 + 16 + 3, "total_tokens": 4 + 16 + 3}
    assert body["object"] == "list"


def test_pictures_and_texts_mix_in_one_request(world: World):
    given = ["a cat", {"image": b64(world.pictures[0])}, {"text": "dog"}]
    body = world.post("/v1/embeddings", input=given).json()
    got = np.array([item["embedding"] for item in body["data"]])
    want = np.stack([*world.model.embed_texts(["a cat", "dog"]), world.vectors[0]])[[0, 2, 1]]
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_base64_vectors_are_little_endian_floats(world: World):
    uris = [data_uri(picture) for picture in world.pictures[:3]]
    answer = world.post("/v1/embeddings", input=uris, modality="image", encoding_format="base64")
    got = [np.frombuffer(base64.b64decode(d["embedding"]), "<f4") for d in answer.json()["data"]]
    np.testing.assert_allclose(np.stack(got), world.vectors[:3], atol=1e-5)


def rows_of(response) -> np.ndarray:
    assert response.status_code == 200, response.text
    return np.array([item["embedding"] for item in response.json()["data"]])


@pytest.mark.parametrize("name", ["embedding_type", "encoding_format"])
def test_bits_are_the_signs_of_the_numbers_the_first_one_highest(world: World, name: str):
    texts = ["a cat", "a dog"]
    vectors = world.model.embed_texts(texts)
    want = [[sum(int(v > 0) << (7 - i) for i, v in enumerate(row[:8]))] for row in vectors]
    unsigned = rows_of(world.post("/v1/embeddings", input=texts, **{name: "ubinary"}))
    assert unsigned.shape == (2, 2)
    assert unsigned[:, :1].tolist() == want
    signed = rows_of(world.post("/v1/embeddings", input=texts, **{name: "binary"}))
    assert (signed == unsigned - 128).all()


def test_jinas_name_of_the_encoding_goes_before_openais(world: World):
    answer = world.post(
        "/v1/embeddings", input="a cat", embedding_type="float", encoding_format="base64"
    )
    np.testing.assert_allclose(rows_of(answer), world.model.embed_texts(["a cat"]), atol=1e-5)
    answer = world.post("/v1/embeddings", input="a cat", embedding_type="base64")
    assert isinstance(answer.json()["data"][0]["embedding"], str)


def chat(*parts: object, **more: object) -> dict[str, object]:
    return {"messages": [{"role": "user", "content": list(parts)}], **more}


def picture_part(picture: bytes) -> dict[str, object]:
    return {"type": "image_url", "image_url": {"url": data_uri(picture), "detail": "low"}}


def test_a_message_of_one_part_is_embedded(world: World):
    text = world.post("/v1/embeddings", **chat({"type": "text", "text": "a cat"}, model="tiny"))
    plain = world.post("/v1/embeddings", messages=[{"role": "user", "content": "a cat"}])
    want = world.model.embed_texts(["a cat"])
    np.testing.assert_allclose(rows_of(text), want, atol=1e-5)
    np.testing.assert_allclose(rows_of(plain), want, atol=1e-5)
    picture = world.post("/v1/embeddings", **chat(picture_part(world.pictures[0])))
    np.testing.assert_allclose(rows_of(picture), world.vectors[:1], atol=1e-5)


TEXT_PART = {"type": "text", "text": "a cat"}


@pytest.mark.parametrize(
    ("body", "status", "word"),
    [
        (chat(TEXT_PART, picture_part(b"")), 400, "one part"),
        (chat(), 400, "one part"),
        (chat({"type": "input_audio", "input_audio": {}}), 400, "one part"),
        ({"messages": [{"role": "user"}]}, 400, "one part"),
        ({"messages": []}, 400, "one message"),
        ({"messages": [{"content": "a"}, {"content": "b"}]}, 400, "one message"),
        ({"messages": [{"content": "a"}], "input": "b"}, 400, "one message"),
        ({"messages": "a"}, 422, "list"),
        (chat({"type": "text", "text": {"a": 1}}), 400, "string"),
        (chat({"type": "image_url", "image_url": {"url": 1.5}}), 400, "string"),
        (chat(picture_part(b"no picture")), 422, "not a picture"),
        (chat({"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}), 400, "URL"),
    ],
)
def test_a_chat_that_is_not_one_text_or_picture_is_refused(world: World, body, status, word):
    check_refusal(world.post("/v1/embeddings", **body), status, word)


def test_an_answer_that_would_come_too_late_is_refused_at_once(own_world: World):
    pace = own_world.registry.model(None).pipeline.batcher._full_pace["text"]
    pace.note(1, 40.0)
    headers = {"X-Request-Timeout": "20"}
    answer = own_world.client.post("/v1/embeddings", json={"input": "a cat"}, headers=headers)
    check_refusal(answer, 429, "X-Request-Timeout")
    assert 20 <= int(answer.headers["Retry-After"]) <= 21
    assert own_world.post("/v1/embeddings", input="a cat").status_code == 200
    again = own_world.client.post("/v1/embeddings", json={"input": "a cat"}, headers=headers)
    assert again.status_code == 200  # it was kept, so the model is not asked


def test_a_single_string_is_an_input(world: World):
    body = world.post("/v1/embeddings", input="a cat", dimensions=16, user="me").json()
    assert len(body["data"]) == 1


def test_a_picture_may_be_the_whole_body(world: World):
    for kind, format in (("image/png", "PNG"), ("image/jpeg", "JPEG"), ("image/webp", "WEBP")):
        picture = encode(make_picture(seed=3), format)
        headers = {"Content-Type": kind}
        answer = world.client.post(
            "/v1/embeddings?encoding_format=float&model=tiny", content=picture, headers=headers
        )
        (item,) = answer.json()["data"]
        want = world.model.embed_images([picture])[0]
        np.testing.assert_allclose(item["embedding"], want, atol=1e-5)


def test_pictures_may_be_the_files_of_a_form(world: World):
    files = [("files", (f"{i}.png", picture)) for i, picture in enumerate(world.pictures[:3])]
    form = {"encoding_format": "base64", "dimensions": "16"}
    body = world.client.post("/v1/embeddings", files=files, data=form).json()
    got = [np.frombuffer(base64.b64decode(d["embedding"]), "<f4") for d in body["data"]]
    np.testing.assert_allclose(np.stack(got), world.vectors[:3], atol=1e-5)


def test_rows_come_as_bytes_or_as_npy(world: World):
    texts = ["a cat", "a dog " * 50, "x"]
    want = world.model.embed_texts(texts)
    raw = world.client.post(
        "/v1/embeddings", json={"input": texts}, headers={"Accept": "application/octet-stream"}
    )
    assert raw.headers["content-type"] == "application/octet-stream"
    assert raw.headers["X-Clipserve-Shape"] == "3,16"
    assert raw.headers["X-Clipserve-Truncated"] == "1"
    assert raw.headers["X-Clipserve-Tokens"] == str(4 + 16 + 3)
    assert raw.headers["X-Clipserve-Model"] == "tiny"
    np.testing.assert_allclose(np.frombuffer(raw.content, "<f4").reshape(3, 16), want, atol=1e-5)
    npy = world.client.post(
        "/v1/embeddings", json={"input": texts}, headers={"Accept": "application/x-npy"}
    )
    rows = np.load(io.BytesIO(npy.content), allow_pickle=False)
    assert rows.dtype == np.float32
    np.testing.assert_allclose(rows, want, atol=1e-5)


def test_a_row_that_could_not_be_made_is_nan_and_named(world: World):
    given = {"input": ["a cat", {"image": b64(b"no picture")}], "on_error": "report"}
    raw = world.client.post(
        "/v1/embeddings", json=given, headers={"Accept": "application/octet-stream"}
    )
    rows = np.frombuffer(raw.content, "<f4").reshape(2, 16)
    assert raw.headers["X-Clipserve-Errors"] == "1"
    assert np.isfinite(rows[0]).all()
    assert np.isnan(rows[1]).all()


def test_one_bad_picture_fails_the_request_or_is_reported_beside_the_others(world: World):
    given = [{"image": b64(world.pictures[0])}, {"image": b64(b"no picture")}, "a cat"]
    failed = world.post("/v1/embeddings", input=given)
    assert failed.status_code == 422
    assert error(failed)["param"] == "input[1]"
    body = world.post("/v1/embeddings", input=given, on_error="report").json()
    assert [item["index"] for item in body["data"]] == [0, 2]
    (problem,) = body["errors"]
    assert (problem["index"], problem["error"]["code"]) == (1, "invalid_image")


def test_a_bad_file_is_named_as_a_file(world: World):
    files = [("files", ("a.png", world.pictures[0])), ("files", ("b.png", b"no picture"))]
    failed = world.client.post("/v1/embeddings", files=files)
    assert (failed.status_code, error(failed)["param"]) == (422, "files[1]")


def test_a_text_that_must_not_be_cut_is_refused(world: World):
    given = ["a cat", "a dog " * 50]
    failed = world.post("/v1/embeddings", input=given, truncate=False)
    assert (failed.status_code, error(failed)["code"]) == (400, "text_too_long")
    assert error(failed)["param"] == "input[1]"
    body = world.post("/v1/embeddings", input=given, truncate=False, on_error="report").json()
    assert [item["index"] for item in body["data"]] == [0]
    assert body["errors"][0]["error"]["code"] == "text_too_long"
    assert world.post("/v1/embeddings", input="a cat", truncate=False).status_code == 200


def test_a_text_of_too_many_characters_is_refused_by_its_index(world: World):
    limit = world.registry.settings.max_text_chars
    assert world.post("/v1/embeddings", input=["a", "x" * limit]).status_code == 200
    failed = world.post("/v1/embeddings", input=["a", "x" * (limit + 1)])
    check_refusal(failed, 422, f"input[1] has {limit + 1} characters")
    assert error(failed)["code"] == "text_too_long"


def test_bulk_work_is_answered_like_any_other(world: World):
    body = world.post("/v1/embeddings", input="a cat", priority="bulk").json()
    want = world.model.embed_texts(["a cat"])[0]
    np.testing.assert_allclose(body["data"][0]["embedding"], want, atol=1e-5)


@pytest.mark.parametrize("priority", [0, 3, -1])
def test_a_priority_of_vllms_changes_nothing(world: World, priority: int):
    one = {"role": "user", "content": "a cat"}
    body = world.post("/v1/embeddings", messages=[one], priority=priority).json()
    want = world.model.embed_texts(["a cat"])[0]
    np.testing.assert_allclose(body["data"][0]["embedding"], want, atol=1e-5)


class OneHost:
    """Fetches from a dictionary."""

    def __init__(self, pictures: dict[str, bytes]) -> None:
        self._pictures = pictures

    async def get(self, url: str, param: str) -> bytes:
        if url not in self._pictures:
            raise RequestError(f"{param} cannot be fetched", param=param, code="fetch_failed")
        return self._pictures[url]


def test_a_url_is_followed_where_fetching_is_on(own_world: World):
    own_world.registry.fetcher = OneHost({"https://x.org/a.png": own_world.pictures[0]})
    given = [{"image": "https://x.org/a.png"}, {"image": "https://x.org/none"}, "a cat"]
    body = own_world.post("/v1/embeddings", input=given, on_error="report").json()
    assert [item["index"] for item in body["data"]] == [0, 2]
    np.testing.assert_allclose(body["data"][0]["embedding"], own_world.vectors[0], atol=1e-5)
    assert body["errors"][0]["error"]["code"] == "fetch_failed"
    failed = own_world.post("/v1/embeddings", input=[{"image": "ftp://x.org/a.png"}])
    assert error(failed)["code"] == "url_not_allowed"


@pytest.mark.parametrize(
    ("body", "status", "word"),
    [
        ({"input": [1, 2, 3]}, 400, "check_embedding_ctx_length"),
        ({"input": [[1, 2], [3]]}, 400, "check_embedding_ctx_length"),
        ({"input": [{"image": 1}]}, 400, "input[0].image is an image, which must be a string"),
        ({"input": [[1]], "modality": "image"}, 400, "base64, a data URI or a URL"),
        ({"input": []}, 400, "empty"),
        ({"input": ""}, 400, "empty"),
        ({"input": ["x"] * 2049}, 400, "at most 256"),
        ({"input": "x", "dimensions": 8}, 400, "16"),
        ({"input": "x", "normalized": False}, 400, "unit length"),
        ({"input": "x", "model": "gpt-4"}, 404, "served here: tiny"),
        ({"input": "x", "modality": "audio"}, 422, "modality"),
        ({"input": "x", "priority": "urgent"}, 422, "priority"),
        ({"input": "x", "priority": 1.5}, 422, "priority"),
        ({"input": "https://example.org/a.png", "modality": "image"}, 400, "URL"),
        ({"input": [{"image": "file:///etc/passwd"}]}, 400, "URL"),
        ({"input": [{"image": "/etc/passwd"}]}, 400, "base64"),
        ({"input": [{"image": "data:image/png,x"}]}, 400, "data URI"),
        ({"input": [{"image": "x", "text": "y"}]}, 400, '{"text": ...}'),
        ({"input": "data:image/png;base64,AAAA"}, 400, "modality"),
        ({}, 422, "input"),
    ],
)
def test_a_wrong_embedding_request_says_what_is_wrong(world: World, body, status, word):
    check_refusal(world.client.post("/v1/embeddings", json=body), status, word)


def test_a_file_part_of_another_name_is_refused(world: World):
    response = world.client.post("/v1/embeddings", files={"picture": world.pictures[0]})
    check_refusal(response, 422, "file or files")
