"""Hostile requests: what stopped, misled or opened other services, each with what it must get here.

The rows are those of published reports on Infinity, clip-as-service, clip-retrieval, vLLM, TGI,
Starlette, python-multipart and Pillow; the number of an advisory is in the row's name. Imports
nothing of ours, so that a benchmark can send the same to a service in another process.
"""

import base64
import gzip
import io
import json
import pickle
import random
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

REFUSED = (400, 404, 413, 415, 422)
_PICTURE = {"Content-Type": "image/jpeg"}


@dataclass(frozen=True)
class Hostile:
    """A request, and the statuses that are an answer to it."""

    name: str
    path: str
    body: bytes
    statuses: tuple[int, ...] = REFUSED
    method: str = "POST"
    headers: dict[str, str] = field(default_factory=dict)


def hostile_requests(large: bool = True) -> list[Hostile]:
    """All of them; `large`: those of many megabytes too."""
    rows = [*_pictures(), *_values(), *_long(), *_addresses(), *_bodies(), *_names()]
    return rows + (list(_large()) if large else [])


def problem(row: Hostile, status: int, body: bytes) -> str | None:
    """What is wrong with an answer, None if nothing is."""
    if status not in row.statuses:
        return f"{row.name}: status {status}: {body[:300]!r}"
    if status < 400:
        return None
    if len(body) > 4000:
        return f"{row.name}: an error of {len(body)} bytes"
    try:
        error = json.loads(body)["error"]
    except (ValueError, KeyError, TypeError):
        return f"{row.name}: not one of our errors: {body[:300]!r}"
    if sorted(error) != ["code", "message", "param", "type"]:
        return f"{row.name}: {error}"
    for leak in (
        b" at 0x",
        b"BytesIO",
        b"Traceback",
        b"site-packages",
        b"/tmp",
        b"/root",
        b"/home",
    ):
        if leak in body:
            return f"{row.name}: tells {leak!r}: {body[:300]!r}"
    return None


def picture_bytes(form: str = "PNG", size: tuple[int, int] = (64, 48), **options: Any) -> bytes:
    """A picture that is as it should be."""
    buffer = io.BytesIO()
    Image.linear_gradient("L").resize(size).convert("RGB").save(buffer, form, **options)
    return buffer.getvalue()


