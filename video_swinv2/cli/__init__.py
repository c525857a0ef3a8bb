"""The command line `video-swinv2`, with one file for each group of verbs.

In these files, the arguments of each verb stand next to the function that runs it. That function imports what it needs
only when it runs, so that `--help` does not wait for torch.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from video_swinv2 import __version__
from video_swinv2.cli.bench import add_bench_verbs
from video_swinv2.cli.configuring import add_config_verbs
from video_swinv2.cli.inference import add_inference_verbs
from video_swinv2.cli.testing import add_testing_verbs
from video_swinv2.cli.tools import add_tools_verbs
from video_swinv2.cli.training import add_training_verbs
from video_swinv2.cli.weights import add_weights_verbs
from video_swinv2.command import Parser, run_verb


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb and return its exit code. `arguments` defaults to those of the process."""
    return run_verb(make_parser(), arguments)


def make_parser() -> argparse.ArgumentParser:
    """Build the parser with all verbs, their arguments and examples."""
    parser: argparse.ArgumentParser = Parser(
        prog="video-swinv2",
        description="Swin Transformer V2 for video: train, test with multiple views, predict. Prepare the clips with "
        "`python -m data_prep`.",
        epilog="exit codes: 0 success; 1 failure, or short of a requested limit; 2 wrong usage; 75 training was asked "
        "to stop (SIGTERM, SIGUSR1, Ctrl-C) and saved a checkpoint: run the same command again to resume. torchrun "
        "hides the 75; a file named start-again in the run folder means the same. 141: the reader of the output, "
        "such as head, closed it.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    # DeepSpeed's launcher passes --local_rank to every process, before the verb. It is accepted and ignored, because
    # the rank is read from the environment.
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    add_config_verbs(verbs)
    add_training_verbs(verbs)
    add_testing_verbs(verbs)
    add_inference_verbs(verbs)
    add_weights_verbs(verbs)
    add_bench_verbs(verbs)
    add_tools_verbs(verbs)
    # For the answer to options such as --lr, which are settings.
    keys_of = dict.fromkeys(("pretrain", "train", "plan", "doctor"), _config_keys) | dict.fromkeys(
        ("test", "probe"), _test_keys
    )
    for name, keys in keys_of.items():
        verbs.choices[name].set_defaults(setting_keys=keys)
    return parser


def _config_keys() -> list[str]:
    from video_swinv2.config import known_keys

    return list(known_keys())


def _test_keys() -> list[str]:
    from video_swinv2.evaluation.overrides import KEYS

    return list(KEYS)
