"""A training run that writes down what each step saw, and kills itself where told to.

    python tests/traced.py TRACE SIGNAL:STEP,... section.key=value ...

A line of TRACE is one rank's step: {"rank", "step", "keys", "pixels", "loss"}. A signal is sent in
the middle of its step, once: the file TRACE.SIGNAL.STEP says that it was. FULL is no signal: the
step fails as on a GPU whose memory is full.
"""

import hashlib
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from clipserve.cli import main
from training import loop


def trace_steps(trace: Path, signals: dict[int, str]) -> None:
    real = loop.train_step

    def step(run: Any, batch: Any, counts: Any) -> Any:
        number = run.state.counters.step + 1
        name = signals.get(number)
        sent = trace.with_name(f"{trace.name}.{name}.{number}")
        if name and not sent.exists():
            sent.touch()
            if name == "FULL":
                raise torch.OutOfMemoryError("CUDA out of memory")
            os.kill(os.getpid(), getattr(signal, name))
        losses = real(run, batch, counts)
        line = {
            "rank": run.world.rank,
            "step": number,
            "keys": ["/".join(run.stream.data.key(i)) for i in batch.samples],
            "pixels": [hashlib.sha256(p.numpy().tobytes()).hexdigest()[:16] for p in batch.pixels],
            "loss": losses["loss"].item().hex(),
        }
        with trace.open("a") as file:
            file.write(json.dumps(line) + "\n")
        return losses

    loop.train_step = step


if __name__ == "__main__":
    trace, wanted, *overrides = sys.argv[1:]
    pairs = [item.split(":") for item in wanted.split(",") if item]
    trace_steps(Path(trace), {int(step): name for name, step in pairs})
    sys.argv = ["clipserve", "train", *overrides]
    main()
