"""The configuration: every recipe of the repository is valid, every mistake is one line that names the key."""

import math
from pathlib import Path

import pytest
import torch
import yaml

from video_swinv2.config import Config, known_keys, load_config, to_yaml, validate_config
from video_swinv2.errors import UsageError
from video_swinv2.models.simmim import hidden_cells, mask_cells
from video_swinv2.training.tasks.base import build_model
from video_swinv2.training.tasks.simmim import resolved_mask

CONFIGS = Path(__file__).parents[1] / "configs"
RECIPES = sorted(CONFIGS.rglob("*.yaml"))
PRETRAIN, IMAGE = (sorted((CONFIGS / room).glob("*.yaml")) for room in ("pretrain", "image"))
CHAIN = [(12, 12), (12, 12), (12, 12), (6, 6)]


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
        validate_config(values, "a.yaml")


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


def built(path, classes):
    """The model of a recipe, without memory."""
    with torch.device("meta"):
        return build_model(load_config(path), classes)


@pytest.mark.parametrize("path", PRETRAIN, ids=lambda p: p.stem)
def test_pretraining_recipes_start_the_chain(path):
    config, encoder = load_config(path), built(path, 0)
    assert encoder.cpb_norm == CHAIN
    assert config.model.name == f"swinv2_{path.stem}"
    assert resolved_mask(config, encoder).unit == (32, 32)
    cells = mask_cells(config.data.image_size, config.mask.unit, 2)
    assert (math.prod(cells), hidden_cells(cells, config.mask.ratio)) == (36, 22)


@pytest.mark.parametrize("path", IMAGE, ids=lambda p: p.stem)
def test_image_recipes_take_the_pretrained_models_over(path):
    """The file `init` names is what the recipe of that size writes, and has a tensor of each shape that is needed."""
    config, model = load_config(path), built(path, 1000)
    before = config.init.split("/")
    if before[:2] == ["runs", "pretrain"]:
        ancestor = next(other for other in PRETRAIN if other.stem == before[2])
        assert load_config(ancestor).out == "/".join(before[:3])
        encoder = built(ancestor, 0)
        given = {name: tensor.shape for name, tensor in encoder.state_dict().items()}
        wanted = {name: tensor.shape for name, tensor in model.state_dict().items() if not name.startswith("head.")}
        assert wanted == given
        model.cpb_norm = encoder.cpb_norm  # as `fill` does
        assert model.cpb_norm == CHAIN
    assert config.data.image_size == 16 * model.window[0], "stage 3 is one window"
    assert config.optim.layer_decay < 1 or before[:2] != ["runs", "pretrain"]
    augment = config.augment
    assert (augment.rand_augment, augment.rand_magnitude, augment.rand_noise) == (2, 9, 0.5)
    assert (augment.erasing, augment.mixup, augment.cutmix, config.optim.label_smoothing) == (0.25, 0.8, 1.0, 0.1)
