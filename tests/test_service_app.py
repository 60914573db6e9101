"""The service as a whole: what all routes share, poison, load and failure, the process."""

import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import encode, make_picture
from served import COUNT, LABELS, World, b64, build, check_hits, data_uri, error, serving

import clipserve
from clipserve.model import Model
from service.app import serve
from service.settings import load_settings

# What every reply has


def test_replies_name_the_model_and_its_fingerprint(world: World):
    fingerprint = world.model.info.fingerprint
    replies = [
        world.post("/v1/embeddings", input="x"),
        world.post("/v1/classify", images=[b64(world.pictures[0])], labels=["a"]),
        world.post("/v1/search", text="x"),
        world.client.get("/v1/collections/toys"),
        world.client.get("/v1/collections/toys/items/toys%2F1"),
        world.client.get("/v1/models/tiny"),
    ]
    for response in replies:
        assert response.status_code == 200
        assert (response.json()["model"], response.json()["fingerprint"]) == ("tiny", fingerprint)
        assert response.headers["X-Clipserve-Model"] == "tiny"
        assert response.headers["X-Clipserve-Fingerprint"] == fingerprint
    (listed,) = world.client.get("/v1/models").json()["data"]
    assert (listed["id"], listed["fingerprint"]) == ("tiny", fingerprint)
    (listed,) = world.client.get("/v1/collections").json()["data"]
    assert (listed["name"], listed["count"]) == ("toys", COUNT)


@pytest.mark.parametrize("path", ["/v1/collections/toys/", "/v1/collections/", "/health/live/"])
def test_no_path_leads_to_another(world: World, path: str):
    """To clients that resolve dots, items/.. is the collection with a slash behind it."""
    for method in ("GET", "DELETE"):
        response = world.client.request(method, path, follow_redirects=False)
        assert (response.status_code, error(response)["code"]) == (404, "not_found")
    assert world.client.get("/v1/collections/toys").status_code == 200


def test_health_and_metrics(world: World):
    assert world.client.get("/health/live").json() == {"status": "live"}
    assert world.client.get("/health/ready").json() == {"status": "ready"}
    health = world.client.get("/health").json()
    assert (health["status"], health["models"][0]["name"]) == ("ok", "tiny")
    world.post("/v1/embeddings", input="x")
    world.client.get("/no-such-path-of-a-client")
    text = world.client.get("/metrics").text
    assert 'clipserve_requests_total{method="POST",route="/v1/embeddings",status="200"}' in text
    assert 'clipserve_batch_size_count{kind="text",model="tiny"}' in text
    assert 'clipserve_queue_items{model="tiny"} 0.0' in text
    assert "no-such-path" not in text


# Poison: each is refused, and the service still answers


def huge_png() -> bytes:
    """20,000 x 20,000 pixels in a hundred bytes or so."""

    def chunk(name: bytes, data: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(name + data))
        return struct.pack(">I", len(data)) + name + data + checksum

    header = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(100_000))
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    )


BAD_PICTURES = {
    "truncated JPEG": encode(make_picture(), "JPEG")[:300],
    "text called jpg": b"this is not a picture",
    "20,000 x 20,000 pixels": huge_png(),
    "thin": encode(make_picture(3, 3000)),
    "one byte": b"\xff",
    "script": b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>",
}


@pytest.mark.parametrize("name", BAD_PICTURES)
def test_a_poisonous_picture_harms_nobody_else(world: World, name: str):
    poison = BAD_PICTURES[name]
    answers = [
        world.post("/v1/embeddings", input=[{"image": b64(poison)}]),
        world.post("/v1/classify", images=[data_uri(poison)], labels=["a", "b"]),
        world.client.post("/v1/classify", files={"files": poison}, data={"labels": "a,b"}),
        world.client.post("/v1/search", files={"file": poison}),
        world.client.put(
            "/v1/collections/toys/items", json={"items": [{"id": "p", "image": b64(poison)}]}
        ),
    ]
    for answer in answers:
        assert answer.status_code == 422
        assert error(answer)["code"] == "invalid_image"
        assert "0x" not in answer.text  # an address; Pillow's own messages hold one
    assert_it_answers(world)


@pytest.mark.parametrize("path", ["/v1/embeddings", "/v1/classify", "/v1/search"])
@pytest.mark.parametrize(
    ("content", "kind", "status"),
    [
        (b"", "application/json", 400),
        (b"{", "application/json", 400),
        (b"\xff\xfe", "application/json", 400),
        (b"[" * 100_000, "application/json", 400),
        (b"null", "application/json", 422),
        (b'{"text": "\\ud800"}', "application/json", 400),
        (b"a=b", "application/x-www-form-urlencoded", 415),
        (b"{}", "", 415),
        (b"x" * (5 * 2**20), "application/json", 413),
    ],
)
def test_a_poisonous_body_harms_nobody_else(world: World, path, content, kind, status):
    response = world.client.post(path, content=content, headers={"Content-Type": kind})
    assert response.status_code == status
    error(response)
    assert len(response.content) < 500  # nothing is echoed
    assert_it_answers(world)


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"", "multipart/form-data; boundary=x"),
        (b"--x\r\nnonsense", "multipart/form-data; boundary=x"),
        (b"abc", "multipart/form-data"),
        (
            b'--x\r\nContent-Disposition: form-data; name="evil"\r\n\r\n1\r\n--x--\r\n',
            "multipart/form-data; boundary=x",
        ),
    ],
)
def test_a_poisonous_form_harms_nobody_else(world: World, content, kind):
    for path in ("/v1/classify", "/v1/search"):
        response = world.client.post(path, content=content, headers={"Content-Type": kind})
        assert response.status_code in (400, 422)
        error(response)
    assert_it_answers(world)


