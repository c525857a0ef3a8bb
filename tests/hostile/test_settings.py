"""Settings that make no sense are refused in one line that names the key; those that are accepted can be used."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import pytest
import yaml

from data_prep.cli import make_parser as data_prep_parser
from tests.hostile.bounded import GIB, reading, run_bounded
from video_swinv2.cli import main, make_parser
from video_swinv2.command import parse_arguments
from video_swinv2.config import known_keys, load_config, to_yaml, validate_config
from video_swinv2.config.plain_yaml import MAX_BYTES, MAX_DEPTH, dump_yaml, parse_yaml
from video_swinv2.errors import UsageError
from video_swinv2.escaping import for_terminal
from video_swinv2.evaluation.overrides import KEYS as TEST_KEYS
from video_swinv2.evaluation.overrides import parse_overrides

SMALLEST = {
    "out": "run",
    "init": "scratch",
    "model": {"name": "swinv2_nano"},
    "data": {"source": "clips", "image_size": 64, "frames": 4},
    "optim": {"epochs": 1, "lr": 1e-3, "batch": 8, "micro_batch": 2},
}
HUGE = str(10**30)
VALUES = (
    ".nan", ".inf", "-.inf", "nan", "inf", "-1", "0", "1.5", "1e999", HUGE, "9" * 5000, "0x" + "f" * 900, '""',
    r'"\x1b[31m"', r'"\0"', "[]", "[[]]", "[0, 0]", "[3, 2]", "[.nan, 1]", "{}", "{path: a, weight: .inf}", "null",
)  # fmt: skip


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "a.yaml"
    path.write_text(yaml.safe_dump(SMALLEST))
    return path


def accepts(file: Path, key: str, value: str) -> bool:
    """Whether a key accepts a value. If not, the refusal is one line that begins with the file or the key."""
    try:
        config = load_config(file, [f"{key}={value}"])
    except UsageError as error:
        text = str(error)
        assert text.removeprefix(f"{file}: ").startswith(key.partition(".")[0]), (value, text)
        assert key.split(".")[-1] in text, (value, text)
        assert text == for_terminal(text), value
        assert len(text) < 1000, value
        return False
    assert validate_config(parse_yaml(to_yaml(config)), "again.yaml") == config
    return True


NAMES = {"out", "init", "model.name", "data.source", "data.train_split", "data.val_split", "resume", "wandb"}
COUNTS = {"checkpoint_blocks", "workers", "frozen_stages", "rand_augment", "normalise_target", "seed", "ignore_index"}
"""Whole numbers that may be 0."""
SHARES = {"drop_path", "head_dropout", "max_broken", "flip", "erasing", "label_smoothing", "ema"}
AMOUNTS = {
    "warmup_epochs", "warmup_lr", "min_lr", "weight_decay", "init_time_noise", "checkpoint_minutes", "rand_noise",
    "rand_magnitude", "mixup", "cutmix", "auxiliary",
}  # fmt: skip
POSITIVE = {
    "epochs", "lr", "clip_norm", "val_epochs", "pictures_epochs", "early_stop_epochs", "decode_seconds",
    "meeting_seconds", "silence_seconds",
}  # fmt: skip
"""Numbers that must be greater than 0 and may be fractions."""


@pytest.mark.parametrize("key", list(known_keys()))
def test_every_key_refuses_what_makes_no_sense(key: str, file: Path) -> None:
    found = {value for value in VALUES if accepts(file, key, value)}
    name = key.split(".")[-1]
    # No key accepts a number that is infinite, NaN, negative or huge, or a text with a null character.
    expected: set[str] = set()
    if key in NAMES:
        expected = {"nan", "inf", r'"\x1b[31m"'}
    if name in COUNTS | SHARES | AMOUNTS:
        expected |= {"0"}
    if name in AMOUNTS - {"init_time_noise"} | POSITIVE:
        expected |= {"1.5"}
    found -= {"null", "[]", "{}"} if name in OPTIONAL else set()
    assert found == expected | SPECIAL.get(name, set())


SIZES = {"patch_size", "window", "image_size", "unit"}
SPECIAL = {key: {"[3, 2]"} for key in SIZES} | {
    "milestones": {"[3, 2]"},  # the schedule, which knows the steps, wants them in order
    "class_weights": {"[3, 2]"},
    "betas": {"[0, 0]"},
    "zero_stage": {"0"},
    # false
    "compile": {"0"},
    "reduce_zero_label": {"0"},
    "photometric": {"0"},
    "drop_faulty": {"0"},
}
OPTIONAL = {
    "patch_size", "window", "cpb_norm", "frames", "short_side", "lr_batch", "clip_norm", "class_weights",
    "init_cpb_norm", "resume", "pictures_epochs", "early_stop_epochs", "wandb", "offload_folder", "milestones",
    "deepspeed", "best_metric", "micro_batch", "task", "short_sides", "jitter",
}  # fmt: skip
"""Keys that may be null or empty."""


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("augment.mixup=1e-320", "augment.mixup: invalid value 1e-320: is neither 0 nor at least 1e-12"),
        ("val_epochs=1e-320", "val_epochs: invalid value 1e-320: input should be greater than or equal to 0.000001"),
        ("optim.epochs=.inf", "optim.epochs: invalid value inf: input should be a finite number"),
        ("seed=-1", "seed: invalid value -1"),
        ("seed=4294967296", "seed: invalid value 4294967296: input should be less than 4294967296"),
        ("data.decode_seconds=.inf", "data.decode_seconds: invalid value inf"),
        ("augment.crop_ratio=[0, 0]", "augment.crop_ratio: invalid value 0"),
        ("augment.crop_ratio=[2, 0.5]", "augment.crop_ratio: invalid value [2, 0.5]: the first number is larger than"),
        ("augment.crop_area=[1, 0.5]", "augment.crop_area: invalid value [1, 0.5]: the first number is larger than"),
        ("augment.crop_area=[0, 0]", "augment.crop_area: invalid value 0"),
        ("optim.betas=[0.9, 1]", "optim.betas: invalid value 1: input should be less than 1"),
        ("optim.label_smoothing=1", "optim.label_smoothing: invalid value 1"),
        ("optim.class_weights=[0, 0]", "optim.class_weights: all are 0"),
        ("optim.micro_batch=1000000000000", "optim.micro_batch: invalid value 1000000000000"),
        ("data.workers=1000000000", "data.workers: invalid value 1000000000"),
        ("data.frames=1000000000", "data.frames: invalid value 1000000000"),
        ("data.image_size=1000000", "data.image_size: invalid value 1000000"),
        ("data.source={path: a, weight: .nan}", "data.source.weight: invalid value nan"),
        ("out=''", "out: invalid value '': string should have at least 1 character"),
        (r'init="a\0"', r"init: invalid value 'a\x00': has a null character"),
        ("engine.device=tpu", "engine.device: invalid value 'tpu'"),
        ("engine.deepspeed.zero_optimization.sub_group_size=.inf", "sub_group_size: inf is not a positive whole"),
        ("engine.deepspeed.gradient_predivide_factor=.inf", "gradient_predivide_factor: inf is not a positive"),
        ("engine.deepspeed.zero_optimization.reduce_bucket_size=0x" + "f" * 900, "is not a positive whole number"),
        ("seed." + "x." * 5000 + "x=1", "seed: invalid value {'x': "),
    ],
)
def test_settings_that_were_accepted_and_gave_a_traceback(override: str, words: str, file: Path) -> None:
    with pytest.raises(UsageError) as caught:
        load_config(file, [override])
    assert words in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("key", sorted(TEST_KEYS))
def test_settings_of_a_test(key: str) -> None:
    refused = {}
    for value in VALUES:
        try:
            parse_overrides([f"{key}={value}"])
        except UsageError as error:
            refused[value] = str(error)
    assert all(text.startswith(f"{key}: ") and text == for_terminal(text) for text in refused.values())
    with_0 = ("data.workers", "seed", "detection.soft_nms", "detection.test_flip", "detection.drop_faulty")
    expected = {"0"} if key in with_0 else set()
    if TEST_KEYS[key].endswith("seconds"):
        expected = {"1.5"}
    if key in ("data.image_size", "model.window", "detection.test_sides"):
        expected = {"[3, 2]"}
    assert set(VALUES) - refused.keys() - {"null"} == expected


def test_an_option_of_the_command_line_refuses_what_makes_no_sense(capsys: pytest.CaptureFixture[str]) -> None:
    """Every option that is a number, of every verb, with every value that makes no sense for it."""
    tried = 0
    for parser in (make_parser(), data_prep_parser()):
        verbs = next(action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
        for verb in verbs.choices.values():
            for action in verb._actions:
                # A type of our own, from `command.py` or the file of the verb.
                if action.type is None or action.type is Path or not action.option_strings or action.choices:
                    continue
                for value in ("nan", "-inf", "-1", HUGE, "9" * 5000, "", "\x1b[31m", "8,-1,7", "1e400GB"):
                    with pytest.raises(SystemExit) as ended:
                        verb.parse_args([f"{action.option_strings[0]}={value}"])
                    said = capsys.readouterr().err
                    assert ended.value.code == 2
                    message = said.splitlines()[-1]
                    assert f"argument {action.option_strings[0]}: " in message, (verb.prog, value)
                    assert len(message) < 300
                    tried += 1
    assert tried > 9 * 30


@pytest.mark.parametrize(
    "line",
    ["serve m --port 99999", "predict m a --top 0", "predict m a --every inf", "bench loader --workers 1000000000"],
)
def test_options_with_bounds_of_their_own(line: str) -> None:
    with pytest.raises(SystemExit):
        parse_arguments(make_parser(), line.split())


# Without torch, which the verbs import: it takes seconds.
CHECK = """
import sys
from video_swinv2.config import load_config
from video_swinv2.errors import UsageError, error_line
try:
    load_config(sys.argv[1])
