"""What a training run is told: frozen, typed, validated at birth.

One path: preset -> TOML file -> `section.key=value` overrides -> a frozen `Config`, which is passed
as an argument and never looked up or written to. Start at `load_config`. The string under each
field says its unit and meaning; `clipserve train --help-config` prints them. The tables of
`objectives` and `optim` have files of their own.
"""

import tomllib
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from clipserve.config_text import describe, explain, nearest, to_toml
from clipserve.errors import ConfigError
from clipserve.lora import LoraConfig
from clipserve.objectives import Contrastive, Objective, check_objectives
from clipserve.optim import OptimConfig
from clipserve.sections import Section, Weight

RerankScore = Literal["matching", "matching+cosine", "matching+contrastive"]


class ModelConfig(Section):
    """Which network is trained, and from which weights."""

    preset: str | None = None
    """a table of defaults shipped with clipserve for any section; docs/objectives.md lists them"""
    architecture: str | dict[str, Any] | None = None
    """an open_clip architecture by name (`ViT-B-32`), or a table: open_clip's, or an ALBEF's"""
    pretrained: str | None = None
    """a model to start from, as `clipserve import` reads it; sizes and dropout can be changed"""
    pretrained_image: str | None = None
    """weights for an ALBEF's image tower: a timm ViT's or DeiT's file, open_clip's, or a model's"""
    pretrained_text: str | None = None
    """folder of a local BERT for an ALBEF's text and fusion layers, and its vocabulary"""


class TrainData(Section):
    """One of the sets to train on."""

    path: Annotated[str, Field(min_length=1)]
    """shards (folder, .tar, `{000..099}.tar`, https, s3, gs, `pipe:`), or a source to pack"""
    weight: Weight = 1.0
    """passes over it in one epoch: 2 shows each sample twice, 0.5 every other epoch"""


def _as_list(value: object) -> object:
    """A path alone, or a list in which paths may stand alone."""
    items = value if isinstance(value, list | tuple) else [value]
    return [{"path": item} if isinstance(item, str) else item for item in items]


class DataConfig(Section):
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
    label_field: str | None = None
    """of shards: JSON field with the class of a picture, for objectives with labels"""
    picture_field: str | None = None
    """of shards: JSON field that names a picture; absent: its bytes tell which are the same"""
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


class EarlyStop(Section):
    """When a run ends before its last step."""

    patience: Annotated[int, Field(ge=1)]
    """validations in a row without a better value of `metric`, after which the run ends"""
    metric: str = "val/mean_r1"
    """the validation metric, larger is better, that is watched"""


class TrainConfig(Section):
    """How long, how precisely, how often."""

    epochs: Annotated[int, Field(ge=1)] | None = None
    """passes over the training shards; give this or `steps`"""
    steps: Annotated[int, Field(ge=1)] | None = None
    """optimizer steps; give this or `epochs`"""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """seed of initial weights, sample order and augmentation"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where to train; auto takes a GPU when there is one"""
    precision: Literal["auto", "fp32", "tf32", "bf16", "fp16"] = "auto"
    """bf16, fp16 (with a loss scale): autocast; auto: bf16 where CPU or GPU is faster in it"""
    accum_freq: Annotated[int, Field(ge=1)] = 1
    """parts that a step's rows go through the towers in, for memory; batch_size counts them all"""
    grad_checkpointing: bool = False
    """compute the layers' activations again in backward: less memory, a third more time"""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile the towers; auto does so on a GPU only"""
    sharding: Literal["none", "fsdp"] = "none"
    """fsdp: each of several processes keeps a part of the weights and moments, for large models"""
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
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    """keep an average of the weights, of which each step keeps this part; it is what is saved"""
    early_stop: EarlyStop | None = None
    spike: Annotated[float, Field(ge=0)] = 10.0
    """skip a step whose loss is so many of their usual deviations above the last ones; 0: do not"""
    roll_back: bool = False
    """at a spike, or three skipped steps in a row, take the last checkpoint's weights and go on"""
    max_skipped: Annotated[int, Field(ge=0)] = 20
    """the run stops, with a checkpoint, when more than this of its last 1000 steps were skipped"""
    report_to: tuple[Literal["wandb", "mlflow"], ...] = ()
    """where else metrics go; each needs its package: `pip install "clipserve[wandb]"`"""
    peak_tflops: Annotated[float, Field(gt=0)] | None = None
    """of one device, for `mfu` in the log; absent: that of bf16 on a GPU that is known"""
    rerank: Annotated[int, Field(ge=0)] = 0
    """at validation, candidates per query that ALBEF's matching puts in a better order; 0: none"""
    rerank_score: RerankScore = "matching"
    """what they are ordered by: the matching logit, plus the cosine, or plus scale times cosine"""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("give exactly one of train.epochs and train.steps")
        if self.rerank_score != "matching" and not self.rerank:
            raise ValueError("train.rerank_score has no use while train.rerank is 0; set that too")
        return self


