"""The table of errors: statuses, codes, and messages that tell nothing of this machine."""

import errno

import orjson
import pytest
from pydantic import ValidationError

from clipserve.errors import (
    CheckpointError,
    ClipserveError,
    ConfigError,
    DiskFull,
    FilterError,
    ImageError,
    IndexStoreError,
)
from index.filters import parse
from service.errors import (
    Forbidden,
    HeadersTooLarge,
    NotFound,
    Overloaded,
    RequestError,
    Unauthorized,
    at,
    error_fields,
    error_response,
    invalid_body,
)
from service.schemas import ClassifyRequest, SearchRequest, UpsertRequest


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (RequestError("x"), 400, "invalid_request"),
        (RequestError("x", code="own"), 400, "own"),
        (FilterError("x"), 400, "invalid_filter"),
        (Unauthorized("x"), 401, "invalid_api_key"),
        (Forbidden("x"), 403, "forbidden"),
        (NotFound("x"), 404, "not_found"),
        (CheckpointError("x"), 422, "invalid_checkpoint"),
        (ImageError("x"), 422, "invalid_image"),
        (Overloaded("x"), 429, "overloaded"),
        (HeadersTooLarge("x"), 431, "headers_too_large"),
        (IndexStoreError("x"), 500, "collection_failed"),
        (ConfigError("x"), 500, "internal_error"),
        (DiskFull("x"), 507, "disk_full"),
        (OSError(errno.ENOSPC, "No space left on device"), 507, "disk_full"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), 507, "disk_full"),
        (OSError(errno.EIO, "Input/output error"), 500, "internal_error"),
        (MemoryError(), 500, "internal_error"),
    ],
)
def test_each_error_has_its_status_and_its_code_in_body_and_header(error, status, code):
    response = error_response(error)
    assert response.status_code == status
    assert orjson.loads(response.body)["error"]["code"] == code
    assert response.headers["x-clipserve-error"] == code


def test_a_filters_error_says_where():
    with pytest.raises(FilterError) as caught:
        parse({"price": {"lt": [1]}})
    assert "price" in error_fields(caught.value)["message"]


@pytest.mark.parametrize(
    "error",
    [
        CheckpointError("/srv/models/secret is damaged"),
        IndexStoreError("/srv/secret/items.sqlite is locked"),
        ClipserveError("/srv/secret"),
        OSError(2, "No such file", "/srv/secret"),
        OSError(errno.ENOSPC, "No space left on device", "/srv/secret"),
        RuntimeError("<object at 0x7f0000000000> secret"),
    ],
)
def test_what_might_hold_a_path_or_an_address_is_logged_and_replaced(error, caplog):
    body = bytes(error_response(error).body)
    assert b"secret" not in body
    assert b"0x7f" not in body
    assert "secret" in caplog.text


def test_an_error_of_one_item_says_which():
    assert error_fields(at(ImageError("damaged"), "input[2]"))["param"] == "input[2]"
    assert error_fields(at(RequestError("bad", param="own"), "input[2]"))["param"] == "own"


def test_a_wrong_body_is_told_without_its_values():
    problems = [{"type": "int_parsing", "loc": ("body", "k"), "msg": "Input should be a number"}]
    fields = error_fields(invalid_body(problems))
    assert (fields["param"], fields["message"]) == ("k", "k: Input should be a number")
    unknown = [{"type": "extra_forbidden", "loc": ("secret",), "msg": "not permitted"}]
    assert "secret" not in str(error_fields(invalid_body(unknown)))
    assert error_fields(invalid_body(unknown))["param"] is None


@pytest.mark.parametrize(
    ("kind", "body", "place"),
    [
        (UpsertRequest, {"items": [{"id": "a"}, {"id": "b", "metadata": 1}]}, "items[1].metadata"),
        (UpsertRequest, {"items": [{"id": "a"}, {"id": "b", "metdata": {}}]}, "items[1]"),
        (SearchRequest, {"batch": [{"queries": [{"txt": "a"}]}]}, "batch[0].queries[0]"),
        (SearchRequest, {"batch": [{"text": "a"}, {"vector": ["x"]}]}, "batch[1].vector[0]"),
        (ClassifyRequest, {"images": ["a", 0]}, "images[1]"),
        (ClassifyRequest, {"templates": 0}, "templates"),
        (ClassifyRequest, {"top_k": 0}, "top_k"),
    ],
)
def test_a_wrong_body_is_told_by_its_place_as_routes_tell_it(kind, body, place):
    with pytest.raises(ValidationError) as caught:
        kind.model_validate(body)
    fields = error_fields(invalid_body(caught.value.errors()))
    assert fields["param"] == place
    assert fields["message"].startswith(place)
