"""All that a continuation needs beside the model directory, saved and restored as one.

A checkpoint is a model directory plus `state/`: the optimizer's moments and whatever else learns or
remembers (a queue, say) as safetensors, the position and the counters as JSON. Never pickle: a
checkpoint may come from anywhere. Random generators are not in it because none is carried along:
each step seeds its own from (seed, step, rank), see `seed_step`. Start at `State`.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from clipserve import checkpoint
from clipserve.config import EarlyStop
from clipserve.errors import CheckpointError
from clipserve.files import sha256
from clipserve.model import Model
from training import state_files
from training.distributed import ALONE, World
from training.fsdp import gather, place
from training.momentum import Twin
from training.order import Position, Purpose

FORMAT_VERSION = 4
_OLDEST_READ = 3
_STATE = "state.json"
_OPTIMIZER = "optimizer"


@dataclass
class Counters:
    """What was done so far. `step` is the number of optimizer steps."""

    step: int = 0
    samples: int = 0
    bad_samples: int = 0
    best: float | None = None
    seconds: float = 0.0
    """time spent training, over all sessions"""
    watched: float | None = None
    """the best value of train.early_stop's metric"""
    stale: int = 0
    """validations since then"""
    skipped: int = 0
    """steps that training.guard did not let happen"""
    skipped_at: list[int] = field(default_factory=list)
    """the last of them"""
    rolled_back: int = 0
    losses: list[float] = field(default_factory=list)
    """of the last sound steps"""
    loss_scale: float = 2.0**16
    """what fp16 multiplies the loss by"""
    steps_at_scale: int = 0
    validated: int = 0
    """the step after which an epoch's end, or the run's, was last seen to"""

    @property
    def is_unproven(self) -> bool:
        """Whether the last step was skipped, so that the weights may be broken."""
        return self.skipped_at[-1:] == [self.step]

    def watch(self, value: float) -> None:
        """Count one more validation."""
        is_better = self.watched is None or value > self.watched
        self.watched, self.stale = (value, 0) if is_better else (self.watched, self.stale + 1)

    def is_stale(self, rule: EarlyStop | None) -> bool:
        """Whether the run has to end early."""
        return rule is not None and self.stale >= rule.patience


