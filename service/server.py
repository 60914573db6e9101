"""uvicorn, as this service runs it: it answers probes while models load, and drains on SIGTERM."""

import asyncio
import contextlib
import logging
import resource
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType

import uvicorn
from fastapi import FastAPI

from clipserve.errors import ConfigError
from service.connection import connections
from service.drain import Lifecycle
from service.ending import Ending
from service.settings import Settings

logger = logging.getLogger(__name__)

CLOSE_S = 8.0
"""for threads and collections to end when requests have; with shutdown_timeout_s as it is set by
default less than the 20 s that a container is given"""
_SPARE_FILES = 512
"""file descriptors for other things than connections"""


class Server(uvicorn.Server):
    """Loads in a thread of its own once it listens; `failure` says why it ended, if loading did.

    `close` is called at the end, whose time is bounded: after that the process ends as it is.
    """

    def __init__(
        self,
        app: FastAPI,
        settings: Settings,
        lifecycle: Lifecycle,
        *,
        load: Callable[[], None],
        say_ready: Callable[[], None],
        close: Callable[[], None] = lambda: None,
    ) -> None:
        config = uvicorn.Config(
            app,
            http=connections(settings),
            log_config=None,  # the command line sets logging up
            access_log=False,
            server_header=False,
            ws="none",
            timeout_graceful_shutdown=1,  # what is worth waiting for was waited for in `_drain`
        )
        super().__init__(config)
        self.failure: BaseException | None = None
        self._settings = settings
        self._lifecycle = lifecycle
        self._load, self._say_ready, self._close = load, say_ready, close
        self._ending = Ending(settings.shutdown_timeout_s + CLOSE_S, self._exit_code)
        self._has_begun_to_end = False
        self._has_run = False
        self._loading = threading.Thread(target=self._run_load, name="load", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._draining: asyncio.Task[None] | None = None

    def run_until_signal(self, listener: socket.socket) -> None:
        """uvicorn raises the signal again when all is done, which shall end in code 0."""
        _allow_files(self._settings.max_connections + _SPARE_FILES)
        self._ending.start()
        with _handling_signals(self._handle_late):
            try:
                with contextlib.suppress(KeyboardInterrupt):
                    self.run(sockets=[listener])
            finally:
                self._has_run = True
                self._begin_to_end()
                self._await_loading()
                self._close()
                self._ending.done()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.should_exit:  # uvicorn has logged why
            self.failure = ConfigError("the service cannot start; its log says why")
            return
        self._loop = asyncio.get_running_loop()
        self._loading.start()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal drains, the second ends the process at once."""
        if self._has_begun_to_end:
            self._ending.begin()
            return
        self._begin_to_end()
        if self._loop is None or self._loading.is_alive():
            super().handle_exit(sig, frame)
        else:
            self._captured_signals.append(sig)
            self._loop.call_soon_threadsafe(self._start_draining)

    def _handle_late(self, sig: int, frame: FrameType | None) -> None:
        """Of the signal that uvicorn raises again, and of those that come while all is closed."""
        if self._has_run:
            self._ending.begin()
            return
        self._has_run = True
        if sig == signal.SIGINT:
            raise KeyboardInterrupt
        sys.exit(0)

    def _begin_to_end(self) -> None:
        if not self._has_begun_to_end:
            self._has_begun_to_end = True
            self._ending.begin()

    def _exit_code(self) -> int:
        if self.failure is None:
            return 0
        logger.error("%s", self.failure)
        return getattr(self.failure, "exit_code", 1)

    def _await_loading(self) -> None:
        """A process that ends while a thread of it is inside torch is aborted."""
        if self._loading.ident is None:
            return
        self._loading.join(self._settings.shutdown_timeout_s)
        if self._loading.is_alive():
            self._ending.end_now("models still load")

    def _start_draining(self) -> None:
        if self._draining is None:
            self._draining = asyncio.ensure_future(self._drain())

    async def _drain(self) -> None:
        logger.info("shutting down: what is being served is finished, nothing else is begun")
        await self._lifecycle.drain(self._settings.shutdown_timeout_s)
        self.should_exit = True

    def _run_load(self) -> None:
        try:
            self._load()
        except BaseException as error:  # raised again where the command line sees it
            self.failure = error
            self.should_exit = True
        else:
            if not self.should_exit:  # no signal came first
                self._lifecycle.phase = "serving"
                self._say_ready()


@contextlib.contextmanager
def _handling_signals(handle: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """What ends a process goes to `handle`, where uvicorn takes it not, if this is the main
    thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {sig: signal.signal(sig, handle) for sig in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for sig, old in before.items():
            signal.signal(sig, old)


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; ConfigError says why there is none."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        # With the protocol named, or asyncio sets no TCP_NODELAY and every answer takes 40 ms more.
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ConfigError(f"host {host!r} cannot be listened on: {error.strerror}") from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(2048)
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"cannot listen on {host} port {port}: {error.strerror}; stop what uses it, or give"
            " another --port"
        ) from None
    return listener


def _allow_files(count: int) -> None:
    """Raise the limit of open files as far as this process may, towards `count`."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count if hard == resource.RLIM_INFINITY else min(count, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
