"""Requests through the pool, the caches and the queue of a real tiny model."""

import asyncio
import gc
import threading
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from albefs import tiny_albef
from conftest import encode, make_picture

import clipserve
from clipserve.decoding import decode
from clipserve.model import Model
from clipserve.packed import multiplies_int8
from clipserve.text import Tokenizer, Tokens
from service.caches import Caches
from service.errors import ImageError, ModelFailed, Overloaded
from service.inputs import Picture, Text
from service.pipeline import Embedded, Pipeline
from service.pool import Pool
from service.settings import load_settings

WAIT_S = 10


class FakeObserver:
    def __init__(self) -> None:
        self.count: Counter[str] = Counter()
        self.sizes: list[tuple[str, int]] = []
        self.paddings: list[float] = []

    def batch(self, kind: str, size: int, seconds: float, waited_s: float) -> None:
        self.sizes.append((kind, size))

    def padding(self, fraction: float) -> None:
        self.paddings.append(fraction)

    def stage(self, name: str, kind: str, seconds: float) -> None:
        self.count[f"{name} {kind}"] += 1

    def cache_hit(self, kind: str) -> None:
        self.count[f"hit {kind}"] += 1

    def cache_miss(self, kind: str) -> None:
        self.count[f"miss {kind}"] += 1

    def restart(self) -> None:
        self.count["restart"] += 1


@pytest.fixture(scope="module")
def model(model_dir: Path) -> Model:
    return clipserve.load(model_dir, device="cpu", dtype="fp32")


@pytest.fixture
def pool() -> Iterator[Pool]:
    made = Pool(2, "decode", 60)
    yield made
    made.close()


@pytest.fixture
def observer() -> FakeObserver:
    return FakeObserver()


@pytest.fixture
def pipeline(model: Model, pool: Pool, observer: FakeObserver) -> Iterator[Pipeline]:
    settings = load_settings(max_queue_items=20, max_items=20, max_text_batch=8)
    made = Pipeline(model, settings, pool, observer, "tiny", Caches(10**6, 10**6))
    yield made
    made.close()


def picture(seed: int) -> Picture:
    return Picture(encode(make_picture(seed=seed)))


def embed(pipeline: Pipeline, *inputs, **options):
    return asyncio.run(pipeline.embed(inputs, **options))


class Gate:
    """Keeps the model's thread busy until it is opened."""

    def __init__(self, pipeline: Pipeline) -> None:
        self.entered, self.opened = threading.Event(), threading.Event()
        self._job = pipeline.batcher.admit(1)
        pipeline.batcher.put(self._job, "call", [(0, self._wait)])
        assert self.entered.wait(WAIT_S)

    def open(self) -> None:
        self.opened.set()

    def _wait(self) -> bool:
        self.entered.set()
        return self.opened.wait(WAIT_S)


async def until(condition) -> None:
    """Let other tasks and threads go on until it holds."""
    async with asyncio.timeout(WAIT_S):
        while not condition():
            await asyncio.to_thread(lambda: None)


def test_pictures_and_texts_get_the_models_own_vectors_in_order(pipeline, model):
    answer = embed(pipeline, Text("a cat"), picture(1), Text("a dog " * 20))
    texts = model.embed_texts(["a cat", "a dog " * 20])
    want = np.stack([texts[0], model.embed_images([make_picture(seed=1)])[0], texts[1]])
    np.testing.assert_allclose(answer.rows(), want, atol=1e-5)
    assert answer.num_tokens == [4, 0, 16]
    assert answer.truncated == [False, False, True]


