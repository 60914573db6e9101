"""/v1/models: what may be named as `model`, and taking a new checkpoint of it in."""

import logging
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from clipserve.errors import ConfigError
from clipserve.prompts import load_templates, template_sets
from service.auth import require
from service.bodies import read_json
from service.errors import Forbidden, RequestError
from service.registry import ServedModel
from service.replies import reply
from service.routes.state import ServedRegistry
from service.schemas import ReloadRequest, request_docs
from service.settings import Settings

logger = logging.getLogger(__name__)
router = APIRouter(tags=["models"])


@router.get("/v1/models")
async def models(registry: ServedRegistry) -> Response:
    """Every model served, the default first, in OpenAI's shape."""
    data = [_describe(served) for served in registry.models.values()]
    return reply({"object": "list", "data": data, "template_sets": template_sets()})


# Before the model's own route, which would match as well.
@router.post(
    "/v1/models/{name:path}:reload",
    dependencies=[Depends(require("admin"))],
    openapi_extra=request_docs(ReloadRequest),
)
async def reload(name: str, request: Request, registry: ServedRegistry) -> Response:
    """Take a new checkpoint in, with no request failed: each is answered by the model it met.

    A collection follows only if its vectors are the new model's too; else it stays with the old one
    and is named in `collections_stale`. If the checkpoint cannot be loaded the old model stays.
    """
    body = await read_json(request, ReloadRequest, optional=True)
    served = registry.model(name)
    path = None if body.path is None else _allowed(body.path, registry.settings)
    try:
        result = await registry.reload(served.name, path)
    except ConfigError as error:  # which may name a path
        logger.warning("model %r was not loaded anew: %s", served.name, error)
        raise RequestError(
            "there is no checkpoint to load, or it is served already under another name; the"
            " server's log says which",
            param="path",
            code="invalid_checkpoint",
        ) from None
    content = {
        "old_fingerprint": result.old_fingerprint,
        "new_fingerprint": result.new_fingerprint,
        "collections_kept": result.collections_kept,
        "collections_stale": result.collections_stale,
    }
    return reply(content, registry.model(served.name))


@router.get("/v1/models/{name:path}")
async def model(name: str, registry: ServedRegistry) -> Response:
    """One model."""
    served = registry.model(name)
    return reply(_describe(served), served)


@router.get("/v1/template-sets")
async def all_template_sets() -> Response:
    """The template sets that a classification may name."""
    data = [
        {"id": name, "object": "template_set", "templates": load_templates(name)}
        for name in template_sets()
    ]
    return reply({"object": "list", "data": data})


def _allowed(text: str, settings: Settings) -> Path:
    """A path below one of the model roots; where links lead counts."""
    if not settings.model_roots:
        raise Forbidden(
            "this service takes no path to a model; set CLIPSERVE_MODEL_ROOTS", param="path"
        )
    try:
        path = Path(text).resolve()
    except (ValueError, OSError, RuntimeError):  # a NUL, a name too long, links in a circle
        raise RequestError("path is not one", param="path") from None
    if not any(path.is_relative_to(root.resolve()) for root in settings.model_roots):
        raise Forbidden(
            "path is below none of the folders that CLIPSERVE_MODEL_ROOTS allows", param="path"
        )
    return path


def _describe(served: ServedModel) -> dict[str, Any]:
    model = served.model
    return {
        "id": served.name,
        "object": "model",
        "created": served.created,
        "owned_by": "clipserve",
        "fingerprint": served.fingerprint,
        "precision": served.precision,
        "embed_dim": model.embed_dim,
        "context_length": model.context_length,
        "image_size": list(model.transform.size),
        "objective": list(model.info.objective),
        "can_match": model.has_fusion,
        "multi_label": model.logit_bias is not None,
    }