@dataclass
class State:
    """Everything that changes while a run goes on.

    `order` is SampleOrder.identity: a run only goes on over the order that it began with. `extras`
    are modules beside the model whose parameters and buffers belong to the run. With an average of
    the weights, `ema`, that is what the model directory holds, and state/ holds the weights. Where
    the weights are split over the ranks there is the `skeleton` of a network to gather them in.
    """

    model: Model
    optimizer: torch.optim.Optimizer
    order: Mapping[str, Any]
    extras: Mapping[str, nn.Module] = field(default_factory=dict)
    position: Position = Position()
    counters: Counters = field(default_factory=Counters)
    ema: Twin | None = None
    skeleton: nn.Module | None = None
    is_torn: bool = False
    """whether a step has begun to change it and is not done"""

    @property
    def served(self) -> Model:
        """The model that is measured and saved: of the averaged weights if they are averaged."""
        if self.ema is None:
            return self.model
        own = self.model
        return Model(self.ema.network, own.architecture, own.transform, own.tokenizer, own.info)

    @property
    def is_split(self) -> bool:
        """Whether each rank has a part of it only."""
        return self.skeleton is not None

    def whole(self) -> Model:
        """`served`, with all its weights; where they are split, all ranks have to ask at once."""
        own = self.served
        if self.skeleton is None:
            return own
        network = gather(own.network, self.skeleton)
        return Model(network, own.architecture, own.transform, own.tokenizer, own.info)

    def save(self, folder: Path, world: World = ALONE) -> None:
        """Write state/ into a new checkpoint folder; of a split state, each rank its part."""
        state = folder / "state"
        state.mkdir(exist_ok=True)  # another rank may be here already
        tensors = {_OPTIMIZER: _moments(self.optimizer, self._names())}
        tensors |= {name: module.state_dict() for name, module in self._modules.items()}
        for name, some in tensors.items():
            state_files.write(state, name, some, world)
        if not world.is_main:
            return
        files = sorted(file.relative_to(state).as_posix() for file in state.rglob("*.safetensors"))
        content = {
            "format_version": FORMAT_VERSION,
            "position": asdict(self.position),
            "counters": asdict(self.counters),
            "order": dict(self.order),
            "optimizer": _name(self.optimizer),
            "start": self._start,
            "files": {name: sha256(state / name) for name in files},
        }
        content["checksum"] = _checksum(content)
        (state / _STATE).write_text(json.dumps(content, indent=1))

    def restore(self, directory: Path) -> None:
        """Take over a checkpoint's weights, moments, extras, position and counters.

        Raises CheckpointError if it is damaged, of another architecture, another start, or of
        another order.
        """
        directory = checkpoint.pin(directory)
        saved = checkpoint.load_for_training(directory)
        if saved.architecture != self.model.architecture:
            raise CheckpointError(
                f"{directory} has another architecture than this run; start anew in another `out`"
            )
        content = _read_state(directory / "state")
        _check_order(directory, content["order"], self.order)
        _check_optimizer(directory, content.get("optimizer", "AdamW"), self.optimizer)
        _check_start(directory, content.get("start", self._start), self._start)
        self._check_extras(directory, set(content["files"]))
        state, trained = directory / "state", self._parameters
        try:
            moments = state_files.read(state, _OPTIMIZER, lambda key: trained.get(_owner(key)))
            optimizer = _optimizer_state(self.optimizer, self._names(), moments)
            for name, module in self._modules.items():
                module.load_state_dict(state_files.read(state, name, module.state_dict().get))
        except (RuntimeError, ValueError) as error:
            first = " ".join(str(error).split())[:200]
            raise CheckpointError(
                f"{directory} was written with other objectives, sizes or adapters than this run's"
                f" ({first}); change them back, or start anew in another `out`"
            ) from None
        network = self.served.network
        own = network.state_dict()
        whole = saved.network.state_dict()
        network.load_state_dict({name: place(whole[name], own[name]) for name in whole})
        self.optimizer.load_state_dict(optimizer)
        self.position = Position(**content["position"])
        counters = content["counters"]
        self.counters = Counters(
            **{"validated": counters["step"], **counters}
        )  # early ones lack it

    def _check_extras(self, directory: Path, files: set[str]) -> None:
        needed, found = {*self._modules, _OPTIMIZER}, {_stem(name) for name in files}
        for what, names in (("lacks", needed - found), ("holds", found - needed)):
            if names:
                verb = "need" if what == "lacks" else "have no use for"
                listed = ", ".join(f"{name}.safetensors" for name in sorted(names))
                raise CheckpointError(
                    f"{directory} {what} {listed}, which this run's objectives,"
                    f" lora or train.ema {verb}; change them back, or start anew in another `out`"
                )

    @property
    def _start(self) -> str | None:
        """The fingerprint of model.pretrained; None for fresh weights."""
        found: str | None = self.model.info.training.get("start_fingerprint")
        return found

    @property
    def _modules(self) -> dict[str, nn.Module]:
        """What state/ holds in a file each."""
        return {**self.extras, **({"network": self.model.network} if self.ema is not None else {})}

    @property
    def _parameters(self) -> dict[str, nn.Parameter]:
        """All that may be trained, by name."""
        named = dict(self.model.network.named_parameters())
        for extra in self.extras.keys() & {"heads", "lora"}:
            inner = self.extras[extra].named_parameters()
            named |= {f"{extra}.{name}": parameter for name, parameter in inner}
        return named

    def _names(self) -> dict[int, str]:
        """The name of each trained parameter, by its identity."""
        return {id(parameter): name for name, parameter in self._parameters.items()}


def seed_step(seed: int, step: int, rank: int) -> None:
    """Set all of torch's generators, on every device, for one step of one rank."""
    words = np.random.SeedSequence((seed, Purpose.STEP, step, rank)).generate_state(2, np.uint32)
    torch.manual_seed(int(words[0]) << 32 | int(words[1]))


def step_generator(device: torch.device, purpose: Purpose, seed: int, step: int) -> torch.Generator:
    """What draws the same on every rank in one step."""
    words = np.random.SeedSequence((seed, purpose, step)).generate_state(2, np.uint32)
    return torch.Generator(device).manual_seed(int(words[0]) << 32 | int(words[1]))


