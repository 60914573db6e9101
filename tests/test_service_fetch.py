"""Fetching from a server on loopback, which only these tests allow, by names made up here."""

import asyncio
import contextlib
import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import encode, make_picture

from service.errors import RequestError
from service.fetch import Fetcher
from service.inputs import Link, fetched
from service.notes import start
from service.settings import load_settings

PICTURE = encode(make_picture())
LOOPBACK = ("127.0.0.0/8",)


def answer(body: bytes, status: str = "200 OK", *headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *headers, "", ""]
    return "\r\n".join(lines).encode() + body


def redirect(location: str) -> bytes:
    return answer(b"", "302 Found", f"Location: {location}")


class Server:
    """Answers by path, and remembers what it was asked."""

    def __init__(self, answers: dict[str, bytes], hang: tuple[str, ...] = ()) -> None:
        self.answers = answers
        self.hang = hang
        self.requests: list[str] = []
        self.connections = 0
        self.port = 0
        self.tasks: list[asyncio.Task[Any]] = []
        self.over = asyncio.Event()

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        task = asyncio.current_task()
        assert task is not None
        self.tasks.append(task)
        try:
            request = (await reader.readuntil(b"\r\n\r\n")).decode()
            self.requests.append(request)
            path = request.split()[1]
            writer.write(self.answers.get(path, answer(b"", "404 Not Found")))
            await writer.drain()
            if path in self.hang:
                await self.over.wait()
        except (asyncio.IncompleteReadError, OSError):
            pass
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    async def close(self) -> None:
        self.over.set()
        await asyncio.gather(*self.tasks)
        self.tasks.clear()
        self.over = asyncio.Event()  # for another run, in another loop


def names(**known: str | list[str]) -> Any:
    """A resolver; a name with several lists gives the next one each time."""
    asked: list[str] = []

    async def resolve(host: str, port: int) -> list[str]:
        asked.append(host)
        found = known.get(host.replace(".", "_"), [])
        return [found] if isinstance(found, str) else found

    resolve.asked = asked  # type: ignore[attr-defined]
    return resolve


def run(
    server: Server,
    scenario: Callable[[Fetcher], Awaitable[Any]],
    *,
    tls: ssl.SSLContext | None = None,
    allowed: tuple[str, ...] = LOOPBACK,
    resolve: Any = None,
    trusted: ssl.SSLContext | None = None,
    **settings: Any,
) -> Any:
    async def main() -> Any:
        listener = await asyncio.start_server(server.handle, "127.0.0.1", 0, ssl=tls)
        server.port = listener.sockets[0].getsockname()[1]
        given = {"fetch_ports": (server.port,), "fetch_timeout_s": 5} | settings
        fetcher = Fetcher(
            load_settings(**given),
            allowed=allowed,
            resolve=resolve or names(pictures_example="127.0.0.1"),
            ssl_context=trusted,
        )
        try:
            return await scenario(fetcher)
        finally:
            listener.close()
            await server.close()
            fetcher.close()

    return asyncio.run(main())


def get(server: Server, path: str, host: str = "pictures.example", **options: Any) -> bytes:
    scheme = "https" if "tls" in options else "http"

    async def scenario(fetcher: Fetcher) -> bytes:
        return await fetcher.get(f"{scheme}://{host}:{server.port}{path}", "input[3].image")

    result: bytes = run(server, scenario, **options)
    return result


def refused(server: Server, path: str, code: str = "fetch_failed", **options: Any) -> str:
    with pytest.raises(RequestError) as caught:
        get(server, path, **options)
    assert (caught.value.code, caught.value.param) == (code, "input[3].image")
    return str(caught.value)


def test_a_picture_is_fetched_as_it_is():
    server = Server({"/a.png?x=1": answer(PICTURE)})
    assert get(server, "/a.png?x=1") == PICTURE
    (request,) = server.requests
    headers = request.lower()
    assert f"host: pictures.example:{server.port}" in headers
    assert "accept-encoding: identity" in headers
    for secret in ("cookie", "authorization", "referer"):
        assert secret not in headers


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_every_kind_of_picture_that_is_decoded_is_fetched(form):
    picture = encode(make_picture(), form)
    assert get(Server({"/": answer(picture)}), "/") == picture


def test_nothing_is_fetched_by_default():
    assert load_settings().allow_fetch is False


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "localhost", "0.0.0.0", "[::1]", "2130706433", "0x7f.1", "127.1", "0177.0.0.1"],
)
def test_loopback_is_refused_however_it_is_written(host):
    server = Server({"/": answer(PICTURE)})
    with pytest.raises(RequestError, match="could be fetched"):
        get(server, "/", host=host, allowed=(), resolve=_system_resolver)
    assert server.connections == 0