def test_long_texts_of_one_request_let_those_of_others_pass(pipeline, model, monkeypatch):
    order: list[list[str]] = []
    go_on, tokenise = threading.Event(), Tokenizer.__call__

    def slow(self: Tokenizer, texts: list[str]) -> Tokens:
        order.append(texts)
        assert go_on.wait(WAIT_S)
        return tokenise(self, texts)

    async def scenario() -> list[Embedded]:
        many = asyncio.ensure_future(pipeline.embed([Text(text) for text in texts]))
        one = asyncio.ensure_future(pipeline.embed([Text("a cat")]))
        await until(lambda: pipeline.batcher.open_items == 18)
        go_on.set()
        return [await many, await one]

    monkeypatch.setattr("service.pipeline._TURN_S", 0)
    monkeypatch.setattr(Tokenizer, "__call__", slow)
    texts = [f"text {i}" for i in range(17)]
    many, one = asyncio.run(scenario())
    assert order == [texts[:8], ["a cat"], texts[8:16], texts[16:]]
    np.testing.assert_allclose(many.rows(), model.embed_texts(texts), atol=1e-5)
    np.testing.assert_allclose(one.rows(), model.embed_texts(["a cat"]), atol=1e-5)


def test_texts_whose_client_left_are_tokenised_no_further(pipeline, monkeypatch):
    begun, go_on, tokenise = threading.Event(), threading.Event(), Tokenizer.__call__
    seen: list[str] = []

    def slow(self: Tokenizer, texts: list[str]) -> Tokens:
        seen.extend(texts)
        begun.set()
        assert go_on.wait(WAIT_S)
        return tokenise(self, texts)

    async def scenario() -> None:
        task = asyncio.ensure_future(pipeline.embed([Text(f"text {i}") for i in range(17)]))
        await asyncio.to_thread(begun.wait, WAIT_S)
        task.cancel()
        await asyncio.wait({task})

    monkeypatch.setattr(Tokenizer, "__call__", slow)
    asyncio.run(scenario())
    go_on.set()
    embed(pipeline, Text("a cat"))  # behind them
    assert seen == [*(f"text {i}" for i in range(8)), "a cat"]


def test_a_picture_that_cannot_be_read_fails_alone(pipeline):
    answer = embed(pipeline, picture(1), Picture(b"no"), Text("a cat"))
    assert [isinstance(one, ImageError) for one in answer.vectors] == [False, True, False]


def test_pictures_are_decoded_within_the_pools_memory(pipeline, pool):
    asked: list[int] = []

    class Budget:
        @contextmanager
        def hold(self, size: int) -> Iterator[None]:
            asked.append(size)
            yield

    pool.memory = Budget()
    picture, large = make_picture(40, 30), make_picture(4000, 3000)
    embed(pipeline, Picture(encode(picture)), Text("a cat"))
    embed(pipeline, Picture(encode(picture, "JPEG")))
    embed(pipeline, Picture(encode(large, "JPEG")))  # decoded at an eighth
    embed(pipeline, Picture(encode(large, "JPEG", progressive=True)))
    sizes = [13 * 40 * 30, 11 * 40 * 30, 5 * 4000 * 3000, 11 * 4000 * 3000]
    assert asked == sizes


def test_what_was_embedded_before_comes_from_the_cache_as_it_was(pipeline, observer):
    inputs = (Text("a dog " * 20), picture(1))
    first = embed(pipeline, *inputs)
    ran = len(observer.sizes)
    second = embed(pipeline, *inputs)
    np.testing.assert_array_equal(first.rows(), second.rows())
    assert (second.num_tokens, second.truncated) == (first.num_tokens, first.truncated)
    assert len(observer.sizes) == ran
    assert observer.count == {
        "miss text": 1,
        "miss image": 1,
        "tokenize text": 1,
        "decode image": 1,
        "hit text": 1,
        "hit image": 1,
    }


def test_the_same_picture_in_base64_is_the_same_content(pipeline, observer):
    import base64

    data = encode(make_picture(seed=1))
    embed(pipeline, Picture(data))
    embed(pipeline, Picture(base64.b64encode(data).decode()))
    assert observer.count["hit image"] == 1


