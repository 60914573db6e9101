"""The tensors of a checkpoint's state/: what each rank has whole, and what is split over the ranks.

    NAME.safetensors                        what every rank has; rank 0 writes it
    NAME/shard-00002-model-...safetensors   the second rank's parts of what is split (torch's
                                            distributed checkpoint, in its safetensors format)

A file says which part of a tensor it holds, so any number of ranks can read what any other wrote.
Start at `write` and `read`.
"""

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clipserve.errors import TrainingError
from clipserve.files import save_tensors
from training.distributed import World, is_split, together
from training.fsdp import place

Like = Callable[[str], Tensor | None]


def write(folder: Path, name: str, tensors: Mapping[str, Tensor], world: World) -> None:
    """Every rank calls it with the same names. OSError where this or another rank cannot write."""
    parts = {key: tensor for key, tensor in tensors.items() if is_split(tensor)}
    if world.is_main:
        whole = {key: tensor for key, tensor in tensors.items() if key not in parts}
        save_tensors(whole, folder / f"{name}.safetensors")
    if parts:
        _write_parts(folder / name, parts)


def read(folder: Path, name: str, like: Like) -> dict[str, Tensor]:
    """All tensors, each split as that which `like` gives for its name, whole if that gives none.

    No rank has to wait for another. ValueError if parts are of another size.
    """
    from safetensors.torch import load_file

    found: dict[str, Tensor] = load_file(folder / f"{name}.safetensors")
    for key, tensor in found.items():
        target = like(key)
        if target is not None and target.shape == tensor.shape:
            found[key] = place(tensor, target)
    if (folder / name).is_dir():
        found |= _read_parts(folder / name, like)
    return found


def _write_parts(folder: Path, parts: Mapping[str, Tensor]) -> None:
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    try:
        with together():
            save(dict(parts), storage_writer=writer)
    except CheckpointException as error:
        rank, (reason, _) = next(iter(error.failures.items()))
        if isinstance(reason, OSError):
            raise OSError(
                reason.errno, f"{reason.strerror} (process {rank})", str(folder)
            ) from None
        raise TrainingError(f"process {rank} could not write {folder}: {reason}") from error


def _read_parts(folder: Path, like: Like) -> dict[str, Tensor]:
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import load

    described = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    found: dict[str, Any] = {}
    for key, tensor in described.items():
        assert isinstance(tensor, TensorStorageMetadata)
        target = like(key)
        if target is not None and target.shape != tensor.size:
            raise ValueError(f"{key} has {tuple(tensor.size)} there")
        found[key] = (
            torch.empty(tensor.size, dtype=tensor.properties.dtype)
            if target is None
            else torch.empty_like(target, dtype=tensor.properties.dtype).detach()
        )
    with warnings.catch_warnings():  # torch wonders whether one process was meant: yes
        warnings.simplefilter("ignore", UserWarning)
        load(found, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)
    return found
