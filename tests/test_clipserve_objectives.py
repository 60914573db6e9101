from pathlib import Path
from typing import Any, get_args

import pytest
from albefs import albef_table, vocabulary
from cocas import coca_architecture
from conftest import tiny_architecture

from clipserve.config import Config, dump_toml, load_config
from clipserve.errors import ConfigError
from clipserve.objectives import Objective, find_momentum
from training.data import open_data
from training.distributed import ALONE
from training.recipe import Run, prepare
from training.run_directory import RunDirectory
from training.shards import pack

NEEDED = ["out=run", "data.train=shards", "train.epochs=3"]


def configure(*objectives: str) -> Config:
    tables = ", ".join(f"{{{objective}}}" for objective in objectives)
    return load_config(None, [*NEEDED, f"objectives=[{tables}]"])


def refusal(*objectives: str) -> str:
    with pytest.raises(ConfigError) as caught:
        configure(*objectives)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("objectives", "reason"),
    [
        ((), "objectives is empty; add"),
        (("name='contrastive'", "name='contrastive'"), "contrastive twice; give it once"),
        (("name='sigmoid'", "name='contrastive'"), "sigmoid and contrastive would pull one temp"),
        (("name='sigmoid'", "name='momentum_contrast'"), "sigmoid and momentum_contrast would"),
        (("name='simclr'",), "simclr do not bring pictures and captions together"),
        (("name='captioning'",), "captioning do not bring pictures and captions together"),
        (("name='vicreg'", "name='simsiam'"), "vicreg, simsiam do not bring pictures"),
        (("name='sigmoid'", "name='matching'"), "matching draws its hard negatives by contrastive"),
        (("name='distill', teacher='t'", "name='matching'"), "matching draws its hard negatives"),
        (("name='contrastive'", "name='masked_language'"), "momentum_contrast, or set alpha = 0"),
        (("name='distill', teacher='t', features=0, affinity=0",), "does nothing; raise one"),
        (
            ("name='contrastive'", "name='simclr', crop_scale=[0.5, 0.2]"),
            "crop_scale [0.5, 0.2] of simclr must be 0 < low <= high",
        ),
        (("name='contrastive', positives=['label']",), "need data.label_field"),
        (
            ("name='contrastive'", "name='simclr', crop_scale=[0.1, 1]", "name='vicreg'"),
            "share their two views, but name different crop_scale",
        ),
        (("name='sigmoid'", "name='distill', teacher='t'"), "sigmoid and distill would pull one"),
        (
            ("name='sigmoid'", "name='contrastive'", "name='momentum_contrast'"),
            "sigmoid and contrastive would",
        ),
    ],
)
def test_what_can_not_be_meant_is_refused_with_the_reason(
    objectives: tuple[str, ...], reason: str
) -> None:
    assert reason in refusal(*objectives)


@pytest.mark.parametrize(
    ("objective", "words"),
    [
        ("name='contrastiv'", ["unknown objective 'contrastiv'", "did you mean 'contrastive'?"]),
        ("name='momentum'", ["unknown objective 'momentum'", "momentum_contrast"]),
        ("name='xyz'", ["unknown objective 'xyz'", "known: contrastive, sigmoid", "captioning"]),
        ("weight=2", ["objectives.0 has no name", "contrastive"]),
        ("name='contrastive', tile=3", ["contrastive.tile", "did you mean 'tile_size'?"]),
        ("name='momentum_contrast', queue=3", ["queue", "did you mean 'queue_size'?"]),
        ("name='vicreg', temperature=1", ["unknown setting", "temperature"]),
        ("name='simclr', temprature=1", ["temprature", "did you mean 'temperature'?"]),
        ("name='matching', negative='batch'", ["did you mean 'negatives'?"]),
        ("name='matching', negatives='queue'", ["negatives = 'queue'", "'process' or 'batch'"]),
        ("name='sigmoid', exchange='tree'", ["exchange = 'tree'", "'gather' or 'ring'"]),
        ("name='contrastive', positives=['photo']", ["photo", "'picture', 'caption' or 'label'"]),
        ("name='contrastive', weight=0", ["weight = 0", "greater than 0"]),
        ("name='contrastive', tile_size=0", ["tile_size = 0"]),
        ("name='sigmoid', chunk_size=0", ["chunk_size = 0"]),
        ("name='momentum_contrast', queue_size=-1", ["queue_size = -1"]),
        ("name='momentum_contrast', momentum=1", ["momentum = 1", "less than 1"]),
        ("name='momentum_contrast', alpha=1.5", ["alpha = 1.5"]),
        ("name='momentum_contrast', alpha_ramp_epochs=-1", ["alpha_ramp_epochs = -1"]),
        ("name='masked_language', probability=1", ["probability = 1"]),
        ("name='masked_language', probability=0", ["probability = 0"]),
        ("name='distill'", ["teacher is required"]),
        ("name='distill', teacher=''", ["teacher"]),
        ("name='simclr', temperature=0", ["temperature = 0"]),
    ],
)
def test_a_wrong_setting_is_named_with_what_is_allowed(objective: str, words: list[str]) -> None:
    message = refusal(objective)
    for word in words:
        assert word in message


