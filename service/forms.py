"""A form (multipart/form-data, RFC 7578) that is in memory already -> its fields and files.

Its parts are found by searching for the boundary, in time that grows with the bytes alone. Parsers
of streams, made for what comes piece by piece, take a step of Python for each byte that might begin
a boundary and write files to disk.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from service.errors import RequestError

_MAX_HEAD_BYTES = 4096
_MAX_FIELD_BYTES = 2**20
_BOUNDARY = re.compile(r';[ \t]*boundary=(?:"([^"]{1,70})"|([^\s;"]{1,70}))', re.IGNORECASE)
_PARAMETER = re.compile(rb';[ \t]*([\w*-]+)=("(?:[^"\\\r\n]|\\.)*"|[^\s;"]*)[ \t]*')
_DISPOSITION = re.compile(
    rb"\r\ncontent-disposition:[ \t]*form-data[ \t]*((?:%b)*)" % _PARAMETER.pattern,
    re.IGNORECASE,
)


@dataclass
class Form:
    """The parts by their names, in order."""

    fields: list[tuple[str, str]] = field(default_factory=list)
    files: list[tuple[str, bytes]] = field(default_factory=list)


def parse_form(content_type: str, body: bytes, *, max_files: int, max_fields: int) -> Form:
    """Raises RequestError for what is no form, or has more parts than that."""
    form = Form()
    for head, content in _parts(body, _boundary(content_type)):
        name, is_file = _describe(head)
        if is_file:
            form.files.append((name, content))
        else:
            form.fields.append((name, _decode(content)))
        if len(form.files) > max_files:
            raise _refusal(f"it has more than {max_files} files")
        if len(form.fields) > max_fields:
            raise _refusal(f"it has more than {max_fields} fields")
    return form


def _boundary(content_type: str) -> bytes:
    found = _BOUNDARY.search(content_type)
    if found is None:
        raise _refusal("its Content-Type names no boundary")
    return (found[1] or found[2]).encode("latin-1")


def _parts(body: bytes, boundary: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Head and content of each; what is before the first and behind the last belongs to none."""
    delimiter = b"\r\n--" + boundary
    first = -2 if body.startswith(delimiter[2:]) else body.find(delimiter)
    if first == -1:
        raise _refusal("its boundary is not in it")
    start = first + len(delimiter)
    while not body.startswith(b"--", start):
        end = body.find(delimiter, start)
        blank = body.find(b"\r\n\r\n", start, start + _MAX_HEAD_BYTES)
        if not (body.startswith(b"\r\n", start) and 0 <= blank < end):
            raise _refusal(f"a part breaks off, or has no head of at most {_MAX_HEAD_BYTES} bytes")
        yield body[start:blank], body[blank + 4 : end]
        start = end + len(delimiter)


def _describe(head: bytes) -> tuple[str, bool]:
    """A part's name, and whether it is a file."""
    found = _DISPOSITION.search(head)
    values = dict(_PARAMETER.findall(found[1])) if found else {}
    if b"name" not in values:
        raise _refusal("a part has no name")
    name = values[b"name"].strip(b'"').decode("utf-8", "replace")
    return name, b"filename" in values or b"filename*" in values


def _decode(content: bytes) -> str:
    if len(content) > _MAX_FIELD_BYTES:
        raise _refusal(f"a field has more than {_MAX_FIELD_BYTES} bytes")
    try:
        return content.decode()
    except UnicodeDecodeError:
        raise _refusal("a field is not UTF-8") from None


def _refusal(problem: str) -> RequestError:
    return RequestError(f"the form cannot be read: {problem}", code="invalid_form")
