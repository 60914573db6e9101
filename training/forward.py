"""One batch through the model, its momentum copy and the teacher: what the objectives see.

`look` computes, and changes nothing. With several ranks the features of the whole batch may be had
on each, with gradients; a rank's objectives answer for its `own` rows.

Legend: B own rows, N global batch, E embedding, T text tokens.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clipserve.model import Encoded, Model
from clipserve.objectives import Same
from training.accumulate import MicroBatches
from training.distributed import World
from training.momentum import FeatureQueue, Twin
from training.objectives.captioning import captioning_loss
from training.order import Purpose
from training.state import step_generator
from training.streaming import Batch

Forward = Callable[[Tensor, Tensor], Encoded]
_COLUMNS = {"picture": 0, "caption": 1, "label": 2}


@dataclass(frozen=True)
class Networks:
    """All that a batch goes through. `forward` and `momentum_forward` may be compiled."""

    model: Model
    forward: Forward
    heads: nn.ModuleDict
    """what objectives learn beside the model"""
    momentum: Model | None = None
    momentum_forward: Forward | None = None
    twin: Twin | None = None
    queue: FeatureQueue | None = None
    teacher: Model | None = None
    parts: MicroBatches = MicroBatches()
    """in how many a batch goes through any of them"""


@dataclass(frozen=True)
class Remembered:
    """What the momentum copy makes of a batch, without gradient."""

    encoded: Encoded
    image: Tensor
    text: Tensor
    """(N, E), unit length"""


@dataclass
class Step:
    """The tensors of one step. Rows `own` of those of (N, ...) are this rank's."""

    networks: Networks
    world: World
    batch: Batch
    counts: list[int]
    """rows of each rank"""
    encoded: Encoded
    """without caption_logits, which are large"""
    groups: Tensor
    """(N, 3): equal numbers in a column are the same picture, caption or label"""
    scale: Tensor
    bias: Tensor | None
    ramp: float
    """how far, from 0 to 1, the ramp of alpha is"""
    random: torch.Generator
    """draws the same on every rank"""
    momentum: "Remembered | None" = None
    """the same by the momentum copy"""
    word_loss: Tensor | None = None
    """of a network with a decoder: sums over own words, one for each part of the batch"""
    reports: dict[str, Tensor] = field(default_factory=dict)
    """numbers for the log beside the losses: each rank's share of a sum"""

    @cached_property
    def image(self) -> Tensor:
        """(N, E), unit length, with the gradients of all ranks; gathered when first asked for,
        which all ranks have to do."""
        return self.world.gather(self.encoded.image, self.counts)

    @cached_property
    def text(self) -> Tensor:
        """Likewise."""
        return self.world.gather(self.encoded.text, self.counts)

    @property
    def own(self) -> slice:
        """This rank's rows."""
        first = sum(self.counts[: self.world.rank])
        return slice(first, first + self.counts[self.world.rank])

    @property
    def size(self) -> int:
        """N."""
        return sum(self.counts)

    def same(self, columns: tuple[Same, ...]) -> Tensor | None:
        """(N, G) the wanted columns of `groups`; None if there are none."""
        return self.groups[:, [_COLUMNS[c] for c in columns]] if columns else None

    def queued(self, columns: tuple[Same, ...]) -> Tensor | None:
        """(K, G) likewise of the queue."""
        queue = self.networks.queue
        return queue.groups[:, [_COLUMNS[c] for c in columns]] if queue and columns else None

    def noise(self, *shape: int) -> Tensor:
        """Uniform in [0, 1); whatever number of ranks there is, a row gets the same."""
        return torch.rand(*shape, generator=self.random, device=self.random.device)

    def count(self, number: int) -> int:
        """The sum over all ranks."""
        return int(self.world.exchange(number).sum())


def look(
    networks: Networks,
    batch: Batch,
    counts: list[int],
    world: World,
    *,
    seed: int,
    step: int,
    ramp: float = 1.0,
) -> Step:
    """Everything that the objectives share. Call it under `precision.computing`."""
    model = networks.model
    batch = batch.to(model.device)
    pixels, ids = (batch.pixels, batch.ids) if batch.samples else blank(model)
    count = len(batch.samples)
    batch = replace(batch, ids=ids[:count])  # as wide as the states, also of no rows
    encoded, word_loss = _encode(networks, pixels, ids, counts, world)
    groups = world.gather(batch.groups, counts)
    return Step(
        networks,
        world,
        batch,
        counts,
        encoded,
        groups=groups,
        scale=model.logit_scale,
        bias=model.logit_bias,
        ramp=ramp,
        random=step_generator(model.device, Purpose.DRAWS, seed, step),
        momentum=_remember(networks, pixels, ids, counts, world),
        word_loss=word_loss,
        reports={"repeated_captions": _count_repeated(groups) / (sum(counts) * world.size)},
    )