def _json(name: str, path: str, value: Any, *statuses: int, method: str = "POST") -> Hostile:
    body = value if isinstance(value, bytes) else json.dumps(value).encode()
    headers = {"Content-Type": "application/json"}
    return Hostile(name, path, body, statuses or REFUSED, method, headers)


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _pictures() -> Iterator[Hostile]:
    """Each as JSON, as a form and as a body of its own."""
    jpeg, png = picture_bytes("JPEG"), picture_bytes()
    bad = {
        "truncated JPEG": jpeg[: len(jpeg) // 2],
        "JPEG of its header alone": jpeg[:20],
        "truncated PNG": png[: len(png) // 2],
        "PNG of a wrong checksum": png[:40] + bytes([png[40] ^ 255]) + png[41:],
        "not a picture": b"not a picture at all",
        "no bytes": b"",
        "thin picture of 3x65535": _png_of_one_colour(3, 65535),
        "picture of 9000x9000": _png_of_one_colour(9000, 9000),
        "picture of 2^31-1 squared": _png_header(2**31 - 1, 2**31 - 1),
        "picture without pixels": _png_header(0, 0),
        "PNG whose comment unpacks to 50 MB": _png_with_bomb(png),
        "JPEG 2000 that fails inside Pillow (CVE-2026-22778)": b"\0\0\0\x0cjP  \r\n\x87\n"
        + b"\0" * 64,
        "HEIF (CVE-2026-28231)": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + b"\0" * 64,
        "EPS, which would start Ghostscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        "SVG that names a file": b'<svg xmlns:x="a"><image x:href="file:///etc/passwd"/></svg>',
        "pickle (CVE-2026-3059, CVE-2025-62164)": pickle.dumps({"a": [1, 2, 3]}),
        "TIFF that points at itself": b"II*\0\x08\0\0\0" + b"\xff\xff" + b"\0" * 24,
    }
    for name, data in bad.items():
        item = [{"image": _base64(data)}]
        yield _json(f"{name}, as JSON", "/v1/embeddings", {"input": item})
        uri = f"data:image/png;base64,{_base64(data)}"
        body = {"images": [uri, _base64(png)], "labels": ["a", "b"]}
        yield _json(f"{name}, beside a good one", "/v1/classify", body, 200, *REFUSED)
        yield _form(f"{name}, in a form", data)
        kind = {"Content-Type": "image/png"}
        yield Hostile(f"{name}, as the body", "/v1/embeddings", data, headers=kind)
    odd = {
        "picture of one pixel (CVE-2026-22773)": picture_bytes(size=(1, 1)),
        "picture of two pixels": picture_bytes(size=(2, 1)),
        "CMYK": _cmyk(),
        "GIF of 200 frames": _gif(200),
    }
    for name, data in odd.items():
        yield _json(name, "/v1/embeddings", {"input": [{"image": _base64(data)}]}, 200)


def _values() -> Iterator[Hostile]:
    embeddings, search = "/v1/embeddings", "/v1/search"
    inputs: dict[str, Any] = {
        "an empty list": [],
        "an empty text": "",
        "blanks": "  \n ",
        "token ids": [101, 2023, 102],
        "lists of token ids": [[101, 2023], [102]],
        "nothing": None,
        "a number": 5,
        "2049 texts": ["a"] * 2049,
        "300 pictures": [{"image": _base64(picture_bytes())}] * 300,
        "text and picture in one": [{"text": "a", "image": "b"}],
        "a list in a list in a list": [[["a"]]],
        "base64 that is none": [{"image": "%%%%"}],
        "a data URI of a program": [{"image": "data:text/html,<script>1</script>"}],
    }
    for name, value in inputs.items():
        yield _json(name, embeddings, {"input": value})
    yield _json("an unknown model", embeddings, {"input": "a", "model": "gpt-4"})
    yield _json("a model that is a path", embeddings, {"input": "a", "model": "../../etc/passwd"})
    yield _json("too few dimensions", embeddings, {"input": "a", "dimensions": 8})
    yield _json("dimensions below zero", embeddings, {"input": "a", "dimensions": -1})
    yield _json("a lone surrogate", embeddings, b'{"input": "\\ud800"}', 200, *REFUSED)
    yield _json("a NUL within a text", embeddings, {"input": "a\0b"}, 200)
    yield _json("control characters", embeddings, {"input": "a\x1b[2J\x07\u202eb"}, 200)
    queries: dict[str, Any] = {
        "a vector of the wrong dimension": {"vector": [1.0, 2.0]},
        "a vector of zeros": {"vector": [0.0] * 16},
        "a vector of nested lists (CVE-2025-62164)": {"vector": [[[1.0]]]},
        "k of 10^9": {"text": "a", "k": 10**9},
        "k below zero": {"text": "a", "k": -1},
        "offset of 10^18": {"text": "a", "offset": 10**18},
        "no query": {},
        "two queries": {"text": "a", "vector": [1.0] * 16},
        "a filter of an unknown operator": {"text": "a", "filter": {"n": {"$where": "1"}}},
        "a filter of 100,000 conditions": {
            "text": "a",
            "filter": {f"f{i}": i for i in range(10**5)},
        },
        "a filter of 500 levels": {"text": "a", "filter": _nested(500)},
    }
    asked = (400, 422)  # not 404, which is also what comes where no collection is served
    for name, value in queries.items():
        yield _json(name, search, value, *asked)
    missing = {"text": "a", "collection": "../secret"}
    yield _json("an unknown collection", search, missing, 404)
    yield _json("an id that is a path", search, {"id": "../../../etc/passwd"}, 404)
    for number in (b"NaN", b"Infinity", b"1e999"):
        body = b'{"vector": [' + b",".join([number] * 16) + b"]}"
        yield _json(f"a vector of {number.decode()}", search, body, *asked)
    picture = _base64(picture_bytes())
    labels: dict[str, Any] = {
        "no labels": {"labels": []},
        "an empty label": {"labels": [""]},
        "3000 labels": {"labels": [str(i) for i in range(3000)]},
        "a template without a place": {"labels": ["a"], "templates": ["x"]},
        "templates that are a path": {"labels": ["a"], "templates": "../../etc/passwd"},
        "a template that reaches into objects": {"labels": ["a"], "templates": ["{0.__class__}"]},
        "a label set that is a path": {"label_set": "../../etc/passwd"},
    }
    for name, value in labels.items():
        yield _json(name, "/v1/classify", {"images": [picture], **value})


def _long() -> Iterator[Hostile]:
    """Little to send, much to work or to answer."""
    word = "".join(random.Random(0).choices("abcdefghijklmnopqrstuvwxyz", k=4_900))
    words = [word[i:] + word[:i] for i in range(256)]
    yield _json("256 texts of one long word", "/v1/embeddings", {"input": words}, 200)
    labels = [f"{i}{'a' * 9_990}" for i in range(399)]
    ask: dict[str, Any] = {"texts": ["a"] * 256, "labels": labels}
    yield _json("an answer of 1 GB", "/v1/classify", ask)
    ask = {"texts": ["a"] * 256, "embedding_types": ["base64"] * 100_000}
    yield _json("100,000 encodings of a vector", "/v2/embed", ask)


def _addresses() -> Iterator[Hostile]:
    """While nothing is fetched, and of what is never fetched."""
    for url in (
        "file:///etc/passwd",
        "http://127.0.0.1:8000/metrics",
        "http://localhost/",
        "http://169.254.169.254/latest/meta-data/",
        "http://[::1]/",
        "http://[::ffff:127.0.0.1]/",
        "http://[64:ff9b::7f00:1]/",
        "http://2130706433/",
        "http://127.0.0.1\\@example.org/",
        "http://example.org@127.0.0.1/",
        "https://example.org/a.png",
        "ftp://example.org/a.png",
        "gopher://127.0.0.1:6379/_FLUSHALL",
        "s3://bucket/a.png",
    ):
        name = f"address {url} (GHSA-3f6c-7fw2-ppm4, CVE-2026-24779)"
        yield _json(name, "/v1/embeddings", {"input": url, "modality": "image"})
    for path in ("/etc/passwd", "../../etc/passwd", "C:\\windows\\win.ini"):
        yield _json(f"path {path}", "/v1/embeddings", {"input": [{"image": path}]})


def _bodies() -> Iterator[Hostile]:
    embeddings, kind = "/v1/embeddings", {"Content-Type": "application/json"}
    good = b'{"input": "a cat"}'
    broken = {
        "no body": b"",
        "half of a body": good[:9],
        "JSON of 100,000 levels": b'{"input": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        "objects of 50,000 levels": b'{"input": ' + b'{"a":' * 50_000 + b"1" + b"}" * 50_001,
        "an integer of 100,000 digits": b'{"input": ' + b"9" * 100_000 + b"}",
        "bytes that are no UTF-8": b'{"input": "\xff\xfe"}',
        "UTF-16": good.decode().encode("utf-16"),
        "a list in the place of an object": b"[1, 2]",
        "a text in the place of an object": b'"a"',
        "pickle, called JSON": pickle.dumps({"input": "a"}),
    }
    for name, body in broken.items():
        yield Hostile(name, embeddings, body, headers=kind)
    for other in (
        "application/x-www-form-urlencoded",  # CVE-2026-54283
        "application/x-pickle",
        "application/xml",
        "text/plain",
        "multipart/mixed; boundary=x",
        "",
    ):
        headers = {"Content-Type": other}
        yield Hostile(f"content type {other or 'none'}", embeddings, good, headers=headers)
    many = b"&".join(b"a%d=1" % i for i in range(20_000))
    headers = {"Content-Type": "application/x-www-form-urlencoded"}
    yield Hostile("20,000 urlencoded fields (CVE-2026-54283)", embeddings, many, headers=headers)
    packed = gzip.compress(b'{"input": "' + b"a" * 10**7 + b'"}')
    headers = kind | {"Content-Encoding": "gzip"}
    yield Hostile("a packed body of 10 MB", embeddings, packed, headers=headers)
    for time in ("0.000001", "-1", "nan", "never"):
        headers = kind | {"X-Request-Timeout": time}
        yield Hostile(f"time of {time}", embeddings, good, (400, 504), headers=headers)
    headers = kind | {f"X-{i}": "a" for i in range(200)}
    yield Hostile("200 headers", embeddings, good, (431,), headers=headers)
    headers = kind | {"X-Long": "a" * 40_000}
    yield Hostile("a header of 40,000 bytes", embeddings, good, (431,), headers=headers)
    yield from _forms()


def _forms() -> Iterator[Hostile]:
    name = b'Content-Disposition: form-data; name="%s"'
    part = b"--x\r\n" + name + b"\r\n\r\n%s\r\n"
    end = b"--x--\r\n"
    label = part % (b"labels", b"a")
    file = b'--x\r\nContent-Disposition: form-data; name="files"; filename="%s"\r\n\r\n%s\r\n'
    forms = {
        "a form without parts": b"",
        "a form that breaks off": b"--x\r\nnonsense",
        "a form without its end": label,
        "a field of 3 MB (CVE-2024-47874)": part % (b"labels", b"a" * 3 * 2**20) + end,
        "20,000 fields (CVE-2024-47874)": label * 20_000 + end,
        "300 files": file % (b"a.png", b"x") * 300 + label + end,
        "a part of 5,000 headers (CVE-2026-42561)": b"--x\r\n"
        + b"A: b\r\n" * 5000
        + b"\r\n1\r\n"
        + end,
        "a header of 1 MB in a part (CVE-2026-42561)": b"--x\r\nA: "
        + b"b" * 2**20
        + b"\r\n\r\n1\r\n"
        + end,
        "1 MB before the first part (CVE-2026-40347)": b"\r\n" * 2**19 + label + end,
        "1 MB behind the last part (CVE-2026-40347)": label + end + b"\r\n" * 2**19,
        "a file of 500,000 false boundaries": file % (b"a.png", b"\r\n--xA" * 500_000) + end,
        "a head of 1 MB of spaces": b"--x\r\nA:" + b" " * 2**20 + b"b\r\n\r\n1\r\n" + end,
        "an unknown field": part % (b"__proto__", b"1") + end,
        "a text in the place of a file": part % (b"files", b"x") + label + end,
    }
    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    for title, body in forms.items():
        yield Hostile(title, "/v1/classify", body, headers=headers)
    path = file % (b"../../../../etc/cron.d/x", picture_bytes()) + label + end
    yield Hostile("a file name that is a path", "/v1/classify", path, (200,), headers=headers)
    none = {"Content-Type": "multipart/form-data"}
    yield Hostile("a form without a boundary", "/v1/classify", label + end, headers=none)


def _names() -> Iterator[Hostile]:
    for name in ("..%2f..%2fetc", "%00", "%2e%2e", "a" * 5000, "nul%0d%0aX-Evil: 1"):
        for path in (f"/v1/collections/{name}", f"/v1/models/{name}", f"/v1/jobs/{name}"):
            yield Hostile(f"GET {path[:60]}", path, b"", (404, 400, 422), "GET")
        path = f"/v1/collections/{name}"
        statuses = (400, 403, 404, 405, 415, 422)
        yield _json(f"PUT {path[:60]}", path, {}, *statuses, method="PUT")
        yield Hostile(f"DELETE {path[:60]}", path, b"", statuses, "DELETE")
    yield _json(
        "reload from a path", "/v1/models/tiny:reload", {"path": "/etc"}, 400, 403, 404, 422
    )
    for path in ("/", "/health/live", "/docs", "/ui/app.js"):
        yield Hostile(f"a body for {path}, which needs no key", path, b"{}", (413,))
    yield Hostile("a path of nobody", "/wp-admin/setup.php", b"", (404,), "GET")
    yield Hostile("a page beside the page", "/ui/../settings.py", b"", (404,), "GET")
    yield Hostile("a page that is a path", "/ui/..%2fsettings.py", b"", (404,), "GET")
    yield Hostile("a method of nobody", "/v1/embeddings", b"", (405,), "BREW")


def _large() -> Iterator[Hostile]:
    junk = b'{"modality": "image", "input": "' + b"%" * 40_000_000 + b'"}'
    yield _json("40 MB of junk", "/v1/embeddings", junk)
    texts = ["word " * 20_000] * 200
    yield _json("20 MB of texts", "/v1/embeddings", {"input": texts})
    values = b'{"vector": [' + b"1," * 1_500_000 + b"1]}"
    yield _json("a vector of 1,500,000 numbers", "/v1/search", values)
    fields = b'{"text": "a", "filter": {' + b'"a":1,' * 1_500_000 + b'"a":1}}'
    yield _json("a filter of 1,500,000 fields", "/v1/search", fields)
    yield _json("70 MB", "/v1/embeddings", b" " * 70_000_000, 413)
    # The largest that is allowed, in few bytes: as much memory as a picture can take.
    for form, options in (("WEBP", {"lossless": True}), ("TIFF", {"compression": "tiff_deflate"})):
        largest = io.BytesIO()
        Image.new("RGBA", (7900, 7900), (1, 2, 3, 4)).save(largest, form, **options)
        name = f"{form} of 62 million transparent pixels"
        yield Hostile(name, "/v1/embeddings", largest.getvalue(), (200,), headers=_PICTURE)
    scans = picture_bytes("JPEG", (7900, 7900), progressive=True)
    last = scans[scans.rindex(b"\xff\xda") : -2]
    bomb = scans[:-2] + 10_000 * last
    yield Hostile("a JPEG of 10,000 scans", "/v1/embeddings", bomb, headers=_PICTURE)


def _form(name: str, data: bytes) -> Hostile:
    body = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a"\r\n\r\n' + data
    body += b'\r\n--x\r\nContent-Disposition: form-data; name="labels"\r\n\r\na,b\r\n--x--\r\n'
    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    return Hostile(name, "/v1/classify", body, headers=headers)


def _nested(levels: int) -> dict[str, Any]:
    value: dict[str, Any] = {"a": 1}
    for _ in range(levels):
        value = {"not": value}
    return value


def _cmyk() -> bytes:
    buffer = io.BytesIO()
    Image.new("CMYK", (32, 32), (10, 20, 30, 40)).save(buffer, "JPEG")
    return buffer.getvalue()


def _gif(frames: int) -> bytes:
    images = [Image.new("P", (16, 16), i % 256) for i in range(frames)]
    buffer = io.BytesIO()
    images[0].save(buffer, "GIF", save_all=True, append_images=images[1:])
    return buffer.getvalue()


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _png_header(width: int, height: int) -> bytes:
    header = _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return (
        b"\x89PNG\r\n\x1a\n" + header + _chunk(b"IDAT", zlib.compress(b"")) + _chunk(b"IEND", b"")
    )


def _png_of_one_colour(width: int, height: int) -> bytes:
    """A few hundred bytes a million pixels."""
    rows = zlib.compress((b"\0" + b"\x80" * width) * height, 9)
    header = _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + _chunk(b"IDAT", rows) + _chunk(b"IEND", b"")


def _png_with_bomb(png: bytes) -> bytes:
    comment = _chunk(b"zTXt", b"Comment\0\0" + zlib.compress(b"a" * 50_000_000, 9))
    return png[:33] + comment + png[33:]
