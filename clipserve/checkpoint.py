"""The model directory: the one artefact that training writes and everything else loads.

    clipserve.json               the description, the sha256 of every other file, and its own
    open_clip_config.json        \\ as open_clip.create_model_and_transforms("local-dir:DIR")
    open_clip_model.safetensors  /  expects them
    tokenizer/                   only what no package ships
    README.md                    a model card made from the above

An ALBEF, which open_clip cannot build, has instead of the two open_clip files

    towers.safetensors           both towers, their projections, the temperature
    fusion.safetensors           the layers that see text and picture, and their heads
    momentum.safetensors         if it was imported with them: momentum weights and queues

Safetensors and JSON only. Start at `save` and `load`. The fingerprint is a digest of what decides
the vectors (weights, architecture, image transform, tokenizer): two directories with one
fingerprint embed alike, whatever their metrics and dates say.
"""

import hashlib
import json
import platform
import tempfile
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn import init
from torch.overrides import TorchFunctionMode

from clipserve import __version__
from clipserve.errors import CheckpointError, ConfigError
from clipserve.files import digest_tensors, new_directory, save_tensors, sha256
from clipserve.images import ImageTransform
from clipserve.model import Model, ModelInfo, assemble
from clipserve.text import Tokenizer
from clipserve.towers import build_network

FORMAT_VERSION = 1
MANIFEST = "clipserve.json"
WEIGHTS = "open_clip_model.safetensors"
OPEN_CLIP_CONFIG = "open_clip_config.json"
TOWERS = "towers.safetensors"
FUSION = "fusion.safetensors"
MOMENTUM = "momentum.safetensors"
_FUSION_PARTS = ("fusion.", "matching_head.", "token_head.")
_METADATA = {"format": "pt"}
_PACKAGES = ("torch", "torchvision", "open_clip_torch", "transformers", "safetensors")


def save(
    model: Model,
    directory: Path,
    *,
    name: str,
    objective: tuple[str, ...] = (),
    training: dict[str, Any] | None = None,
    data_fingerprint: str | None = None,
    momentum: Mapping[str, Tensor] | None = None,
) -> str:
    """Write a model directory, whole or not at all; returns its fingerprint.

    An existing directory of that name is replaced at the end. `momentum` is what
    `clipserve.convert` found beside the weights; it is no part of the fingerprint.
    """
    with new_directory(directory) as folder:
        return write_into(
            folder,
            model,
            name=name,
            objective=objective,
            training=training,
            data_fingerprint=data_fingerprint,
            momentum=momentum,
        )


def write_into(
    folder: Path,
    model: Model,
    *,
    name: str,
    objective: tuple[str, ...] = (),
    training: dict[str, Any] | None = None,
    data_fingerprint: str | None = None,
    momentum: Mapping[str, Tensor] | None = None,
) -> str:
    """Write the files of a model directory into an empty folder that the caller makes durable."""
    for file, tensors in _weights(model).items():
        save_tensors(tensors, folder / file, _METADATA)
    if momentum is not None:
        save_tensors(momentum, folder / MOMENTUM)
    transform = model.transform.to_open_clip()
    if not model.has_fusion:
        config = {"model_cfg": model.architecture, "preprocess_cfg": transform}
        (folder / OPEN_CLIP_CONFIG).write_text(_canonical(config))
    model.tokenizer.save(folder / "tokenizer")
    description: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "name": name,
        "architecture": model.architecture,
        "image_transform": transform,
        "objective": list(objective),
        "training": training or {},
        "data_fingerprint": data_fingerprint,
        "versions": _versions(),
    }
    description["fingerprint"] = _fingerprint(description, _hash_files(folder))
    (folder / "README.md").write_text(_model_card(description))
    description["files"] = _hash_files(folder)
    description["checksum"] = _checksum(description)
    (folder / MANIFEST).write_text(_canonical(description))
    return str(description["fingerprint"])


def fingerprint(model: Model) -> str:
    """What a directory of this model would have; its weights are not written for that."""
    with tempfile.TemporaryDirectory() as folder:
        model.tokenizer.save(Path(folder) / "tokenizer")
        files = _hash_files(Path(folder))
    for file, tensors in _weights(model).items():
        files[file] = digest_tensors(tensors, _METADATA)
    transform = model.transform.to_open_clip()
    return _fingerprint({"architecture": model.architecture, "image_transform": transform}, files)


