from pathlib import Path

import pytest

from clipserve.config import TrainData, describe_fields, dump_toml, load_config, preset_names
from clipserve.errors import ConfigError

NEEDED = ["out=run", "data.train=shards", "train.epochs=3"]


def test_three_settings_suffice_and_the_tiny_preset_is_the_default() -> None:
    config = load_config(None, NEEDED)
    assert (config.out, config.train.epochs) == ("run", 3)
    assert config.data.train == (TrainData(path="shards"),)
    assert isinstance(config.model.architecture, dict)
    assert config.model.architecture["vision_cfg"]["image_size"] == 64
    assert [objective.name for objective in config.objectives] == ["contrastive"]


def test_override_beats_file_beats_preset(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text(
        'out = "a"\n[data]\ntrain = "s"\nbatch_size = 64\n[optim]\nlr = 2e-3\n[train]\nsteps = 5\n'
    )
    config = load_config(file, ["data.batch_size=32"])
    assert config.data.batch_size == 32
    assert config.optim.lr == 2e-3
    assert config.optim.warmup_steps == 50  # the preset's


def test_an_inline_key_refines_the_preset_architecture() -> None:
    config = load_config(None, [*NEEDED, "model.architecture.vision_cfg.width=128"])
    assert isinstance(config.model.architecture, dict)
    assert config.model.architecture["vision_cfg"]["width"] == 128
    assert config.model.architecture["vision_cfg"]["patch_size"] == 8
    config = load_config(None, [*NEEDED, "model.architecture.embed_dim=128"])
    assert isinstance(config.model.architecture, dict)
    assert config.model.architecture["embed_dim"] == 128
    assert config.optim.warmup_steps == 50


def test_pretrained_weights_bring_their_own_architecture() -> None:
    assert load_config(None, [*NEEDED, "model.pretrained=x"]).model.architecture is None


def test_an_architecture_by_name_takes_no_preset() -> None:
    config = load_config(None, [*NEEDED, "model.architecture=ViT-B-16"])
    assert config.model.architecture == "ViT-B-16"
    assert config.optim.warmup_steps == 500


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data.batchsize=3", ["data.batchsize", "batch_size"]),
        ("trian.epochs=3", ["trian", "train"]),
        ("objectives=[{name='contrastive', wieght=2}]", ["wieght", "weight"]),
        ("model.preset=tyni", ["tyni", "tiny"]),
        ("data.batch_size=many", ["data.batch_size", "many"]),
        ("data.batch_size=1", ["data.batch_size", "2"]),
        ("data.crop_scale=[0.5, 0.2]", ["crop_scale"]),
        ("objectives=[]", ["objectives"]),
        ("objectives=[{name='contrast'}]", ["contrast", "did you mean 'contrastive'"]),
        ("objectives=[{weight=2}]", ["objectives.0", "no name"]),
        ("objectives=[{name='matching'}]", ["bring pictures and captions together"]),
        ("objectives=contrastive", ["objectives", "contrastive"]),
        ("objectives=[{name='contrastive', positives=['label']}]", ["data.label_field"]),
        ("train.rerank=-1", ["train.rerank", "-1"]),
        ("train.rerank_score=cosine", ["rerank_score", "matching+cosine"]),
        ("train.steps=4", ["exactly one"]),
        ("nonsense", ["section.key=value"]),
        ("optim.lr=inf", ["optim.lr"]),
        ("optim.betas=[2, 2]", ["betas"]),
        ("model.architecture=5", ["architecture"]),
        ("out=", ["out = ''", "at least 1 character"]),
        ("train.best_metric=val/mean_r10", ["train.best_metric", "nothing to watch", "data.val"]),
        ("train.early_stop={patience=2}", ["train.early_stop", "nothing to watch", "data.val"]),
    ],
)
def test_a_wrong_setting_is_one_line_that_names_it(override: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, [*NEEDED, override])
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_missing_and_broken_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.toml does not exist"):
        load_config(tmp_path / "nowhere.toml")
    (tmp_path / "bad.toml").write_text("out = [")
    with pytest.raises(ConfigError, match=r"bad\.toml cannot be read"):
        load_config(tmp_path / "bad.toml")


def test_of_a_missing_table_the_settings_are_named() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config()
    assert str(caught.value) == (
        "out is required; data.train is required; give exactly one of train.epochs and train.steps"
    )
    with pytest.raises(ConfigError, match=r"^data\.train is required$"):
        load_config(None, ["out=x", "train.epochs=1"])


@pytest.mark.parametrize("preset", preset_names())
def test_resolved_config_survives_the_round_trip_through_toml(preset: str, tmp_path: Path) -> None:
    awkward = 'out="a \\"b\\" \\\\ \u00e9 #"'
    config = load_config(None, [*NEEDED[1:], awkward, f"model.preset={preset}"])
    file = tmp_path / "config.toml"
    file.write_text(dump_toml(config), encoding="utf-8")
    again = load_config(file)
    assert again.model_dump(exclude={"model": {"preset"}}) == config.model_dump(
        exclude={"model": {"preset"}}
    )


def test_an_objective_has_the_settings_of_its_kind_alone() -> None:
    with pytest.raises(ConfigError, match=r"tile_size.*known: name, weight, negatives, positives"):
        load_config(None, [*NEEDED, "objectives=[{name='matching', tile_size=2}]"])


def test_settings_of_every_kind_of_objective_are_described() -> None:
    names = [name for name, _, _ in describe_fields()]
    assert len(names) == len(set(names))
    assert "objectives[].contrastive.tile_size" in names
    assert "objectives[].momentum_contrast.queue_size" in names
    assert "objectives[].simclr.temperature" in names
    assert "objectives[].barlow_twins/vicreg/simsiam.hidden_size" in names
    assert "objectives[].barlow_twins/vicreg/simsiam.temperature" not in names


def test_a_config_cannot_be_written_to() -> None:
    config = load_config(None, NEEDED)
    with pytest.raises(ValueError, match="frozen"):
        config.train.seed = 3


def test_every_setting_says_its_meaning() -> None:
    rows = describe_fields()
    assert len(rows) > 20
    assert [name for name, _, meaning in rows if not meaning] == []
