"""What a training run is told: frozen, typed, validated at birth.

One path: preset -> TOML file -> `section.key=value` overrides -> a frozen `Config`, which is passed
as an argument and never looked up or written to. Start at `load_config`. The string under each
field says its unit and meaning; `clipserve train --help-config` prints them.
"""

import difflib
import tomllib
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from clipserve.errors import ConfigError

Beta = Annotated[float, Field(ge=0, lt=1)]
Weight = Annotated[float, Field(gt=0)]


class _Section(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )


class ModelConfig(_Section):
    """Which network is trained, and from which weights."""

    preset: str | None = None
    """a table of defaults shipped with clipserve (`tiny`, `clip_vit_b32`) for any section"""
    architecture: str | dict[str, Any] | None = None
    """an open_clip architecture by name (`ViT-B-32`), or its configuration as an inline table"""
    pretrained: str | None = None
    """clipserve model directory to start from; an architecture given as well must be its own"""


class TrainData(_Section):
    """One of the sets to train on."""

    path: Annotated[str, Field(min_length=1)]
    """shards (folder, .tar, `{000..099}.tar`, https, s3, gs, `pipe:`), or a source to pack"""
    weight: Weight = 1.0
    """passes over it in one epoch: 2 shows each sample twice, 0.5 every other epoch"""


def _as_list(value: object) -> object:
    """A path alone, or a list in which paths may stand alone."""
    items = value if isinstance(value, list | tuple) else [value]
    return [{"path": item} if isinstance(item, str) else item for item in items]


class DataConfig(_Section):
    """Where the captioned pictures come from, and how a batch is made of them."""

    train: Annotated[tuple[TrainData, ...], BeforeValidator(_as_list)]
    """what to train on: shards, or a source that `clipserve pack` reads; or a list of several"""
    val: str | None = None
    """shards or a source to measure retrieval on, never trained on"""
    val_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """instead of `val`: the part of a train source, not of shards, that is held out"""
    image_column: str | None = None
    """of a source: the column with the picture's path, bytes or URL"""
    caption_column: str | None = None
    """of a source: the column with the caption"""
    caption_template: str | None = None
    """of a source: a caption made of columns, "{title}, {colour}" """
    caption_fields: Annotated[dict[str, Weight], Field(min_length=1)] | None = None
    """of shards: JSON fields to draw the caption from, with weights; `caption` is the packed one"""
    batch_size: Annotated[int, Field(ge=2)] = 256
    """pairs in one optimizer step, over all processes"""
    last_batch: Literal["drop", "keep", "pad"] = "drop"
    """the epoch's last batch when it is not full: left out, short, or filled from the first"""
    replacement: bool = False
    """draw samples independently, so that an epoch may show one twice and another never"""
    shuffle_shards: Annotated[int, Field(ge=1)] | None = None
    """shards that are mixed at a time; absent: all, or 8 when shards are fetched from elsewhere"""
    bucket_batches: Annotated[int, Field(ge=0)] = 0
    """sort captions by length within so many batches, so that each batch is cut short; 0: do not"""
    workers: Annotated[int, Field(ge=0)] = 2
    """processes that decode pictures, per training process; 0 decodes in it"""
    decoder: Literal["fast", "exact"] = "fast"
    """fast: JPEGs are decoded at a reduced size, within a stated tolerance; exact: as open_clip"""
    cache_dir: str | None = None
    """where fetched shards are kept; absent: $CLIPSERVE_CACHE or ~/.cache/clipserve"""
    cache_gb: Annotated[float, Field(gt=0)] = 50.0
    """how much of them is kept; at least twice `shuffle_shards` shards"""
    crop_scale: tuple[float, float] = (0.9, 1.0)
    """area of the random crop as a fraction of the picture; [1, 1] turns augmentation off"""
    crop_ratio: tuple[float, float] = (0.75, 1.3333333333333333)
    """width over height of the random crop"""
    max_bad_fraction: Annotated[float, Field(ge=0, le=1)] = 0.01
    """the run stops when more than this fraction of the samples read were bad (ten at least)"""

    @model_validator(mode="after")
    def _check(self) -> Self:
        low, high = self.crop_scale
        if not 0 < low <= high <= 1:
            raise ValueError(f"crop_scale [{low}, {high}] must hold 0 < low <= high <= 1")
        low, high = self.crop_ratio
        if not 0 < low <= high:
            raise ValueError(f"crop_ratio [{low}, {high}] must hold 0 < low <= high")
        if not self.train:
            raise ValueError("data.train is empty; name shards or a source")
        if self.val_fraction and (self.val is not None or len(self.train) > 1):
            raise ValueError(
                "val_fraction holds out of one train source; leave out val, or name it"
            )
        return self


