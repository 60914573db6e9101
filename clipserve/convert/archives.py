"""OpenAI's files: TorchScript archives, read for their tensors alone.

Such an archive is a zip with a pickle of the module tree, which torch.load refuses to read without
trusting it, and code, which torch.jit.load compiles. Here the pickle is read by an unpickler that
knows four harmless functions and puts an empty object in place of every class; the code is not
looked at.
"""

import collections
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clipserve.errors import CheckpointError

_NO_WEIGHTS = {"input_resolution", "context_length", "vocab_size", "attn_mask"}
"""what OpenAI's archives hold beside weights"""


def is_archive(file: Path) -> bool:
    """Whether it is TorchScript's, by the names in it."""
    if not zipfile.is_zipfile(file):
        return False
    with zipfile.ZipFile(file) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def read_archive(file: Path) -> dict[str, Tensor]:
    """Its parameters and buffers, under the names that they have in the module. CheckpointError."""
    try:
        with zipfile.ZipFile(file) as archive:
            root = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
            with archive.open(root) as content:
                tree = _TensorUnpickler(content, archive, root.removesuffix("data.pkl")).load()
    except (OSError, zipfile.BadZipFile, StopIteration, *_UNPICKLING_ERRORS) as error:
        raise CheckpointError(
            f"{file} cannot be read as one of OpenAI's TorchScript archives ({error}); fetch it"
            " again, or save its state_dict() as a file of weights and name its architecture"
        ) from None
    tensors = dict(_tensors_of(tree, ""))
    if not tensors:
        raise CheckpointError(f"{file} holds no tensors")
    return tensors


_UNPICKLING_ERRORS = (
    pickle.UnpicklingError,
    RuntimeError,
    ValueError,
    TypeError,
    KeyError,
    AttributeError,
    IndexError,
    EOFError,
)


class _Part:
    """What stands for a module, or anything else that has attributes."""


class _TensorUnpickler(pickle.Unpickler):
    def __init__(self, content: Any, archive: zipfile.ZipFile, root: str) -> None:
        super().__init__(content)
        self._archive, self._root = archive, root

    def find_class(self, module: str, name: str) -> Any:
        if module == "__torch__" or module.startswith("__torch__."):
            return _Part
        if module == "torch" and name.endswith("Storage"):
            return name
        if (module, name) in _KNOWN:
            return _KNOWN[module, name]
        if module == "torch.jit._pickle":
            return _as_it_is
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no weights need")

    def persistent_load(self, saved: Any) -> Any:
        _, kind, key, *_ = saved
        data = bytearray(self._archive.read(f"{self._root}data/{key}"))
        storage = torch.frombuffer(data, dtype=torch.uint8).untyped_storage()
        return torch.storage.TypedStorage(  # type: ignore[no-untyped-call]
            wrap_storage=storage, dtype=_DTYPES[kind], _internal=True
        )


def _as_it_is(value: Any, *_: Any) -> Any:
    return value


_KNOWN = {
    ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
    ("collections", "OrderedDict"): collections.OrderedDict,
}
_DTYPES = {
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "BoolStorage": torch.bool,
}


def _tensors_of(part: Any, prefix: str) -> Any:
    for name, value in vars(part).items() if isinstance(part, _Part) else ():
        if isinstance(value, Tensor) and name not in _NO_WEIGHTS:
            yield prefix + name, value
        elif isinstance(value, _Part):
            yield from _tensors_of(value, f"{prefix}{name}.")
