"""The file of API keys, which `clipserve keys` writes and the service reads.

A key is `csk_ID_SECRET`; its file keeps, a JSON object a line, the ID, a name, a scope, a salt and
the SHA-256 of salt and secret. The secret is 256 random bits, so a slow hash would protect nothing
more. Start at `Keys`.
"""

import contextlib
import datetime
import fcntl
import hashlib
import hmac
import json
import logging
import os
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, get_args

from clipserve.errors import ConfigError
from clipserve.files import new_file

logger = logging.getLogger(__name__)

KeyScope = Literal["read", "write", "admin"]
SCOPES: tuple[KeyScope, ...] = get_args(KeyScope)
"""each may do what those before it may"""

_UNKNOWN_SALT = "0" * 32
_MAX_TOKEN_BYTES = 200


@dataclass(frozen=True)
class Key:
    """A line of the file."""

    id: str
    name: str
    scope: KeyScope
    salt: str
    sha256: str
    created: str

    def allows(self, scope: KeyScope) -> bool:
        return SCOPES.index(self.scope) >= SCOPES.index(scope)


class Keys:
    """The keys of a file, read again when it changes. ConfigError if there is none at first."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: dict[str, Key] = {}
        self._seen: tuple[int, int, int] | None = None
        _check_readable(path)
        self._refresh()
        if not self._known:
            raise ConfigError(
                f"{path} holds no API key; make one: clipserve keys new --name NAME --file {path}"
            )

    def find(self, token: bytes) -> Key | None:
        """The key that a client sent, None if it is not one of ours."""
        self._refresh()
        identity, secret = _parse(token)
        key = self._known.get(identity)
        # An unknown key is hashed and compared too: both take the same time.
        salt, expected = (key.salt, key.sha256) if key else (_UNKNOWN_SALT, "0" * 64)
        equal = hmac.compare_digest(_hash(salt, secret), expected)
        return key if key is not None and equal else None

    def _refresh(self) -> None:
        """Read the file if it is another than last time; a missing one holds no keys."""
        try:
            status = self._path.stat()
        except OSError:
            seen = None
        else:
            seen = (status.st_mtime_ns, status.st_size, status.st_ino)
        if seen == self._seen:
            return
        self._seen = seen
        self._known = {} if seen is None else {key.id: key for key in read_keys(self._path)}
        logger.info("%d API keys are known", len(self._known))


def read_keys(path: Path) -> list[Key]:
    """The keys of a file; a line that is none grants nothing and is logged by its number."""
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError):
        logger.error("the file of API keys cannot be read; nobody is let in")
        return []
    return list(_read_lines(lines))


def check_scope(text: str) -> KeyScope:
    """ConfigError unless it is one."""
    for scope in SCOPES:
        if scope == text:
            return scope
    raise ConfigError(f"scope {text!r} is none; use {', '.join(SCOPES)}")


def add_key(path: Path, name: str, scope: KeyScope) -> str:
    """Append a new key to the file, made if it is not there; returns what the client sends."""
    if not name.strip() or len(name) > 64 or not name.isprintable():
        raise ConfigError(f"name {name!r} must be 1 to 64 printable characters")
    identity, secret, salt = secrets.token_hex(6), secrets.token_urlsafe(32), secrets.token_hex(16)
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    key = Key(identity, name, scope, salt, _hash(salt, secret.encode()), now)
    with _locked(path.parent):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        with os.fdopen(descriptor, "r+b", buffering=0) as file:
            is_cut = file.read()[-1:] not in (b"", b"\n")  # by an editor
            file.write(b"\n" * is_cut + json.dumps(asdict(key)).encode() + b"\n")
            os.fsync(file.fileno())
    return f"csk_{identity}_{secret}"


def revoke_key(path: Path, identity: str) -> Key:
    """Take a key, by its ID, out of the file, of which all else stays. ConfigError lists the
    known."""
    with _locked(path.parent):
        keys = read_keys(path)
        gone = next((key for key in keys if key.id == identity), None)
        if gone is None:
            known = ", ".join(key.id for key in keys) or "none"
            raise ConfigError(f"no key {identity!r} in {path}; there are: {known}")
        lines = path.read_text().splitlines(keepends=True)
        found = [(line, _read_line(line)) for line in lines]
        _replace(path, [line for line, key in found if key is None or key.id != identity])
    return gone


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Wait for whoever changes a file of keys there. A lock file would be its maker's, whom
    others of the machine could not follow."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _replace(path: Path, lines: Sequence[str]) -> None:
    """As the same owner's, or the service could not read it after root changed it."""
    status = path.stat()
    with new_file(path) as file:
        try:
            os.fchown(file.fileno(), status.st_uid, status.st_gid)
        except PermissionError:
            raise ConfigError(f"{path} is another user's; change it as its owner") from None
        os.fchmod(file.fileno(), status.st_mode & 0o777)
        file.write("".join(lines).encode())


def _check_readable(path: Path) -> None:
    try:
        path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"api_keys_file {path} cannot be read: {getattr(error, 'strerror', None) or error};"
            f" make one: clipserve keys new --name NAME --file {path}"
        ) from None


def _read_lines(lines: Sequence[str]) -> Iterator[Key]:
    for number, line in enumerate(lines, start=1):
        key = _read_line(line)
        if key is not None:
            yield key
        elif line.strip():
            logger.error("line %d of the file of API keys is no key", number)


def _read_line(line: str) -> Key | None:
    try:
        key = Key(**json.loads(line))
        if not all(isinstance(value, str) and value for value in asdict(key).values()):
            return None
        is_key = key.scope in SCOPES and len(bytes.fromhex(key.sha256)) == 32
    except (ValueError, TypeError):
        return None
    return key if is_key else None


def _parse(token: bytes) -> tuple[str, bytes]:
    prefix, _, rest = token.partition(b"_")
    identity, _, secret = rest.partition(b"_")
    if prefix != b"csk" or len(token) > _MAX_TOKEN_BYTES:
        return "", b""
    return identity.decode("latin-1"), secret


def _hash(salt: str, secret: bytes) -> str:
    return hashlib.sha256(salt.encode() + secret).hexdigest()
