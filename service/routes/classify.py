"""POST /v1/classify: pictures x labels -> ranked probabilities, as JSON or as a form."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from fastapi import APIRouter, Request
from starlette.responses import Response

from clipserve.prompts import ClassHead
from service.errors import at, error_fields
from service.inputs import Picture, check_count, parse_labels, parse_picture, parse_templates
from service.registry import Registry
from service.replies import reply
from service.routes.state import ServedRegistry
from service.schemas import ClassifyRequest, is_form, read_form, read_json, request_docs

router = APIRouter(tags=["classify"])

_FORM = {
    "files": {"type": "array", "items": {"type": "string", "format": "binary"}},
    "labels": {"type": "string", "description": "separated by commas, or one a part"},
    "templates": {"type": "string", "description": "a set's name, or templates with {}"},
    "top_k": {"type": "integer"},
    "model": {"type": "string"},
}


@dataclass(frozen=True)
class _Question:
    model: str | None
    pictures: list[Picture]
    labels: list[str]
    templates: str | list[str]
    top_k: int | None


@router.post("/v1/classify", openapi_extra=request_docs(ClassifyRequest, _FORM))
async def classify(request: Request, registry: ServedRegistry) -> Response:
    """The probability of each label for each picture, most probable first.

    A picture that cannot be read gets an `error` in its place; the others are answered. When none
    can be read, that is the answer.
    """
    settings = registry.settings
    question = await _read(request, registry)
    served = registry.model(question.model)
    check_count(len(question.pictures), settings.max_items, "images")
    labels = parse_labels(question.labels, settings.max_labels)
    head = await served.head(labels, parse_templates(question.templates))
    answer = await served.pipeline.embed(question.pictures)
    failed = [vector for vector in answer.vectors if isinstance(vector, Exception)]
    if len(failed) == len(answer.vectors):
        raise at(failed[0], "images[0]")
    top_k = min(question.top_k or len(labels), len(labels))
    content = {
        "object": "list",
        "results": [_result(i, v, head, top_k) for i, v in enumerate(answer.vectors)],
        "activation": "softmax" if head.logit_bias is None else "sigmoid",
    }
    return reply(content, served)


async def _read(request: Request, registry: Registry) -> _Question:
    settings = registry.settings
    if not is_form(request):
        body = await read_json(request, ClassifyRequest)
        check_count(len(body.images), settings.max_items, "images")
        pictures = [parse_picture(text, f"images[{i}]") for i, text in enumerate(body.images)]
        return _Question(body.model, pictures, body.labels, body.templates, body.top_k)
    form = await read_form(
        request, _FORM, max_files=settings.max_items, max_fields=settings.max_labels + 100
    )
    labels = form.all("labels")
    templates = form.all("templates")
    return _Question(
        form.one("model"),
        [Picture(data) for data in form.files],
        labels[0].split(",") if len(labels) == 1 else labels,
        templates[0] if len(templates) == 1 else templates or "none",
        form.number("top_k", 1, settings.max_labels),
    )


def _result(
    index: int, vector: np.ndarray | Exception, head: ClassHead, top_k: int
) -> dict[str, Any]:
    if isinstance(vector, Exception):
        return {"index": index, "error": error_fields(vector, f"images[{index}]")}
    probabilities = head.probabilities(vector[None])[0]  # (C,)
    best = np.argsort(-probabilities, kind="stable")[:top_k]
    return {
        "index": index,
        "predictions": [
            {"label": head.labels[c], "label_index": int(c), "probability": probabilities[c]}
            for c in best
        ],
    }