ALL = [
    "name='contrastive', positives=['picture', 'label'], tile_size=512",
    "name='momentum_contrast', weight=0.5, queue_size=0, momentum=0.9, alpha=0,"
    " alpha_ramp_epochs=2.5, positives=[]",
    "name='matching', negatives='batch', positives=['caption']",
    "name='masked_language', probability=0.3, alpha=0.1",
    "name='distill', teacher='a b/c', features=0, affinity=2",
    "name='simclr', temperature=0.2, hidden_size=8, output_size=4, crop_scale=[0.3, 0.9]",
    "name='barlow_twins', crop_scale=[0.3, 0.9]",
    "name='vicreg', crop_scale=[0.3, 0.9]",
    "name='simsiam', crop_scale=[0.3, 0.9]",
    "name='captioning', weight=2",
]
SIGLIP = ["name='sigmoid', positives=['picture'], chunk_size=64, exchange='ring'"]


@pytest.mark.parametrize("objectives", [ALL, SIGLIP])
def test_every_kind_survives_the_round_trip_through_toml(
    objectives: list[str], tmp_path: Path
) -> None:
    tables = ", ".join(f"{{{objective}}}" for objective in objectives)
    config = load_config(None, [*NEEDED, f"objectives=[{tables}]", "data.label_field=colour"])
    assert len(config.objectives) == len(objectives)
    file = tmp_path / "config.toml"
    file.write_text(dump_toml(config), encoding="utf-8")
    again = load_config(file)
    assert again.objectives == config.objectives
    assert [type(o) for o in again.objectives] == [type(o) for o in config.objectives]


def test_the_round_trip_leaves_no_kind_out() -> None:
    (union, _) = get_args(Objective)
    known = {name for kind in get_args(union) for name in get_args(kind.__annotations__["name"])}
    assert {text.split("'")[1] for text in ALL + SIGLIP} == known


def test_the_momentum_copy_has_one_owner() -> None:
    config = configure("name='contrastive'", "name='momentum_contrast', queue_size=3")
    found = find_momentum(config.objectives)
    assert found is config.objectives[1]
    assert find_momentum(configure("name='contrastive'").objectives) is None


def test_albefs_objectives_go_together() -> None:
    config = configure(
        "name='momentum_contrast'", "name='matching'", "name='masked_language'", "name='simclr'"
    )
    assert [o.name for o in config.objectives][-1] == "simclr"
    configure("name='contrastive'", "name='masked_language', alpha=0")
    configure("name='distill', teacher='t'")
    configure("name='contrastive'", "name='distill', teacher='t', features=0")


@pytest.fixture
def prepared(captioned: Any, tmp_path: Path) -> Any:
    """prepared(architecture, *objectives) -> what training would work on."""
    pack(captioned(4), tmp_path / "shards")

    def make(architecture: dict[str, Any], *objectives: dict[str, Any]) -> Run:
        config = Config.model_validate(
            {
                "out": str(tmp_path / "run"),
                "model": {"architecture": architecture},
                "data": {"train": str(tmp_path / "shards"), "batch_size": 2},
                "objectives": objectives,
                "train": {"steps": 1, "compile": "off"},
            }
        )
        data = open_data(config, RunDirectory(tmp_path / "run", 1))
        return prepare(config, data, ALONE)

    return make


CONTRASTIVE = {"name": "contrastive"}


@pytest.mark.parametrize(
    ("objectives", "reason"),
    [
        ([CONTRASTIVE, {"name": "matching"}], "matching needs fusion layers, .*preset albef_tiny"),
        (
            [CONTRASTIVE, {"name": "masked_language", "alpha": 0}],
            "masked_language needs fusion layers",
        ),
        ([{"name": "sigmoid"}], "sigmoid needs a logit bias; add init_logit_bias"),
        ([CONTRASTIVE, {"name": "captioning"}], "captioning needs a text decoder; use a CoCa"),
        ([{"name": "distill", "teacher": "nowhere"}], "'nowhere' is not a model directory"),
    ],
)
def test_an_objective_that_the_model_cannot_serve_is_refused(
    prepared: Any, objectives: list[dict[str, Any]], reason: str
) -> None:
    with pytest.raises(ConfigError, match=reason) as caught:
        prepared(tiny_architecture(), *objectives)
    assert "\n" not in str(caught.value)


def test_masked_words_need_their_head(prepared: Any, tmp_path: Path) -> None:
    table = albef_table(tokenizer_path=str(vocabulary(tmp_path / "words")))
    words = {"name": "masked_language", "alpha": 0}
    prepared(table, CONTRASTIVE, words)
    table["fusion_cfg"]["token_head"] = False
    with pytest.raises(ConfigError, match="masked_language needs a head for masked words"):
        prepared(table, CONTRASTIVE, words)
    prepared(table, CONTRASTIVE, {"name": "matching"})


def test_the_architecture_that_has_the_part_is_taken(prepared: Any) -> None:
    bias = {"init_logit_bias": -10.0, "init_logit_scale": 2.3}
    assert prepared(tiny_architecture() | bias, {"name": "sigmoid"}).networks.model.logit_bias < 0
    run = prepared(coca_architecture(), CONTRASTIVE, {"name": "captioning"})
    assert run.networks.model.has_decoder