def load(
    path: str | Path,
    device: str = "auto",
    dtype: str = "auto",
    *,
    verify: bool = True,
) -> Model:
    """Load a model directory for inference.

    device: "auto" (a GPU if there is one), "cpu", "cuda", "cuda:1"; dtype: "auto" (bf16 where the
    device is faster in it, see `clipserve.embed`), "fp32", "bf16", "int8". `verify` checks every
    file's sha256 first. Raises CheckpointError for a missing, damaged or newer directory, and
    ConfigError for a device or dtype that is not to be had here.
    """
    from clipserve.embed import prepare

    model = load_for_training(path, verify=verify)
    return prepare(model, device, dtype)


def load_for_training(path: str | Path, *, verify: bool = True) -> Model:
    """The model in float32 on the CPU, as it was saved."""
    directory = pin(path)
    description = read_description(directory)
    if verify:
        _check_files(directory, description)
    architecture = description["architecture"]
    folder = directory / "tokenizer"
    try:
        transform = ImageTransform.from_open_clip(description["image_transform"])
        network = _load_network(architecture, directory)
        tokenizer = Tokenizer(architecture["text_cfg"], folder if folder.is_dir() else None)
    except ConfigError as error:
        raise CheckpointError(f"{directory / MANIFEST}: {error}") from error
    info = ModelInfo(
        name=description["name"],
        fingerprint=description["fingerprint"],
        objective=tuple(description["objective"]),
        training=description["training"],
    )
    return assemble(network, architecture, transform, tokenizer, info)


def load_momentum(path: str | Path) -> dict[str, Tensor] | None:
    """What `momentum.safetensors` of a model directory holds; None if there is none."""
    directory = pin(path)
    described = MOMENTUM in read_description(directory)["files"]
    return _load_tensors(directory / MOMENTUM) if described else None


def verify(path: str | Path) -> dict[str, Any]:
    """Check every byte of a model directory; returns its description or raises CheckpointError."""
    directory = pin(path)
    description = read_description(directory)
    _check_files(directory, description)
    return description


def pin(path: str | Path) -> Path:
    """Where a link such as a run's `best` leads now, to read all files from there: it may move to
    another checkpoint meanwhile. A path without links stays as it was given."""
    given = Path(path)
    resolved = given.resolve()
    return given if resolved == given.absolute() else resolved


def is_model_directory(path: str | Path) -> bool:
    """Whether `path` looks like one; says nothing about its health."""
    return (Path(path) / MANIFEST).is_file()


def point_into_run(directory: Path) -> str:
    """What is added to a refusal of the directory of a training run, which holds models."""
    latest = directory / "latest"
    return f"; it is a training run: name its model {latest}" if is_model_directory(latest) else ""


def read_description(directory: Path) -> dict[str, Any]:
    """clipserve.json, checked against itself; reads no other file."""
    file = directory / MANIFEST
    try:
        text = file.read_text(encoding="utf-8")
        description = json.loads(text)
    except FileNotFoundError:
        raise CheckpointError(
            f"{directory} is not a model directory: it has no {MANIFEST}{point_into_run(directory)}"
        ) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} is damaged or unreadable: {error}") from None
    found = description.get("format_version") if isinstance(description, dict) else None
    if isinstance(found, int) and found > FORMAT_VERSION:
        raise CheckpointError(
            f"{file} has format {found}; this clipserve {__version__} reads up to"
            f" {FORMAT_VERSION}: install a newer clipserve"
        )
    is_as_saved = (
        found == FORMAT_VERSION
        and text == _canonical(description)
        and description.get("checksum") == _checksum(description)
    )
    if not is_as_saved:
        raise CheckpointError(f"{file} was changed after it was written: it is not as saved")
    assert isinstance(description, dict)
    return description


def _check_files(directory: Path, description: dict[str, Any]) -> None:
    for name, expected in description["files"].items():
        try:
            found = sha256(directory / name)
        except OSError as error:
            raise CheckpointError(f"{directory / name}: {error.strerror}") from None
        if found != expected:
            raise CheckpointError(
                f"{directory / name} is damaged: its sha256 is {found[:12]}..., not the"
                f" {expected[:12]}... it was saved with; restore it or use another checkpoint"
            )


