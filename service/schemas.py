"""The bodies of requests, as pydantic models, and how they get into /openapi.json.

The string under a field is its documentation. `bodies.py` reads them, from JSON, from a form, or
from the query beside a picture's bytes; `Given` says how the text of a form's field becomes a value
that is no text.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic.json_schema import models_json_schema

from clipserve.config import RerankScore

T = TypeVar("T")
RowEncoding = Literal["float", "base64", "binary", "ubinary"]
_Priority = Literal["interactive", "bulk"]

K_MAX = 1000
OFFSET_MAX = 9000
"""with K_MAX within what `Searcher.search` passes over and finds at once"""

MAX_VALUES = 100_000
"""in any list; what the settings allow is less, and is checked after"""
MAX_OBJECTS = 10_000
"""the same, of objects with fields of their own, which cost more"""

_MAX_FIELDS = 100
_PICTURE_TYPES = ("image/jpeg", "image/png", "image/webp")
_REFERENCE = "#/components/schemas/{model}"

Cosine = Annotated[float, Field(ge=-1, le=1, allow_inf_nan=False)]
Weight = Annotated[float, Field(ge=-1000, le=1000, allow_inf_nan=False)]
# The first thing that is wrong ends it: an error for each of a million values is a gigabyte.
Values = Annotated[list[T], Field(max_length=MAX_VALUES, fail_fast=True)]
Objects = Annotated[list[T], Field(max_length=MAX_OBJECTS, fail_fast=True)]


@dataclass(frozen=True)
class Given:
    """How a value is given as text, in a form or a query."""

    form: Literal["json", "commas", "one or several"]
    """commas: one text with commas, or the field several times"""


class Body(BaseModel):
    """What all bodies are: checked, and of known fields alone."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def _check(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            raise ValueError("must be an object")
        if len(value) > _MAX_FIELDS:  # each unknown one would be an error of its own
            raise ValueError(f"an object has more than {_MAX_FIELDS} fields")
        return value


def _pass_over_vllms(priority: Any) -> Any:
    return "interactive" if isinstance(priority, int) else priority


class EmbeddingsRequest(Body):
    """OpenAI's shape, with pictures beside texts."""

    model_config = ConfigDict(extra="ignore")  # OpenAI's clients send fields of their own

    model: str | None = None
    """one of /v1/models; the first when left out"""
    input: Annotated[
        Any,
        Field(
            json_schema_extra={
                "anyOf": [
                    {"type": "string"},
                    {
                        "type": "array",
                        "items": {
                            "anyOf": [
                                {"type": "string"},
                                {"type": "object", "properties": {"text": {"type": "string"}}},
                                {"type": "object", "properties": {"image": {"type": "string"}}},
                            ]
                        },
                    },
                ]
            }
        ),
        Given("one or several"),
    ] = None
    """a string, or a list of strings, {"text": ...} and {"image": base64, data URI or URL};
    required unless pictures are sent as files, or messages"""
    messages: Annotated[Objects[dict[str, Any]] | None, Given("json")] = None
    """in the place of input, one text or picture as a chat has it (vLLM's): a single message whose
    content is a string, or a list of one part: {"type": "text", "text": ...} or {"type":
    "image_url", "image_url": {"url": data URI}}"""
    modality: Literal["text", "image"] = "text"
    """what plain strings are; an image is base64, a data URI or a URL"""
    encoding_format: RowEncoding = "float"
    """base64 holds little-endian float32; ubinary a bit for each number, 1 above zero, eight to a
    byte with the first one highest; binary the same bytes less 128"""
    embedding_type: RowEncoding | None = None
    """Jina's name for encoding_format; goes before it"""
    dimensions: int | None = None
    """must be the model's own number, if given"""
    normalized: bool = True
    """Jina's; vectors are always of unit length, so false is refused"""
    on_error: Literal["fail", "report"] = "fail"
    """fail: one bad item fails the request; report: the others are answered, `errors` names it"""
    truncate: bool = True
    """false: a text that does not fit into the model's context is an error, instead of cut"""
    priority: Annotated[
        _Priority,
        BeforeValidator(_pass_over_vllms, json_schema_input_type=_Priority | int),
    ] = "interactive"
    """bulk: behind what is interactive; while that goes on, it has one small batch in nine; a whole
    number is vLLM's and changes nothing"""


