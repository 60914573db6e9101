"""Twenty epochs take no more memory than two."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from small_runs import SMALL

from training.shards import PackOptions, pack

EPOCHS = 20
SCRIPT = Path(__file__).with_name("measured.py")


def test_memory_is_flat_over_epochs(captioned: Any, tmp_path: Path) -> None:
    pack(captioned(256), tmp_path / "shards", PackOptions(samples_per_shard=50))
    log = tmp_path / "memory.jsonl"
    settings = [
        f"out={tmp_path / 'run'}",
        f"data.train={tmp_path / 'shards'}",
        f"train.epochs={EPOCHS}",
        *SMALL,
        "data.batch_size=32",
        "data.workers=2",
        "data.last_batch=keep",
    ]
    subprocess.run([sys.executable, str(SCRIPT), str(log), *settings], check=True, timeout=300)
    epochs = [json.loads(line) for line in log.read_text().splitlines()]
    assert len(epochs) == EPOCHS
    assert len(epochs[0]) == 3  # the parent and two workers, the same ones to the end
    for name, second in epochs[1].items():
        most = max(epoch[name] for epoch in epochs[1:])
        assert most <= 1.03 * second, (name, [epoch[name] for epoch in epochs])
