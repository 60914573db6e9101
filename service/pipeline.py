"""The pictures and texts of one request -> unit vectors, through the pool and the model's queue.

Decoding and tokenising happen in small thread pools, neither on the event loop nor on the model's
thread. Each item succeeds or fails on its own, and one whose content was seen before is not
computed again. Start at `Pipeline.embed`.

Legend: N items, E embedding.
"""

import asyncio
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from clipserve.decoding import decode, decoding_bytes
from clipserve.embed import precision, stage
from clipserve.images import make_thumbnail, read_header
from clipserve.match import probability
from clipserve.model import Model
from clipserve.transforms import Decoded
from service.batching import Batcher, Job, Kind, Observer
from service.caches import Caches, Entry, Key, Outcome, Turn, VectorCache, digest
from service.encoding import Encoder, Pair, TextRow
from service.errors import ModelFailed, Overloaded
from service.inputs import Input, Picture, Text
from service.pool import Pool
from service.scheduler import Priority
from service.settings import Settings

_TEXTS_AT_ONCE = 8
_TURN_S = 0.02
"""of the tokenizer's thread for one request, while others wait"""


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


@dataclass
class Matched:
    """The answers for N pairs of a picture and a text, in order."""

    logits: list[np.ndarray | Exception]
    """(2,), the second one for that the two belong together, or the error that stopped this pair"""
    truncated: list[bool]

    @property
    def probabilities(self) -> list[float | Exception]:
        """That the two belong together, or the error that stopped this pair."""
        return [one if isinstance(one, Exception) else probability(one) for one in self.logits]


@dataclass(frozen=True, eq=False)
class _Request:
    job: Job
    answer: Embedded
    thumbnails: bool
    priority: Priority

    @property
    def is_cached(self) -> bool:
        """A canary must reach the model, and what comes in bulk comes once."""
        return self.priority == "interactive" and not self.thumbnails