def test_too_many_files_are_refused(world: World):
    files = [("files", (f"{i}.png", b"x")) for i in range(300)]
    response = world.client.post("/v1/classify", files=files, data={"labels": "a"})
    assert response.status_code == 400
    error(response)
    assert_it_answers(world)


def test_a_request_is_never_repeated_in_an_error(world: World):
    marker = "mArKeR"
    requests = [
        ("/v1/embeddings", {"input": marker, "model": marker}),
        ("/v1/embeddings", {"input": {marker: marker}}),
        ("/v1/embeddings", {"input": "x", "encoding_format": marker}),
        ("/v1/classify", {"images": [marker * 9], "labels": ["a"], "templates": marker}),
        ("/v1/classify", {"images": marker, "labels": {marker: 1}, marker: 1}),
        ("/v1/search", {"text": "x", "collection": marker}),
        ("/v1/search", {"vector": marker, "k": marker}),
        ("/v1/search", {"queries": [{marker: marker}]}),
        ("/v1/search", {"id": marker}),
        ("/v1/match", {"images": [marker * 9], "texts": [marker]}),
        ("/v1/jobs", {"collection": marker, "items": [{"id": marker, marker: 1}]}),
        (f"/v1/jobs/{marker}:start", {}),
        (f"/v1/models/{marker}:reload", {"path": marker}),
        ("/v1/models/tiny:reload", {"path": marker}),
        ("/v1/collections/toys/items:delete", {"ids": marker}),
    ]
    for path, body in requests:
        response = world.client.post(path, json=body)
        assert response.status_code >= 400
        assert marker not in response.text, path
    assert marker not in world.client.get(f"/{marker}").text


def test_a_wrong_method_has_the_same_body(world: World):
    response = world.client.delete("/v1/embeddings")
    assert (response.status_code, error(response)["code"]) == (405, "method_not_allowed")


def assert_it_answers(world: World) -> None:
    (item,) = world.post("/v1/embeddings", input="a cat").json()["data"]
    want = world.model.embed_texts(["a cat"])[0]
    np.testing.assert_allclose(item["embedding"], want, atol=1e-5)
    assert world.registry.models["tiny"].pipeline.batcher.open_items == 0


# Load and failure


def test_forty_mixed_requests_at_once_each_get_their_own_answer(world: World):
    texts = [f"text number {i} " * (i % 5 + 1) for i in range(10)]
    want = world.model.embed_texts(texts)
    head = world.model.zero_shot(LABELS)

    def ask(i: int) -> None:
        n = i // 4 % 10
        if i % 4 == 0:
            (item,) = world.post("/v1/embeddings", input=texts[n]).json()["data"]
            np.testing.assert_allclose(item["embedding"], want[n], atol=1e-5)
        elif i % 4 == 1:
            body = world.post("/v1/embeddings", input=[{"image": b64(world.pictures[n])}]).json()
            np.testing.assert_allclose(body["data"][0]["embedding"], world.vectors[n], atol=1e-5)
        elif i % 4 == 2:
            images = [b64(world.pictures[n]), b64(b"broken")]
            results = world.post("/v1/classify", images=images, labels=LABELS).json()["results"]
            best = results[0]["predictions"][0]["probability"]
            assert best == pytest.approx(head.classify([world.pictures[n]]).max(), abs=1e-5)
            assert "error" in results[1]
        else:
            found = world.post("/v1/search", image=b64(world.pictures[n]), k=3).json()
            check_hits(world, found["hits"], world.vectors[n], 3)

    with ThreadPoolExecutor(40) as pool:
        list(pool.map(ask, range(40)))
    assert world.registry.models["tiny"].pipeline.batcher.open_items == 0


def test_a_full_queue_gets_429_and_a_time_to_come_back(own_world: World):
    batcher = own_world.registry.models["tiny"].pipeline.batcher
    job = batcher.admit(own_world.registry.settings.max_queue_items)
    response = own_world.post("/v1/embeddings", input="x")
    assert (response.status_code, error(response)["code"]) == (429, "overloaded")
    assert int(response.headers["Retry-After"]) >= 1
    assert own_world.client.get("/health/ready").status_code == 200
    batcher.abandon(job)
    assert own_world.post("/v1/embeddings", input="x").status_code == 200


