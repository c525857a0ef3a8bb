"""Command-line verb `config`: what every key of a configuration means, and a first configuration for a data set."""

from __future__ import annotations

import argparse
from pathlib import Path

from video_swinv2.command import Verbs, add_verb
from video_swinv2.errors import UsageError
from video_swinv2.escaping import for_terminal
from video_swinv2.files import atomic_write, create_folder, json_text


def add_config_verbs(verbs: Verbs[argparse.ArgumentParser]) -> None:
    """Add `config` and `config init`."""
    text = "explain every key of a configuration: default, possible values, meaning and unit"
    verb = add_verb(verbs, "config", _config, text, "video-swinv2 config | less")
    verb.add_argument("--json", action="store_true", help="print a JSON schema, which editors check YAML files with")
    actions: Verbs[argparse.ArgumentParser] = verb.add_subparsers(metavar="init")
    text = "write a first configuration for a data set, with sizes that suit its videos and this machine"
    init = add_verb(actions, "init", _init, text, "video-swinv2 config init data/mine --out mine.yaml")
    init.add_argument("data", type=Path, metavar="DATA", help="the data set: a folder or a list")
    init.add_argument(
        "--out", type=Path, default=Path("config.yaml"), metavar="FILE", help="file to write (default: %(default)s)"
    )


def _config(options: argparse.Namespace) -> None:
    from video_swinv2.config.reference import config_schema, settings_text

    print(json_text(config_schema(), indent=1) if options.json else settings_text())


def _init(options: argparse.Namespace) -> None:
    from video_swinv2.plan.starter import starter

    if options.out.exists():
        raise UsageError(f"{options.out}: exists already; give another --out, or remove it")
    text = starter(options.data)
    create_folder(options.out.parent)
    with atomic_write(options.out) as part:
        part.write_text(text, encoding="utf-8")
    print(text, end="")
    print(for_terminal(f"wrote {options.out}; next: video-swinv2 plan {options.out}"))
