"""What objectives need beside the model: momentum copy, queue, heads, teacher. See `build`; how a
batch goes through all of it is `plan`'s."""

import dataclasses
import logging
from typing import Any

import torch
from torch import Tensor, nn

from clipserve import checkpoint
from clipserve.config import Config
from clipserve.convert.fitting import fit_positions
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
from training.accumulate import MicroBatches, check_separable, draws
from training.distributed import World
from training.forward import Networks, blank
from training.momentum import FeatureQueue, Twin
from training.objectives.self_supervision import ImageSelfSupervision, build_method

logger = logging.getLogger(__name__)


def build(config: Config, model: Model, world: World) -> Networks:
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
    teacher = _load_teacher(config, model.device)
    networks = Networks(
        model=model,
        forward=model,
        heads=_build_heads(config, model, teacher, world).to(model.device),
        teacher=teacher,
    )
    momentum = find_momentum(config.objectives)
    if momentum is None:
        return networks
    source = config.model.pretrained
    is_ours = source is not None and checkpoint.is_model_directory(source)
    remembered = checkpoint.load_momentum(source) if source and is_ours else None
    return _add_momentum(networks, momentum, remembered)


def plan(config: Config, networks: Networks, compile_towers: bool) -> Networks:
    """How a batch goes through them: compiled, in parts, keeping activations or not.

    What is frozen for good is in evaluation mode already, where it draws nothing.
    """
    model, momentum = networks.model, networks.momentum
    if config.train.grad_checkpointing:
        model.network.set_grad_checkpointing()
    networks = dataclasses.replace(networks, parts=_plan_parts(config, model))
    if not compile_towers or networks.parts.draws:
        return networks
    return dataclasses.replace(
        networks,
        forward=torch.compile(model),
        momentum_forward=torch.compile(momentum) if momentum is not None else None,
    )


def _plan_parts(config: Config, model: Model) -> MicroBatches:
    """What is compiled draws random numbers of its own."""
    number = config.train.accum_freq
    if number == 1:
        return MicroBatches()
    check_separable(model.network, thaws=config.optim.unfreeze_after_steps is not None)
    if not draws(model, *blank(model)):
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
    remembered: dict[str, Tensor] | None,
) -> Networks:
    model = networks.model
    twin = Twin(model.network, settings.momentum)
    copied = Model(twin.network, model.architecture, model.transform, model.tokenizer, model.info)
    queue = FeatureQueue(settings.queue_size, model.embed_dim, num_groups=3)
    if remembered:
        _recall(twin, queue, remembered, model.architecture)
    return dataclasses.replace(
        networks,
        momentum=copied,
        momentum_forward=copied,
        twin=twin,
        queue=queue.to(model.device),
    )


def _recall(
    twin: Twin, queue: FeatureQueue, remembered: dict[str, Tensor], table: dict[str, Any]
) -> None:
    """Go on with the momentum weights and queues that a model directory was imported with, of the
    sizes that the run's architecture, `table`, has."""
    weights = {k.removeprefix("twin."): v for k, v in remembered.items() if k.startswith("twin.")}
    own = twin.network.state_dict()
    fit_positions(weights, own, table)
    # ALBEF has no copy of these two.
    missing = [
        name
        for name in own.keys() - weights.keys()
        if not name.startswith(("matching_head.", "logit_scale"))
    ]
    unknown = [
        name for name in weights if name not in own or weights[name].shape != own[name].shape
    ]
    if missing or unknown:
        raise CheckpointError(
            f"the momentum weights of model.pretrained do not fit: {len(missing)} are missing and"
            f" {len(unknown)} unknown, or of another size; import the checkpoint again"
        )
    twin.network.load_state_dict(weights, strict=False)
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
    nobody = torch.iinfo(torch.int64).min + torch.arange(queue.size)
    queue.stored_groups.copy_(nobody[:, None])
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