def test_a_large_body_for_a_full_queue_is_not_even_read(own_world: World):
    batcher = own_world.registry.models["tiny"].pipeline.batcher
    json, large = {"Content-Type": "application/json"}, b"{" * 40_000
    job = batcher.admit(own_world.registry.settings.max_queue_items)
    for path in ("/v1/embeddings", "/v1/classify", "/v1/match"):
        response = own_world.client.post(path, content=large, headers=json)
        assert (response.status_code, error(response)["code"]) == (429, "overloaded"), path
        assert int(response.headers["Retry-After"]) >= 1
    path = "/v1/collections/toys/items"  # may need no model
    assert own_world.client.put(path, content=large, headers=json).status_code == 400
    batcher.abandon(job)
    for path in ("/v1/embeddings", "/v1/classify"):
        assert own_world.client.post(path, content=large, headers=json).status_code == 400, path


def break_pictures(model: Model, error: BaseException) -> Any:
    """Make the picture tower raise until the handle is removed."""

    def raise_it(*_: object) -> None:
        raise error

    return model.network.visual.register_forward_pre_hook(raise_it)


def test_an_exception_in_the_model_fails_its_batch_and_nothing_else(own_world: World):
    image = {"image": b64(encode(make_picture()))}
    handle = break_pictures(own_world.model, RuntimeError("secret detail"))
    failed = own_world.post("/v1/embeddings", input=[image])
    assert (failed.status_code, error(failed)["code"]) == (500, "model_failed")
    assert "secret" not in failed.text
    mixed = own_world.post("/v1/embeddings", input=[image, "a cat"], on_error="report").json()
    assert [item["index"] for item in mixed["data"]] == [1]
    handle.remove()
    assert own_world.post("/v1/embeddings", input=[image]).status_code == 200


def test_a_dead_model_thread_is_not_ready_and_comes_back(own_world: World):
    handle = own_world.model.network.transformer.register_forward_pre_hook(
        lambda *_: (_ for _ in ()).throw(SystemExit(1))
    )
    ready = own_world.client.get("/health/ready")
    assert (ready.status_code, error(ready)["code"]) == (503, "not_ready")
    assert own_world.client.get("/health/live").status_code == 200
    handle.remove()
    assert own_world.post("/v1/embeddings", input="x").status_code == 200
    assert (
        'clipserve_model_restarts_total{model="tiny"} 1.0' in own_world.client.get("/metrics").text
    )


def test_a_batch_that_hangs_is_given_up_after_the_time_that_was_set(
    tmp_path: Path, model_dir: Path
):
    go_on, hangs = threading.Event(), iter([True])

    def hang_once(*_: object) -> None:
        if next(hangs, False):
            go_on.wait(60)

    with serving(tmp_path, model_dir, load_settings(max_batch_s=1.0)) as world:
        world.model.network.transformer.register_forward_pre_hook(hang_once)
        response = world.post("/v1/embeddings", input="x")
        assert (response.status_code, error(response)["code"]) == (500, "model_failed")
        assert world.post("/v1/embeddings", input="x").status_code == 200
        go_on.set()


def test_a_damaged_collection_is_reported_without_its_path(
    own_world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def fail(*_: Any, **__: Any) -> None:
        raise clipserve.errors.IndexStoreError(f"{tmp_path} is damaged")

    monkeypatch.setattr(own_world.registry.collections["toys"].searcher, "search", fail)
    response = own_world.post("/v1/search", text="x")
    assert (response.status_code, error(response)["code"]) == (500, "collection_failed")
    assert str(tmp_path) not in response.text
    assert own_world.post("/v1/embeddings", input="x").status_code == 200


# The process


def test_a_busy_port_is_known_before_a_model_is_loaded(tmp_path: Path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(clipserve.errors.ConfigError, match=f"port {port}: Address already"):
            serve([tmp_path / "no model"], [], load_settings(port=port))


SERVE = """
import atexit, gc, logging, sys
from pathlib import Path
from service.app import serve
from service.settings import load_settings
logging.basicConfig(level=logging.INFO, format="%(name)s %(message)s")
atexit.register(lambda: print(gc.get_freeze_count(), file=sys.stderr))
serve([Path(sys.argv[1])], [], load_settings(port=0, collections_root=Path(sys.argv[2])))
"""


def test_serve_says_where_it_listens_and_ends_well(tmp_path: Path, model_dir: Path):
    registry, _ = build(tmp_path, model_dir, load_settings())
    registry.close()
    shutil.copytree(tmp_path / "toys", tmp_path / ".dropped-0")  # left by a killed service
    process = subprocess.Popen(
        [sys.executable, "-c", SERVE, str(model_dir), str(tmp_path)],
        cwd=Path(__file__).parent.parent,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    log = ""
    for line in process.stderr:
        log += line
        if line.startswith("service.app ready at http://127.0.0.1:"):
            break
    else:
        pytest.fail(log)
    assert "tiny (" in line
    assert "toys" in line
    assert "dropped" not in line
    assert not (tmp_path / ".dropped-0").exists()
    process.send_signal(signal.SIGTERM)
    rest = process.communicate(timeout=20)[1]
    assert process.returncode == 0, rest
    assert "Traceback" not in rest
    num_frozen = int(rest.split()[-1])  # what was imported is never looked over for garbage
    assert num_frozen > 100_000
