"""The end of a process that no thread holds up.

A thread that waits for a volume which does not answer can be neither stopped nor joined, and Python
joins the threads of its pools before a process ends. So closing has one deadline, after which the
process ends as it is: what was acknowledged is on disk by then. Start at `Ending.begin`.
"""

import logging
import os
import queue
import threading
from collections.abc import Callable
from typing import NoReturn

logger = logging.getLogger(__name__)

_LAST_WORDS_S = 2.0


class Ending:
    """Watches over the closing of a service, from a thread of its own. `exit_code` is asked for
    what to end with."""

    def __init__(self, patience_s: float, exit_code: Callable[[], int] = lambda: 0) -> None:
        self._patience_s = patience_s
        self._exit_code = exit_code
        # Its `put` may come from the handler of a signal, whatever that interrupted.
        self._events: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._watch, name="ending", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def begin(self) -> None:
        """Everything has to be closed in so many seconds; who comes a second time ends the process
        now. May be called by the handler of a signal."""
        self._events.put(False)

    def done(self) -> None:
        """Everything is closed."""
        self._events.put(True)

    def end_now(self, why: str) -> NoReturn:
        """End the process, as far as it has come; a log that does not take the reason is not waited
        for either."""
        codes = [1]

        def tell() -> None:
            codes.append(self._exit_code())
            logger.warning("%s: the process ends without waiting any longer", why)
            logging.shutdown()

        try:
            telling = threading.Thread(target=tell, name="last words", daemon=True)
            telling.start()
            telling.join(_LAST_WORDS_S)
        finally:
            os._exit(codes[-1])

    def _watch(self) -> None:
        if self._events.get():
            return
        try:
            if self._events.get(timeout=self._patience_s):
                return
        except queue.Empty:
            self.end_now(f"closing took over {self._patience_s:g} s")
        self.end_now("a second signal came")
