"""From a configuration to the things a run needs: model, data, optimizer, step count."""

import logging
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from clipserve import wordpiece
from clipserve.albef import Albef
from clipserve.config import Config, ModelConfig
from clipserve.convert.reading import read_pretrained
from clipserve.embed import resolve_device
from clipserve.errors import ConfigError, DataError
from clipserve.images import TrainTransform
from clipserve.metrics import RETRIEVAL_METRICS
from clipserve.model import Model, create
from clipserve.objectives import SelfSupervision
from clipserve.shards import ShardSet
from clipserve.towers import architecture_config
from clipserve.weights import load_bert, load_image_tower
from training.augment import ViewTransform
from training.data import REMOTE_SHUFFLE_SHARDS, Data
from training.distributed import World
from training.forward import Networks, modules_of
from training.frozen import Frozen
from training.frozen import choose as choose_frozen
from training.fsdp import check as check_fsdp
from training.fsdp import skeleton, split
from training.lora import Adapters
from training.lora import choose as choose_targets
from training.momentum import Twin
from training.networks import build as build_networks
from training.networks import plan
from training.optim import MAX_LOGIT_SCALE, build_optimizer, check_steps, largest_logit_scale
from training.order import OrderSettings
from training.parts import Weight, find_weights
from training.precision import Precision
from training.precision import choose as choose_precision
from training.state import State
from training.streaming import SampleSettings, Stream
from training.work import Work, find_peak, measure

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """All that the loop works on."""

    config: Config
    state: State
    stream: Stream
    val: ShardSet | None
    networks: Networks
    device: torch.device
    precision: Precision
    total_steps: int
    world: World
    frozen: Frozen = field(default_factory=Frozen)
    work: Work | None = None
    max_logit_scale: float = MAX_LOGIT_SCALE
    """its logarithm: what it is clamped to"""
    adapters: Adapters = field(default_factory=Adapters)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All that is trained, now or later or never; not what adapters learn for."""
        adapted = {id(adapter.target.parameter) for adapter in self.adapters}
        own = [p for p in self.state.model.parameters() if id(p) not in adapted]
        return [*own, *self.networks.heads.parameters(), *self.adapters.parameters()]


def prepare(config: Config, data: Data, world: World, vocabulary: Path | None = None) -> Run:
    """Build and check everything; raises ClipserveError. Nothing is written.

    `vocabulary` is the folder of `training.vocabulary`, if the model needs it.
    """
    device = _device(config, world)
    _check_metrics(config, data)
    splits = config.train.sharding != "none" and world.size > 1
    if splits:
        check_fsdp(config)
    torch.manual_seed(config.train.seed)
    model = build_model(config, vocabulary).to(device)
    _check_rerank(config, model)
    compile_towers = _use_compile(config, device, splits)
    networks = build_networks(config, model, world)
    for module in (model.network, *modules_of(networks).values()):
        world.same_weights(module)
    ema = Twin(model.network, config.train.ema) if config.train.ema else None
    precision = choose_precision(config.train.precision, device, world)
    targets, still = _choose(config, networks)
    frozen = _freeze(config, networks, still)
    work = measure(model, find_peak(device, precision, config.train.peak_tflops))
    networks = plan(config, networks, compile_towers)
    hollow = skeleton(model.network) if splits else None
    if splits:
        _split(networks, ema, world)
        frozen = _freeze(config, networks, still)  # weights are other objects now
    weights = find_weights(model.network, networks.heads)
    adapters = Adapters(targets, config.lora)
    world.same_weights(adapters)
    _tell_share(weights, frozen, adapters)
    optimizer = build_optimizer(model, config.optim, adapters.replace(weights), frozen)
    extras = {**modules_of(networks), **({"lora": adapters} if config.lora else {})}
    stream = _build_stream(config, data, model, world, compile_towers)
    if not world.agrees(repr(stream.order.identity).encode()):
        raise DataError(
            "the processes of this run see different shards or settings; give all the same"
        )
    total_steps = config.train.steps or (
        (config.train.epochs or 0) * stream.order.batches_per_epoch
    )
    check_steps(config.optim, total_steps)
    return Run(
        config=config,
        state=State(
            model,
            optimizer,
            stream.order.identity,
            extras,
            ema=ema,
            skeleton=hollow,
        ),
        stream=stream,
        val=data.val,
        networks=networks,
        device=device,
        precision=precision,
        total_steps=total_steps,
        world=world,
        frozen=frozen,
        work=work,
        max_logit_scale=largest_logit_scale(model, config.objectives),
        adapters=adapters,
    )


def _split(networks: Networks, ema: Twin | None, world: World) -> None:
    """Leave each rank its part."""
    split(networks.model, world)
    for copied in (networks.momentum, ema and ema.network):
        if copied is not None:
            split(copied, world, is_trained=False)


def _choose(config: Config, networks: Networks) -> tuple[list[Weight], set[str]]:
    """What adapters are for, and the names of what is frozen."""
    weights = find_weights(networks.model.network, networks.heads)
    targets: list[Weight] = []
    frozen = choose_frozen(weights, config.optim.freeze)
    if config.lora is not None:
        fresh = networks.heads.parameters()
        targets, frozen = choose_targets(weights, config.lora, frozen, fresh)
    return targets, {weight.name for weight in frozen}


def _freeze(config: Config, networks: Networks, still: set[str]) -> Frozen:
    """Hold what is never trained; the loop holds the rest for a while."""
    modules = (networks.model.network, networks.heads)
    chosen = [weight for weight in find_weights(*modules) if weight.name in still]
    frozen = Frozen(chosen, modules, config.optim.unfreeze_after_steps)
    if frozen.until is None:
        frozen.hold(0)
    return frozen


def _tell_share(weights: list[Weight], frozen: Frozen, adapters: Adapters) -> None:
    """A line says how much of the model is trained, if not all."""
    if not frozen.weights:
        return
    held = {id(weight.parameter) for weight in frozen.weights}
    learning = [w.parameter for w in adapters.replace(weights) if id(w.parameter) not in held]
    trained = sum(parameter.numel() for parameter in learning)
    total = sum(weight.parameter.numel() for weight in weights)
    logger.info(
        "trains %.2f%% of %d weights%s, %d; the others are frozen",
        100 * trained / total,
        total,
        f" for {frozen.until} steps" if frozen.until else "",
        trained,
    )


def _build_stream(
    config: Config, data: Data, model: Model, world: World, compile_towers: bool
) -> Stream:
    settings = config.data
    window = settings.shuffle_shards
    if window is None and data.train.is_remote:
        window = REMOTE_SHUFFLE_SHARDS
    transform = TrainTransform(model.transform, settings.crop_scale, settings.crop_ratio)
    return Stream(
        data.train,
        SampleSettings(
            transform,
            settings.caption_fields,
            settings.decoder == "exact",
            _view_transform(config, model),
            settings.label_field,
            settings.picture_field,
            any(getattr(objective, "positives", ()) for objective in config.objectives),
        ),
        model.tokenizer,
        OrderSettings(
            batch_size=settings.batch_size,
            seed=config.train.seed,
            last_batch=settings.last_batch,
            replacement=settings.replacement,
            shuffle_shards=window,
            bucket_batches=settings.bucket_batches,
        ),
        # Few distinct lengths where each is compiled for.
        text_multiple=(8 if compile_towers else 1) if model.can_cut_text else 0,
        world=world,
    )


def _view_transform(config: Config, model: Model) -> ViewTransform | None:
    """What makes the two views that self-supervision compares."""
    wanted = [o for o in config.objectives if isinstance(o, SelfSupervision)]
    if not wanted:
        return None
    scale = wanted[0].crop_scale  # all have the same
    return ViewTransform(TrainTransform(model.transform, scale, config.data.crop_ratio))


def _device(config: Config, world: World) -> torch.device:
    """One GPU for each process of a machine, as torchrun numbers them."""
    device = resolve_device(config.train.device)
    if device.type == "cuda" and world.size > 1:
        device = world.gpu
        torch.cuda.set_device(device)
    return device


def build_model(config: Config, vocabulary: Path | None = None) -> Model:
    """Fresh weights, or those of `model.pretrained`, in float32 and training mode."""
    source, architecture = config.model.pretrained, config.model.architecture
    if source is None:
        assert architecture is not None  # the configuration holds one of the two
        model = create(_with_vocabulary(architecture, vocabulary)).train()
        _load_parts(config.model, model)
        return model
    read = read_pretrained(source, architecture)
    for note in read.notes:
        logger.warning("model.pretrained: %s", note)
    return read.model.train().requires_grad_(True)


def _load_parts(config: ModelConfig, model: Model) -> None:
    """Weights from elsewhere for an ALBEF's tower or layers."""
    image, text = config.pretrained_image, config.pretrained_text
    if not (image or text):
        return
    if not isinstance(model.network, Albef):
        raise ConfigError(
            "model.pretrained_image and model.pretrained_text are for ALBEF architectures; name a"
            " whole model as model.pretrained"
        )
    if image:
        load_image_tower(model.network, Path(image))
    if text:
        load_bert(model.network, Path(text))


