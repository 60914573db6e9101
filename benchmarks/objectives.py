"""What each objective learns in the same processor time: the same small towers, batch 32, emoji.

    python -m benchmarks.objectives [--minutes 4] [--seeds 0,1,2] [--only NAME,...]
        [--data ../shared/data/noto_emoji] [--out FILE.json]

Of every variant a few steps are timed first; from them follows how many steps, and so which course
of the learning rate, fit into the budget of processor time. Each run has one thread, and two go
side by side: processor time hardly changes when other programs run. Finished runs are kept in the
result file, so an interrupted benchmark goes on.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args

from benchmarks.embedding import processor
from clipserve.config import RerankScore

PACKAGES = ("torch", "open_clip_torch")
SHORT, LONG, ROUNDS = 10, 40, 3
"""steps of two timed runs, whose difference is free of start and end; the least of the rounds is
taken, for other programs can only add to it"""
TOWERS = [
    "model.architecture.embed_dim=192",
    "model.architecture.vision_cfg.width=192",
    "model.architecture.vision_cfg.head_width=48",
    "model.architecture.vision_cfg.layers=4",
    "model.architecture.vision_cfg.patch_size=16",
    "model.architecture.vision_cfg.patch_dropout=0",
    "model.architecture.text_cfg.width=192",
    "model.architecture.text_cfg.heads=4",
    "model.architecture.text_cfg.layers=3",
]
COMMON = [
    *TOWERS,
    "data.workers=0",
    "data.batch_size=32",
    "data.last_batch=drop",
    "optim.lr=1e-3",
    "optim.warmup_steps=50",
    "train.log_every=50",
    "train.keep_checkpoints=1",
    "train.device=cpu",
]


IN_BATCH = '{name="contrastive"}'
MATCHING = '{name="matching"}'
MASKED_LANGUAGE = '{name="masked_language",weight=0.1}'


def queue(alpha: float) -> str:
    settings = f"queue_size=1024,momentum=0.99,alpha={alpha}"
    return f'{{name="momentum_contrast",{settings}}}'


VARIANTS = {
    "CLIP": ["model.preset=tiny"],
    "CLIP + queue": ["model.preset=tiny", f"objectives=[{IN_BATCH},{queue(0)}]"],
    "CLIP + queue + distillation": [
        "model.preset=tiny",
        f"objectives=[{IN_BATCH},{queue(0.4)}]",
    ],
    "SigLIP": [
        "model.preset=tiny",
        'objectives=[{name="sigmoid"}]',
        "model.architecture.init_logit_scale=2.302585",
        "model.architecture.init_logit_bias=-10",
    ],
    "ALBEF": [
        "model.preset=albef_tiny",
        "optim.lr=3e-4",  # BERT's layers, normalised last, bear no more
        f"objectives=[{IN_BATCH},{queue(0.4)},{MATCHING},{MASKED_LANGUAGE}]",
        "train.rerank=0",
    ],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=4.0, help="of processor time, a run")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--only", default=",".join(VARIANTS))
    parser.add_argument("--data", type=Path, default=Path("../shared/data/noto_emoji"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/objectives.json"))
    arguments = parser.parse_args()
    report = json.loads(arguments.out.read_text()) if arguments.out.exists() else {"runs": {}}
    report |= {
        "benchmark": "objectives",
        "date": date.today().isoformat(),
        "machine": {"processor": processor(), "cores": os.cpu_count()},
        "versions": {name: version(name) for name in PACKAGES}
        | {"python": platform.python_version()},
        "cpu_minutes": arguments.minutes,
        "settings": COMMON,
        "variants": VARIANTS,
    }

    def save() -> None:
        report["summary"] = summarise(report["runs"])
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(report, indent=1) + "\n")

    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
        shards = pack(arguments.data, Path(folder))
        names = [name for name in VARIANTS if name in arguments.only.split(",")]
        costs = report.setdefault("cpu_seconds_per_step", {})
        fresh = [name for name in names if name not in costs]
        for name, cost in zip(
            fresh, pool.map(lambda n: cost_of_step(n, shards), fresh), strict=True
        ):
            costs[name] = round(cost, 4)
        save()
        wanted = [(name, seed) for seed in arguments.seeds.split(",") for name in names]

        def run(task: tuple[str, str]) -> None:
            name, seed = task
            if seed in report["runs"].setdefault(name, {}):
                return
            steps = int(arguments.minutes * 60 / costs[name])
            report["runs"][name][seed] = measure(name, shards, steps, int(seed))
            save()

        list(pool.map(run, wanted))
    save()


def pack(source: Path, folder: Path) -> Path:
    """The emoji as shards, a tenth of them held out."""
    shutil.copy(source / "captions.csv", folder)
    with tarfile.open(source / "images.tar") as archive:
        archive.extractall(folder, filter="data")
    command = ["pack", f"{folder}/captions.csv", f"{folder}/shards", "--val-fraction", "0.1"]
    subprocess.run([sys.executable, "-m", "clipserve", *command], check=True, capture_output=True)
    return folder / "shards"


def cost_of_step(name: str, shards: Path) -> float:
    """Seconds of processor time."""
    short, long = (
        min(train(name, shards, steps, 0)[1] for _ in range(ROUNDS)) for steps in (SHORT, LONG)
    )
    return (long - short) / (LONG - SHORT)


def measure(name: str, shards: Path, steps: int, seed: int) -> dict[str, Any]:
    """One run, and what its model finds among the pictures held out."""
    model, seconds = train(name, shards, steps, seed)
    found = evaluate(model, shards)
    for score in get_args(RerankScore) if name == "ALBEF" else ():
        again = evaluate(model, shards, "--rerank", "16", "--rerank-score", score)
        for key, value in again.items():
            if key.startswith("reranked_"):
                found[key.replace("reranked", score)] = value
    shutil.rmtree(model.parent)
    return {"steps": steps, "cpu_seconds": round(seconds, 1), **found}


def evaluate(model: Path, shards: Path, *options: str) -> dict[str, float]:
    printed, _ = run_clipserve("evaluate", str(model), "--data", f"{shards}/val", *options)
    found: dict[str, float] = json.loads(printed)["retrieval"]
    return found


def train(name: str, shards: Path, steps: int, seed: int) -> tuple[Path, float]:
    """The model directory, and processor seconds with start and end."""
    out = Path(tempfile.mkdtemp(dir=shards.parent)) / "run"
    settings = [f"out={out}", f"data.train={shards}/train", f"train.steps={steps}"]
    everything = [*settings, f"train.seed={seed}", *COMMON, *VARIANTS[name]]
    _, seconds = run_clipserve("train", *everything)
    return out / "latest", seconds


def run_clipserve(*arguments: str) -> tuple[str, float]:
    """What it printed, and its processor seconds."""
    process = subprocess.Popen(
        [sys.executable, "-m", "clipserve", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert process.stdout is not None
    printed = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if os.waitstatus_to_exitcode(status):
        sys.exit(f"clipserve {' '.join(arguments)} failed")
    return printed, usage.ru_utime + usage.ru_stime


def summarise(runs: Mapping[str, Mapping[str, Mapping[str, float]]]) -> dict[str, dict[str, str]]:
    """Mean and standard deviation over the seeds, of every measure."""
    summary = {}
    for name, by_seed in runs.items():
        keys = [key for key in next(iter(by_seed.values()), {}) if "_r" in key]
        values = {key: [run[key] for run in by_seed.values()] for key in keys}
        summary[name] = {
            key: f"{statistics.mean(v):.3f} +- {statistics.stdev(v) if len(v) > 1 else 0:.3f}"
            for key, v in values.items()
        }
    return summary


if __name__ == "__main__":
    main()