async def _system_resolver(host: str, port: int) -> list[str]:
    found = await asyncio.get_running_loop().getaddrinfo(host, port)
    return [str(item[4][0]) for item in found]


def test_a_name_with_one_private_number_is_refused_altogether():
    server = Server({"/": answer(PICTURE)})
    resolve = names(pictures_example=["127.0.0.1", "10.0.0.1"])
    refused(server, "/", resolve=resolve)
    assert server.connections == 0


def test_a_name_that_changes_its_mind_is_asked_once_and_gains_nothing():
    server = Server({"/": answer(PICTURE)})
    answers = [["127.0.0.1"], ["169.254.169.254"]]
    asked: list[str] = []

    async def rebinding(host: str, port: int) -> list[str]:
        asked.append(host)
        return answers[len(asked) - 1]

    assert get(server, "/", resolve=rebinding) == PICTURE
    assert asked == ["pictures.example"]
    refused(server, "/", resolve=rebinding)
    assert server.connections == 1


def test_redirects_are_followed_to_their_end():
    server = Server({"/1": redirect("/2"), "/2": redirect("3"), "/3": answer(PICTURE)})
    assert get(server, "/1") == PICTURE
    assert server.connections == 3


def test_redirects_are_followed_only_so_far():
    answers = {f"/{i}": redirect(f"/{i + 1}") for i in range(9)} | {"/9": answer(PICTURE)}
    server = Server(answers)
    refused(server, "/0")
    assert server.connections == 4
    server = Server(answers)
    assert get(server, "/5", fetch_max_redirects=4) == PICTURE


@pytest.mark.parametrize(
    "location",
    [
        "http://inside.example:{port}/",
        "http://169.254.169.254:{port}/latest/meta-data/",
        "http://pictures.example:22/",
        "http://pictures.example/",
        "http://user@pictures.example:{port}/a",
        "file:///etc/passwd",
        "ftp://pictures.example:{port}/",
        "",
    ],
)
def test_a_redirect_is_checked_as_the_first_address_was(location):
    server = Server({"/a": answer(PICTURE)})
    resolve = names(pictures_example="127.0.0.1", inside_example="10.0.0.1")

    async def scenario(fetcher: Fetcher) -> None:
        server.answers["/"] = redirect(location.format(port=server.port))
        await fetcher.get(f"http://pictures.example:{server.port}/", "image")

    with pytest.raises(RequestError) as caught:
        run(server, scenario, resolve=resolve)
    assert caught.value.code == "fetch_failed"


@pytest.mark.parametrize(
    "body",
    [
        answer(b"<html>secret inside</html>"),
        answer(b""),
        answer(b"\x89PN"),
        answer(PICTURE, "404 Not Found"),
        answer(PICTURE, "206 Partial Content"),
        answer(PICTURE, "200 OK", "Content-Encoding: gzip"),
        answer(PICTURE, "302 Found"),
        b"HTTP/1.1 200 OK\r\nContent-Length: 10000\r\n\r\n" + PICTURE[:100],
        b"SSH-2.0-OpenSSH\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"X: " + b"y" * 300_000 + b"\r\n\r\n",
        b"",
    ],
)
def test_whatever_goes_wrong_is_told_in_the_same_words(body):
    unreachable = refused(Server({}), "/", resolve=names(pictures_example="127.0.0.2"))
    private = refused(Server({}), "/", resolve=names(pictures_example="10.0.0.1"))
    unknown = refused(Server({}), "/", resolve=names())
    answered = refused(Server({"/": body}), "/")
    assert unreachable == private == unknown == answered
    assert "127." not in answered
    assert "pictures.example" not in answered


@pytest.mark.parametrize(
    ("url", "settings"),
    [
        ("http://pictures.example:22/", {}),
        ("http://pictures.example/", {"fetch_ports": (443,)}),
        ("ftp://pictures.example/", {}),
        ("http://user@pictures.example/", {"fetch_ports": (80,)}),
        ("http://pictures.example/", {"fetch_ports": (80,), "fetch_hosts": ("other.example",)}),
        ("http://xother.example/", {"fetch_ports": (80,), "fetch_hosts": ("other.example",)}),
        ("http://other.example/", {"fetch_ports": (80,), "fetch_hosts": (".other.example",)}),
    ],
)
def test_an_address_the_settings_rule_out_is_not_even_resolved(url, settings):
    resolve = names(pictures_example="127.0.0.1")

    async def scenario(fetcher: Fetcher) -> None:
        await fetcher.get(url, "image")

    with pytest.raises(RequestError) as caught:
        run(Server({}), scenario, resolve=resolve, **settings)
    assert caught.value.code == "url_not_allowed"
    assert resolve.asked == []
    assert "pictures.example" not in str(caught.value)


