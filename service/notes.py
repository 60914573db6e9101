"""What is known of the request being served, for its log line, its headers and its span.

Whoever learns something while a request runs says it here: `notes().key = "name"`. Outside of a
request, as in a bulk job, nobody reads it.
"""

import contextvars
from collections.abc import Callable
from dataclasses import dataclass, field


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
