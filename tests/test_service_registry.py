"""What may be served together."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import clipserve
from clipserve import checkpoint
from clipserve.errors import ConfigError, IndexStoreError
from clipserve.model import create
from index.collection import Collection
from service.errors import ModelFailed
from service.registry import Registry
from service.settings import load_settings


@pytest.fixture
def registry() -> Iterator[Registry]:
    made = Registry(load_settings())
    yield made
    made.close()


def load(path: Path) -> clipserve.Model:
    return clipserve.load(path, device="cpu", dtype="fp32")


def make_collection(path: Path, fingerprint: str) -> Path:
    Collection.create(path, fingerprint=fingerprint, model_name="m", embed_dim=16).close()
    return path


def test_a_collection_of_another_model_is_refused_naming_both(registry, model_dir, tmp_path):
    served = registry.add_model(load(model_dir))
    path = make_collection(tmp_path / "c", "f" * 64)
    with pytest.raises(IndexStoreError, match="f" * 12) as refused:
        registry.add_collection(path)
    assert served.fingerprint[:12] in str(refused.value)


def test_each_collection_is_bound_to_the_model_that_made_it(
    registry, model_dir, architecture, tmp_path
):
    torch.manual_seed(1)
    checkpoint.save(create(architecture), tmp_path / "other", name="tiny")
    first = registry.add_model(load(model_dir))
    second = registry.add_model(load(tmp_path / "other"))
    assert first.name == "tiny"
    assert second.name == f"tiny@{second.fingerprint[:12]}"
    for name, model in (("a", first), ("b", second)):
        path = make_collection(tmp_path / name, model.fingerprint)
        assert registry.add_collection(path).model is model
    assert registry.model(None) is first


def test_the_same_model_or_name_twice_is_refused(registry, model_dir, tmp_path):
    served = registry.add_model(load(model_dir))
    with pytest.raises(ConfigError, match="given twice"):
        registry.add_model(load(model_dir))
    registry.add_collection(make_collection(tmp_path / "x" / "c", served.fingerprint))
    with pytest.raises(ConfigError, match="'c'; rename"):
        registry.add_collection(make_collection(tmp_path / "y" / "c", served.fingerprint))


def test_a_model_that_was_never_saved_is_refused(registry, tiny_model):
    with pytest.raises(ConfigError, match="save it first"):
        registry.add_model(tiny_model)


def test_a_model_that_gives_no_vectors_is_found_before_it_is_served(registry, tiny_model, tmp_path):
    with torch.no_grad():
        tiny_model.network.visual.proj.fill_(float("nan"))
    checkpoint.save(tiny_model, tmp_path / "broken", name="broken")
    with pytest.raises(ModelFailed, match="not finite"):
        registry.add_model(load(tmp_path / "broken")).pipeline.warm_up()


@pytest.mark.parametrize("wanted", [True, False])
def test_a_served_collection_is_looked_after_unless_settings_say_no(
    wanted: bool, model_dir: Path, tmp_path: Path
) -> None:
    registry = Registry(load_settings(rebuild_indexes=wanted))
    served = registry.add_model(load(model_dir))
    registry.add_collection(make_collection(tmp_path / "c", served.fingerprint))
    assert ("maintainer" in [thread.name for thread in threading.enumerate()]) is wanted
    registry.close()
    assert "maintainer" not in [thread.name for thread in threading.enumerate()]
