"""The cache of class heads."""

import asyncio

import numpy as np
import pytest

from clipserve.prompts import ClassHead
from service.heads import Head, HeadCache, digest


class Counts:
    def __init__(self) -> None:
        self.told: list[str] = []

    def cache_hit(self, kind: str) -> None:
        self.told.append(f"{kind} hit")

    def cache_miss(self, kind: str) -> None:
        self.told.append(f"{kind} miss")


PLENTY = 2**20


def make_head(size: int, label: str = "x") -> Head:
    return Head(ClassHead((label,) * size, np.ones((size, 2), np.float32), 1.0, None, None))


def test_requests_for_the_same_head_share_one_build_and_keep_it():
    counts = Counts()

    async def scenario() -> tuple[int, set[int]]:
        cache, builds = HeadCache(PLENTY, counts), []

        async def build() -> Head:
            builds.append(1)
            await asyncio.sleep(0)
            return make_head(3)

        heads = await asyncio.gather(*(cache.get("key", build) for _ in range(5)))
        heads.append(await cache.get("key", build))
        return len(builds), {id(head) for head in heads}

    builds, identities = asyncio.run(scenario())
    assert builds == 1
    assert len(identities) == 1
    assert counts.told == ["head miss"] + ["head hit"] * 5


def test_a_build_that_failed_is_tried_again():
    async def scenario() -> Head:
        cache = HeadCache(PLENTY, Counts())

        async def fail() -> Head:
            raise RuntimeError("no")

        async def build() -> Head:
            return make_head(1)

        with pytest.raises(RuntimeError):
            await cache.get("key", fail)
        return await cache.get("key", build)

    assert len(asyncio.run(scenario()).classifier.labels) == 1


def test_a_build_stops_when_the_last_who_waits_is_gone_and_not_before():
    async def scenario() -> list[str]:
        cache, log = HeadCache(PLENTY, Counts()), []
        never = asyncio.Event()

        async def build() -> Head:
            try:
                await never.wait()
            finally:
                log.append("stopped")
            return make_head(1)

        waiters = [asyncio.ensure_future(cache.get("key", build)) for _ in range(2)]
        await asyncio.sleep(0)
        for waiter in waiters:
            await asyncio.sleep(0)
            waiter.cancel()
            log.append("cancelled")
            await asyncio.wait({waiter})
        await asyncio.sleep(0)
        return list(log)  # as it is now; the end of the loop cancels what is left

    assert asyncio.run(scenario()) == ["cancelled", "cancelled", "stopped"]


def test_the_least_recently_used_head_goes_when_there_are_too_many_bytes():
    async def scenario() -> tuple[int, list[str]]:
        cache, built = HeadCache(600, Counts()), []  # two heads of four labels

        async def get(key: str) -> None:
            async def build() -> Head:
                built.append(key)
                return make_head(4)

            await cache.get(key, build)

        for key in ("a", "b", "a", "c", "a", "b"):
            await get(key)
        return len(cache), built

    assert asyncio.run(scenario()) == (2, ["a", "b", "c", "b"])


def test_a_head_of_long_labels_counts_with_them():
    async def scenario(label: str) -> int:
        cache = HeadCache(5000, Counts())

        async def build() -> Head:
            return make_head(4, label)

        await cache.get("key", build)
        return len(cache)

    assert asyncio.run(scenario("x")) == 1
    assert asyncio.run(scenario("x" * 2000)) == 0


def test_a_key_is_short_and_another_for_other_labels_or_templates():
    digests = {
        digest(["a", "b"], ["{}"]),
        digest(["ab"], ["{}"]),
        digest(["b", "a"], ["{}"]),
        digest(["a"], ["b", "{}"]),
        digest(["a" * 10_000], ["{}"]),
    }
    assert len(digests) == 5
    assert {len(one) for one in digests} == {32}
    assert digest(("a", "b"), ("{}",)) == digest(["a", "b"], ["{}"])