def test_the_same_content_asked_at_once_is_computed_once(pipeline, observer):
    async def scenario():
        gate = Gate(pipeline)
        tasks = [
            asyncio.ensure_future(pipeline.embed([Text("a cat"), picture(3)])) for _ in range(5)
        ]
        await until(lambda: observer.count["hit image"] + observer.count["hit text"] == 8)
        gate.open()
        return await asyncio.gather(*tasks)

    answers = asyncio.run(scenario())
    assert sorted(observer.sizes) == [("call", 1), ("image", 1), ("text", 1)]
    for answer in answers:
        np.testing.assert_array_equal(answer.rows(), answers[0].rows())


def test_pictures_sent_together_are_embedded_together(pipeline, observer):
    embed(pipeline, *(picture(seed) for seed in range(7)))
    assert observer.sizes == [("image", 7)]


def test_requests_that_wait_for_each_others_pictures_are_all_answered(pipeline):
    async def scenario(turn: int):
        pictures = [picture(10 * turn + i) for i in range(3)]
        orders = (pictures, pictures[::-1], [pictures[1], pictures[1], pictures[0]])
        async with asyncio.timeout(WAIT_S):
            return await asyncio.gather(*(pipeline.embed(order) for order in orders))

    for turn in range(20):
        first, second, third = (answer.rows() for answer in asyncio.run(scenario(turn)))
        np.testing.assert_array_equal(first, second[::-1])
        np.testing.assert_array_equal(first[[1, 1, 0]], third)


def test_who_waits_for_anothers_picture_computes_it_when_the_other_is_gone(pipeline, observer):
    async def scenario():
        gate = Gate(pipeline)
        first = asyncio.ensure_future(pipeline.embed([picture(3), Text("a cat")]))
        await until(lambda: observer.count["miss image"] + observer.count["miss text"] == 2)
        second = asyncio.ensure_future(pipeline.embed([picture(3), Text("a cat")]))
        await until(lambda: observer.count["hit image"] + observer.count["hit text"] == 2)
        first.cancel()
        await asyncio.wait({first})
        gate.open()
        return await second

    assert asyncio.run(scenario()).rows().shape == (2, 16)


def test_a_bad_picture_asked_at_once_fails_for_each_and_is_forgotten(pipeline, observer):
    async def scenario():
        inputs = [Picture(b"no"), Picture(b"no")]
        return await pipeline.embed(inputs), await pipeline.embed(inputs)

    for answer in asyncio.run(scenario()):
        assert all(isinstance(one, ImageError) for one in answer.vectors)
    assert observer.count["miss image"] >= 2


def test_a_canary_and_bulk_pass_the_cache_by(pipeline, observer):
    for priority in ("interactive", "urgent", "bulk"):
        embed(pipeline, Text("a canary"), priority=priority)
    assert observer.sizes == [("text", 1)] * 3
    assert observer.count["hit text"] == 0


def test_caches_never_mix_models_or_dtypes(model, model_dir, pool, observer, tmp_path):
    import torch

    from clipserve import checkpoint
    from clipserve.model import create

    torch.manual_seed(5)
    checkpoint.save(create(model.architecture), tmp_path / "other", name="other")
    models = [
        model,
        clipserve.load(model_dir, device="cpu", dtype="bf16"),
        clipserve.load(tmp_path / "other", device="cpu", dtype="fp32"),
    ]
    if multiplies_int8():
        models.append(clipserve.load(model_dir, device="cpu", dtype="int8"))
    caches = Caches(10**6, 10**6)
    pipelines = [Pipeline(m, load_settings(), pool, observer, "m", caches) for m in models]
    inputs = (Text("a cat"), picture(1))
    for one, own in zip(pipelines, models, strict=True):
        want = [own.embed_texts(["a cat"])[0], own.embed_images([make_picture(seed=1)])[0]]
        np.testing.assert_allclose(embed(one, *inputs).rows(), np.stack(want), atol=1e-6)
    assert observer.count["hit text"] == observer.count["hit image"] == 0
    for one in pipelines:
        one.close()


