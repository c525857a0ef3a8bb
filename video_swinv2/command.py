"""What both command lines share: verbs with help and an example, exit codes, errors of one line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

from video_swinv2.errors import UserError

Verbs = argparse._SubParsersAction  # argparse has no public name for what add_subparsers returns


def run_verb(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> int:
    """Run the verb asked for; the exit code is 0 done, 1 failed or fell short of a limit, 2 wrong usage."""
    options = parse(parser, arguments)
    try:
        return int(options.run(options) or 0)
    except UserError as error:
        if options.debug:
            raise
        # An error from a loader's worker arrives with the worker's traceback in front; its own line is the last.
        print(f"error: {str(error).strip().splitlines()[-1]}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("error: interrupted; run the same command again to go on", file=sys.stderr)
        return 1


def parse(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """Options of a verb, with its `key=value` overrides wherever they stand on the line.

    argparse takes positional arguments in one run only, so those behind an option come back to it as unknown.
    """
    options, rest = parser.parse_known_args(arguments)
    unknown = [text for text in rest if text.startswith("-") or "=" not in text or not hasattr(options, "overrides")]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if rest:
        options.overrides = [*options.overrides, *rest]
    return options


def add_verb(
    verbs: Verbs[argparse.ArgumentParser],
    name: str,
    run: Callable[[argparse.Namespace], int | None],
    text: str,
    example: str,
) -> argparse.ArgumentParser:
    """A verb with help, an example and `--debug`; `run` gets the parsed options and may return an exit code."""
    verb = verbs.add_parser(name, help=text, description=text, epilog=f"example: {example}")
    verb.add_argument("--debug", action="store_true", help="show the traceback of an error")
    verb.set_defaults(run=run)
    return verb


def integers(text: str) -> tuple[int, ...]:
    """`8,7,7` as numbers, for argparse."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not whole numbers such as 8,7,7") from None
