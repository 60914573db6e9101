"""The pictures and texts of one request -> unit vectors, through the pool and the model's queue.

Decoding and tokenising happen in a small thread pool, neither on the event loop nor on the model's
thread. Each item succeeds or fails on its own. Start at `Pipeline.embed`.

Legend: N items, T text tokens, E embedding.
"""

import asyncio
from collections.abc import Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clipserve.embed import embed_ids, embed_pixels
from clipserve.images import ImageLimits, decode_image, make_thumbnail
from clipserve.model import Model
from clipserve.text import Tokens
from service.batching import Batcher, Job, Observer
from service.inputs import Input, Picture, Text
from service.settings import Settings


@dataclass
class Embedded:
    """The answers for N inputs, in order."""

    vectors: list[np.ndarray | Exception]
    """a row (E,), or the error that stopped this item"""
    num_tokens: list[int]
    """0 for a picture"""
    truncated: list[bool]
    thumbnails: list[bytes | None]
    """small JPEGs of the pictures, if asked for"""

    def rows(self) -> np.ndarray:
        """(N, E) when nothing failed; else raises the first error."""
        for vector in self.vectors:
            if isinstance(vector, Exception):
                raise vector
        return np.stack([vector for vector in self.vectors if isinstance(vector, np.ndarray)])


class Pipeline:
    """A model behind its queue."""

    def __init__(
        self, model: Model, settings: Settings, pool: Executor, observer: Observer, name: str
    ) -> None:
        self._model = model
        self._limits: ImageLimits = settings.image_limits
        self._pool = pool
        # Texts do not wait behind pictures; one thread, for transformers' fast tokenizers are not
        # thread-safe.
        self._tokenizer_thread = ThreadPoolExecutor(1, f"tokenize-{name}")
        self.batcher = Batcher(
            {"image": self._encode_images, "text": self._encode_texts},
            max_batch={"image": settings.max_image_batch, "text": settings.max_text_batch},
            max_items=settings.max_queue_items,
            observer=observer,
            name=name,
        )

    async def embed(
        self, inputs: Sequence[Input], *, thumbnails: bool = False, urgent: bool = False
    ) -> Embedded:
        """Vectors of all inputs. Raises Overloaded before any work; cancelling drops the work."""
        size = len(inputs)
        answer = Embedded([], [0] * size, [False] * size, [None] * size)
        job = self.batcher.admit(size, urgent=urgent)
        try:
            self._prepare(job, inputs, answer, thumbnails, urgent)
            await asyncio.wrap_future(job.done)
        finally:
            self.batcher.abandon(job)
        answer.vectors = [result for result in job.results if result is not None]
        assert len(answer.vectors) == size
        return answer

    def warm_up(self) -> None:
        """A picture and a text through the queue, so that no client waits for first-time work.

        ModelFailed if the model cannot embed them.
        """
        tokens = self._model.tokenizer(["a text"])
        job = self.batcher.admit(2)
        self.batcher.put(job, 0, "image", np.zeros((3, *self._model.transform.size), np.uint8))
        self.batcher.put(job, 1, "text", (tokens.ids[0], tokens.lengths[0]))
        job.done.result()
        for result in job.results:
            if isinstance(result, Exception):
                raise result

    def close(self) -> None:
        """Stop the model's thread; what waits is refused."""
        self.batcher.close()
        self._tokenizer_thread.shutdown(cancel_futures=True)

    def _prepare(
        self,
        job: Job,
        inputs: Sequence[Input],
        answer: Embedded,
        thumbnails: bool,
        urgent: bool,
    ) -> None:
        texts = [(index, item.text) for index, item in enumerate(inputs) if isinstance(item, Text)]
        if texts:
            self._tokenizer_thread.submit(self._tokenize, job, texts, answer, urgent)
        for index, item in enumerate(inputs):
            if isinstance(item, Picture):
                self._pool.submit(self._decode, job, index, item, answer, thumbnails)

    def _tokenize(
        self, job: Job, texts: list[tuple[int, str]], answer: Embedded, urgent: bool
    ) -> None:
        if job.done.done():
            return
        try:
            tokens = self._model.tokenizer([text for _, text in texts])
        except Exception as error:  # any failure must settle the items, or they wait for ever
            for index, _ in texts:
                job.settle(index, error)
            return
        for row, (index, _) in enumerate(texts):
            answer.num_tokens[index] = tokens.lengths[row]
            answer.truncated[index] = tokens.truncated[row]
            data = (tokens.ids[row], tokens.lengths[row])
            self.batcher.put(job, index, "text", data, urgent=urgent)

    def _decode(
        self, job: Job, index: int, item: Picture, answer: Embedded, thumbnails: bool
    ) -> None:
        if job.is_settled(index):
            return
        try:
            picture = decode_image(item.read(), self._limits)
            if thumbnails:
                answer.thumbnails[index] = make_thumbnail(picture)
            pixels = self._model.transform.resize(picture)
        except Exception as error:  # any failure must settle the item, or it waits for ever
            job.settle(index, error)
            return
        self.batcher.put(job, index, "image", pixels)

    def _encode_images(self, pixels: Sequence[Any]) -> np.ndarray:
        return embed_pixels(self._model, pixels)

    def _encode_texts(self, rows: Sequence[tuple[Tensor, int]]) -> np.ndarray:
        """(N, E) from ids (T,) and their lengths; padding is left away where the model allows."""
        ids = torch.stack([ids for ids, _ in rows])  # (N, T)
        tokens = Tokens(ids, [length for _, length in rows], [])
        return embed_ids(self._model, tokens.cut() if self._model.can_cut_text else ids)
