"""What both command lines share: verbs with help and an example, exit codes, and one-line error messages."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

from video_swinv2.errors import UserError

Verbs = argparse._SubParsersAction  # the type of what add_subparsers returns; argparse has no public name for it


def run_verb(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> int:
    """Parse the arguments and run the verb. The exit code: 0 done, 1 failed or fell short of a limit, 2 wrong usage."""
    options = parse_arguments(parser, arguments)
    try:
        return int(options.run(options) or 0)
    except UserError as error:
        if options.debug:
            raise
        # An error raised in a DataLoader worker carries the worker's traceback; the message itself is the last line.
        print(f"error: {str(error).strip().splitlines()[-1]}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("error: interrupted; run the same command again to resume", file=sys.stderr)
        return 1


def parse_arguments(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options of a verb, with its `key=value` overrides anywhere on the line.

    argparse accepts a list of positional arguments in one place only and reports those after an option as unknown.
    Unknown arguments of the form `key=value` are therefore taken as overrides if the verb has any.
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
    """Add a verb with its help text, an example and `--debug`; the caller adds the arguments to the parser returned.

    run: called with the parsed options; returns the exit code, or None for 0.
    """
    verb = verbs.add_parser(name, help=text, description=text, epilog=f"example: {example}")
    verb.add_argument("--debug", action="store_true", help="show the traceback of an error")
    verb.set_defaults(run=run)
    return verb


def comma_separated_integers(text: str) -> tuple[int, ...]:
    """`8,7,7` as (8, 7, 7); an argparse type."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"invalid value {text!r}: use whole numbers such as 8,7,7") from None
