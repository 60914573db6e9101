"""What Weaviate's module multi2vec-clip asks of its inference container: /vectorize, /meta and the
probes below /.well-known (weaviate/weaviate, modules/multi2vec-clip/clients)."""

from fastapi import APIRouter, Request
from starlette.responses import Response

from service.bodies import read_json
from service.compat.vectors import Lenient, cut_places, docs, embed
from service.errors import RequestError
from service.inputs import Input, check_count, parse_picture, parse_text
from service.replies import reply, written
from service.routes.encodings import encode
from service.routes.health import Readiness
from service.routes.state import ServedRegistry
from service.schemas import Values

router = APIRouter(tags=["compatibility"])


class VectorizeRequest(Lenient):
    """Texts, pictures, or both; Weaviate sends null for none."""

    model: str | None = None
    texts: Values[str] | None = None
    images: Values[str] | None = None
    """base64 or data URIs"""


@router.post("/vectorize", openapi_extra=docs(VectorizeRequest))
async def vectorize(request: Request, registry: ServedRegistry) -> Response:
    """Unit vectors of the texts and of the pictures, each in their order."""
    body = await read_json(request, VectorizeRequest)
    served = registry.model(body.model)
    texts, images = body.texts or [], body.images or []
    if not texts and not images:
        raise RequestError("give texts, images or both", param="texts")
    settings = registry.settings
    check_count(len(texts) + len(images), settings.max_items, "texts and images")
    places = [f"texts[{i}]" for i in range(len(texts))]
    places += [f"images[{i}]" for i in range(len(images))]
    inputs: list[Input] = [
        parse_text(text, place, settings.max_text_chars)
        for text, place in zip(texts, places, strict=False)
    ]
    inputs += [
        parse_picture(image, place)
        for image, place in zip(images, places[len(texts) :], strict=True)
    ]
    answer = await embed(registry, served, inputs, places)
    rows = answer.rows()
    content = {
        "textVectors": encode(rows[: len(texts)], "float"),
        "imageVectors": encode(rows[len(texts) :], "float"),
        "truncated": cut_places(answer.truncated, places),
    }
    return await written(registry.pool, rows.size, lambda: reply(content, served))


@router.get("/meta")
async def meta(registry: ServedRegistry) -> Response:
    """The default model, which Weaviate shows as its module's."""
    served = registry.model(None)
    return reply({"embed_dim": served.model.embed_dim}, served)


@router.head("/.well-known/live", status_code=204, include_in_schema=False)
@router.get("/.well-known/live", status_code=204)
async def live() -> Response:
    """The process answers."""
    return Response(status_code=204)


@router.head("/.well-known/ready", status_code=204, include_in_schema=False)
@router.get("/.well-known/ready", status_code=204)
async def ready(request: Request) -> Response:
    """As /health/ready; Weaviate waits for it when it starts."""
    readiness: Readiness = request.app.state.readiness
    await readiness.check()
    return Response(status_code=204)
