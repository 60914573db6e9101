"""The thread that runs a model's batches, and how a bad item is told from its good neighbours.

Start at `Worker`. It knows no queue: it is handed batches and told when to stop. Whether it lives,
and how long its present call takes, is for its supervisor (`batching.py`) to see.

Legend: N items of a batch, E embedding.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from service.errors import ModelFailed
from service.scheduler import Item, Kind

logger = logging.getLogger(__name__)

Encode = Callable[[Sequence[Any]], Sequence[Any] | np.ndarray]
"""prepared items of a batch -> vectors (N, E), or N answers of which each may be an exception"""


class Worker:
    """One thread. `take` waits for its next batch, None ends it; `ran` is told of each that ran;
    `ended` is called last, however it came to that."""

    def __init__(
        self,
        name: str,
        encode: Mapping[Kind, Encode],
        take: Callable[["Worker"], list[Item] | None],
        ran: Callable[["Worker", list[Item], list[Any], float], None],
        ended: Callable[["Worker"], None],
        clock: Callable[[], float],
    ) -> None:
        self.name = name
        self.held: list[Item] = []
        """the batch that was handed to it last, while it runs"""
        self.called_s: float | None = None
        """when the model was last called for it; None while there is no batch"""
        self.has_ended = False
        self._encode = encode
        self._take = take
        self._ran = ran
        self._ended = ended
        self._clock = clock
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def join(self, timeout_s: float) -> None:
        self._thread.join(timeout_s)

    def _work(self) -> None:
        try:
            while (batch := self._take(self)) is not None:
                self._run(batch)
        except BaseException:  # whatever it is, another thread takes over; the log says what
            logger.critical("%s: the model's thread dies", self.name, exc_info=True)
        finally:
            self.has_ended = True
            self._ended(self)

    def hold(self, items: list[Item]) -> None:
        """What it is about to run; from now on its time is taken."""
        self.held, self.called_s = items, self._clock()

    def _run(self, items: list[Item]) -> None:
        kind, started = items[0].kind, self._clock()
        results = isolate(lambda data: self._call(kind, data), [item.data for item in items])
        self._ran(self, items, results, self._clock() - started)
        for item, result in zip(items, results, strict=True):
            item.settle(result)
        self.held, self.called_s = [], None

    def _call(self, kind: Kind, data: Sequence[Any]) -> list[Any]:
        self.called_s = self._clock()
        try:
            return check(self._encode[kind](data), len(data))
        except Exception:  # whatever it is; who calls tries parts, and fails items one by one
            logger.exception("%s: a batch of %d (%s) failed", self.name, len(data), kind)
            raise


def isolate(call: Callable[[Sequence[Any]], list[Any]], data: Sequence[Any]) -> list[Any]:
    """N answers. Where the call raises, its halves are tried, so that a bad item fails alone.

    One bad item of N costs about 2 log2(N) calls more. At most twice that many are made: items that
    are not settled by then fail, for it is the model that is broken.
    """
    answers: list[Any] = [ModelFailed("the model failed; try again") for _ in data]
    calls_left = 2 + 4 * len(data).bit_length()
    parts = deque([range(len(data))])
    while parts and calls_left:
        part = parts.popleft()
        calls_left -= 1
        try:
            answers[part.start : part.stop] = call(data[part.start : part.stop])
        except Exception as error:
            if len(part) > 1:
                middle = part.start + len(part) // 2
                parts += [range(part.start, middle), range(middle, part.stop)]
            else:
                answers[part.start] = _failed(error)
    return answers


def check(answers: Sequence[Any] | np.ndarray, size: int) -> list[Any]:
    """One for each item; of vectors (N, E) an error in place of each that is not finite."""
    if len(answers) != size:
        raise ModelFailed(f"the model gave {len(answers)} answers for {size} items")
    if not isinstance(answers, np.ndarray):
        return list(answers)
    finite = np.isfinite(answers).all(axis=tuple(range(1, answers.ndim)))
    return [
        answer if good else ModelFailed("the model gave a vector that is not finite")
        for answer, good in zip(answers, finite, strict=True)
    ]


def _failed(error: Exception) -> ModelFailed:
    if isinstance(error, ModelFailed):
        return error
    return ModelFailed(f"the model failed on this item ({type(error).__name__})")
