"""POST /v1/classify: pictures or texts x labels -> ranked probabilities; and GET /v1/label-sets."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
from fastapi import APIRouter, Request
from starlette.responses import Response

from clipserve.prompts import ClassHead
from service.bodies import read
from service.errors import NotFound, RequestError, at, error_fields
from service.inputs import (
    Input,
    Picture,
    check_count,
    check_prompts,
    fetched,
    parse_labels,
    parse_picture,
    parse_templates,
    parse_text,
)
from service.label_sets import LabelSets
from service.registry import Registry
from service.replies import MAX_ANSWER_BYTES, reply, to_json, written
from service.routes.state import ServedLabelSets, ServedRegistry
from service.schemas import ClassifyRequest, request_docs

router = APIRouter(tags=["classify"])

_PREDICTION_BYTES = 72
"""of JSON, beside the label"""
_CHARACTER_BYTES = 6
"""that JSON may take to write one"""


@dataclass(frozen=True)
class _Items:
    """What is classified, and what it is called in the request."""

    param: str
    inputs: list[Input]


@router.post("/v1/classify", openapi_extra=request_docs(ClassifyRequest, pictures=True))
async def classify(
    request: Request, registry: ServedRegistry, label_sets: ServedLabelSets
) -> Response:
    """The probability of each label for each picture or text, most probable first.

    A picture that cannot be read gets an `error` in its place; the others are answered. When none
    can be read, that is the answer. `truncated_labels` are the places of labels that, in a
    template, did not fit into the model's context.
    """
    settings = registry.settings
    body, files = await read(
        request,
        ClassifyRequest,
        max_files=settings.max_items,
        max_fields=settings.max_labels + 100,
    )
    served = registry.model(body.model)
    items = _items(body, files, registry)
    labels = _labels(body, registry, label_sets)
    templates = parse_templates(body.templates, settings.max_text_chars)
    check_prompts(labels, templates)
    top_k = min(body.top_k or len(labels), len(labels))
    _check_answer(labels, top_k, items)
    built = await served.head(labels, templates)
    head = _tempered(built.classifier, body)
    answer = await served.pipeline.embed(await fetched(items.inputs, registry.fetcher))
    failed = [vector for vector in answer.vectors if isinstance(vector, Exception)]
    if len(failed) == len(answer.vectors):
        raise at(failed[0], f"{items.param}[0]")

    def write() -> Response:
        results = _results(answer.vectors, items.param, head, top_k, body.min_probability)
        if items.param == "texts":
            for result, is_cut in zip(results, answer.truncated, strict=True):
                result["truncated"] = is_cut
        activation = "softmax" if head.logit_bias is None else "sigmoid"
        content = {
            "object": "list",
            "results": results,
            "activation": activation,
            "truncated_labels": built.truncated,
        }
        return reply(content, served)

    return await written(registry.pool, len(labels) * len(items.inputs), write)


@router.get("/v1/label-sets")
async def label_sets(label_sets: ServedLabelSets) -> Response:
    """The label sets that a classification may name."""
    data = [
        {"id": name, "object": "label_set", "count": len(labels), "labels": labels}
        for name, labels in label_sets.items()
    ]
    return reply({"object": "list", "data": data})


def _items(body: ClassifyRequest, files: list[bytes], registry: Registry) -> _Items:
    settings = registry.settings
    given = [name for name in ("images", "texts") if getattr(body, name) is not None]
    if len(given) + bool(files) != 1:
        raise RequestError(
            "give one of images, texts and files of pictures, and no other", param="images"
        )
    if files:
        check_count(len(files), settings.max_items, "images")
        return _Items("images", [Picture(file) for file in files])
    if body.texts is not None:
        check_count(len(body.texts), settings.max_items, "texts")
        limit = settings.max_text_chars
        texts = [parse_text(text, f"texts[{i}]", limit) for i, text in enumerate(body.texts)]
        return _Items("texts", [*texts])
    images = body.images or []
    check_count(len(images), settings.max_items, "images")
    return _Items("images", [parse_picture(text, f"images[{i}]") for i, text in enumerate(images)])


def _labels(body: ClassifyRequest, registry: Registry, sets: LabelSets) -> tuple[str, ...]:
    settings = registry.settings
    if (body.labels is None) == (body.label_set is None):
        raise RequestError("give labels or label_set, one of the two", param="labels")
    if body.label_set is None:
        return parse_labels(body.labels or [], settings.max_labels, settings.max_text_chars)
    if body.label_set in sets:
        return sets[body.label_set]
    known = ", ".join(sets) or "none"
    raise NotFound(
        f"no such label set; served here: {known}", param="label_set", code="label_set_not_found"
    )


def _check_answer(labels: tuple[str, ...], top_k: int, items: _Items) -> None:
    """RequestError for an answer too large, as each item repeats its labels."""
    label_bytes = min(len(to_json(labels)), top_k * _CHARACTER_BYTES * max(map(len, labels)))
    size = len(items.inputs) * (top_k * _PREDICTION_BYTES + label_bytes)
    if size > MAX_ANSWER_BYTES:
        raise RequestError(
            f"the answer, {top_k} labels for each of {len(items.inputs)} {items.param}, would have"
            f" up to {size} bytes; at most {MAX_ANSWER_BYTES} are allowed: set top_k, or send"
            " fewer at once",
            param="top_k",
            code="answer_too_large",
        )


def _tempered(head: ClassHead, body: ClassifyRequest) -> ClassHead:
    """The head with its logits divided by the temperature, and judged as was asked for."""
    bias = head.logit_bias
    if body.multi_label and bias is None:
        raise RequestError(
            "multi_label judges each label by a sigmoid, which needs a logit bias, and this model"
            " was trained without one (with one: SigLIP); its probabilities only compare labels",
            param="multi_label",
            code="no_logit_bias",
        )
    if body.multi_label is False:
        bias = None
    return dataclasses.replace(
        head,
        logit_scale=head.logit_scale / body.temperature,
        logit_bias=None if bias is None else bias / body.temperature,
    )


def _results(
    vectors: list[np.ndarray | Exception],
    param: str,
    head: ClassHead,
    top_k: int,
    min_probability: float | None,
) -> list[dict[str, Any]]:
    rows = [vector for vector in vectors if isinstance(vector, np.ndarray)]
    probabilities = iter(head.probabilities(np.stack(rows)))  # (N, C)
    return [
        {"index": index, "error": error_fields(vector, f"{param}[{index}]")}
        if isinstance(vector, Exception)
        else {"index": index, **_predictions(next(probabilities), head, top_k, min_probability)}
        for index, vector in enumerate(vectors)
    ]


def _predictions(
    probabilities: np.ndarray, head: ClassHead, top_k: int, min_probability: float | None
) -> dict[str, Any]:
    """Of one picture or text, from its probabilities (C,)."""
    best = np.argsort(-probabilities, kind="stable")[:top_k]
    if min_probability is not None:
        best = best[probabilities[best] >= min_probability]
    predictions = [
        {"label": head.labels[c], "label_index": int(c), "probability": probabilities[c]}
        for c in best
    ]
    if min_probability is None:
        return {"predictions": predictions}
    return {"predictions": predictions, "abstained": not predictions}
