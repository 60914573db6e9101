import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from albefs import CAPTIONS, decided_albef
from conftest import make_picture

from clipserve.config import RerankScore
from clipserve.errors import ConfigError
from clipserve.images import decode_image, make_thumbnail
from clipserve.model import Model
from index import rerank as rerank_module
from index.collection import Collection
from index.items import Item
from index.rerank import rerank
from index.search import Hit, Searcher

NUM = 12
TEXTS = CAPTIONS[:3]


@pytest.fixture
def model(tmp_path: Path) -> Model:
    return decided_albef(tmp_path / "words")


@pytest.fixture
def thumbnails() -> list[bytes]:
    return [make_thumbnail(make_picture(seed=i)) for i in range(NUM)]


@pytest.fixture
def collection(tmp_path: Path, model: Model, thumbnails: list[bytes]) -> Iterator[Collection]:
    path = tmp_path / "pets"
    with Collection.create(path, fingerprint="a" * 64, model_name="t", embed_dim=16) as made:
        made.upsert(
            [Item(f"{i:02d}") for i in range(NUM)], model.embed_images(thumbnails), thumbnails
        )
        yield made


def find(model: Model, collection: Collection, texts: list[str], k: int = 8) -> list[list[Hit]]:
    with Searcher(collection.path, device="cpu") as searcher:
        return searcher.search(model.embed_texts(texts), k)


@torch.no_grad()
def logits(model: Model, thumbnail: bytes, text: str) -> np.ndarray:
    """(2,): no match, match; of one pair alone."""
    pixels = torch.from_numpy(model.transform.resize(decode_image(thumbnail)))[None]
    image, _ = model.network.encode_image_states(model.transform.normalize(pixels))
    ids = model.tokenizer([text]).cut()
    words, _ = model.network.encode_text_states(ids)
    return model.network.matching_logits(model.network.fuse(words, ids, image))[0].numpy()


@pytest.mark.parametrize("score", get_args(RerankScore))
def test_the_first_hits_are_in_the_order_of_the_matching_head(
    model: Model, collection: Collection, thumbnails: list[bytes], score: RerankScore
) -> None:
    before = find(model, collection, TEXTS)
    found = rerank(model, TEXTS, before, collection, k_test=5, score=score)
    assert found.pairs_per_second > 0
    scale = model.logit_scale.item()
    factor = {"matching": 0.0, "matching+cosine": 1.0, "matching+contrastive": scale}[score]
    assert found.hits != before
    for text, old, new in zip(TEXTS, before, found.hits, strict=True):
        keys = {}
        for hit in old[:5]:
            no, yes = logits(model, thumbnails[int(hit.id)], text)
            keys[hit.id] = yes + factor * hit.score
            (moved,) = [one for one in new if one.id == hit.id]
            assert moved.matching == pytest.approx(1 / (1 + np.exp(no - yes)), abs=1e-5)
            assert moved.score == hit.score
        assert [hit.id for hit in new[:5]] == sorted(keys, key=lambda id: -keys[id])
        assert new[5:] == old[5:]


def test_a_hit_without_a_picture_keeps_its_place(
    model: Model,
    collection: Collection,
    thumbnails: list[bytes],
    caplog: pytest.LogCaptureFixture,
) -> None:
    before = find(model, collection, TEXTS[:1])[0]
    rows = [Item(before[i].id) for i in (1, 2)]
    vectors = model.embed_images([thumbnails[int(row.id)] for row in rows])
    collection.upsert(rows, vectors, [None, thumbnails[0][:100]])
    with caplog.at_level(logging.WARNING):
        new = rerank(model, TEXTS[:1], [before], collection, k_test=5).hits[0]
    assert f"picture kept of item '{before[2].id}' is not matched" in caplog.text
    assert new[1:3] == before[1:3]
    assert {hit.id for hit in new[:5]} == {hit.id for hit in before[:5]}
    assert [hit.matching is None for hit in new[:5]] == [False, True, True, False, False]


def test_pieces_do_not_show_and_each_picture_is_encoded_once(
    model: Model, collection: Collection, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = find(model, collection, TEXTS)
    whole = rerank(model, TEXTS, before, collection)
    encoded = []
    encode = model.network.encode_image_states
    monkeypatch.setattr(
        model.network, "encode_image_states", lambda x: encoded.append(len(x)) or encode(x)
    )
    monkeypatch.setattr(rerank_module, "_IMAGES_AT_A_TIME", 3)
    pieces = rerank(model, TEXTS, before, collection)
    assert sum(encoded) == len({hit.id for own in before for hit in own})
    assert max(encoded) == 3
    for one, other in zip(whole.hits, pieces.hits, strict=True):
        assert [hit.id for hit in one] == [hit.id for hit in other]
        assert np.allclose([h.matching for h in one], [h.matching for h in other], atol=1e-5)


def test_k_test_is_clamped_to_the_hits_and_none_is_none(
    model: Model, collection: Collection
) -> None:
    before = find(model, collection, TEXTS, k=3)
    found = rerank(model, [*TEXTS, "none"], [*before, []], collection, k_test=1000)
    assert [len(own) for own in found.hits] == [3, 3, 3, 0]
    nothing = rerank(model, [], [], collection)
    assert (nothing.hits, nothing.pairs_per_second) == ([], 0)


def test_a_hit_that_was_deleted_meanwhile_keeps_its_place(
    model: Model, collection: Collection
) -> None:
    before = find(model, collection, TEXTS[:1])[0]
    collection.delete([before[0].id])
    new = rerank(model, TEXTS[:1], [before], collection).hits[0]
    assert new[0] == before[0]
    assert new[1].matching is not None


def test_a_model_without_fusion_is_refused(tiny_model: Model, collection: Collection) -> None:
    with pytest.raises(ConfigError, match="no fusion layers"):
        rerank(tiny_model, ["a"], [[]], collection)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"k_test": 0}, "k_test = 0"),
        ({"score": "cosine"}, "'cosine'; use matching or matching.cosine or matching.contrastive"),
        ({"texts": ["a", "b"]}, "2 texts for 1 lists"),
    ],
)
def test_what_cannot_be_done_is_said(
    model: Model, collection: Collection, arguments: dict[str, Any], says: str
) -> None:
    texts = arguments.pop("texts", ["a"])
    with pytest.raises(ConfigError, match=says):
        rerank(model, texts, [[]], collection, **arguments)