def _with_vocabulary(
    architecture: str | dict[str, Any], folder: Path | None
) -> str | dict[str, Any]:
    if folder is None:
        return architecture
    table = architecture_config(architecture) if isinstance(architecture, str) else architecture
    size = wordpiece.load(folder).vocab_size  # few captions may not give as many as asked for
    text = table["text_cfg"] | {"tokenizer_path": str(folder), "vocab_size": size}
    return table | {"text_cfg": text}


def _check_metrics(config: Config, data: Data) -> None:
    stages = ["", "reranked_"] if config.train.rerank else [""]
    known = [f"val/{stage}{name}" for stage in stages for name in RETRIEVAL_METRICS]
    wanted = {"train.best_metric": config.train.best_metric}
    if config.train.early_stop is not None:
        wanted["train.early_stop.metric"] = config.train.early_stop.metric
    for setting, metric in wanted.items():
        if data.val is not None and metric not in known:
            raise ConfigError(f"{setting} {metric!r} is not one of {', '.join(known)}")


def _check_rerank(config: Config, model: Model) -> None:
    if config.train.rerank and not model.has_fusion:
        raise ConfigError(
            f"train.rerank = {config.train.rerank} needs the fusion layers of an ALBEF, which this"
            " model lacks; set train.rerank = 0"
        )


def _use_compile(config: Config, device: torch.device, splits: bool) -> bool:
    """On a CPU only when asked for: there two text lengths of the tiny preset took 200 s to compile
    for a step that was a tenth faster (2 cores, 2026-11)."""
    wanted = config.train.compile
    if splits:
        return False
    compiler = shutil.which("g++") or shutil.which("clang++")
    if wanted == "on" and not compiler:
        raise ConfigError("train.compile = on needs a C++ compiler; install g++ or use off")
    if wanted == "auto" and device.type == "cuda" and not compiler:
        logger.warning("no C++ compiler here: the towers are not compiled, which is slower")
    return wanted == "on" or (wanted == "auto" and device.type == "cuda" and bool(compiler))