class Pipeline:
    """A model behind its queue. Its threads end when nobody holds it any more, or at `close`."""

    def __init__(
        self,
        model: Model,
        settings: Settings,
        decoders: Pool,
        observer: Observer,
        name: str,
        caches: Caches | None = None,
    ) -> None:
        self._model = model
        self._limits = settings.image_limits
        self._decoders = decoders
        self.observer = observer
        self._caches = caches or Caches(0, 0)
        self._maker = f"{model.info.fingerprint}/{precision(model)}/{model.device.type}"
        # Texts do not wait behind pictures; one thread, for transformers' fast tokenizers are not
        # thread-safe.
        self._tokenizer_thread = Pool(1, f"tokenize-{name}", settings.max_batch_s)
        self._encoder = Encoder(model, observer)
        on_gpu = model.device.type == "cuda"
        self._max_batch: dict[Kind, int] = {
            "image": settings.max_image_batch,
            "text": settings.max_text_batch,
            "match": settings.max_image_batch,
            "call": 1,
        }
        self.batcher = Batcher(
            self._encoder.functions(),
            max_batch=self._max_batch,
            max_items=settings.max_queue_items,
            observer=observer,
            name=name,
            threads=2 if on_gpu else 1,
            max_call_s=settings.max_batch_s,
        )
        # Its threads hold the batcher and the encoder, never this object.
        weakref.finalize(self, _end, self.batcher, self._tokenizer_thread)

    async def embed(
        self,
        inputs: Sequence[Input],
        *,
        thumbnails: bool = False,
        priority: Priority = "interactive",
    ) -> Embedded:
        """Vectors of all inputs. Raises Overloaded before any work, unless all are texts that are
        kept; cancelling drops the work."""
        size = len(inputs)
        answer = Embedded([], [0] * size, [False] * size, [None] * size)
        try:
            job = self.batcher.admit(size, priority=priority)
        except Overloaded:
            if thumbnails or priority == "bulk" or not self._are_kept(inputs):
                raise
            job = self.batcher.admit(size, priority="urgent")
        request = _Request(job, answer, thumbnails, priority)
        try:
            self._prepare(request, inputs)
            await asyncio.wrap_future(job.done)
        finally:
            self._leave(job)
        answer.vectors = list(job.results)
        return answer

    async def match(
        self, pairs: Sequence[tuple[Picture, Text]], *, priority: Priority = "interactive"
    ) -> Matched:
        """How likely picture and text of each pair belong together; for a model with fusion layers.
        Raises Overloaded before any work; cancelling drops the work."""
        truncated = [False] * len(pairs)
        job = self.batcher.admit(len(pairs), priority=priority)
        try:
            tokenize = partial(self._tokenize_pairs, job, pairs, truncated, priority)
            job.prepare("match", range(len(pairs)))
            self._tokenizer_thread.submit(job, range(len(pairs)), tokenize, priority)
            await asyncio.wrap_future(job.done)
        finally:
            self._leave(job)
        return Matched(list(job.results), truncated)

    def warm_up(self) -> None:
        """Batches of the sizes that matter, then a picture and a text through the queue, so that no
        client waits for first-time work. ModelFailed if the model cannot embed them."""
        pixels = np.zeros((3, *self._model.transform.size), np.uint8)
        tokens = self._model.tokenizer(["a text " * self._model.context_length, "a text"])
        rows = [TextRow(tokens.ids[i], tokens.lengths[i]) for i in (1, 0)]
        for size in _sizes(self._max_batch["image"], self._model.device.type):
            self._call(partial(self._encoder.encode_images, [stage(self._model, pixels)] * size))
        for size in _sizes(self._max_batch["text"], self._model.device.type):
            for row in rows:
                self._call(partial(self._encoder.encode_texts, [row] * size))
        job = self.batcher.admit(2)
        self.batcher.put(job, "image", [(0, stage(self._model, pixels))])
        self.batcher.put(job, "text", [(1, rows[0])])
        job.done.result()
        for result in job.results:
            if isinstance(result, Exception):
                raise result

    def close(self) -> None:
        """Stop the model's thread; what waits is refused."""
        self.batcher.close()
        self._tokenizer_thread.close()

    def _leave(self, job: Job) -> None:
        """Nobody waits for this job any more: no queue holds anything of it."""
        self.batcher.abandon(job)  # the first: what comes to a pool from now on is not kept
        self._decoders.drop(job)
        self._tokenizer_thread.drop(job)

    def _call(self, function: Callable[[], Any]) -> None:
        job = self.batcher.admit(1)
        self.batcher.put(job, "call", [(0, lambda: (function(),))])
        job.done.result()
        try:
            _returned(job)
        except Exception as error:
            raise ModelFailed(f"the model cannot embed: {error}") from error

    def _prepare(self, request: _Request, inputs: Sequence[Input]) -> None:
        pictures: dict[int, Callable[[], None]] = {}
        texts = []
        for index, item in enumerate(inputs):
            if isinstance(item, Picture):
                pictures[index] = partial(self._read, request, index, item)
            elif self._is_mine(request, index, "text", item.text):
                texts.append((index, item.text))
        self._submit_pictures(request, pictures)
        if texts:
            self._submit_texts(request, texts)

    def _submit_pictures(self, request: _Request, calls: Mapping[int, Callable[[], None]]) -> None:
        request.job.prepare("image", calls)
        for index, call in calls.items():
            self._decoders.submit(request.job, [index], call, request.priority)

    def _submit_texts(self, request: _Request, texts: list[tuple[int, str]]) -> None:
        indices, tokenize = [index for index, _ in texts], partial(self._tokenize, request, texts)
        request.job.prepare("text", indices)
        self._tokenizer_thread.submit(request.job, indices, tokenize, request.priority)

    # The cache

    def _are_kept(self, inputs: Sequence[Input]) -> bool:
        return all(
            isinstance(item, Text) and self._key(item.text) in self._caches.texts for item in inputs
        )

    def _key(self, content: str | bytes) -> Key:
        return Key(self._maker, digest(content))

    def _is_mine(self, request: _Request, index: int, kind: Kind, content: str | bytes) -> bool:
        """Whether this item is to be computed; else its answer is there, or comes from another."""
        if not request.is_cached:
            return True
        cache = self._caches.texts if kind == "text" else self._caches.images
        key = self._key(content)
        told = cache.ask(key, partial(self._be_told, cache, key, request, index, content))
        if told is Turn.YOURS:
            self.observer.cache_miss(kind)
            self._promise(cache, key, request, index)
            return True
        self.observer.cache_hit(kind)
        if isinstance(told, Entry):
            _settle(request, index, told)
        return False

    def _be_told(
        self,
        cache: VectorCache,
        key: Key,
        request: _Request,
        index: int,
        content: str | bytes,
        outcome: Outcome,
    ) -> bool:
        """The other one is done, or is gone and leaves it to this request, if that still waits."""
        if outcome is not Turn.YOURS:
            _settle(request, index, outcome)
            return True
        if request.job.is_settled(index):
            return False
        self._promise(cache, key, request, index)
        if isinstance(content, str):
            self._submit_texts(request, [(index, content)])
        else:
            self._submit_pictures(request, {index: partial(self._decode, request, index, content)})
        return True

    def _promise(self, cache: VectorCache, key: Key, request: _Request, index: int) -> None:
        """The cache will be told of the item's result."""

        def tell(result: np.ndarray | Exception) -> None:
            if isinstance(result, Exception):
                cache.tell(key, result)
            else:
                answer = request.answer
                entry = Entry(result, answer.num_tokens[index], answer.truncated[index])
                cache.tell(key, entry)

        request.job.when_settled(index, tell)

    # In the pools

    def _tokenize(self, request: _Request, texts: list[tuple[int, str]]) -> None:
        """As many as one turn allows; the others wait behind those of other requests."""
        started = time.perf_counter()
        rows: list[tuple[int, TextRow]] = []
        while texts:
            part, texts = texts[:_TEXTS_AT_ONCE], texts[_TEXTS_AT_ONCE:]
            part = [(index, text) for index, text in part if not request.job.is_settled(index)]
            tokens = self._model.tokenizer([text for _, text in part])
            for row, (index, _) in enumerate(part):
                request.answer.num_tokens[index] = tokens.lengths[row]
                request.answer.truncated[index] = tokens.truncated[row]
                rows.append((index, TextRow(tokens.ids[row], tokens.lengths[row])))
            if time.perf_counter() - started > _TURN_S:
                break
        if rows:
            self.observer.stage("tokenize", "text", time.perf_counter() - started)
            self.batcher.put(request.job, "text", rows, request.priority)
        if texts:
            self._submit_texts(request, texts)

    def _read(self, request: _Request, index: int, item: Picture) -> None:
        if request.job.is_settled(index):
            return
        data = item.read()
        if self._is_mine(request, index, "image", data):
            self._decode(request, index, data)
        else:
            self.batcher.leave_out(request.job, index)

    def _decode(self, request: _Request, index: int, data: bytes) -> None:
        if request.job.is_settled(index):
            return
        with self._decoded(data, "image") as decoded:
            if request.thumbnails:
                request.answer.thumbnails[index] = make_thumbnail(decoded.picture)
            pixels = self._model.transform.resize(decoded)
        staged = stage(self._model, pixels)
        self.batcher.put(request.job, "image", [(index, staged)], request.priority)

    @contextmanager
    def _decoded(self, data: bytes, kind: Kind) -> Iterator[Decoded]:
        """The picture, which takes memory until it is left."""
        header = read_header(data, self._limits)
        with self._decoders.memory.hold(decoding_bytes(header, self._model.transform)):
            started = time.perf_counter()
            yield decode(data, self._model.transform, self._limits, header)
            self.observer.stage("decode", kind, time.perf_counter() - started)

    def _tokenize_pairs(
        self,
        job: Job,
        pairs: Sequence[tuple[Picture, Text]],
        truncated: list[bool],
        priority: Priority,
    ) -> None:
        """Then one task for each different picture decodes it and queues its pairs."""
        places = {text: place for place, text in enumerate(dict.fromkeys(t for _, t in pairs))}
        tokens = self._model.tokenizer([text.text for text in places])
        rows = [TextRow(*row) for row in zip(tokens.ids, tokens.lengths, strict=True)]
        texts_of: dict[Picture, dict[int, TextRow]] = {}
        for index, (picture, text) in enumerate(pairs):
            texts_of.setdefault(picture, {})[index] = rows[places[text]]
            truncated[index] = tokens.truncated[places[text]]
        for picture, texts in texts_of.items():
            decode_pairs = partial(self._decode_pairs, job, picture, texts, priority)
            self._decoders.submit(job, list(texts), decode_pairs, priority)

    def _decode_pairs(
        self, job: Job, picture: Picture, texts: dict[int, TextRow], priority: Priority
    ) -> None:
        if job.done.done():
            return
        with self._decoded(picture.read(), "match") as decoded:
            pixels = self._model.transform.resize(decoded)
        staged = stage(self._model, pixels)
        pairs = [(index, Pair(staged, text)) for index, text in texts.items()]
        self.batcher.put(job, "match", pairs, priority)


def _end(batcher: Batcher, tokenizer_thread: Pool) -> None:
    batcher.shut()
    tokenizer_thread.shut()


def _settle(request: _Request, index: int, found: Entry | Exception) -> None:
    if isinstance(found, Entry):
        request.answer.num_tokens[index] = found.num_tokens
        request.answer.truncated[index] = found.truncated
        request.job.settle(index, found.vector)
    else:
        request.job.settle(index, found)


def _returned(job: Job) -> Any:
    """What a call returned; raises what it raised."""
    if isinstance(job.results[0], Exception):
        raise job.results[0]
    return job.results[0][0]


def _sizes(largest: int, device: str) -> list[int]:
    """Batch sizes to warm up: on a GPU each new shape costs once, on a CPU only the first."""
    if device == "cuda":
        return [size for size in (1, 2, 4, 8, 16, 32, 64, 128) if size < largest] + [largest]
    return [1]
