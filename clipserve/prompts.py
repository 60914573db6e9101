"""Prompt template sets, and class heads: class names -> one weight matrix (C, E).

The classifier of CLIP (arXiv:2103.00020, section 3.1.4): for class c and templates t_1..t_M

    e_cm = normalize(encode_text(t_m.format(c)))     each prompt is normalised first,
    w_c  = normalize(mean over m of e_cm)            and their mean again.

Start at `build_head`. Legend: N pictures, C classes, M templates, E embedding.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np

from clipserve.embed import embed_images, embed_texts
from clipserve.errors import ConfigError, TextError
from clipserve.images import DEFAULT_LIMITS, ImageLimits, ImageSource
from clipserve.model import Model

_MAX_FILE_BYTES = 16 * 2**20


@dataclass(frozen=True)
class ClassHead:
    """A zero-shot classifier: unit weights (C, E), one row per label, and the model's temperature.

    With a logit bias (SigLIP) each label is judged on its own, by a sigmoid; else softmax.
    """

    labels: tuple[str, ...]
    weights: np.ndarray
    logit_scale: float
    logit_bias: float | None
    model: Model

    def classify(
        self, images: Iterable[ImageSource], limits: ImageLimits = DEFAULT_LIMITS
    ) -> np.ndarray:
        """(N, C) float32 probabilities of paths, bytes or PIL images."""
        return self.probabilities(embed_images(self.model, images, limits=limits))

    def probabilities(self, image_vectors: np.ndarray) -> np.ndarray:
        """(N, C) float32 from unit vectors (N, E). Rows sum to one unless the model is SigLIP."""
        logits = (self.logit_scale * (image_vectors @ self.weights.T)).astype(np.float64)
        if self.logit_bias is not None:
            # The two-sided form of 1 / (1 + exp(-x)) that cannot overflow.
            judged: np.ndarray = 0.5 * (1 + np.tanh((logits + self.logit_bias) / 2))
            return judged.astype(np.float32)
        exponentials: np.ndarray = np.exp(logits - logits.max(axis=1, keepdims=True))
        shares: np.ndarray = exponentials / exponentials.sum(axis=1, keepdims=True)
        return shares.astype(np.float32)


def build_head(model: Model, labels: list[str], templates: str | list[str] = "none") -> ClassHead:
    """Embed every label in every template and average. Labels may repeat (ImageNet's do).

    ConfigError for an unknown or malformed template set; TextError for an empty label.
    """
    names = [label.strip() for label in labels]
    if not names:
        raise TextError("labels is empty; give at least one class name")
    if "" in names:
        raise TextError(f"label {names.index('')} is empty; every class needs a name")
    sets = (
        load_templates(templates) if isinstance(templates, str) else _check(templates, "templates")
    )
    prompts = [fill(template, name) for name in names for template in sets]
    return head_from_prompts(model, tuple(names), embed_texts(model, prompts))


def head_from_prompts(model: Model, labels: tuple[str, ...], prompts: np.ndarray) -> ClassHead:
    """Average the unit vectors of filled prompts (C * M, E), label by label, into a head."""
    vectors = prompts.reshape(len(labels), -1, prompts.shape[1])  # (C, M, E)
    means = vectors.mean(axis=1)  # (C, E)
    weights = means / np.linalg.norm(means, axis=1, keepdims=True)
    bias = model.logit_bias
    return ClassHead(
        labels=labels,
        weights=weights,
        logit_scale=model.logit_scale.item(),
        logit_bias=None if bias is None else bias.item(),
        model=model,
    )


def template_sets() -> list[str]:
    """Names of the template sets that are always there."""
    files = resources.files("clipserve.presets").iterdir()
    own = [f.name.removeprefix("templates_")[:-4] for f in files if f.name.startswith("templates_")]
    return sorted(["openai", "simple", *own])


def load_templates(name: str) -> list[str]:
    """A set by name, or from a file: one template a line, or the JSON form `file.json#DATASET`.

    `openai` (80) and `simple` (7) are the ImageNet templates of CLIP as open_clip ships them.
    In a file both `{}` and `{c}` stand for the class name.
    """
    if name in ("openai", "simple"):
        return _open_clip_templates(name)
    if name in template_sets():
        resource = resources.files("clipserve.presets").joinpath(f"templates_{name}.txt")
        return _parse_lines(resource.read_text("utf-8"), name)
    file, _, key = name.partition("#")
    path = Path(file)
    if not path.is_file():
        raise ConfigError(
            f"unknown templates {name!r}; use {', '.join(template_sets())}, or the path of a file"
        )
    if path.stat().st_size > _MAX_FILE_BYTES:
        raise ConfigError(f"templates file {path} is larger than {_MAX_FILE_BYTES} bytes")
    try:
        text = path.read_text(encoding="utf-8")
        return (
            _parse_json(json.loads(text), key, name)
            if path.suffix == ".json"
            else _parse_lines(text, name)
        )
    except (OSError, ValueError) as error:
        raise ConfigError(f"templates file {path} cannot be read: {error}") from None


def fill(template: str, label: str) -> str:
    """The template with the label in place of `{}` or `{c}`; other braces stay as they are."""
    return template.replace("{}", label).replace("{c}", label)


def _parse_lines(text: str, name: str) -> list[str]:
    return _check([line.strip() for line in text.splitlines() if line.strip()], name)


def _parse_json(content: object, key: str, name: str) -> list[str]:
    """A list of templates, {"templates": [...]}, or {dataset: {"templates": [...]}}."""
    if key:
        if not isinstance(content, dict) or key not in content:
            known = ", ".join(content) if isinstance(content, dict) else "none"
            raise ConfigError(f"templates {name!r}: no data set {key!r}; there are: {known}")
        content = content[key]
    if isinstance(content, dict):
        if "templates" not in content:
            raise ConfigError(
                f"templates {name!r}: say which data set, as FILE.json#NAME; there are:"
                f" {', '.join(content)}"
            )
        content = content["templates"]
    return _check(content, name)


def _check(templates: object, name: str) -> list[str]:
    if not isinstance(templates, list) or not templates:
        raise ConfigError(f"{name}: expected a list of templates, at least one")
    for template in templates:
        if not isinstance(template, str) or not ("{}" in template or "{c}" in template):
            raise ConfigError(f"{name}: template {template!r} has no {{}} for the class name")
    return templates


def _open_clip_templates(name: str) -> list[str]:
    """open_clip's templates are functions of a name; given "{}", they return their template."""
    from clipserve.towers import zero_shot_module

    module = zero_shot_module()
    functions = {
        "openai": module.OPENAI_IMAGENET_TEMPLATES,
        "simple": module.SIMPLE_IMAGENET_TEMPLATES,
    }[name]
    return [function("{}") for function in functions]
