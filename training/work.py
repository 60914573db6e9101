"""How much a device computes, against what it could: FLOPs of a sample, peaks of devices, MFU.

Counted on the uncompiled towers, forward and backward, as they are trained: patches that are
dropped are not counted, and of what is frozen for good only its forward pass. Nor are the
objectives, the momentum copy, the teacher, and what is computed a second time to save memory. Start
at `measure`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from clipserve.model import Model
from training.buffers import untouched
from training.precision import Precision, without_shortcut
from training.streaming import Batch

# Dense bf16, from NVIDIA's data sheets, in TFLOP/s; the longer of two names first.
_PEAKS = {
    "B200": 2250,
    "H200": 989,
    "H100 PCIe": 756,
    "H100": 989,
    "A100": 312,
    "L40S": 362,
    "L40": 181,
    "L4": 121,
    "A10": 125,
    "A30": 165,
    "RTX 4090": 165,
    "RTX 3090": 71,
}
_ROWS = 2  # one is too few for batch norm


@dataclass(frozen=True)
class Work:
    """FLOPs of one sample, and those that a device can do in a second."""

    image: float
    text: float
    """at `context` tokens; shorter texts are taken to cost so much less"""
    context: int
    peak: float | None = None

    @property
    def sample(self) -> float:
        """With a text as long as the context."""
        return self.image + self.text

    def of(self, batch: Batch) -> float:
        """FLOPs of a batch of this rank."""
        return self.image * len(batch.samples) + self.text * batch.ids.numel() / self.context


def measure(model: Model, peak: float | None = None) -> Work:
    """Count on two blank pictures and empty texts; the model stays as it is.

    It must be whole, without checkpointing of activations, and without gradients yet: those that
    this makes are dropped.
    """
    pixels = torch.zeros(_ROWS, 3, *model.transform.size, device=model.device)
    ids = model.tokenizer([""] * _ROWS).ids.to(model.device)
    image = _count(model, lambda: [model.encode_image(pixels)])
    both = _count(model, lambda: [part for part in model(pixels, ids) if part is not None])
    return Work(image, both - image, model.context_length, peak)


def find_peak(device: torch.device, precision: Precision, given: float | None) -> float | None:
    """FLOP/s of one device: what `train.peak_tflops` says, or the data sheet of a known GPU."""
    if given is not None:
        return given * 1e12
    if device.type != "cuda" or precision.autocast is None:
        return None
    name = torch.cuda.get_device_name(device)
    known = next((peak for part, peak in _PEAKS.items() if part in name.split(" ", 1)[-1]), None)
    return None if known is None else known * 1e12


def _count(model: Model, compute: Callable[[], list[Tensor]]) -> float:
    """FLOPs of one row, with the gradients that training would need."""
    counter = FlopCounterMode(display=False)  # which does not know what the shortcut does
    with untouched(model.network), without_shortcut(), counter:
        outputs = [output.sum() for output in compute() if output.requires_grad]
        if outputs:
            torch.autograd.backward(outputs)  # the counter's hooks know no autograd.grad
    for parameter in model.parameters():
        parameter.grad = None
    return float(counter.get_total_flops()) / _ROWS
