"""`Client`: `AsyncClient` in a thread of its own, so that there is one client and not two."""

import contextlib
import functools
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any, Concatenate, ParamSpec, Self, TypeVar

from anyio.from_thread import start_blocking_portal

from clipserve.client.asynchronous import AsyncClient

P = ParamSpec("P")
T = TypeVar("T")


def _blocking(
    method: Callable[Concatenate[AsyncClient, P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate["Client", P], T]:
    """The same method, which returns when it is done; its signature and docstring stay."""

    @functools.wraps(method)
    def run(self: "Client", /, *args: P.args, **kwargs: P.kwargs) -> T:
        future: Future[T] = self._portal.start_task_soon(
            functools.partial(method, self._client, *args, **kwargs)
        )
        try:
            return future.result()
        except BaseException:  # Ctrl-C ends the requests too
            future.cancel()
            raise

    return run


class Client:
    """A client of one service, for threads. Takes what `AsyncClient` takes; close it after use.

    A `progress` function is called in the client's own thread.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._client = AsyncClient(*args, **kwargs)
        self._running = contextlib.ExitStack()
        self._portal = self._running.enter_context(start_blocking_portal())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close every connection, then the thread."""
        self._close()
        self._running.close()

    _close = _blocking(AsyncClient.close)
    embed_images = _blocking(AsyncClient.embed_images)
    embed_texts = _blocking(AsyncClient.embed_texts)
    classify = _blocking(AsyncClient.classify)
    classify_texts = _blocking(AsyncClient.classify_texts)
    match = _blocking(AsyncClient.match)
    rerank = _blocking(AsyncClient.rerank)
    search = _blocking(AsyncClient.search)
    search_many = _blocking(AsyncClient.search_many)
    upsert = _blocking(AsyncClient.upsert)
    delete = _blocking(AsyncClient.delete)
    item = _blocking(AsyncClient.item)
    items = _blocking(AsyncClient.items)
    item_image = _blocking(AsyncClient.item_image)
    collections = _blocking(AsyncClient.collections)
    collection = _blocking(AsyncClient.collection)
    count = _blocking(AsyncClient.count)
    rebuild = _blocking(AsyncClient.rebuild)
    create_collection = _blocking(AsyncClient.create_collection)
    drop_collection = _blocking(AsyncClient.drop_collection)
    start_job = _blocking(AsyncClient.start_job)
    follow_job = _blocking(AsyncClient.follow_job)
    job = _blocking(AsyncClient.job)
    jobs = _blocking(AsyncClient.jobs)
    cancel_job = _blocking(AsyncClient.cancel_job)
    models = _blocking(AsyncClient.models)
    model = _blocking(AsyncClient.model)
    label_sets = _blocking(AsyncClient.label_sets)
    template_sets = _blocking(AsyncClient.template_sets)
    reload = _blocking(AsyncClient.reload)
    health = _blocking(AsyncClient.health)