def _weights(model: Model) -> dict[str, dict[str, Tensor]]:
    """The network's tensors, by the file that they go to."""
    tensors: dict[str, Tensor] = model.network.state_dict()
    if not model.has_fusion:
        return {WEIGHTS: tensors}
    fusion = {k: v for k, v in tensors.items() if k.startswith(_FUSION_PARTS)}
    return {TOWERS: {k: v for k, v in tensors.items() if k not in fusion}, FUSION: fusion}


def _weight_files(architecture: dict[str, Any]) -> tuple[str, ...]:
    return (TOWERS, FUSION) if "fusion_cfg" in architecture else (WEIGHTS,)


def _load_tensors(file: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors: dict[str, Tensor] = load_file(file)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from None
    return tensors


def _load_network(architecture: dict[str, Any], directory: Path) -> nn.Module:
    files = [directory / name for name in _weight_files(architecture)]
    tensors = {name: tensor for file in files for name, tensor in _load_tensors(file).items()}
    with _NoRandomInit():
        network = build_network(architecture)
    try:
        network.load_state_dict(tensors, assign=True)
    except RuntimeError as error:
        first = str(error).splitlines()[1:2] or [str(error)]
        raise CheckpointError(
            f"{' and '.join(map(str, files))} does not fit its architecture: {first[0].strip()}"
        ) from None
    return network.eval()


_RANDOM_INITS = (init.normal_, init.uniform_, init.kaiming_uniform_, init.xavier_uniform_)


class _NoRandomInit(TorchFunctionMode):
    """Leaves out the random numbers that loading would overwrite, most of the time it takes.

    Not the meta device, which does the same: its first use imports torch's compiler, two seconds.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in (Tensor.normal_, Tensor.uniform_):
            return args[0]
        if func in _RANDOM_INITS:  # which would call those two with this mode off
            return kwargs["tensor"] if kwargs and "tensor" in kwargs else args[0]
        return func(*args, **(kwargs or {}))


def _fingerprint(description: dict[str, Any], files: dict[str, str]) -> str:
    weights = _weight_files(description["architecture"])
    deciding = {
        "architecture": description.get("architecture"),
        "image_transform": description.get("image_transform"),
        "files": {
            name: digest
            for name, digest in files.items()
            if name in weights or name.startswith("tokenizer/")
        },
    }
    return hashlib.sha256(_canonical(deciding).encode()).hexdigest()


def _checksum(description: dict[str, Any]) -> str:
    rest = {key: value for key, value in description.items() if key != "checksum"}
    return hashlib.sha256(_canonical(rest).encode()).hexdigest()


def _hash_files(folder: Path) -> dict[str, str]:
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {file.relative_to(folder).as_posix(): sha256(file) for file in files}


def _canonical(value: object) -> str:
    """One spelling per value, so that any changed byte shows."""
    return json.dumps(value, indent=2, sort_keys=True, ensure_ascii=True) + "\n"


def _versions() -> dict[str, str]:
    found = {"clipserve": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _model_card(description: dict[str, Any]) -> str:
    training = description["training"]
    more = _FUSION_CARD if "fusion_cfg" in description["architecture"] else _OPEN_CLIP_CARD
    metrics = "\n".join(
        f"| {key} | {value:.4g} |" if isinstance(value, float) else f"| {key} | {value} |"
        for key, value in sorted(training.items())
        if isinstance(value, int | float | str)
    )
    return f"""# {description["name"]}

An image-text model trained with clipserve.

- fingerprint: `{description["fingerprint"]}`
- objective: {", ".join(description["objective"]) or "unknown"}
- data: `{description["data_fingerprint"] or "unknown"}`

| of its training | |
|---|---|
{metrics}

```python
import clipserve

model = clipserve.load("THIS_DIRECTORY")
model.embed_images(["picture.jpg"])
model.zero_shot(["cat", "dog"]).classify(["picture.jpg"])
```

{more}
"""


_OPEN_CLIP_CARD = (
    "open_clip reads it as well:"
    ' `open_clip.create_model_and_transforms("local-dir:THIS_DIRECTORY")`.'
)
_FUSION_CARD = (
    "It is an ALBEF, which reads a text with a picture in view:"
    ' `model.match(["picture.jpg"], ["a cat"])` is how likely the two belong together.'
)
