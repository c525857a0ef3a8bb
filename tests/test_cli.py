"""The command line: help, exit codes, one-line errors, and imports that do not slow it down."""

import os
import subprocess
import sys

import pytest

from video_swinv2 import __version__
from video_swinv2.cli import main, make_parser
from video_swinv2.command import Parser, add_verb, parse_arguments, run_verb

# A verb that prints more than a pipe and a buffer hold.
MANY = """
from video_swinv2.command import Parser, add_verb, run_verb
parser = Parser()
add_verb(parser.add_subparsers(), "many", lambda options: print("line\\n" * 10**5), "text", "example")
raise SystemExit(run_verb(parser, ["many"]))
"""
VERBS = "config pretrain train plan test probe report predict serve export convert bench doctor demo".split()  # noqa: SIM905 - one line


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_with_an_example(verb, capsys):
    with pytest.raises(SystemExit) as ended:
        main([verb, "--help"])
    assert ended.value.code == 0
    assert "example:" in capsys.readouterr().out


def test_version_and_wrong_usage(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.strip() == __version__
    for arguments, words in (
        (["trian"], "unknown value 'trian'; did you mean train?\n"),
        (["dance"], "invalid choice: 'dance' (choose from "),
        (["bench", "modle"], "unknown value 'modle'; did you mean model?\n"),
        (["train"], "required: CONFIG"),
        (["test", "model"], "required: DATA"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 2
        assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["train", "absent.yaml"], 2, "absent.yaml: cannot be read"),
        (["test", "absent.safetensors", "data", "--out", "o"], 1, "absent.safetensors: no such model file"),
        (["report", "absent"], 1, "absent"),
        (["predict", "absent.safetensors", "clip.mp4"], 1, "absent.safetensors: no such model file"),
    ],
)
def test_errors_are_one_line(arguments, code, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == code
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert words in error


@pytest.mark.parametrize(
    "line",
    [
        "test m d --out o --split val seed=1 data.frames=4",
        "test m d seed=1 data.frames=4 --out o --split val",
        "test m d seed=1 --out o data.frames=4 --split val",
        "test --out o m d seed=1 --split val data.frames=4",
    ],
)
def test_overrides_may_be_anywhere_on_the_line(line):
    options = parse_arguments(make_parser(), line.split())
    assert (str(options.model), str(options.data), options.split) == ("m", "d", "val")
    assert options.overrides == ["seed=1", "data.frames=4"]


@pytest.mark.parametrize("line", ["test m d --out o --splitt=val", "test m d --out o more", "report d --x=1 a=b"])
def test_unknown_arguments_are_refused(line, capsys):
    with pytest.raises(SystemExit) as ended:
        main(line.split())
    assert ended.value.code == 2


def test_the_argument_of_deepspeeds_launcher_is_accepted():
    options = make_parser().parse_args(["--local_rank=1", "train", "a.yaml", "seed=1"])
    assert (options.config.name, options.overrides) == ("a.yaml", ["seed=1"])


def test_all_verbs_of_the_parser_are_tested():
    assert set(VERBS) == set(make_parser()._subparsers._group_actions[0].choices)


def test_importing_the_package_does_not_import_torch():
    code = "import sys, video_swinv2, data_prep.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from video_swinv2.cli import make_parser; make_parser().format_help();"
        "sys.exit(','.join({'torch', 'numpy', 'av', 'sklearn', 'pydantic'} & sys.modules.keys()) or 0)"
    )
    ended = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (0, "")


@pytest.mark.parametrize("arguments", [["-m", "video_swinv2", "--help"], ["-m", "data_prep", "--help"], ["-c", MANY]])
def test_output_that_nobody_reads_any_more_is_no_error(arguments):
    """As with `| head`: the pipe's other end is closed before anything is written."""
    read_end, write_end = os.pipe()
    os.close(read_end)
    try:
        done = subprocess.run(
            [sys.executable, *arguments],
            stdout=write_end,
            stderr=subprocess.PIPE,
            text=True,
            env={name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"},
        )
    finally:
        os.close(write_end)
    assert (done.returncode, done.stderr) == (141, "")


def test_another_broken_pipe_is_an_error():
    def fail(options):
        raise BrokenPipeError

    parser = Parser()
    add_verb(parser.add_subparsers(), "fail", fail, "text", "example")
    with pytest.raises(BrokenPipeError):
        run_verb(parser, ["fail"])