class ClassifyRequest(Body):
    """Pictures, or texts, and the labels to choose from."""

    model: str | None = None
    """one of /v1/models; the first when left out"""
    images: Annotated[Values[str] | None, Given("one or several")] = None
    """base64, data URIs or URLs"""
    texts: Annotated[Values[str] | None, Given("one or several")] = None
    """in the place of images"""
    labels: Annotated[Values[str] | None, Given("commas")] = None
    """class names; in a form separated by commas, or one a part"""
    label_set: str | None = None
    """one of /v1/label-sets, in the place of labels"""
    templates: Annotated[str | Values[str], Given("one or several")] = "none"
    """the name of a template set, or templates that each hold {} for the label"""
    top_k: Annotated[int, Field(ge=1)] | None = None
    """labels to return for each item, most probable first; all when left out"""
    temperature: Annotated[float, Field(ge=1e-3, le=1e3, allow_inf_nan=False)] = 1.0
    """0.001 to 1000; divides the logits, which hold the model's own temperature: above 1 the
    probabilities are more alike, below 1 less"""
    multi_label: bool | None = None
    """true: each label is judged on its own, by a sigmoid (models with a logit bias alone); false:
    the labels exclude each other; left out: as the model was trained"""
    min_probability: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None
    """labels below it are left out, and an item without any says `abstained`"""


class MatchRequest(Body):
    """Pictures and texts, read together: picture i with text i, or one with each of the others."""

    model: str | None = None
    """one of /v1/models, trained to match; the first when left out"""
    images: Annotated[Values[str] | None, Given("one or several")] = None
    """base64, data URIs or URLs"""
    texts: Annotated[Values[str] | None, Given("one or several")] = None
    """as many as images, or one for all of them; or any number for one image"""


class Part(Body):
    """What is looked for: exactly one of text, image, vector and id."""

    text: str | None = None
    """a text"""
    image: str | None = None
    """base64, a data URI or a URL"""
    vector: Annotated[Values[float] | None, Given("json")] = None
    """of the collection's dimension; need not be of unit length"""
    id: str | None = None
    """an item of the collection, more like which is looked for; it is no answer itself"""


class WeightedPart(Part):
    """A part of a mixed query."""

    weight: Weight = 1.0
    """how much it counts; a negative one looks away from it; not 0"""


class Query(Part):
    """One query: a text, image, vector or id, or several of them together."""

    queries: Annotated[Objects[WeightedPart] | None, Given("json")] = None
    """parts whose vectors are weighted and summed, in the place of one text, image, vector or id"""


class SearchRequest(Query):
    """A query, or a batch of them, and which of the hits are wanted."""

    collection: str | None = None
    """one of /v1/collections; may be left out when there is one"""
    batch: Annotated[Objects[Query] | None, Given("json")] = None
    """several queries at once, in the place of one; answered in `results`"""
    k: Annotated[int, Field(ge=1, le=K_MAX)] = 10
    """hits to return"""
    offset: Annotated[int, Field(ge=0, le=OFFSET_MAX)] = 0
    """of the best hits, so many are passed over"""
    filter: Annotated[dict[str, Any] | None, Given("json")] = None
    """only items whose metadata it holds for: {"color": "red", "price": {"lt": 10}}"""
    min_score: Cosine | None = None
    """no hit of a lower cosine"""
    field: Literal["image", "text"] = "image"
    """the vectors that are searched: of the items' pictures (of what there is, for an item without
    a picture), or of their texts"""
    deduplicate: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    """leave out what has a cosine of at least that to a better hit"""
    rerank: bool = False
    """order the first `k_test` hits of a text anew by reading text and picture together (models
    trained to match alone)"""
    k_test: Annotated[int, Field(ge=1, le=K_MAX)] = 16
    """hits that `rerank` reads"""
    rerank_score: RerankScore = "matching+contrastive"
    """what `rerank` orders by: the matching logit, alone or with the contrastive logit or cosine"""
    with_vectors: bool = False
    """return the hits' vectors"""
    exact: bool = False
    """compare every vector, whatever index there is: slow, and nothing is passed over"""