def test_cancelling_frees_the_slots_and_drops_the_work(pipeline, observer):
    async def scenario():
        gate = Gate(pipeline)
        tasks = [asyncio.ensure_future(pipeline.embed([Text(f"{i}")] * 5)) for i in range(3)]
        await until(lambda: pipeline.batcher.open_items == 16)
        with pytest.raises(Overloaded):
            await pipeline.embed([Text("x")] * 5)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        assert pipeline.batcher.open_items == 1
        gate.open()
        await pipeline.embed([Text("x")] * 5)

    asyncio.run(scenario())
    assert [size for kind, size in observer.sizes if kind == "text"] == [1]  # x, once


@pytest.mark.parametrize("kind", ["embed", "match"])
def test_pictures_whose_client_left_are_in_no_queue(kind, tmp_path, observer):
    decoders, albef = Pool(1, "decode", 60), tiny_albef(tmp_path)
    pipeline = Pipeline(albef, load_settings(), decoders, observer, "albef")
    entered, opened, queued = threading.Event(), threading.Event(), threading.Semaphore(0)
    submit = decoders.submit

    def noticed(*given) -> None:
        submit(*given)
        queued.release()

    def busy() -> None:
        entered.set()
        opened.wait(WAIT_S)

    async def scenario() -> list[weakref.ref[Picture]]:
        decoders.submit(pipeline.batcher.admit(1), [0], busy)
        assert await asyncio.to_thread(entered.wait, WAIT_S)
        decoders.submit = noticed
        pictures = [picture(seed) for seed in range(3)]
        ask = {
            "embed": lambda: pipeline.embed(pictures),
            "match": lambda: pipeline.match([(one, Text("a red cat")) for one in pictures]),
        }
        task = asyncio.ensure_future(ask[kind]())
        await asyncio.sleep(0)
        for _ in pictures:
            assert await asyncio.to_thread(queued.acquire, timeout=WAIT_S)
        task.cancel()
        await asyncio.wait({task})
        return [weakref.ref(one) for one in pictures]

    gone = asyncio.run(scenario())
    gc.collect()
    assert [one() for one in gone] == [None, None, None]
    opened.set()
    pipeline.close()
    decoders.close()


def test_texts_that_are_kept_are_answered_though_the_queue_is_full(pipeline):
    kept = embed(pipeline, Text("a cat"), Text("a dog")).rows()
    full = pipeline.batcher.admit(20)
    np.testing.assert_array_equal(embed(pipeline, Text("a cat"), Text("a dog")).rows(), kept)
    for other in (Text("a bird"), picture(1)):
        with pytest.raises(Overloaded):
            embed(pipeline, Text("a cat"), other)
    with pytest.raises(Overloaded):
        embed(pipeline, Text("a cat"), priority="bulk")
    pipeline.batcher.abandon(full)
    assert pipeline.batcher.open_items == 0


def test_padding_of_texts_is_told(pipeline, observer):
    embed(pipeline, Text("a"), Text("a b c d e"), priority="bulk")
    assert observer.paddings == [pytest.approx(1 - (3 + 7) / 14)]


def test_pairs_are_matched_as_the_model_matches_them(tmp_path, pool, observer):
    albef = tiny_albef(tmp_path)
    pipeline = Pipeline(albef, load_settings(max_image_batch=3), pool, observer, "albef")
    images = [make_picture(seed=i) for i in (1, 2, 1, 2, 1)]
    texts = ["a red cat", "two dogs in a house", "the blue bird sings", "a dog", "a red cat"]
    pairs = [(Picture(encode(i)), Text(t)) for i, t in zip(images, texts, strict=True)]
    pairs.append((Picture(b"no"), Text("a dog")))
    found = asyncio.run(pipeline.match(pairs))
    want = albef.match(images, texts)
    np.testing.assert_allclose(found.probabilities[:5], want, atol=1e-5)
    assert isinstance(found.probabilities[5], ImageError)
    assert [kind for kind, _ in observer.sizes] == ["match"] * len(observer.sizes)
    assert observer.count["decode match"] == 2  # each picture once
    pipeline.close()