def verify_state(directory: Path) -> None:
    """Check every byte of a checkpoint's state/, if it has one. Raises CheckpointError."""
    if (directory / "state").is_dir():
        _read_state(directory / "state")


def _read_state(state: Path) -> dict[str, Any]:
    """state.json, with all files checked."""
    try:
        text = (state / _STATE).read_text()
        content: dict[str, Any] = json.loads(text)
        digests = {name: sha256(state / _within(name)) for name in content["files"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{state} cannot be resumed from: {error}") from None
    if text != json.dumps(content, indent=1) or content.get("checksum") != _checksum(content):
        raise CheckpointError(f"{state / _STATE} was changed after it was written")
    if content["format_version"] < _OLDEST_READ:
        raise CheckpointError(
            f"{state} has format {content['format_version']} of an earlier clipserve, which cannot"
            " be continued exactly; start anew in another `out`, with model.pretrained"
        )
    if content["format_version"] > FORMAT_VERSION:
        raise CheckpointError(
            f"{state} has format {content['format_version']}; this version reads up to"
            f" {FORMAT_VERSION}: install a newer clipserve"
        )
    for name, digest in digests.items():
        if digest != content["files"][name]:
            raise CheckpointError(f"{state / name} is damaged; resume from another checkpoint")
    return content


def _within(name: str) -> Path:
    """A file of state/ or of a folder in it, whatever `name` says: it comes from anywhere."""
    return Path(*[part for part in Path(name).parts if part not in ("/", "..")][-2:])


def _stem(name: str) -> str:
    """What a file of state/ is of."""
    return name.split("/")[0].removesuffix(".safetensors")


def _check_order(directory: Path, before: dict[str, Any], now: Mapping[str, Any]) -> None:
    for name in sorted(before.keys() | now.keys()):
        old, new = before.get(name), now.get(name)
        if old != new:
            what = {"datasets": "the training shards or their weights"}.get(name, name)
            raise CheckpointError(
                f"{what} changed since {directory.name} was written, from {str(old)[:12]} to"
                f" {str(new)[:12]}; change it back, or start anew in another `out`"
            )


def _check_optimizer(directory: Path, before: str, now: torch.optim.Optimizer) -> None:
    if before != _name(now):
        raise CheckpointError(
            f"{directory} was written by {before}, whose moments are of no use to {_name(now)};"
            " change optim.name back, or start anew in another `out`"
        )


def _check_start(directory: Path, before: str | None, now: str | None) -> None:
    if before != now:
        old, new = (
            f"the weights {start[:12]}" if start else "fresh weights" for start in (before, now)
        )
        raise CheckpointError(
            f"{directory} is of a run that began with {old}, and model.pretrained now means {new};"
            " change it back, or start anew in another `out`"
        )


def _name(optimizer: torch.optim.Optimizer) -> str:
    return type(optimizer).__name__


def _checksum(content: dict[str, Any]) -> str:
    rest = {key: value for key, value in content.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _moments(optimizer: torch.optim.Optimizer, names: Mapping[int, str]) -> dict[str, Tensor]:
    """`MOMENT/PARAMETER` -> its tensor, of every parameter that has had a gradient."""
    return {
        f"{moment}/{names[id(parameter)]}": value
        for parameter, moments in optimizer.state.items()
        for moment, value in moments.items()
        if isinstance(value, Tensor)  # timm's Muon also keeps which group a parameter is of
    }


def _owner(key: str) -> str:
    """The parameter that a moment is of."""
    return key.partition("/")[2]


def _optimizer_state(
    optimizer: torch.optim.Optimizer, names: Mapping[int, str], tensors: Mapping[str, Tensor]
) -> dict[str, Any]:
    """What Optimizer.load_state_dict takes, by place. ValueError for a moment that fits nothing."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    places = {names[id(parameter)]: place for place, parameter in enumerate(parameters)}
    found: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        moment, _, name = key.partition("/")
        if name not in places:
            raise ValueError(f"its optimizer knows a parameter {name}, which is not trained here")
        if value.ndim and value.shape != parameters[places[name]].shape:
            raise ValueError(f"{name} has {tuple(value.shape)} there")
        found.setdefault(places[name], {})[moment] = value
    return {"state": found, "param_groups": optimizer.state_dict()["param_groups"]}
