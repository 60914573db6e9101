"""What a data worker's death may interrupt."""

import multiprocessing
import signal
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
