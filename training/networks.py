"""What objectives need beside the model: momentum copy, queue, heads, teacher. See `build`."""

import dataclasses
import logging

import torch
from torch import Tensor, nn

from clipserve import checkpoint
from clipserve.config import Config
from clipserve.embed import prepare as prepare_for_inference
from clipserve.errors import CheckpointError, ConfigError
from clipserve.model import Model
from clipserve.objectives import (
    Agreement,
    Distillation,
    MomentumContrast,
    SimCLR,
    check_against_architecture,
    find_momentum,
)
from clipserve.towers import trunk_features
from training.accumulate import MicroBatches, draws
from training.distributed import World
from training.forward import Networks, blank
from training.momentum import FeatureQueue, Twin
from training.objectives.self_supervision import ImageSelfSupervision, build_method

logger = logging.getLogger(__name__)


def build(config: Config, model: Model, world: World, compile_towers: bool) -> Networks:
    """All networks of a run, on the model's device. Raises ClipserveError if they do not fit."""
    try:
        check_against_architecture(
            config.objectives,
            has_fusion=model.has_fusion,
            has_token_head=getattr(model.network, "token_head", None) is not None,
            has_bias=model.logit_bias is not None,
            has_decoder=model.has_decoder,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if config.train.grad_checkpointing:
        model.network.set_grad_checkpointing()
    parts = _plan_parts(config, model)
    compile_towers = compile_towers and not parts.draws
    teacher = _load_teacher(config, model.device)
    networks = Networks(
        model=model,
        forward=torch.compile(model) if compile_towers else model,
        heads=_build_heads(config, model, teacher, world).to(model.device),
        teacher=teacher,
        parts=parts,
    )
    momentum = find_momentum(config.objectives)
    if momentum is None:
        return networks
    source = config.model.pretrained
    is_ours = source is not None and checkpoint.is_model_directory(source)
    remembered = checkpoint.load_momentum(source) if source and is_ours else None
    return _add_momentum(networks, momentum, compile_towers, remembered)


def _plan_parts(config: Config, model: Model) -> MicroBatches:
    """How a batch goes through the networks. What is compiled draws random numbers of its own."""
    number = config.train.accum_freq
    if number == 1 or not draws(model, *blank(model)):
        return MicroBatches(number)
    if config.train.compile == "on":
        raise ConfigError(
            f"train.accum_freq = {number} draws the random numbers of this model's dropout as the"
            " whole batch would, which torch.compile prevents; set train.compile = off, or leave"
            " the dropout out"
        )
    return MicroBatches(number, draws=True)


def _add_momentum(
    networks: Networks,
    settings: MomentumContrast,
    compiled: bool,
    remembered: dict[str, Tensor] | None,
) -> Networks:
    model = networks.model
    twin = Twin(model.network, settings.momentum)
    copied = Model(twin.network, model.architecture, model.transform, model.tokenizer, model.info)
    queue = FeatureQueue(settings.queue_size, model.embed_dim, num_groups=3)
    if remembered:
        _recall(twin, queue, remembered)
    return dataclasses.replace(
        networks,
        momentum=copied,
        momentum_forward=torch.compile(copied) if compiled else copied,
        twin=twin,
        queue=queue.to(model.device),
    )


def _recall(twin: Twin, queue: FeatureQueue, remembered: dict[str, Tensor]) -> None:
    """Go on with the momentum weights and queues that a model directory was imported with."""
    weights = {k.removeprefix("twin."): v for k, v in remembered.items() if k.startswith("twin.")}
    found = twin.network.load_state_dict(weights, strict=False)
    # ALBEF has no copy of these two.
    missing = [n for n in found.missing_keys if not n.startswith(("matching_head.", "logit_scale"))]
    if missing or found.unexpected_keys:
        raise CheckpointError(
            f"the momentum weights of model.pretrained do not fit: {len(missing)} are missing and"
            f" {len(found.unexpected_keys)} unknown; import the checkpoint again"
        )
    images, texts = remembered.get("queue.image"), remembered.get("queue.text")
    if images is None or texts is None:
        return
    if images.shape != queue.stored_image.shape:
        logger.warning(
            "the queue of model.pretrained holds %d pairs and is left out; queue_size = %d begins"
            " empty",
            len(images),
            queue.size,
        )
        return
    queue.stored_image.copy_(images)
    queue.stored_text.copy_(texts)
    # Of which pictures they were is not known here: numbers that no sample has.
    unknown = torch.iinfo(torch.int64).min + torch.arange(queue.size)
    queue.stored_groups.copy_(unknown[:, None])
    queue.pushed = queue.size + int(remembered["queue.cursor"])


def _load_teacher(config: Config, device: torch.device) -> Model | None:
    wanted = next((o for o in config.objectives if isinstance(o, Distillation)), None)
    if wanted is None:
        return None
    if not checkpoint.is_model_directory(wanted.teacher):
        raise ConfigError(f"distill: teacher = {wanted.teacher!r} is not a model directory")
    return prepare_for_inference(checkpoint.load_for_training(wanted.teacher), str(device))


def method_of(objective: SimCLR | Agreement) -> ImageSelfSupervision:
    """The head and the loss that a configuration means."""
    temperature = objective.temperature if isinstance(objective, SimCLR) else 0.1
    return build_method(objective.name, temperature)


@torch.no_grad()
def _trunk_size(model: Model) -> int:
    """F of what self-supervision sees; without a trace in running statistics."""
    visual, pixels = model.network.visual, torch.zeros(1, 3, *model.transform.size)
    was_training = visual.training
    size = trunk_features(visual.eval(), pixels.to(model.device)).shape[1]
    visual.train(was_training)
    return int(size)


def _build_heads(
    config: Config, model: Model, teacher: Model | None, world: World
) -> nn.ModuleDict:
    heads = nn.ModuleDict()
    for objective in config.objectives:
        if isinstance(objective, SimCLR | Agreement):
            heads[objective.name] = method_of(objective).build_head(
                _trunk_size(model), objective.hidden_size, objective.output_size, world
            )
        differs = teacher is not None and teacher.embed_dim != model.embed_dim
        if isinstance(objective, Distillation) and objective.features and differs:
            assert teacher is not None
            heads["distill_image"] = nn.Linear(model.embed_dim, teacher.embed_dim)
            heads["distill_text"] = nn.Linear(model.embed_dim, teacher.embed_dim)
    return heads