def _count_repeated(groups: Tensor) -> Tensor:
    """How many captions of the global batch occur in it before."""
    captions = groups[:, _COLUMNS["caption"]].sort().values
    return (captions[1:] == captions[:-1]).sum()


def _encode(
    networks: Networks, pixels: Tensor, ids: Tensor, counts: list[int], world: World
) -> tuple[Encoded, Tensor | None]:
    """What the model makes of this rank's rows; of captions only their losses."""
    model, count = networks.model, counts[world.rank]

    def encode(rows: slice, pixels: Tensor, ids: Tensor) -> tuple[Tensor, ...]:
        found = networks.forward(model.transform.normalize(pixels[rows]), ids[rows])
        logits, targets = found.caption_logits, ids[rows, 1:]
        if logits is None:
            return _kept(found)
        loss = captioning_loss(logits, targets, model.network.pad_id, total=1)
        return *_kept(found), loss[None]

    found = networks.parts.alike(counts)(encode, len(ids), pixels, ids)
    parts = [part[:count] for part in found]
    word_loss = parts.pop() if model.has_decoder else None
    return Encoded(*parts), word_loss


@torch.no_grad()
def _remember(
    networks: Networks, pixels: Tensor, ids: Tensor, counts: list[int], world: World
) -> Remembered | None:
    forward = networks.momentum_forward
    if forward is None:
        return None

    def encode(rows: slice, pixels: Tensor, ids: Tensor) -> tuple[Tensor, ...]:
        return _kept(forward(networks.model.transform.normalize(pixels[rows]), ids[rows]))

    parts = networks.parts.alike(counts)(encode, len(ids), pixels, ids)
    encoded = Encoded(*(part[: counts[world.rank]] for part in parts))
    image, text = (world.gather(part, counts) for part in (encoded.image, encoded.text))
    return Remembered(encoded, image, text)


def _kept(found: Encoded) -> tuple[Tensor, ...]:
    return tuple(part for part in found._replace(caption_logits=None) if part is not None)


def blank(model: Model) -> tuple[Tensor, Tensor]:
    """A pair to take part with, where a short batch leaves a rank without any."""
    ids = model.tokenizer([""]).ids
    return torch.zeros(1, 3, *model.transform.size, device=model.device), ids.to(model.device)


@torch.no_grad()
def ask_teacher(step: Step, teacher: Model) -> tuple[Tensor, Tensor]:
    """The teacher's unit vectors (B, E') of this rank's pictures and captions.

    It sees the student's crop, at its own size, and the caption through its own tokenizer, and
    computes in the dtype that was found good enough for it.
    """
    if not step.batch.samples:  # towers want a row
        nothing = step.encoded.image.new_zeros(0, teacher.embed_dim)
        return nothing, nothing
    tokens = teacher.tokenizer(step.batch.captions)
    ids = tokens.cut() if teacher.can_cut_text else tokens.ids

    def encode(rows: slice, pixels: Tensor, ids: Tensor) -> tuple[Tensor, ...]:
        pixels = _resize(pixels[rows], teacher.transform.size)
        image = teacher.encode_image(teacher.transform.normalize(pixels))
        return image, teacher.encode_text(ids[rows])

    pixels, ids = step.batch.pixels, ids.to(teacher.device)
    with torch.autocast(teacher.device.type, enabled=False):
        image, text = step.networks.parts(encode, len(ids), pixels, ids)
    return image, text


def _resize(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    if tuple(pixels.shape[2:]) == tuple(size):
        return pixels
    resized = F.interpolate(pixels.float(), size, mode="bicubic", antialias=True)
    return resized.round().clamp(0, 255).byte()


def modules_of(networks: Networks) -> Mapping[str, nn.Module]:
    """What belongs to the run's state beside the model."""
    found = {"momentum": networks.twin, "queue": networks.queue}
    modules: dict[str, nn.Module] = {name: m for name, m in found.items() if m is not None}
    return modules | ({"heads": networks.heads} if len(networks.heads) else {})
