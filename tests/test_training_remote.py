"""Training from shards that are elsewhere: the same run, fetched ahead, stopped while it waits."""

import functools
import http.server
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_training_continuation import finish, read_trace, run, start

from clipserve.shards import ShardSet
from training.mixture import Mixture, WeightedShards
from training.order import Dataset, OrderSettings, Position, SampleOrder
from training.shards import PackOptions, pack
from training.streaming import _BATCHES_AHEAD, _fetching_ahead


class Server(http.server.SimpleHTTPRequestHandler):
    """Serves a folder; names in `stalled` are not answered."""

    stalled: set[str] = set()

    def do_GET(self) -> None:
        if Path(self.path).name in self.stalled:
            time.sleep(600)
        super().do_GET()

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def shards(captioned: Any, tmp_path: Path) -> Path:
    """Seven shards of five samples, the last of three."""
    pack(captioned(33), tmp_path / "shards", PackOptions(samples_per_shard=5))
    return tmp_path / "shards"


@pytest.fixture
def url(shards: Path) -> Iterator[str]:
    handler = functools.partial(Server, directory=str(shards))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
    Server.stalled = set()


WINDOW = ["data.shuffle_shards=2", "data.last_batch=keep"]


@pytest.mark.slow
def test_shards_from_elsewhere_give_the_same_run(shards: Path, url: str, tmp_path: Path) -> None:
    run(shards, tmp_path / "local", more=WINDOW)
    expected = read_trace(tmp_path / "local")
    # A shard has 36 kB: the cache holds three, fewer than two windows.
    small = [*WINDOW, "data.cache_gb=1e-4", f"data.cache_dir={tmp_path / 'small'}"]
    run(url, tmp_path / "folder", more=[*small, "data.workers=2"])
    assert read_trace(tmp_path / "folder") == expected
    kept = sum(file.stat().st_size for file in (tmp_path / "small").rglob("*.tar"))
    assert 0 < kept <= 1e-4 * 2**30

    pattern = f"{url}/{{000000..000006}}.tar"
    run(pattern, tmp_path / "pattern", more=WINDOW)
    pipe = f"pipe:cat {shards}/{{000000..000006}}.tar"
    run(pipe, tmp_path / "pipe", more=WINDOW)
    for name in ("pattern", "pipe"):
        found = read_trace(tmp_path / name)
        assert {s: line["loss"] for s, line in found.items()} == {
            s: line["loss"] for s, line in expected.items()
        }


@pytest.mark.parametrize("workers", [0, 1])
def test_a_stop_while_waiting_for_data_is_heard_at_once(
    shards: Path, url: str, tmp_path: Path, workers: int
) -> None:
    more = ["data.shuffle_shards=1", f"data.workers={workers}", f"data.cache_dir={tmp_path / 'c'}"]
    needed = SampleOrder(
        (Dataset("", ShardSet.open(shards).shard_starts),),
        OrderSettings(8, shuffle_shards=1),
        lambda samples: samples,
    ).draws(0)[0]
    Server.stalled = {f"{needed[-1] // 5:06d}.tar"}  # the epoch's last one
    out = tmp_path / "run"
    process = start(url, out, more=more)
    trace = Path(f"{out}.trace")
    for _ in range(600):
        if trace.exists() and len(trace.read_text().splitlines()) >= 2:
            break
        time.sleep(0.1)
    time.sleep(1.0)  # it waits for the shard now
    process.send_signal(signal.SIGTERM)
    asked = time.monotonic()
    errors = finish(process, 128 + signal.SIGTERM)
    assert time.monotonic() - asked < 20
    step = len(trace.read_text().splitlines())
    assert f"stopped by SIGTERM after step {step}, which is saved" in errors
    assert (out / "latest").resolve().name == f"step-{step:09d}"


class Far(Mixture):
    """Notes which shards are asked for."""

    def __init__(self, folder: Path) -> None:
        super().__init__([WeightedShards(ShardSet.open(folder))])
        self.fetched: list[int] = []

    def fetch(self, shard: int) -> None:
        self.fetched.append(shard)


def test_shards_are_fetched_before_their_use_in_every_epoch(shards: Path) -> None:
    data = Far(shards)
    order = SampleOrder(data.datasets, OrderSettings(2, shuffle_shards=1), data.text_bytes)
    batches = _fetching_ahead(data, order.batches(Position()))
    for number in range(40 * order.batches_per_epoch):
        batch = next(batches)
        used = set(data.shards_of(np.array([draw.sample for draw in batch])).tolist())
        until = time.monotonic() + 10
        while not used <= set(data.fetched) and time.monotonic() < until:
            time.sleep(0.001)  # on its way, while the batches before are trained on
        assert used <= set(data.fetched), number
    threads = [thread for thread in threading.enumerate() if thread.name == "fetch"]
    assert len(threads) == 4
    batches.close()
    for thread in threads:
        thread.join(timeout=10)
        assert not thread.is_alive()


def test_looking_ahead_is_bounded(shards: Path) -> None:
    data = Far(shards)
    drawn = 0

    def count(batches: Iterator[Any]) -> Iterator[Any]:
        nonlocal drawn
        for batch in batches:
            drawn += 1
            yield batch

    order = SampleOrder(data.datasets, OrderSettings(1, shuffle_shards=1), data.text_bytes)
    ahead = _fetching_ahead(data, count(order.batches(Position())))
    for taken in range(1, 1000):
        next(ahead)
        assert drawn <= taken + _BATCHES_AHEAD
    assert set(data.fetched) == set(range(7))
    assert len(data.fetched) > 50  # in every epoch: a small cache has dropped them
