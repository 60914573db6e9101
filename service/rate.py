"""How often a client may ask: a token bucket for each, in a table of bounded size."""

import math
import time
from collections import OrderedDict
from collections.abc import Callable

from service.errors import Overloaded

_MAX_CLIENTS = 10_000
"""those seen longest ago are forgotten first, which fills their buckets again"""


class RateLimit:
    """At most `per_minute` requests a minute of each client, all of them at once if it likes."""

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_minute = per_minute
        self._clock = clock
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()  # tokens, when

    def take(self, client: str) -> None:
        """Count one request. Overloaded, with the time until the next, when the bucket is empty."""
        if not self._per_minute:
            return
        now = self._clock()
        tokens, then = self._buckets.pop(client, (float(self._per_minute), now))
        tokens = min(self._per_minute, tokens + (now - then) * self._per_minute / 60)
        allowed = tokens >= 1
        self._buckets[client] = (tokens - allowed, now)
        if len(self._buckets) > _MAX_CLIENTS:
            self._buckets.popitem(last=False)
        if not allowed:
            raise Overloaded(
                f"over {self._per_minute} requests a minute; come back later",
                math.ceil((1 - tokens) * 60 / self._per_minute),
                code="rate_limited",
            )
