"""What is said about the keys of a configuration: all of them, with default and meaning, and what is missing."""

from __future__ import annotations

import json

import pytest

from video_swinv2.cli import main
from video_swinv2.config import known_keys, validate_config
from video_swinv2.config.reference import config_schema, settings, settings_text
from video_swinv2.errors import UsageError

REQUIRED = {
    "out",
    "init",
    "model.name",
    "data.source",
    "data.image_size",
    "optim.epochs",
    "optim.lr",
    "optim.batch",
}
WHOLE = {
    "out": "runs/a",
    "init": "scratch",
    "model": {"name": "swinv2_nano"},
    "data": {"source": "clips", "image_size": 32},
    "optim": {"epochs": 1, "lr": 1e-3, "batch": 8, "micro_batch": 8},
}


def test_every_key_has_a_default_and_a_meaning() -> None:
    found = {setting.key: setting for setting in settings()}
    assert sorted(found) == sorted(known_keys())
    assert not [key for key, setting in found.items() if len(setting.meaning) < 20]
    assert {key for key, setting in found.items() if setting.default is None} == REQUIRED
    assert found["optim.lr"].meaning.startswith("Peak learning rate")
    assert (found["engine.zero_stage"].default, found["engine.zero_stage"].values) == ("1", "whole number from 0 to 3")
    assert found["mask.shape"].values == "block | tube"
    assert found["augment.crop_area"].default == "[0.08, 1.0]"
    assert found["data.source"].values == "[text or {path: ..., weight: ...}, ...]"
    assert found["engine.deepspeed"].default == "{}"


def test_the_text_fits_a_terminal_and_the_schema_an_editor() -> None:
    lines = settings_text().splitlines()
    assert max(map(len, lines)) <= 100
    assert "optim.weight_decay: 0.05  (number from 0 to 1,000.0)" in lines
    assert config_schema()["properties"]["out"]["description"].startswith("The run folder.")


def test_all_missing_keys_are_named_at_once() -> None:
    with pytest.raises(UsageError) as fault:
        validate_config({}, "a.yaml")
    named = str(fault.value).removeprefix("a.yaml: ").partition(" are missing; ")[0]
    assert set(named.split(", ")) == REQUIRED
    with pytest.raises(UsageError, match=r"^a.yaml: optim.lr, optim.batch are missing; .*optim.lr=\.\.\."):
        validate_config(WHOLE | {"optim": {"epochs": 1}}, "a.yaml")
    with pytest.raises(UsageError, match=r"^a.yaml: optim.lr is missing; add it to the file or as optim.lr=\.\.\.$"):
        validate_config(WHOLE | {"optim": {"epochs": 1, "batch": 8, "micro_batch": 8}}, "a.yaml")


def test_a_misspelt_key_is_named_before_the_one_that_it_makes_missing() -> None:
    with pytest.raises(UsageError, match=r"unknown key optim.lrr; did you mean optim.lr\?"):
        validate_config(WHOLE | {"optim": {"epochs": 1, "batch": 8, "micro_batch": 8, "lrr": 1e-3}}, "a.yaml")
    assert validate_config(WHOLE, "a.yaml").optim.lr == 1e-3


def test_config_prints_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config"]) == 0
    assert capsys.readouterr().out == settings_text() + "\n"
    assert main(["config", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == config_schema()


@pytest.mark.parametrize(
    ("arguments", "answer"),
    [
        (["train", "a.yaml", "--lr", "3e-4"], "--lr 3e-4; settings are given without dashes: optim.lr=3e-4"),
        (["plan", "a.yaml", "--micro-batch=4"], "settings are given without dashes: optim.micro_batch=4"),
        (["pretrain", "a.yaml", "--optim.lr=1"], "settings are given without dashes: optim.lr=1"),
        (["test", "m", "d", "--out", "o", "--frames", "8"], "settings are given without dashes: data.frames=8"),
        (["train", "a.yaml", "--nonsense"], "unrecognized arguments: --nonsense\n"),
    ],
)
def test_an_option_that_is_a_setting_is_answered_with_its_key(
    arguments: list[str], answer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(arguments)
    assert answer in capsys.readouterr().err
