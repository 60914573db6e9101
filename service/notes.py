"""What is known of the request being served, for its log line, its headers and its span.

Whoever learns something while a request runs says it here: `notes().key = "name"`. Outside of a
request, as in a bulk job, nobody reads it.
"""

import contextlib
import contextvars
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace


@dataclass
class Notes:
    """One request."""

    id: str = ""
    key: str | None = None
    """the name of its API key"""
    items: int = 0
    """pictures and texts that went to a model"""
    hold: Callable[[int], None] = lambda size: None
    """counts bytes that the request holds beside its body; raises when they are too many"""
    expect: Callable[[int], None] = lambda size: None
    """counts bytes that its answer is made from, before they are read, from any thread; raises when
    all requests together hold too many"""
    deadline_s: float = math.inf
    """by time.monotonic: when its client stops waiting, if it said so"""
    seconds: dict[str, float] = field(default_factory=dict)
    """by stage: the longest wait in the queue, the sum of its batches; read a copy, as a model's
    thread may be adding to it"""

    def ran(self, waited_s: float, seconds: float) -> None:
        """A batch that holds items of this request was run. From any thread."""
        self.seconds["queue"] = max(self.seconds.get("queue", 0.0), waited_s)
        self.seconds["inference"] = self.seconds.get("inference", 0.0) + seconds


_current: contextvars.ContextVar[Notes | None] = contextvars.ContextVar("notes", default=None)


def start(request_id: str) -> Notes:
    """Notes of a new request, found by `notes` in its task and in those made from it."""
    made = Notes(request_id)
    _current.set(made)
    return made


def notes() -> Notes:
    """Those of the request being served, or some that are thrown away."""
    return _current.get() or Notes()


@contextlib.contextmanager
def without_deadline() -> Iterator[None]:
    """For work that other requests wait for as well, which may have more time."""
    own = notes()
    made = replace(own, items=0, deadline_s=math.inf)
    token = _current.set(made)
    try:
        yield
    finally:
        _current.reset(token)
        own.items += made.items