class ObjectiveConfig(_Section):
    """One term of the loss."""

    name: Literal["contrastive"]
    """contrastive: symmetric image-text InfoNCE over the global batch (CLIP)"""
    weight: Weight = 1.0
    """factor of this term in the sum"""


class OptimConfig(_Section):
    """AdamW with open_clip's decay groups, and the learning rate over time."""

    lr: Annotated[float, Field(gt=0)] = 5e-4
    """peak learning rate"""
    weight_decay: Annotated[float, Field(ge=0)] = 0.2
    """decay of matrices; gains, biases, position and class embeddings and the scale have none"""
    betas: tuple[Beta, Beta] | None = None
    """Adam's betas; default (0.9, 0.98) for a ViT, (0.9, 0.999) otherwise, as in open_clip"""
    eps: Annotated[float, Field(gt=0)] | None = None
    """Adam's epsilon; default 1e-6 for a ViT, 1e-8 otherwise, as in open_clip"""
    warmup_steps: Annotated[int, Field(ge=0)] = 500
    """steps of linear warm-up"""
    schedule: Literal["cosine", "constant"] = "cosine"
    """course of the learning rate after warm-up; cosine ends at zero"""
    grad_clip: Annotated[float, Field(gt=0)] | None = None
    """largest norm of the gradient; absent: not clipped"""


class TrainConfig(_Section):
    """How long, how precisely, how often."""

    epochs: Annotated[int, Field(ge=1)] | None = None
    """passes over the training shards; give this or `steps`"""
    steps: Annotated[int, Field(ge=1)] | None = None
    """optimizer steps; give this or `epochs`"""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """seed of initial weights, sample order and augmentation"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where to train; auto takes a GPU when there is one"""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """bf16: autocast; auto takes it where the CPU (AMX, AVX512-BF16) or the GPU computes in it"""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile the towers; auto does so on a GPU only"""
    log_every: Annotated[int, Field(ge=1)] = 10
    """steps between lines of metrics.jsonl"""
    checkpoint_every_steps: Annotated[int, Field(ge=1)] | None = None
    """steps between checkpoints, beside the one at each epoch's end"""
    checkpoint_every_minutes: Annotated[float, Field(gt=0)] | None = None
    """minutes between checkpoints, likewise"""
    keep_checkpoints: Annotated[int, Field(ge=1)] = 2
    """newest checkpoints that stay on disk, beside the best"""
    best_metric: str = "val/mean_r1"
    """the validation metric, larger is better, that `best` follows"""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("give exactly one of train.epochs and train.steps")
        return self


class Config(_Section):
    """A whole training run."""

    out: str
    """run directory: checkpoints, metrics.jsonl, the resolved config.toml"""
    model: ModelConfig
    data: DataConfig
    objectives: tuple[ObjectiveConfig, ...] = (ObjectiveConfig(name="contrastive"),)
    optim: OptimConfig = OptimConfig()
    train: TrainConfig

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.objectives:
            raise ValueError('objectives is empty; add [[objectives]] name = "contrastive"')
        if self.model.architecture is None and self.model.pretrained is None:
            raise ValueError(
                "model.architecture is not set; name an open_clip architecture or a preset:"
                f" {', '.join(preset_names())}"
            )
        return self


def load_config(path: Path | None = None, overrides: list[str] | None = None) -> Config:
    """Resolve preset, TOML file and `section.key=value` overrides, later ones winning.

    Raises ConfigError for an unknown key (naming the nearest known one), a value of the wrong type
    or range, and a file that cannot be read.
    """
    given = _read_toml(path) if path else {}
    for override in overrides or []:
        _merge(given, _parse_override(override))
    preset = _preset_of(given)
    layered = _read_preset(preset) if preset else {}
    _merge(layered, given)
    try:
        return Config.model_validate(layered)
    except ValidationError as error:
        raise ConfigError("; ".join(_explain(item) for item in error.errors())) from None


def dump_toml(config: Config) -> str:
    """The fully resolved configuration as TOML that `load_config` reads back to an equal value."""
    values = config.model_dump(exclude_none=True, mode="json")
    values["model"].pop("preset", None)  # already resolved into the other values
    return "\n".join(_toml_lines(values, prefix="")) + "\n"


def preset_names() -> list[str]:
    """Names of the presets shipped with clipserve."""
    files = resources.files("clipserve.presets").iterdir()
    return sorted(file.name[:-5] for file in files if file.name.endswith(".toml"))


