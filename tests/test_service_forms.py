"""Forms as clients write them, and as nobody should."""

import tempfile
import threading
from typing import Any

import httpx
import pytest
from served import World, error

from service import bodies
from service.errors import RequestError
from service.forms import Form, parse_form

TYPE = "multipart/form-data; boundary=x"
FIELD = b'--x\r\nContent-Disposition: form-data; name="labels"\r\n\r\na cat\r\n'
FILE = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a"\r\n\r\n%b\r\n'
END = b"--x--\r\n"


def parse(body: bytes, content_type: str = TYPE) -> Form:
    return parse_form(content_type, body, max_files=3, max_fields=3)


def test_what_a_client_writes_is_read() -> None:
    odd = b"\r\n--\r\n\r\n\0\xff--"
    files = [("files", ("a.png", odd)), ("file", ('\u732b; name="b".png', b"", "image/png"))]
    data = {"labels": ["caf\u00e9", ""], "k": "1"}
    sent = httpx.Request("POST", "http://x", files=files, data=data)
    form = parse(sent.read(), sent.headers["content-type"])
    assert form.files == [("files", odd), ("file", b"")]
    assert sorted(form.fields) == [("k", "1"), ("labels", ""), ("labels", "caf\u00e9")]


@pytest.mark.parametrize(
    "body",
    [
        FIELD + END,
        FIELD + b"--x--",
        b"something before\r\n" + FIELD + END + b"something behind\r\n--x\r\n",
        FIELD.replace(b'"', b"").replace(b"C", b"c").replace(b": ", b":") + END,
        FIELD.replace(b"\r\nContent", b"\r\nContent-Type: text/plain\r\nContent") + END,
    ],
)
def test_a_form_may_be_written_in_several_ways(body: bytes) -> None:
    assert parse(body) == Form([("labels", "a cat")], [])


@pytest.mark.parametrize(
    "content_type",
    ['Multipart/Form-Data; Boundary="x"', "multipart/form-data;charset=utf-8;boundary=x; a=b"],
)
def test_a_boundary_may_be_written_in_several_ways(content_type: str) -> None:
    assert parse(FIELD + END, content_type).fields == [("labels", "a cat")]


@pytest.mark.parametrize("name", [b'a\\"; name=\\"b', b"a; name=b", b"C:\\a.png", b""])
def test_the_name_of_a_file_is_no_name_of_a_part(name: bytes) -> None:
    assert parse(FILE.replace(b'"a"', b'"%b"' % name) % b"1" + END).files == [("files", b"1")]


def test_a_file_name_of_other_letters_makes_a_file_too() -> None:
    body = FILE.replace(b'filename="a"', b"filename*=utf-8''%%E7%%8C%%AB.png") % b"1" + END
    assert parse(body).files == [("files", b"1")]


@pytest.mark.parametrize(
    ("body", "word"),
    [
        (b"", "boundary is not in it"),
        (b"--y--", "boundary is not in it"),
        (FIELD, "breaks off"),
        (b"--x\r\nnonsense", "breaks off"),
        (b"--x\r\n\r\n1\r\n" + END, "no name"),
        (FIELD.replace(b"name=", b"nome=") + END, "no name"),
        (FIELD.replace(b"--x", b"--xContent: 1") + b"\r\n" + END, "no head"),
        (FIELD.replace(b"a cat", b"\xff") + END, "UTF-8"),
        (FIELD.replace(b"a cat", b"a" * 2**21) + END, "1048576 bytes"),
        (FIELD.replace(b"\r\n\r\n", b"\r\nA: %b\r\n\r\n" % (b"a" * 5000)) + END, "no head"),
        (FIELD * 4 + END, "more than 3 fields"),
        (FILE % b"1" * 4 + END, "more than 3 files"),
        (FILE % (b"\r\n--xA" * 100_000) + END, "breaks off"),
    ],
)
def test_what_is_no_form_is_refused(body: bytes, word: str) -> None:
    with pytest.raises(RequestError, match=word) as caught:
        parse(body)
    assert caught.value.code == "invalid_form"


@pytest.mark.parametrize("content_type", ["multipart/form-data", TYPE + "y" * 70])
def test_a_boundary_is_needed(content_type: str) -> None:
    with pytest.raises(RequestError):
        parse(FIELD + END, content_type)


def test_a_large_form_is_read_in_the_pool_and_never_on_disk(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[str] = []

    def noted(*arguments: Any, **options: Any) -> Form:
        threads.append(threading.current_thread().name)
        return parse_form(*arguments, **options)

    def refuse(*arguments: Any, **options: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(bodies, "parse_form", noted)
    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    files = [("files", world.pictures[0]), ("files", b"x" * 3 * 2**20)]
    answer = world.client.post("/v1/classify", files=files, data={"labels": "a,b"})
    assert ["error" in one for one in answer.json()["results"]] == [False, True]
    pool = world.registry.pool.submit(threading.current_thread).result().name
    assert [name.rpartition("_")[0] for name in threads] == [pool.rpartition("_")[0]]


def test_a_form_with_too_many_files_says_how_many_there_may_be(world: World) -> None:
    answer = world.client.post("/v1/search", files=[("file", world.pictures[0])] * 2)
    assert answer.status_code == 400
    assert "more than 1 files" in error(answer)["message"]
