"""GET /v1/models: what may be named as `model`."""

from typing import Any

from fastapi import APIRouter
from starlette.responses import Response

from clipserve.prompts import template_sets
from service.registry import ServedModel
from service.replies import reply
from service.routes.state import ServedRegistry

router = APIRouter(tags=["models"])


@router.get("/v1/models")
async def models(registry: ServedRegistry) -> Response:
    """Every model served, the default first, in OpenAI's shape."""
    data = [_describe(served) for served in registry.models.values()]
    return reply({"object": "list", "data": data, "template_sets": template_sets()})


@router.get("/v1/models/{name:path}")
async def model(name: str, registry: ServedRegistry) -> Response:
    """One model."""
    served = registry.model(name)
    return reply(_describe(served), served)


def _describe(served: ServedModel) -> dict[str, Any]:
    model = served.model
    return {
        "id": served.name,
        "object": "model",
        "created": 0,
        "owned_by": "clipserve",
        "fingerprint": served.fingerprint,
        "embed_dim": model.embed_dim,
        "context_length": model.context_length,
        "image_size": list(model.transform.size),
        "objective": list(model.info.objective),
    }
