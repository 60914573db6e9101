"""The demo: from pictures to answers over HTTP, through the commands a user would type.

Start at `run`. Every step is a `clipserve` command, printed before it runs, so the demo is also the
tour. Steps that are done are not done again: an interrupted demo continues where it stopped.
"""

import base64
import contextlib
import csv
import json
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from clipserve.errors import ClipserveError, ConfigError
from clipserve.files import write_atomic
from clipserve.pictures import Drawing, draw_digits, draw_emoji, find_emoji_font

NUM_VAL = 400
EPOCHS = 12
_QUERIES = {
    "emoji": ("red apple", "woman firefighter with dark skin", "a dancing man"),
    "digits": ("three", "a handwritten seven", "zero"),
}
_STAMP = "dataset.txt"
_READY_TIMEOUT_S = 120.0
_STOP_TIMEOUT_S = 15.0


def run(out: Path, *, stay: bool, port: int) -> None:
    """Draw, pack, train, evaluate, embed, index, serve, ask. Leaves `out`/summary.json.

    `stay` keeps the service up until Ctrl-C; without it a free port is used and given back.
    """
    console = Console(highlight=False)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the service ends with us
    if stay:
        _check_port(port)
    _check_folder(out)
    dataset = _draw(out, console)
    run_dir, collection = out / f"{dataset}-clip", out / dataset
    for part in ("train", "val"):
        if not (out / "shards" / part / "manifest.json").exists():
            shutil.rmtree(out / "shards" / part, ignore_errors=True)
            _clipserve(console, "pack", out / f"{part}.csv", out / "shards" / part)
    started = time.monotonic()
    _clipserve(
        console,
        "train",
        f"out={run_dir}",
        "model.preset=tiny",
        f"data.train={out / 'shards' / 'train'}",
        f"data.val={out / 'shards' / 'val'}",
        "data.workers=1",
        f"train.epochs={EPOCHS}",
    )
    wall = time.monotonic() - started
    model = run_dir / "best"
    scores = _evaluate(console, model, out / "shards" / "val")
    _clipserve(console, "embed", model, out / "captions.csv", "--collection", collection)
    _clipserve(console, "index", "build", collection)
    summary = _summarize(dataset, run_dir / "latest", wall, scores)
    write_atomic(out / "summary.json", json.dumps(summary, indent=2) + "\n")
    port = port if stay else _free_port()
    address = f"http://127.0.0.1:{port}"
    with _service(console, model, collection, port, address) as process:
        _ask(console, address, dataset, out)
        console.print(f"\nsummary: {out / 'summary.json'}")
        if stay:
            console.print(f"The page is at [bold]{address}/[/bold] - stop with Ctrl-C")
            with contextlib.suppress(KeyboardInterrupt):
                process.wait()


def _check_port(port: int) -> None:
    try:
        with socket.create_server(("127.0.0.1", port)):
            return
    except OSError:
        raise ConfigError(f"port {port} is taken; choose another with --port") from None


def _check_folder(out: Path) -> None:
    """The demo replaces what it finds in its folder, so it must be new, empty or its own."""
    out.mkdir(parents=True, exist_ok=True)
    if not (out / _STAMP).exists():
        if any(out.iterdir()):
            raise ConfigError(f"{out} holds something else; give the demo a folder of its own")
        write_atomic(out / _STAMP, "drawing\n")


def _draw(out: Path, console: Console) -> str:
    """Pictures, captions.csv of all, train.csv and val.csv; returns the data set's name."""
    font = find_emoji_font()
    dataset = "emoji" if font else "digits"
    stamp = out / _STAMP
    if stamp.read_text().strip() == dataset:
        return dataset
    for stale in ("pictures", "shards", dataset, f"{dataset}-clip"):
        shutil.rmtree(out / stale, ignore_errors=True)
    folder = out / "pictures"
    folder.mkdir()
    if font:
        console.print("drawing every emoji ...")
        drawings = draw_emoji(font, folder)
    else:
        console.print(
            "no colour emoji font, or no Raqm to draw with: using scikit-learn's handwritten digits"
            " instead (apt-get install fonts-noto-color-emoji libfribidi0 brings the emoji)"
        )
        drawings = draw_digits(folder)
    ordered = sorted(drawings, key=lambda drawing: sha256(drawing.name.encode()).digest())
    _write_csv(out / "val.csv", ordered[:NUM_VAL])
    _write_csv(out / "train.csv", ordered[NUM_VAL:])
    _write_csv(out / "captions.csv", drawings)
    console.print(f"{len(drawings)} pictures, {NUM_VAL} of them held out")
    write_atomic(stamp, dataset + "\n")
    return dataset


