"""`AsyncClient`: every call of the service's API, as a coroutine.

Its calls are in three files by what they are about. What is given as `errors` (a dict) takes the
errors of single items, by their places; without it the first one is raised as ItemRefused. What is
given as `truncated` (a set) takes the places of items whose text was cut to the model's context;
without it that is the warning TextTruncated. Every call raises ServiceError.
"""

from typing import Any

from clipserve.client.calls import given
from clipserve.client.collection_calls import CollectionCalls
from clipserve.client.job_calls import JobCalls
from clipserve.client.transport import address
from clipserve.client.vector_calls import VectorCalls


class AsyncClient(VectorCalls, CollectionCalls, JobCalls):
    """A client of one service. Close it after use, or use it in `async with`.

    timeout_s: of one request. retries: of a request that may be repeated. concurrency and
    batch_size: how many requests of one call are on their way, and the items in each.
    """

    async def models(self) -> list[dict[str, Any]]:
        """Every model served, the default first."""
        return await self._list("/v1/models")

    async def model(self, name: str) -> dict[str, Any]:
        """One model: its sizes, its precision, its fingerprint."""
        return await self._read("GET", address("models", name))

    async def label_sets(self) -> list[dict[str, Any]]:
        """The `labels` that `classify` may name as a `label_set`, each by its `id`."""
        return await self._list("/v1/label-sets")

    async def template_sets(self) -> list[dict[str, Any]]:
        """The `templates` that `classify` may name, each by its `id`."""
        return await self._list("/v1/template-sets")

    async def reload(self, model: str, *, path: str | None = None) -> dict[str, Any]:
        """Take in a model's new checkpoint; which collections follow is in the answer."""
        place = address("models", model) + ":reload"
        return await self._read("POST", place, given(path=path), idempotent=False)

    async def health(self) -> dict[str, Any]:
        """Raises ServiceOverloaded unless every model answers."""
        return await self._read("GET", "/health/ready")
