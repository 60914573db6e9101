"""Weights split over the processes of a run: torch's FSDP2 (`train.sharding = "fsdp"`).

Each rank keeps its rows of every weight, of its moments and of its average; a layer is whole only
while it computes. The shares of the loss add up over the ranks, so gradients are summed, where
torch would take their mean. Scalars, such as the logit scale, stay whole: torch splits none. Start
at `split`.
"""

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from clipserve.config import Config
from clipserve.errors import ConfigError
from training.distributed import World, is_split, together
from training.parts import is_layer

_OBJECTIVES = ("contrastive", "sigmoid", "momentum_contrast", "distill", "captioning")


def check(config: Config) -> None:
    """Raises ConfigError for what does not go together with split weights."""
    if config.train.sharding == "none":
        return
    with_ours = "train.sharding = fsdp"
    others = [o.name for o in config.objectives if o.name not in _OBJECTIVES]
    if others:
        raise ConfigError(
            f"{with_ours} does not go with the objective {others[0]}, which asks for layers one by"
            f" one; it goes with {', '.join(_OBJECTIVES)}; set train.sharding = none"
        )
    if config.lora is not None:
        raise ConfigError(f"{with_ours} does not go with [lora]; leave one of them out")
    if config.optim.name != "adamw":
        raise ConfigError(
            f"{with_ours} goes with optim.name = adamw, not {config.optim.name}; set one of them"
        )
    if config.train.compile == "on":
        raise ConfigError(f"{with_ours} does not go with train.compile = on; set it to off")


def split(root: nn.Module, world: World, *, is_trained: bool = True) -> None:
    """Leave this rank its part of all weights, layer by layer, in place.

    The parameters are other objects afterwards. What is not trained is split again after each
    forward pass.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard

    mesh = init_device_mesh(next(root.parameters()).device.type, (world.size,))
    layers = [module for name, module in root.named_modules() if is_layer(name)]
    for layer in reversed(layers):  # inner ones first
        fully_shard(layer, mesh=mesh)
    scalars = {parameter for parameter in root.parameters() if not parameter.ndim}
    fully_shard(root, mesh=mesh, reshard_after_forward=not is_trained, ignored_params=scalars)
    for module in root.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def skeleton(network: nn.Module) -> nn.Module:
    """A copy without weights, for `gather` to fill: what is split cannot be copied any more."""
    hollow = {id(p): nn.Parameter(p.detach().to("meta"), False) for p in network.parameters()}
    return copy.deepcopy(network, hollow)


def gather(network: nn.Module, skeleton: nn.Module) -> nn.Module:
    """The network with all its weights; every rank has to ask at once."""
    with together():
        whole = {name: _whole(tensor) for name, tensor in network.state_dict().items()}
    filled = copy.deepcopy(skeleton)
    filled.load_state_dict(whole, assign=True)
    return filled


def own_part(tensor: Any) -> Tensor:
    """This rank's part, or a whole tensor itself; to be written to."""
    part: Tensor = tensor.to_local() if is_split(tensor) else tensor
    return part


def place(whole: Tensor, like: Any) -> Tensor:
    """A tensor that this rank has all of, split as `like` is."""
    if not is_split(like):
        return whole
    from torch.distributed.tensor import distribute_tensor

    on_device = whole.to(like.device)
    return distribute_tensor(on_device, like.device_mesh, like.placements, src_data_rank=None)


def gradient_norm(parameters: Iterable[nn.Parameter], world: World) -> Tensor:
    """Of all gradients over all ranks, as one vector."""
    parts, whole = _gradients(parameters)
    norm = torch.nn.utils.get_total_norm(whole)
    if parts:
        own = torch.nn.utils.get_total_norm(parts)
        norm = (world.total(own.square()) + norm.to(own.device).square()).sqrt()
    return norm


def clip_gradients(parameters: Iterable[nn.Parameter], limit: float, norm: Tensor) -> None:
    """Scale gradients of that `norm` down to `limit`."""
    scale_gradients(parameters, (limit / (norm + 1e-6)).clamp(max=1))


def scale_gradients(parameters: Iterable[nn.Parameter], factor: Tensor | float) -> None:
    for gradients in filter(None, _gradients(parameters)):
        torch._foreach_mul_(gradients, factor)


def _gradients(parameters: Iterable[nn.Parameter]) -> tuple[list[Tensor], list[Tensor]]:
    """This rank's parts of those that are split, and those that are whole."""
    found = [p.grad for p in parameters if p.grad is not None]
    split_ones = [own_part(gradient) for gradient in found if is_split(gradient)]
    return split_ones, [gradient for gradient in found if not is_split(gradient)]


def _whole(tensor: Any) -> Tensor:
    found: Tensor = tensor.full_tensor() if is_split(tensor) else tensor.clone()
    return found.detach()