def _write_csv(file: Path, drawings: list[Drawing]) -> None:
    with file.open("w", newline="", encoding="utf-8") as handle:
        writer = csv.writer(handle)
        writer.writerow(["image", "caption"])
        writer.writerows((f"pictures/{d.file.name}", d.caption) for d in drawings)


def _evaluate(console: Console, model: Path, shards: Path) -> dict[str, Any]:
    arguments = ["evaluate", model, "--data", shards, "--tasks", "retrieval,zeroshot"]
    console.print(f"[bold]$ clipserve {' '.join(map(str, arguments))}[/bold]")
    done = subprocess.run(_command(*arguments), stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise ClipserveError(f"clipserve evaluate failed with exit code {done.returncode}")
    report = json.loads(done.stdout)
    console.print_json(
        json.dumps({"retrieval": report["retrieval"], "zeroshot": report["zeroshot"]})
    )
    assert isinstance(report, dict)
    return report


def _summarize(dataset: str, latest: Path, wall: float, scores: dict[str, Any]) -> dict[str, Any]:
    description = json.loads((latest / "clipserve.json").read_text())
    training, retrieval = description["training"], scores["retrieval"]
    return {
        "dataset": dataset,
        "train_seconds": training["seconds"],
        "train_command_seconds": round(wall, 1),
        "samples_per_second": round(training["samples"] / training["seconds"], 1),
        **{
            f"{way}_r{k}": retrieval[f"{way}_r{k}"]
            for way in ("t2i", "i2t", "mean")
            for k in (1, 5, 10)
        },
        "zero_shot_acc1": scores["zeroshot"]["acc1"],
        "num_val": scores["num_images"],
        "device": training["device"],
        "versions": description["versions"],
    }


@contextlib.contextmanager
def _service(
    console: Console, model: Path, collection: Path, port: int, address: str
) -> Iterator["subprocess.Popen[bytes]"]:
    """A running `clipserve serve`; ended with the block."""
    arguments = ["serve", model, "--collection", collection, "--port", port]
    console.print(f"[bold]$ clipserve {' '.join(map(str, arguments))}[/bold]")
    process = subprocess.Popen(_command(*arguments))
    try:
        _wait_until_ready(process, address)
        yield process
    finally:
        process.terminate()
        try:
            process.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_until_ready(process: "subprocess.Popen[bytes]", address: str) -> None:
    deadline = time.monotonic() + _READY_TIMEOUT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise ClipserveError(f"clipserve serve ended with exit code {process.returncode}")
        try:
            with urllib.request.urlopen(f"{address}/health/ready", timeout=5):
                return
        except OSError:
            time.sleep(0.2)
    raise ClipserveError(f"the service was not ready after {_READY_TIMEOUT_S:.0f} s")


def _ask(console: Console, address: str, dataset: str, out: Path) -> None:
    """Three searches and one classification of a held-out picture, as a table."""
    table = Table(title="asked over HTTP")
    for column in ("question", "first", "second", "third"):
        table.add_column(column)
    for query in _QUERIES[dataset]:
        hits = _post(f"{address}/v1/search", {"text": query, "k": 3})["hits"]
        table.add_row(f"search: {query}", *(f"{h['caption']} ({h['score']:.2f})" for h in hits))
    with (out / "val.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    labels = list(dict.fromkeys(row["caption"] for row in rows))[:5]
    picture = base64.b64encode((out / rows[0]["image"]).read_bytes()).decode()
    body = {"images": [picture], "labels": labels, "top_k": 3}
    ranked = _post(f"{address}/v1/classify", body)["results"][0]["predictions"]
    answers = (f"{entry['label']} ({entry['probability']:.0%})" for entry in ranked)
    table.add_row(f"classify an unseen picture of: {rows[0]['caption']}", *answers)
    console.print(table)


def _post(url: str, body: dict[str, Any]) -> Any:
    data = json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return json.load(response)
    except urllib.error.HTTPError as error:
        raise ClipserveError(f"{url} answered {error.code}: {error.read()[:500]!r}") from None


def _clipserve(console: Console, *arguments: object) -> None:
    """Run a clipserve command, shown as one would type it; its output passes through."""
    console.print(f"[bold]$ clipserve {' '.join(map(str, arguments))}[/bold]")
    done = subprocess.run(_command(*arguments))
    if done.returncode:
        raise ClipserveError(f"clipserve {arguments[0]} failed with exit code {done.returncode}")


def _command(*arguments: object) -> list[str]:
    return [sys.executable, "-P", "-m", "clipserve", *map(str, arguments)]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
