"""Fills the command-line reference of the site with the programs' own help texts, so that the two cannot differ.

mkdocs calls `on_page_markdown` for every page (`hooks:` in mkdocs.yml). A line `{{ help video-swinv2 }}` or
`{{ help python -m data_prep }}` becomes one section per verb.
"""

from __future__ import annotations

import argparse
import os
import re
from typing import Any

from data_prep.cli import make_parser as data_prep_parser
from video_swinv2.cli import make_parser as toolkit_parser

PARSERS = {"video-swinv2": toolkit_parser, "python -m data_prep": data_prep_parser}


def on_page_markdown(markdown: str, **page: Any) -> str:
    """Replace each `{{ help PROGRAM }}` of a page by the help texts of the program's verbs."""
    return re.sub(r"\{\{ help (.+?) \}\}", lambda found: help_texts(found[1]), markdown)


def help_texts(program: str) -> str:
    """One section per verb, nested verbs included: `### train` and its help text in a code block."""
    os.environ["COLUMNS"] = "100"  # argparse wraps to the terminal's width, and there is none here
    sections = [f"```text\n{PARSERS[program]().format_help()}```"]
    for name, parser in verbs_of(PARSERS[program]()):
        sections.append(f"### {name}\n\n```text\n{parser.format_help()}```")
    return "\n\n".join(sections)


def verbs_of(parser: argparse.ArgumentParser, prefix: str = "") -> list[tuple[str, argparse.ArgumentParser]]:
    """(name, parser) of every verb below `parser`, in the order they were added; `bench model` for nested ones."""
    found: list[tuple[str, argparse.ArgumentParser]] = []
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, verb in action.choices.items():
                nested = verbs_of(verb, f"{prefix}{name} ")
                # `bench` is nothing without a verb below it, but `config` is a verb itself.
                found += nested if nested and not verb.get_default("run") else [(f"{prefix}{name}", verb), *nested]
    return found
