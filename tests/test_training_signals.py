"""What a data worker's death may interrupt."""

import multiprocessing
import signal
import subprocess
import sys
from typing import Any

import pytest
from torch.utils.data import DataLoader

from training.signals import without_interruption


class HalfHandedOver:
    """Fails where it is received, as a batch whose sender died while sending does."""

    def __reduce__(self) -> Any:
        return fail, ()


def fail() -> None:
    raise EOFError


class Samples:
    def __len__(self) -> int:
        return 4

    def __getitem__(self, i: int) -> HalfHandedOver:
        return HalfHandedOver()


def test_after_the_loop_no_worker_is_told_of_whoever_holds_the_error() -> None:
    before = set(multiprocessing.active_children())
    loader: Any = DataLoader(Samples(), num_workers=1, collate_fn=lambda batch: batch[0])  # type: ignore[arg-type]
    with pytest.raises(EOFError) as caught:  # its traceback holds torch's iterator
        list(without_interruption(loader))
    signal.raise_signal(signal.SIGCHLD)  # as when any child ends
    assert set(multiprocessing.active_children()) <= before
    assert caught.traceback


HALF_A_BATCH = """
import os, signal, struct, sys
import torch
from torch.utils.data import DataLoader
from training.signals import begin_worker, without_interruption, worker_context

class Batch:
    def __init__(self, samples):
        self.samples = samples

    def pin_memory(self):
        return self

class Numbers:
    def __len__(self):
        return 400

    def __getitem__(self, index):
        if index == 60:
            frame = sys._getframe()
            while "data_queue" not in frame.f_locals:
                frame = frame.f_back
            queue = frame.f_locals["data_queue"]
            queue._wlock.acquire()
            os.write(queue._writer.fileno(), struct.pack("!i", 100_000) + b"x" * 5_000)
            os.kill(os.getpid(), signal.SIGKILL)
        return index

torch.accelerator.is_available = lambda: True
torch.accelerator.current_accelerator = lambda *_: torch.device("cuda")
torch.accelerator.current_device_index = lambda: 0
torch.accelerator.set_device_index = lambda index: None
options = dict(num_workers=2, pin_memory=True, worker_init_fn=begin_worker, collate_fn=Batch)
loader = DataLoader(Numbers(), 4, multiprocessing_context=worker_context(), **options)
print(sum(len(batch.samples) for batch in without_interruption(loader)))
"""


def test_a_worker_killed_while_it_hands_over_a_batch_blocks_nothing() -> None:
    """With a GPU a thread of torch's reads what workers write, and is waited for at the end."""
    command = [sys.executable, "-c", HALF_A_BATCH]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "exited unexpectedly" in done.stderr.splitlines()[-1]
