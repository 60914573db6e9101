"""What /openapi.json says of the routes and their bodies, and which keys they ask for."""

import json
import threading
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError
from served import World, error, serving

from service import bodies, schemas
from service.compat import clip_as_service, clip_retrieval, cohere, infinity, rerank
from service.keys import SCOPES, add_key
from service.settings import load_settings

OWN_ROUTES = {
    ("post", "/v1/embeddings"),
    ("post", "/v1/classify"),
    ("get", "/v1/label-sets"),
    ("get", "/v1/template-sets"),
    ("post", "/v1/match"),
    ("post", "/v1/search"),
    ("get", "/v1/models"),
    ("get", "/v1/models/{name}"),
    ("post", "/v1/models/{name}:reload"),
    ("get", "/v1/collections"),
    ("get", "/v1/collections/{name}"),
    ("put", "/v1/collections/{name}"),
    ("delete", "/v1/collections/{name}"),
    ("post", "/v1/collections/{name}:rebuild"),
    ("get", "/v1/collections/{name}/count"),
    ("get", "/v1/collections/{name}/items"),
    ("put", "/v1/collections/{name}/items"),
    ("post", "/v1/collections/{name}/items:delete"),
    ("get", "/v1/collections/{name}/items/{id}"),
    ("delete", "/v1/collections/{name}/items/{id}"),
    ("get", "/v1/collections/{name}/items/{id}/image"),
    ("get", "/v1/jobs"),
    ("post", "/v1/jobs"),
    ("get", "/v1/jobs/{id}"),
    ("delete", "/v1/jobs/{id}"),
    ("post", "/v1/jobs/{id}:append"),
    ("post", "/v1/jobs/{id}:start"),
    ("get", "/health"),
    ("get", "/health/live"),
    ("get", "/health/ready"),
    ("get", "/metrics"),
}
PICTURES = {"application/json", "multipart/form-data", "image/jpeg", "image/png", "image/webp"}
JSON = {"application/json"}
BODIES = {
    ("post", "/v1/embeddings"): (schemas.EmbeddingsRequest, PICTURES),
    ("post", "/v1/classify"): (schemas.ClassifyRequest, PICTURES),
    ("post", "/v1/match"): (schemas.MatchRequest, PICTURES),
    ("post", "/v1/search"): (schemas.SearchRequest, PICTURES),
    ("post", "/v1/models/{name}:reload"): (schemas.ReloadRequest, JSON),
    ("put", "/v1/collections/{name}"): (schemas.CreateRequest, JSON),
    ("put", "/v1/collections/{name}/items"): (schemas.UpsertRequest, JSON),
    ("post", "/v1/collections/{name}/items:delete"): (schemas.DeleteRequest, JSON),
    ("post", "/v1/jobs"): (schemas.JobRequest, JSON | {"application/x-ndjson"}),
}


def test_every_route_is_documented(world: World):
    schema = world.client.get("/openapi.json").json()
    documented = {(method, path) for path, ways in schema["paths"].items() for method in ways}
    assert documented >= OWN_ROUTES
    references = set(json.dumps(schema).split('"#/components/schemas/')[1:])
    for reference in references:
        assert reference.partition('"')[0] in schema["components"]["schemas"]
    for path, ways in schema["paths"].items():
        for method, route in ways.items():
            assert route.get("description"), (method, path)
    assert world.client.get("/docs").status_code == 200


@pytest.mark.parametrize("route", BODIES)
def test_every_field_of_a_body_is_documented(world: World, route: tuple[str, str]):
    schema = world.client.get("/openapi.json").json()
    body, types = BODIES[route]
    content = schema["paths"][route[1]][route[0]]["requestBody"]["content"]
    assert set(content) == types
    reference = content["application/json"]["schema"]["$ref"]
    assert reference == f"#/components/schemas/{body.__name__}"
    properties = schema["components"]["schemas"][body.__name__]["properties"]
    assert set(properties) == set(body.model_fields)
    if types == PICTURES:
        form = content["multipart/form-data"]["schema"]["properties"]
        assert set(form) == {*body.model_fields, "files"}
    for name, described in properties.items():
        assert described.get("description"), name


def test_every_part_of_a_body_is_documented():
    for name, component in schemas.body_schemas().items():
        assert component["description"], name
        for field, described in component["properties"].items():
            assert described.get("description"), (name, field)


READS = {"/v1/embeddings", "/v1/classify", "/v1/match", "/v1/search"}
ADMINS = {("delete", "/v1/collections/{name}"), ("post", "/v1/models/{name}:reload")}


def test_changes_need_a_key_of_a_higher_scope(tmp_path: Path, model_dir: Path):
    keys = {scope: add_key(tmp_path / "keys", scope, scope) for scope in SCOPES}
    settings = load_settings(api_keys_file=tmp_path / "keys")
    with serving(tmp_path, model_dir, settings) as world:

        def is_allowed(method: str, path: str, scope: str) -> bool:
            place = path.format(name="none", id="none")
            headers = {"Authorization": f"Bearer {keys[scope]}"}
            response = world.client.request(method, place, headers=headers)
            return response.json().get("error", {}).get("code") != "insufficient_scope"

        for method, path in sorted(OWN_ROUTES - {("get", "/metrics")}):
            needed = "read" if method == "get" or path in READS else "write"
            needed = "admin" if (method, path) in ADMINS else needed
            allowed = [scope for scope in SCOPES if is_allowed(method, path, scope)]
            assert allowed == list(SCOPES[SCOPES.index(needed) :]), (method, path)


