"""Builds a collection's index anew when enough was written since, while searches go on.

Start at `Maintainer`. What is decided, and when, is in `Maintainer.is_due`.
"""

import logging
import math
import os
import threading
import time
from collections.abc import Callable
from typing import Self

import numpy as np

from clipserve.errors import ClipserveError
from index.build import rebuild
from index.collection import Collection
from index.search import Searcher

logger = logging.getLogger(__name__)

_PATIENCE_S = 2.0
"""for a build under way when the maintainer is closed"""


class Maintainer:
    """One thread that looks after the index of a searcher. A context manager that ends it.

    An index is due when the vectors that a search goes through beside it, fresh or dead, are more
    than `min_rows` and than `rebuild_fraction` of it; or the fresh ones, each of which every search
    compares, more than `max_fresh`. After a build it rests for as long as that took, and longer the
    less than `rebuild_fraction` has changed since, so that a flood of writes is not followed by
    build upon build. It is built as the one before was asked for, unless `kind`, `queries`,
    `recall_target` or `memory_bytes`, which are `build`'s, say otherwise. Errors are logged and
    searches go on with the index there is; after one the next attempt waits `retry_s`. Without
    `notify` it looks every `poll_s`.
    """

    def __init__(
        self,
        searcher: Searcher,
        *,
        rebuild_fraction: float = 0.1,
        min_rows: int = 10_000,
        max_fresh: int = 50_000,
        kind: str | None = None,
        queries: np.ndarray | None = None,
        recall_target: float | None = None,
        memory_bytes: int | None = None,
        threads: int | None = None,
        poll_s: float = 60.0,
        retry_s: float = 60.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._searcher = searcher
        self._fraction = rebuild_fraction
        self._min_rows = min_rows
        self._max_fresh = max_fresh
        self._kind = kind
        self._queries = queries
        self._recall_target = recall_target
        self._memory_bytes = memory_bytes
        self._threads = threads or max(1, (os.cpu_count() or 1) // 2)
        self._poll_s = poll_s
        self._retry_s = retry_s
        self._clock = clock
        self._built_at, self._built_s = -math.inf, 0.0
        self._wake = threading.Event()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="maintainer", daemon=True)

    def __enter__(self) -> Self:
        self._searcher.watch(self.notify)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def notify(self) -> None:
        """Something was written. Returns at once."""
        self._wake.set()

    def close(self) -> None:
        """End the thread. A build that takes long is left behind: it ends with the process, or
        leaves a good index for the next searcher."""
        self._closing.set()
        self._wake.set()
        self._thread.join(_PATIENCE_S)
        if self._thread.is_alive():
            logger.warning(
                "the index of %s is still being built and is not waited for",
                self._searcher.collection.path,
            )

    def is_due(self) -> bool:
        """Whether so much is searched beside the index that a new one is worth building."""
        stats = self._searcher.stats()
        changed = stats.fresh + stats.dead
        worth_it = max(self._min_rows, self._fraction * stats.indexed)
        if stats.fresh <= self._max_fresh and changed <= worth_it:
            return False
        rest_s = self._built_s * max(1.0, worth_it / changed)
        return self._clock() >= self._built_at + rest_s

    def rebuild(self) -> None:
        """Build the index and have the searcher take it, here and now."""
        started = self._clock()
        try:
            self._searcher.take_index(self._build)
        finally:
            self._built_at = self._clock()
            self._built_s = self._built_at - started

    def _build(self) -> bool:
        # A connection of its own: the searcher's may be closed before a long build ends.
        with Collection.open(self._searcher.collection.path) as collection:
            rebuild(
                collection,
                kind=self._kind,
                field=self._searcher.field,
                queries=self._queries,
                recall_target=self._recall_target,
                memory_bytes=self._memory_bytes,
                threads=self._threads,
            )
        return not self._closing.is_set()

    def _run(self) -> None:
        while not self._closing.is_set():
            self._wake.wait(self._poll_s)
            self._wake.clear()
            try:
                if not self._closing.is_set() and self.is_due():
                    self.rebuild()
            except Exception as error:  # whatever it is, searches go on
                if self._closing.is_set():
                    return
                is_ours = isinstance(error, ClipserveError)
                logger.error(
                    "the index of %s was not built anew, the old one stays: %s",
                    self._searcher.collection.path,
                    error,
                    exc_info=None if is_ours else error,
                )
                self._closing.wait(self._retry_s)
