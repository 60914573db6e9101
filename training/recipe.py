"""From a configuration to the things a run needs: model, data, optimizer, step count."""

import logging
import shutil
from dataclasses import dataclass
from pathlib import Path

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
from training.optim import build_optimizer
from training.state import Order
from training.streaming import Stream

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """All that the loop works on."""

    config: Config
    model: Model
    stream: Stream
    val: ShardSet | None
    optimizer: torch.optim.AdamW
    device: torch.device
    autocast: bool
    compile: bool
    total_steps: int

    @property
    def order(self) -> Order:
        """What the order of samples depends on."""
        fingerprint = self.stream.shards.manifest.fingerprint
        return Order(fingerprint, self.stream.batch_size, self.stream.seed)


def prepare(config: Config) -> Run:
    """Build and check everything; raises ClipserveError before anything is written."""
    device = resolve_device(config.train.device)
    torch.manual_seed(config.train.seed)
    model = build_model(config).to(device)
    train = ShardSet.open(Path(config.data.train))
    val = _open_val(config)
    compile_towers = _use_compile(config, device)
    stream = Stream(
        train,
        TrainTransform(model.transform, config.data.crop_scale, config.data.crop_ratio),
        model.tokenizer,
        batch_size=config.data.batch_size,
        seed=config.train.seed,
        # Few distinct lengths where each is compiled for.
        text_multiple=(8 if compile_towers else 1) if model.can_cut_text else 0,
    )
    total_steps = config.train.steps or (config.train.epochs or 0) * stream.batches_per_epoch
    return Run(
        config=config,
        model=model,
        stream=stream,
        val=val,
        optimizer=build_optimizer(model, config.optim),
        device=device,
        autocast=_use_bf16(config, device),
        compile=compile_towers,
        total_steps=total_steps,
    )


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


def _open_val(config: Config) -> ShardSet | None:
    if config.data.val is None:
        return None
    known = [f"val/{name}" for name in RETRIEVAL_METRICS]
    if config.train.best_metric not in known:
        raise ConfigError(
            f"train.best_metric {config.train.best_metric!r} is not one of {', '.join(known)}"
        )
    val = ShardSet.open(Path(config.data.val))
    if not len(val):
        raise DataError(f"data.val = {config.data.val!r} holds no samples; leave it out or fill it")
    return val


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