LISTS: list[tuple[type[BaseModel], str, Any]] = [
    (schemas.ClassifyRequest, "images", 0),
    (schemas.ClassifyRequest, "texts", 0),
    (schemas.ClassifyRequest, "labels", 0),
    (schemas.ClassifyRequest, "templates", 0),
    (schemas.MatchRequest, "images", 0),
    (schemas.MatchRequest, "texts", 0),
    (schemas.SearchRequest, "batch", 0),
    (schemas.SearchRequest, "queries", 0),
    (schemas.SearchRequest, "vector", "x"),
    (schemas.UpsertItem, "vector", "x"),
    (schemas.UpsertRequest, "items", {}),
    (schemas.DeleteRequest, "ids", 0),
    (schemas.JobRequest, "items", {}),
    (clip_as_service.PostRequest, "data", 0),
    (clip_retrieval.KnnRequest, "embedding_input", "x"),
    (clip_retrieval.MetadataRequest, "ids", 0),
    (cohere.CohereEmbedRequest, "texts", 0),
    (cohere.CohereEmbedRequest, "images", 0),
    (cohere.CohereEmbedRequest, "embedding_types", 0),
    (cohere.CohereRerankRequest, "documents", 0),
    (infinity.EmbeddingsImageRequest, "input", 0),
    (rerank.RerankRequest, "texts", 0),
]


@pytest.mark.parametrize(("body", "name", "wrong"), LISTS)
def test_a_list_of_wrong_values_is_left_at_the_first(body: type[BaseModel], name: str, wrong: Any):
    with pytest.raises(ValidationError) as caught:
        body.model_validate({name: [wrong] * 1000})
    assert caught.value.error_count() < 10


@pytest.mark.parametrize(
    ("body", "name", "one", "limit"),
    [
        (schemas.ClassifyRequest, "labels", "a", schemas.MAX_VALUES),
        (schemas.SearchRequest, "batch", {}, schemas.MAX_OBJECTS),
        (cohere.CohereEmbedRequest, "inputs", {}, schemas.MAX_VALUES),
        (rerank.RerankRequest, "documents", 0, schemas.MAX_VALUES),
    ],
)
def test_a_list_may_not_be_endless(body: type[BaseModel], name: str, one: Any, limit: int):
    with pytest.raises(ValidationError, match=f"at most {limit} items"):
        body.model_validate({name: [one] * (limit + 1), "query": "a"})


def test_unknown_fields_are_not_each_an_error(world: World):
    fields = {f"f{i}": 0 for i in range(1000)}
    with pytest.raises(ValidationError) as caught:
        schemas.ClassifyRequest.model_validate(fields)
    assert caught.value.error_count() == 1
    answer = world.client.post("/v1/search", json={"batch": [fields]})
    assert (answer.status_code, error(answer)["param"]) == (422, "batch[0]")
    assert "more than 100 fields" in error(answer)["message"]


def test_a_body_of_lists_and_objects_alone_is_not_read(world: World, monkeypatch):
    monkeypatch.setattr(bodies, "_MAX_BRACKETS", 100)
    answer = world.client.post("/v1/embeddings", json={"input": [[]] * 100})
    assert (answer.status_code, error(answer)["code"]) == (422, "too_many_items")
    assert "more than 100 lists and objects" in error(answer)["message"]


def test_a_body_of_very_many_values_is_not_read(world: World, monkeypatch):
    monkeypatch.setattr(bodies, "_MAX_VALUES", 100)
    for body in ({"vector": [0.1] * 102}, {"filter": {f"f{i}": 0 for i in range(102)}}):
        answer = world.client.post("/v1/search", json=body)
        assert (answer.status_code, error(answer)["code"]) == (422, "too_many_items")
        assert "more than 100 values" in error(answer)["message"]


@pytest.mark.parametrize("body", ["[]", "1", '{"batch": [0]}'])
def test_what_is_no_object_is_told_by_its_place_alone(world: World, body: str):
    headers = {"Content-Type": "application/json"}
    answer = world.client.post("/v1/search", content=body, headers=headers)
    assert answer.status_code == 422
    assert error(answer)["message"].endswith("must be an object")


def test_what_is_no_json_says_so(world: World):
    headers = {"Content-Type": "application/json"}
    for body in (b"", b"{", b'{"text": \xff}', b"[" * 1000):
        answer = world.client.post("/v1/search", content=body, headers=headers)
        assert (answer.status_code, error(answer)["code"]) == (400, "invalid_json")


def test_the_error_of_a_large_body_is_made_in_the_pool(world: World, monkeypatch):
    where: list[str] = []
    invalid = bodies.invalid_body

    def noted(problems: Any) -> Any:
        where.append(threading.current_thread().name)
        return invalid(problems)

    monkeypatch.setattr(bodies, "invalid_body", noted)
    monkeypatch.setattr(bodies, "_LARGE_BODY_BYTES", 0)
    pool = world.registry.pool.submit(threading.current_thread).result().name
    assert world.client.post("/v1/classify", json={"labels": [0]}).status_code == 422
    assert where[0].rpartition("_")[0] == pool.rpartition("_")[0] != ""