def test_warming_up_runs_a_picture_and_a_text_through_the_queue(pipeline, observer):
    pipeline.warm_up()
    assert ("image", 1) in observer.sizes
    assert ("text", 1) in observer.sizes
    assert pipeline.batcher.open_items == 0


def test_a_model_that_cannot_embed_is_found_by_warming_up(pipeline, monkeypatch):
    def fail(model: Model, ids: object) -> None:
        raise RuntimeError("shapes")

    monkeypatch.setattr("service.encoding.embed_ids", fail)
    with pytest.raises(ModelFailed, match="shapes"):
        pipeline.warm_up()


def test_the_threads_end_when_nobody_holds_the_pipeline_any_more(model, pool, observer):
    pipeline = Pipeline(model, load_settings(), pool, observer, "dropped", Caches(10**6, 10**6))
    embed(pipeline, Text("a cat"), picture(1))
    batcher, gone = pipeline.batcher, weakref.ref(pipeline)
    workers = [t for t in threading.enumerate() if "dropped" in t.name]
    assert workers
    del pipeline
    gc.collect()
    assert gone() is None
    for thread in workers:
        thread.join(WAIT_S)
        assert not thread.is_alive()
    assert batcher.open_items == 0


def test_killing_the_models_thread_costs_one_request(pipeline, observer):
    def die() -> None:
        raise SystemExit

    job = pipeline.batcher.admit(1)
    pipeline.batcher.put(job, "call", [(0, die)])
    job.done.result(WAIT_S)
    assert isinstance(job.results[0], ModelFailed)
    assert embed(pipeline, Text("a cat")).rows().shape == (1, 16)
    assert observer.count["restart"] == 1


def test_a_later_picture_is_decoded_before_a_jobs_and_beside_a_long_requests(
    model, observer, monkeypatch
):
    decoders = Pool(1, "decode", 60)
    settings = load_settings(max_image_batch=1)
    pipeline = Pipeline(model, settings, decoders, observer, "tiny", Caches(0, 0))
    contents = {name: encode(make_picture(seed=i)) for i, name in enumerate(["bulk", "long", "x"])}
    names, order = {data: name for name, data in contents.items()}, []

    def noticed(data, *arguments):
        order.append(names[data])
        return decode(data, *arguments)

    monkeypatch.setattr("service.pipeline.decode", noticed)

    async def scenario():
        entered, opened = threading.Event(), threading.Event()

        def wait() -> None:
            entered.set()
            opened.wait(WAIT_S)

        decoders.submit(pipeline.batcher.admit(1), [0], wait)
        assert entered.wait(WAIT_S)
        asked = (("bulk", 3, "bulk"), ("long", 3, "interactive"), ("x", 1, "interactive"))
        tasks = [
            asyncio.ensure_future(
                pipeline.embed([Picture(contents[name])] * size, priority=priority)
            )
            for name, size, priority in asked
        ]
        await until(lambda: pipeline.batcher.open_items == 8)
        opened.set()
        await asyncio.gather(*tasks)

    asyncio.run(scenario())
    assert order == ["long", "x", "long", "long", "bulk", "bulk", "bulk"]
    decoders.close()
    pipeline.close()


def test_texts_that_do_not_fit_are_told_of_pairs_too(tmp_path, pool, observer):
    albef = tiny_albef(tmp_path)
    pipeline = Pipeline(albef, load_settings(), pool, observer, "albef")
    pairs = [(picture(1), Text("a red cat")), (picture(1), Text("a dog " * 200))]
    assert asyncio.run(pipeline.match(pairs)).truncated == [False, True]
    pipeline.close()
