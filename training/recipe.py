"""From a configuration to the things a run needs: model, data, optimizer, step count."""

import logging
import os
import shutil
from dataclasses import dataclass

import torch

from clipserve import checkpoint
from clipserve.config import Config
from clipserve.embed import computes_bf16, resolve_device
from clipserve.errors import ConfigError, DataError
from clipserve.images import TrainTransform
from clipserve.metrics import RETRIEVAL_METRICS
from clipserve.model import Model, create
from clipserve.shards import ShardSet
from clipserve.towers import architecture_config
from training.data import REMOTE_SHUFFLE_SHARDS, Data
from training.distributed import World
from training.optim import build_optimizer
from training.order import OrderSettings
from training.state import State
from training.streaming import SampleSettings, Stream

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """All that the loop works on."""

    config: Config
    state: State
    stream: Stream
    val: ShardSet | None
    device: torch.device
    autocast: bool
    compile: bool
    total_steps: int
    world: World


def prepare(config: Config, data: Data, world: World) -> Run:
    """Build and check everything; raises ClipserveError. Nothing is written."""
    device = _device(config, world)
    _check_best_metric(config, data)
    torch.manual_seed(config.train.seed)
    model = build_model(config).to(device)
    world.same_weights(model.network)
    compile_towers = _use_compile(config, device)
    stream = _build_stream(config, data, model, world, compile_towers)
    if not world.agrees(repr(stream.order.identity).encode()):
        raise DataError(
            "the processes of this run see different shards or settings; give all the same"
        )
    total_steps = config.train.steps or (
        (config.train.epochs or 0) * stream.order.batches_per_epoch
    )
    return Run(
        config=config,
        state=State(model, build_optimizer(model, config.optim), stream.order.identity),
        stream=stream,
        val=data.val,
        device=device,
        autocast=_use_bf16(config, device),
        compile=compile_towers,
        total_steps=total_steps,
        world=world,
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
        SampleSettings(transform, settings.caption_fields, settings.decoder == "exact"),
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


def _device(config: Config, world: World) -> torch.device:
    """One GPU for each process of a machine, as torchrun numbers them."""
    device = resolve_device(config.train.device)
    if device.type == "cuda" and world.size > 1:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    return device


def build_model(config: Config) -> Model:
    """Fresh weights, or those of `model.pretrained`, in float32 and training mode."""
    source, architecture = config.model.pretrained, config.model.architecture
    if source is None:
        assert architecture is not None  # the configuration holds one of the two
        return create(architecture).train()
    if not checkpoint.is_model_directory(source):
        raise ConfigError(
            f"model.pretrained = {source!r} is not a clipserve model directory;"
            " give the directory of a checkpoint"
        )
    model = checkpoint.load_for_training(source).train().requires_grad_(True)
    table = architecture_config(architecture) if isinstance(architecture, str) else architecture
    if table is not None and table != model.architecture:
        raise ConfigError(
            f"model.architecture is not that of model.pretrained = {source!r}; leave it out"
        )
    return model


def _check_best_metric(config: Config, data: Data) -> None:
    known = [f"val/{name}" for name in RETRIEVAL_METRICS]
    if data.val is not None and config.train.best_metric not in known:
        raise ConfigError(
            f"train.best_metric {config.train.best_metric!r} is not one of {', '.join(known)}"
        )


def _use_bf16(config: Config, device: torch.device) -> bool:
    wanted = config.train.precision
    if wanted == "auto":
        return computes_bf16(device)
    if wanted == "bf16" and not computes_bf16(device):
        logger.warning("train.precision = bf16, which this %s computes slowly", device.type)
    return wanted == "bf16"


def _use_compile(config: Config, device: torch.device) -> bool:
    """On a CPU only when asked for: there two text lengths of the tiny preset took 200 s to compile
    for a step that was a tenth faster (2 cores, 2026-11)."""
    wanted = config.train.compile
    compiler = shutil.which("g++") or shutil.which("clang++")
    if wanted == "on" and not compiler:
        raise ConfigError("train.compile = on needs a C++ compiler; install g++ or use off")
    if wanted == "auto" and device.type == "cuda" and not compiler:
        logger.warning("no C++ compiler here: the towers are not compiled, which is slower")
    return wanted == "on" or (wanted == "auto" and device.type == "cuda" and bool(compiler))
