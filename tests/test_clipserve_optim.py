from pathlib import Path

import pytest

from clipserve.config import describe_fields, dump_toml, load_config
from clipserve.errors import ConfigError
from clipserve.optim import OptimConfig

NEEDED = ["out=run", "data.train=shards", "train.epochs=3"]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["optim.name=adam"], ["optim.name", "'adamw'"]),
        (["optim.schedule=wsd"], ["wsd needs optim.decay_steps"]),
        (["optim.decay_steps=9"], ["decay_steps has no use", "cosine"]),
        (["optim.unfreeze_after_steps=9"], ["no use without optim.freeze"]),
        (["optim.name=lion", "optim.eps=1e-8"], ["eps has no use", "lion"]),
        (["optim.layer_decay=1"], ["optim.layer_decay", "less than 1"]),
        (["optim.image.lr=0"], ["optim.image.lr", "greater than 0"]),
        (["optim.imge.lr=1"], ["optim.imge", "did you mean 'image'"]),
        (["optim.image.wd=1"], ["optim.image.wd", "weight_decay"]),
        (["optim.fusion.layer_decay=0.5"], ["unknown setting 'optim.fusion.layer_decay'"]),
        (
            [
                "optim.layer_decay=0.5",
                "optim.image.layer_decay=0.6",
                "optim.text.layer_decay=0.7",
            ],
            ["optim.layer_decay has no use"],
        ),
        (["train.early_stop={patience=3}"], ["nothing to watch", "data.val"]),
        (["train.early_stop={patience=0}", "data.val=x"], ["train.early_stop.patience"]),
        (["train.early_stop={metric='val/mean_r1'}", "data.val=x"], ["patience is required"]),
        (["train.ema=1"], ["train.ema", "less than 1"]),
    ],
)
def test_what_cannot_be_meant_is_one_line_that_says_why(given: list[str], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, [*NEEDED, *given])
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_tables_of_parts_survive_the_round_trip_through_toml(tmp_path: Path) -> None:
    given = [
        "optim.image={lr=1e-5, layer_decay=0.75}",
        "optim.heads.weight_decay=0",
        'optim.freeze=["text.*", "!text.text_projection"]',
        "train.early_stop={patience=2, metric='val/t2i_r5'}",
        "train.ema=0.99",
        "data.val=x",
    ]
    config = load_config(None, [*NEEDED, *given])
    file = tmp_path / "config.toml"
    file.write_text(dump_toml(config))
    again = load_config(file)
    assert (again.optim, again.train) == (config.optim, config.train)
    assert config.train.early_stop is not None
    assert config.train.early_stop.metric == "val/t2i_r5"


def test_tables_that_are_no_list_are_described_without_brackets() -> None:
    names = [name for name, _, _ in describe_fields()]
    assert {"optim.image.layer_decay", "optim.fusion.lr", "train.early_stop.patience"} < set(names)
    assert "data.train[].path" in names


def test_a_towers_layer_decay_stands_in_place_of_that_of_all() -> None:
    config = OptimConfig.model_validate({"layer_decay": 0.5, "text": {"layer_decay": 1}})
    assert config.layer_decay_of("image") == 0.5
    assert config.layer_decay_of("text") == 1
    assert config.layer_decay_of("fusion") is None
    assert OptimConfig.model_validate({"image": {"lr": 1}}).layer_decay_of("image") is None