except UsageError as error:
    print(error_line(error))
"""


def nested(depth: int) -> str:
    return "a: " + "[" * depth + "]" * depth


LAUGHS = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 60))
MERGES = "a0: &a0 {k: 1}\n" + "".join(f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}\n" for n in range(1, 9))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (nested(MAX_DEPTH + 1), "nested too deeply"),
        (nested(100_000), "nested too deeply"),
        ("{a: " * 50_000, "nested too deeply"),
        (LAUGHS, "an alias; write the value itself"),
        (MERGES, "an alias; write the value itself"),
        ("a: &a [*a]", "an alias"),
        ("a: !!python/object/apply:os.system [id]", "an explicit tag; remove it"),
        ("a: !!timestamp x", "an explicit tag"),
        ("a: 1\nb: 2\na: 3", "the key a twice"),
        ("1: 2", "a key that is no text"),
        ("? [a]\n: b", "a key that is no text"),
        ("a: " + "9" * 5000, "a number of too many digits"),
        ("a: 2024-99-99", "month must be in 1..12"),
        ("a: 0b_", "invalid literal"),
        ("a: \x1b", "special characters are not allowed"),
        ("a\n" * 3 + ":", "not valid YAML"),
    ],
    ids=lambda text: text[:20],
)
def test_hostile_yaml(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(text)
    ended = run_bounded("-c", CHECK, path, cpu_seconds=60, memory_gib=4)
    assert ended.err == ""
    assert ended.out.startswith(f"{path}: not valid YAML (")
    assert words in ended.out
    assert ended.out.count("\n") == 1


def test_text_that_is_a_number_in_yaml_1_2() -> None:
    text = "{a: 5e8, b: 1e-3, c: -2.5E+3, d: .5e1, e: 1.e2, f: 1.5, g: 12, h: '5e8', i: 5e8x, j: e8, k: 1e999}"
    inf = float("inf")
    assert parse_yaml(text) == {
        "a": 5e8, "b": 1e-3, "c": -2500.0, "d": 5.0, "e": 100.0, "f": 1.5, "g": 12, "h": "5e8", "i": "5e8x", "j": "e8",
        "k": inf,
    }  # fmt: skip
    for value in (parse_yaml(text), {"name": "5e8", "other": "1e-3", "list": [["5e8"], 5e8]}):
        assert parse_yaml(dump_yaml(value)) == value, "a text with quotes stays a text"


def test_a_number_written_with_an_exponent(file: Path) -> None:
    bucket = "engine.deepspeed.zero_optimization.reduce_bucket_size"
    config = load_config(file, [f"{bucket}=5e8", "optim.batch=1e3", "optim.lr=1e-3"])
    assert config.engine.deepspeed == {"zero_optimization": {"reduce_bucket_size": 5e8}}
    assert (config.optim.batch, config.optim.lr) == (1000, 1e-3)


def test_a_large_file(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    with path.open("wb") as file:
        file.truncate(GIB)  # sparse
    ended = run_bounded("-c", CHECK, path, cpu_seconds=60, memory_gib=4)
    assert (ended.out, ended.err) == (f"{path}: has more than {MAX_BYTES:,} bytes; give a configuration\n", "")
    assert ended.peak_bytes < GIB


READERS = {
    "configuration": "from video_swinv2.config import load_config as read",
    "class list": "from video_swinv2.files import read_class_list as read",
    "class map": "from video_swinv2.weights.convert import read_class_map as read",
    "checkpoint": "from video_swinv2.weights.formats import read_checkpoint as read",
}


@pytest.mark.parametrize("kind", ["device", "pipe"])
@pytest.mark.parametrize("reader", READERS)
def test_special_files(kind: str, reader: str, tmp_path: Path) -> None:
    """A device without an end and a pipe that nobody writes to are refused before they are opened."""
    path = Path("/dev/zero")
    if kind == "pipe":
        path = tmp_path / "pipe"
        os.mkfifo(path)
    ended = run_bounded("-c", reading(READERS[reader]), path, cpu_seconds=60, memory_gib=16)
    assert (ended.out, ended.err) == (f"{path}: is a device, a pipe or a socket; name a regular file\n", "")
    assert ended.peak_bytes < GIB


@pytest.mark.parametrize("override", ["out=FILE", "out=FILE/run", "init=/dev/zero", "data.source=/dev/zero"])
def test_a_run_that_names_a_file_of_the_wrong_kind(
    override: str, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "FILE").write_text("a file")
    (tmp_path / "clips").mkdir()
    value = override.partition("=")[2].replace("FILE", str(tmp_path / "FILE"))
    key = override.partition("=")[0]
    settings = [f"out={tmp_path / 'run'}", f"data.source={tmp_path / 'clips'}", "engine.engine=plain", f"{key}={value}"]
    assert main(["train", str(file), *settings]) in (1, 2)
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