def describe_fields() -> list[tuple[str, str, str]]:
    """Every setting as (dotted name, default, meaning), in the order of the file."""
    return _describe(Config, "")


def _describe(kind: type[BaseModel], prefix: str) -> list[tuple[str, str, str]]:
    rows = []
    for name, field in kind.model_fields.items():
        inner, is_list = _section_in(field.annotation)
        if field.description:
            default = "required" if field.is_required() else str(field.default)
            rows.append((prefix + name, default, field.description))
        if inner is not None:
            rows += _describe(inner, f"{prefix}{name}{'[]' if is_list else ''}.")
    return rows


def _section_in(annotation: Any) -> tuple[type[BaseModel] | None, bool]:
    """The table that a field holds, if it holds one, and whether it is a list of them."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation, False
    inside = [arg for arg in get_args(annotation) if isinstance(arg, type)]
    sections = [arg for arg in inside if issubclass(arg, BaseModel)]
    return (sections[0], True) if sections else (None, False)


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"config file {path} does not exist") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"config file {path} cannot be read: {error}") from None


def _preset_of(given: dict[str, Any]) -> object:
    """The preset asked for; `tiny` when nothing else says what the network is."""
    model = given.get("model")
    model = model if isinstance(model, dict) else {}
    architecture = model.get("architecture", {})
    is_part = isinstance(architecture, dict) and not {"vision_cfg", "text_cfg"} <= set(architecture)
    has_own = "architecture" in model and not is_part
    return model.get("preset", None if has_own or "pretrained" in model else "tiny")


def _read_preset(name: object) -> dict[str, Any]:
    if name not in preset_names():
        raise ConfigError(f"unknown preset {name!r}; {_nearest(str(name), preset_names())}")
    text = resources.files("clipserve.presets").joinpath(f"{name}.toml").read_text("utf-8")
    return tomllib.loads(text)


def _parse_override(override: str) -> dict[str, Any]:
    """`train.seed=3` -> {"train": {"seed": 3}}; the value is TOML, or else a bare string."""
    dotted, separator, text = override.partition("=")
    if not separator or not dotted.strip():
        raise ConfigError(f"override {override!r} is not of the form section.key=value")
    try:
        value: Any = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    for part in reversed(dotted.strip().split(".")):
        value = {part: value}
    assert isinstance(value, dict)
    return value


def _merge(base: dict[str, Any], over: dict[str, Any]) -> None:
    """Lay `over` on `base` in place. An inline architecture replaces one given by name, whole."""
    for key, value in over.items():
        below = base.get(key)
        if isinstance(value, dict) and isinstance(below, dict):
            _merge(below, value)
        else:
            base[key] = value


def _explain(item: ErrorDetails) -> str:
    location = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        *parents, name = [str(part) for part in item["loc"]]
        return f"unknown setting {location!r}; {_nearest(name, _known_names(parents))}"
    if item["type"] == "missing":
        return f"{location} is required"
    message = item["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    if item["type"] == "value_error":
        return message
    return f"{location} = {item['input']!r}: {message}"


def _known_names(parents: list[str]) -> list[str]:
    kind: type[BaseModel] = Config
    for part in parents:
        if part in kind.model_fields:
            kind = _section_in(kind.model_fields[part].annotation)[0] or kind
    return list(kind.model_fields)


def _nearest(name: str, known: list[str]) -> str:
    match = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {match[0]!r}?" if match else f"known: {', '.join(known)}"


def _toml_lines(table: dict[str, Any], prefix: str) -> list[str]:
    """Plain values first, then sub-tables: all the TOML that a configuration needs."""
    lines = []
    for key, value in table.items():
        if not isinstance(value, dict) and not _is_table_list(value):
            lines.append(f"{_toml_key(key)} = {_toml_value(value)}")
    for key, value in table.items():
        name = f"{prefix}{_toml_key(key)}"
        if isinstance(value, dict):
            lines += ["", f"[{name}]", *_toml_lines(value, f"{name}.")]
        elif _is_table_list(value):
            for item in value:
                lines += ["", f"[[{name}]]", *_toml_lines(item, f"{name}.")]
    return lines


def _is_table_list(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(v, dict) for v in value)


def _toml_key(key: str) -> str:
    bare = key.isascii() and key.replace("_", "").replace("-", "").isalnum()
    return key if bare else _toml_value(key)


def _toml_value(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, list):
        return f"[{', '.join(_toml_value(item) for item in value)}]"
    assert isinstance(value, str)
    # A JSON string is a TOML basic string, but for DEL, which TOML wants escaped.
    import json

    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
