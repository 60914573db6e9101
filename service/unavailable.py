"""A collection that is in its place and is not served, and why.

A service starts without it: one collection must not take the models and the others with it,
restart after restart. It is listed, refused with its reason, and can be dropped.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from clipserve.errors import IndexStoreError
from index.collection import Collection

_CLOSED = "it cannot be opened; the server's log says why"


@dataclass(frozen=True)
class Unavailable:
    """What is known of it; of one that cannot be opened its place alone."""

    path: Path
    reason: str = _CLOSED
    """for clients, so without a path"""
    model_name: str | None = None
    fingerprint: str | None = None
    identity: str | None = None

    @property
    def name(self) -> str:
        return self.path.absolute().name


class ModelNotServed(IndexStoreError):
    """A collection whose model is not among those that are served; `found` is the collection."""

    def __init__(self, collection: Collection, served: Iterable[str]) -> None:
        reason = (
            f"it was made by model {collection.model_name!r} with fingerprint"
            f" {collection.fingerprint[:12]}, which is not served; served:"
            f" {', '.join(served) or 'none'}"
        )
        super().__init__(
            f"collection {collection.name!r}: {reason}; serve that model too, or embed the"
            " collection anew: clipserve embed MODEL SOURCE --collection NEW_DIR"
        )
        self.found = Unavailable(
            collection.path,
            reason,
            collection.model_name,
            collection.fingerprint,
            collection.identity,
        )
