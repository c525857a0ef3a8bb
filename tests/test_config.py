"""The configuration: every recipe of the repository is valid, every mistake is one line that names the key."""

from pathlib import Path

import pytest
import yaml

from video_swinv2.config import Config, check, known_keys, load_config, to_yaml
from video_swinv2.errors import UsageError

RECIPES = sorted((Path(__file__).parents[1] / "configs").rglob("*.yaml"))


def smallest() -> dict[str, object]:
    return {
        "out": "run",
        "init": "scratch",
        "model": {"name": "swinv2_tiny"},
        "data": {"source": "clips", "image_size": 224},
        "optim": {"epochs": 1, "lr": 1e-3, "batch": 8, "micro_batch": 2},
    }


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_recipes_are_valid_and_survive_a_round_trip(path, tmp_path):
    config = load_config(path)
    (tmp_path / "again.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "again.yaml") == config


def test_overrides_reach_every_depth(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(yaml.safe_dump(smallest()))
    overrides = ["optim.lr=3e-4", "model.window=[8, 7, 7]", "engine.zero_stage=2", "data.source=[a, b]", "seed=7"]
    config = load_config(path, overrides)
    assert config.optim.lr == 3e-4
    assert config.model.window == (8, 7, 7)
    assert config.engine.zero_stage == 2
    assert config.data.source == ("a", "b")
    assert config.seed == 7


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optim.lrr=1", "unknown key optim.lrr; did you mean optim.lr?"),
        ("modell.name=x", "unknown key modell; did you mean model?"),
        ("optim.lr=fast", "optim.lr: 'fast' does not do"),
        ("optim.batch=-2", "optim.batch: -2 does not do"),
        ("model.attention=quick", "model.attention: 'quick' does not do"),
        ("engine.zero_stage=4", "engine.zero_stage: 4 does not do"),
        ("augment.flip=2", "augment.flip: 2 does not do"),
        ("seed.x=1", "seed: {'x': 1} does not do"),
        ("optim.lr", "an override is written key.sub=value"),
        ("optim.lr=[", "the value is not YAML"),
    ],
)
def test_mistakes_are_named_in_one_line(tmp_path, override, words):
    path = tmp_path / "a.yaml"
    path.write_text(yaml.safe_dump(smallest()))
    with pytest.raises(UsageError) as caught:
        load_config(path, [override])
    assert "\n" not in str(caught.value)
    assert words in str(caught.value)


@pytest.mark.parametrize("key", ["out", "init", "model", "optim"])
def test_nothing_needed_is_guessed(key):
    values = smallest()
    del values[key]
    with pytest.raises(UsageError, match=f"{key} is missing"):
        check(values, "a.yaml")


@pytest.mark.parametrize(
    ("text", "words"), [("- a\n- b\n", "holds no keys"), ("a: [", "not YAML"), ("", "holds no keys")]
)
def test_files_that_are_no_configuration(tmp_path, text, words):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(UsageError, match=words):
        load_config(tmp_path / "a.yaml")
    with pytest.raises(UsageError, match="cannot be read"):
        load_config(tmp_path / "b.yaml")


def test_every_key_is_known_by_its_full_name():
    keys = set(known_keys())
    assert {"optim.lr", "data.frames", "model.window", "seed"} <= keys
    assert not any(hasattr(Config, key) and "." in key for key in keys)