class Config(Section):
    """A whole training run."""

    out: Annotated[str, Field(min_length=1)]
    """run directory: checkpoints, metrics.jsonl, the resolved config.toml"""
    model: ModelConfig
    data: DataConfig
    objectives: tuple[Objective, ...] = (Contrastive(name="contrastive"),)
    optim: OptimConfig = OptimConfig()
    lora: LoraConfig | None = None
    train: TrainConfig

    @model_validator(mode="before")
    @classmethod
    def _name_what_is_missing(cls, given: Any) -> Any:
        """Settings, and not the tables that they stand in."""
        if not isinstance(given, dict):
            return given
        return {"model": {}, "data": {}, "train": {}, **given}

    @model_validator(mode="after")
    def _check(self) -> Self:
        check_objectives(self.objectives)
        wants_labels = any("label" in getattr(o, "positives", ()) for o in self.objectives)
        if wants_labels and self.data.label_field is None:
            raise ValueError(
                'positives with "label" need data.label_field, the JSON field with the label'
            )
        self._check_validation()
        if self.model.pretrained and (self.model.pretrained_image or self.model.pretrained_text):
            raise ValueError(
                "model.pretrained brings all weights; leave out pretrained_image and"
                " pretrained_text"
            )
        if self.lora is not None and not self.model.pretrained:
            raise ValueError("lora adapts a trained model; name it as model.pretrained")
        if self.lora is not None and self.optim.unfreeze_after_steps is not None:
            raise ValueError(
                "optim.unfreeze_after_steps would train the weights that lora adapts; use one"
            )
        if self.model.architecture is None and self.model.pretrained is None:
            raise ValueError(
                "model.architecture is not set; name an open_clip architecture or a preset:"
                f" {', '.join(preset_names())}"
            )
        return self

    def _check_validation(self) -> None:
        if self.data.val or self.data.val_fraction:
            return
        usual = TrainConfig.model_fields["best_metric"].default
        for setting, is_set in (
            ("early_stop", self.train.early_stop is not None),
            ("best_metric", self.train.best_metric != usual),
        ):
            if is_set:
                raise ValueError(
                    f"train.{setting} has nothing to watch without validation; set data.val or"
                    " data.val_fraction"
                )


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
        raise ConfigError("; ".join(explain(item, Config) for item in error.errors())) from None


def dump_toml(config: Config) -> str:
    """The fully resolved configuration as TOML that `load_config` reads back to an equal value."""
    values = config.model_dump(exclude_none=True, mode="json")
    values["model"].pop("preset", None)  # already resolved into the other values
    return to_toml(values)


def preset_names() -> list[str]:
    """Names of the presets shipped with clipserve."""
    files = resources.files("clipserve.presets").iterdir()
    return sorted(file.name[:-5] for file in files if file.name.endswith(".toml"))


def describe_fields() -> list[tuple[str, str, str]]:
    """Every setting as (dotted name, default, meaning), in the order of the file."""
    return describe(Config)


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
        raise ConfigError(f"unknown preset {name!r}; {nearest(str(name), preset_names())}")
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