@pytest.mark.parametrize("hosts", [("Pictures.example",), (".example",)])
def test_a_host_on_the_list_is_asked(hosts):
    assert get(Server({"/": answer(PICTURE)}), "/", fetch_hosts=hosts) == PICTURE


def test_a_picture_over_the_limit_is_not_read_to_its_end():
    endless = b"HTTP/1.1 200 OK\r\n\r\n" + PICTURE + b"\0" * 2**20
    server = Server({"/": endless}, hang=("/",))
    refused(server, "/", max_image_bytes=2**19)


@pytest.mark.parametrize("start_of_answer", [b"", b"HTTP/1.1 200 OK\r\n\r\n" + PICTURE[:50]])
def test_a_server_that_hangs_is_given_up(start_of_answer):
    server = Server({"/": start_of_answer}, hang=("/",))
    refused(server, "/", fetch_timeout_s=0.2)


def test_a_request_holds_what_is_fetched_for_it():
    async def scenario(fetcher: Fetcher) -> int:
        held: list[int] = []
        start("id").hold = held.append
        await fetcher.get(f"http://pictures.example:{server.port}/", "image")
        return sum(held)

    server = Server({"/": answer(PICTURE)})
    assert run(server, scenario) == len(PICTURE)


def test_one_request_has_four_fetches_at_once_and_leaves_the_rest_to_others():
    asked: list[str] = []
    go_on = asyncio.Event()

    class Slow:
        async def get(self, url: str, param: str) -> bytes:
            asked.append(url)
            await go_on.wait()
            return PICTURE

    async def scenario() -> None:
        links = [Link(f"https://pictures.example/{i}", "input") for i in range(10)]
        many = asyncio.ensure_future(fetched(links, Slow()))
        one = asyncio.ensure_future(fetched(links[9:], Slow()))
        for _ in range(10):
            await asyncio.sleep(0)
        assert [url[-1] for url in asked] == ["0", "1", "2", "3", "9"]
        go_on.set()
        pictures = await many + await one
        assert [picture.read() for picture in pictures] == [PICTURE] * 11

    asyncio.run(scenario())


def test_where_one_fetch_ends_the_request_the_others_end_with_it():
    begun, ended = [], []

    class TooManyBytes(Exception):
        pass

    class Mixed:
        async def get(self, url: str, param: str) -> bytes:
            if url.endswith("2"):
                raise TooManyBytes
            begun.append(url)
            try:
                await asyncio.Event().wait()
            finally:
                ended.append(url)
            raise AssertionError("nobody waits for this")

    async def scenario() -> None:
        links = [Link(f"https://pictures.example/{i}", "input") for i in range(10)]
        with pytest.raises(TooManyBytes):
            await fetched(links, Mixed())
        await asyncio.sleep(0)
        assert len(begun) < 9
        assert ended == begun
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(scenario())


def test_names_are_resolved_by_threads_that_end_with_the_fetcher(monkeypatch):
    threads: list[threading.Thread] = []
    known = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 80))]

    def getaddrinfo(*_: Any, **__: Any) -> Any:
        threads.append(threading.current_thread())
        return known

    async def main() -> None:
        fetcher = Fetcher(load_settings(fetch_connections=1), allowed=())
        try:
            for _ in range(2):
                with pytest.raises(RequestError):
                    await fetcher.get("http://pictures.example/", "image")
        finally:
            fetcher.close()

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    asyncio.run(main())
    first, second = threads
    assert first is second
    assert first.name.startswith("resolve")
    first.join(30)
    assert not first.is_alive()


def test_proxies_of_the_environment_are_not_asked(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    assert get(Server({"/": answer(PICTURE)}), "/") == PICTURE


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of pictures.example, signed by itself: key and certificate in one file."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("needs the openssl command")
    folder = tmp_path_factory.mktemp("tls")
    command = f"{openssl} req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes"
    command += f" -keyout {folder}/key -out {folder}/certificate -days 2 -subj /CN=test"
    command += " -addext subjectAltName=DNS:pictures.example"
    subprocess.run(command.split(), check=True, capture_output=True)
    both = folder / "both"
    both.write_bytes((folder / "key").read_bytes() + (folder / "certificate").read_bytes())
    return both


def test_tls_checks_the_name_though_the_connection_goes_to_a_number(certificate: Path):
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate)
    trusted = ssl.create_default_context(cafile=str(certificate))
    resolve = names(pictures_example="127.0.0.1", other_example="127.0.0.1")
    options: dict[str, Any] = {"tls": tls, "resolve": resolve}
    server = Server({"/": answer(PICTURE)})
    assert get(server, "/", trusted=trusted, **options) == PICTURE
    refused(server, "/", trusted=trusted, host="other.example", **options)
    refused(server, "/", **options)