class UpsertItem(Body):
    """One item, with an image, a text, a vector, or a text beside one of the others."""

    id: str
    """1 to 512 bytes, not "." or ".."; an item of that id is replaced"""
    image: str | None = None
    """base64, a data URI or a URL; a small copy is kept for display"""
    text: str | None = None
    """searched as `field: text`; and as the item's image, when it has none"""
    vector: Values[float] | None = None
    """in the place of image: made by the collection's model; scaled to unit length"""
    caption: str = ""
    """shown with a hit"""
    metadata: dict[str, Any] = {}
    """any JSON object, with the caption at most 1 MiB; what a filter looks at"""


class UpsertRequest(Body):
    """Items to add or replace: all of them, or none when one is wrong."""

    items: Objects[UpsertItem]
    """at most as many as one request may hold; more go into a job"""


class DeleteRequest(Body):
    """Items to remove."""

    ids: Values[str]
    """those that are not there are passed over"""


class CreateRequest(Body):
    """A new, empty collection."""

    model: str | None = None
    """one of /v1/models, which makes its vectors; the first when left out"""


class JobRequest(Body):
    """Items to embed and store, without waiting for it."""

    collection: str | None = None
    """one of /v1/collections; may be left out when there is one"""
    items: Objects[UpsertItem] = []
    """as for PUT /v1/collections/{name}/items"""
    start: bool = True
    """false: more is appended before `:start`"""


class ReloadRequest(Body):
    """Where a model's new checkpoint is."""

    path: str | None = None
    """a model directory on the server, below one of CLIPSERVE_MODEL_ROOTS; left out: the directory
    that the model came from is read again"""


_BODIES: tuple[type[BaseModel], ...] = (
    EmbeddingsRequest,
    ClassifyRequest,
    MatchRequest,
    SearchRequest,
    UpsertRequest,
    DeleteRequest,
    CreateRequest,
    JobRequest,
    ReloadRequest,
)


def request_docs(
    kind: type[BaseModel], *, pictures: bool = False, also: Iterable[str] = ()
) -> dict[str, Any]:
    """`openapi_extra` of a route that reads its own body.

    pictures: forms and pictures as a body are read as well. also: other types of body.
    """
    reference = {"$ref": _REFERENCE.format(model=kind.__name__)}
    content: dict[str, Any] = {"application/json": {"schema": reference}}
    if pictures:
        content["multipart/form-data"] = {"schema": _form_schema(kind)}
    binary = {"schema": {"type": "string", "format": "binary"}}
    for sent_as in (*(_PICTURE_TYPES if pictures else ()), *also):
        content[sent_as] = binary
    needed = any(field.is_required() for field in kind.model_fields.values())
    return {"requestBody": {"required": needed or pictures, "content": content}}


def body_schemas() -> dict[str, Any]:
    """The components that `request_docs` refers to."""
    pairs: list[tuple[type[BaseModel], Literal["validation"]]] = [
        (body, "validation") for body in _BODIES
    ]
    _, schema = models_json_schema(pairs, ref_template=_REFERENCE)
    definitions: dict[str, Any] = schema["$defs"]
    return definitions


def _form_schema(kind: type[BaseModel]) -> dict[str, Any]:
    properties: dict[str, Any] = {
        "files": {"type": "array", "items": {"type": "string", "format": "binary"}}
    }
    for name, field in kind.model_fields.items():
        properties[name] = {"type": "string", "description": field.description or ""}
    return {"type": "object", "properties": properties}
