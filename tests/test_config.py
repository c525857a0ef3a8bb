"""The configuration: every recipe of this repository is valid, and every mistake is one line that names the key."""

import ast
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest
import torch
import yaml

from video_swinv2.config import (
    CHANGES_LEARNING,
    changed_settings,
    known_keys,
    load_config,
    plain_values,
    to_yaml,
    validate_config,
)
from video_swinv2.config.loading import SECTIONS
from video_swinv2.config.schema import AttentionBackend
from video_swinv2.errors import UsageError
from video_swinv2.evaluation.overrides import KEYS as TEST_KEYS
from video_swinv2.models.attention import Backend
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
        ("lr=1", "unknown key lr; did you mean optim.lr?"),
        ("optim.frames=8", "unknown key optim.frames; did you mean data.frames?"),
        ("optim.verbose=1", "unknown key optim.verbose; `video-swinv2 config` lists all keys"),
        ("optim.lr=fast", "optim.lr: invalid value 'fast': input should be a valid number"),
        ("optim.batch=-2", "optim.batch: invalid value -2: input should be greater than"),
        ("model.attention=quick", "model.attention: invalid value 'quick': input should be 'auto', 'eager', 'sdpa'"),
        ("engine.zero_stage=4", "engine.zero_stage: invalid value 4: input should be less than"),
        ("engine.engine=fast", "engine.engine: invalid value 'fast': input should be 'deepspeed' or 'plain'"),
        ("engine.precision=fp8", "engine.precision: invalid value 'fp8': input should be 'auto', 'bf16', "),
        ("engine.communication=fp16", "engine.communication: invalid value 'fp16'"),
        ("engine.offload_optimizer=disk", "engine.offload_optimizer: invalid value 'disk'"),
        ("engine.offload_parameters=disk", "engine.offload_parameters: invalid value 'disk'"),
        ("engine.offload_optimizer=nvme", "engine.offload_folder: missing"),
        ("mask.normalise_target=46", "mask.normalise_target: 46 is not an odd number"),
        ("init_time_noise=0.5", "init_time_noise: is for inflated weights"),
        ("augment.flip=2", "augment.flip: invalid value 2: input should be less than"),
        ("seed.x=1", "seed: invalid value {'x': 1}: input should be a valid integer"),
        ("optim.lr", "write an override as key.sub=value"),
        ("optim.lr=[", "the value is not valid YAML"),
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
def test_required_keys_have_no_default(key):
    values = smallest()
    del values[key]
    with pytest.raises(UsageError, match=rf"a.yaml: {key}\b.* (is|are) missing"):
        validate_config(values, "a.yaml")


@pytest.mark.parametrize(
    ("text", "words"), [("- a\n- b\n", "contains no keys"), ("a: [", "not valid YAML"), ("", "contains no keys")]
)
def test_files_that_are_not_a_configuration(tmp_path, text, words):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(UsageError, match=words):
        load_config(tmp_path / "a.yaml")
    with pytest.raises(UsageError, match="cannot be read"):
        load_config(tmp_path / "b.yaml")


def leaves(values: dict[str, object], prefix: str = "") -> set[str]:
    """The dotted keys of nested data; a section without values is a leaf."""
    found: set[str] = set()
    for key, value in values.items():
        found |= leaves(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {prefix + key}
    return found


def test_known_keys_are_those_that_a_resolved_configuration_is_written_with():
    """In dotted form, each once, and no section by itself."""
    keys = list(known_keys())
    assert len(set(keys)) == len(keys)
    assert set(keys) == leaves(yaml.safe_load(to_yaml(validate_config(smallest(), "a.yaml"))))


def test_attention_backends_are_those_of_the_models():
    """The configuration imports nothing of ours, so it lists them itself."""
    assert get_args(AttentionBackend) == get_args(Backend)


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


def messages() -> Iterator[tuple[str, str]]:
    """Every string of the packages that is not a docstring, with its place; of f-strings the constant parts."""
    root = CONFIGS.parent
    for path in sorted([*(root / "video_swinv2").rglob("*.py"), *(root / "data_prep").rglob("*.py")]):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        documentation = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documentation:
                yield f"{path.relative_to(root)}:{node.lineno}", node.value


def unknown_keys(text: str) -> list[str]:
    """What looks like `section.key` in a text and is no key; names of files, modules and attributes are none."""
    named = re.findall(rf"(?<![\w./])(?:{'|'.join(SECTIONS)})\.[a-z]\w*", text)
    others = {"model.safetensors", "model.onnx", "model.state_dict", "model.preprocessing", "data.pkl"}
    others |= {"data.transforms", "data.video_dataset"}
    return [key for key in named if key not in {*known_keys(), *TEST_KEYS, *others}]


def test_keys_that_messages_name_exist():
    assert unknown_keys("remove these files, or raise optim.max_skipped and optim.lr") == ["optim.max_skipped"]
    found = [(place, text) for place, text in messages() if any(f"{section}." in text for section in SECTIONS)]
    assert len(found) > 50
    assert [(place, unknown_keys(text)) for place, text in found if unknown_keys(text)] == []


def test_every_key_is_classified_by_what_its_change_means_for_a_run():
    assert sorted(CHANGES_LEARNING) == sorted(known_keys())
    page = (CONFIGS.parent / "docs" / "configuration.md").read_text(encoding="utf-8")
    listed = re.search(r"<!-- shown only -->(.*?)<!-- end -->", page, re.DOTALL)
    assert listed
    assert sorted(re.findall(r"`([\w.]+)`", listed[1])) == sorted(
        key for key, learning in CHANGES_LEARNING.items() if not learning
    )


def test_changes_of_settings_are_told_by_key_with_both_values():
    old = plain_values(validate_config(smallest(), "a.yaml"))
    values = smallest() | {"best_metric": "val/loss", "optim": {"epochs": 2, "lr": 1e-3, "batch": 8, "micro_batch": 4}}
    new = plain_values(validate_config(values, "b.yaml"))
    changes = changed_settings(json.loads(json.dumps(old)), new)
    assert {str(change): change.changes_learning for change in changes} == {
        "best_metric: null -> val/loss": True,
        "optim.epochs: 1.0 -> 2.0": True,
        "optim.micro_batch: 2 -> 4": False,
    }
    assert changed_settings(old, plain_values(validate_config(smallest(), "a.yaml"))) == []
    # Of another version, or damaged: what only one of the two has is not compared.
    assert changed_settings({"optim": 3, "model": {"name": "x", "colour": 1}}, new)[0].key == "model.name"
    assert changed_settings({}, new) == []
