"""The common part of both command lines: verbs with help and an example, exit codes, and one-line error messages."""

from __future__ import annotations

import argparse
import os
import select
import signal
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn, TextIO, TypeVar

from video_swinv2.errors import DEBUG_VARIABLE, UserError, error_line, nearest_name, shows_tracebacks
from video_swinv2.escaping import for_terminal

MAX_NUMBER = 10**6  # of an option, unless it says otherwise
MAX_SIZE = 10**4  # in pixels, frames or tokens
MAX_SEED = 2**32 - 1  # that NumPy's old generator takes
NO_READER = 128 + signal.SIGPIPE  # exit code
WEEK_SECONDS = 7 * 24 * 3600.0
Number = TypeVar("Number", int, float)
Verbs = argparse._SubParsersAction  # what add_subparsers returns; argparse has no public name for it


class Parser(argparse.ArgumentParser):
    """An argparse parser whose errors show arguments, such as file names that the shell found, with escapes."""

    def error(self, message: str) -> NoReturn:
        """Print the usage and the message, and exit with code 2."""
        super().error(for_terminal(message))

    def _check_value(self, action: argparse.Action, value: object) -> None:
        """Refuse a verb or a value that is none of those allowed, as argparse does, or else name the one that is near.

        argparse lists all of them, which for a slip of the keyboard is more than helps. It has no public name for this.
        """
        near = nearest_name(str(value), map(str, action.choices or ()))
        if action.choices is not None and value not in action.choices and near:
            raise argparse.ArgumentError(action, f"unknown value {str(value)[:50]!r}; did you mean {near}?")
        super()._check_value(action, value)


def run_verb(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> int:
    """Parse the arguments, run the verb and return the exit code.

    0: done. 1: failed, or a required limit was not met. 2: wrong usage. An error may define another code. If whatever
    reads the output has had enough, as `head` has, the program ends silently with the exit code that shells give a
    process ended by SIGPIPE.
    """
    try:
        try:
            return _run_verb(parser, arguments)
        finally:
            # Here, also after --help, because an error at the interpreter's exit could not be caught.
            sys.stdout.flush()
    except BrokenPipeError:
        if not _has_no_reader(sys.stdout):
            raise  # it was another pipe
        # The interpreter flushes what is still in the buffer, which must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return NO_READER


def _has_no_reader(stream: TextIO) -> bool:
    """Whether a stream is a pipe whose other end is closed."""
    poll = select.poll()
    poll.register(stream, 0)  # errors are reported in any case
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _run_verb(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> int:
    options = parse_arguments(parser, arguments)
    if options.debug:
        os.environ[DEBUG_VARIABLE] = "1"
    try:
        return int(options.run(options) or 0)
    except UserError as error:
        if shows_tracebacks():
            raise
        print(f"error: {error_line(error)}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("error: interrupted; run the same command again to resume", file=sys.stderr)
        return 1


def parse_arguments(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the options of a verb and its `key=value` overrides, which may be anywhere on the command line.

    argparse accepts a list of positional arguments in one place only and reports those after an option as unknown.
    Therefore unknown arguments of the form `key=value` are taken as overrides if the verb accepts overrides.
    """
    options, rest = parser.parse_known_args(arguments)
    unknown = [text for text in rest if text.startswith("-") or "=" not in text or not hasattr(options, "overrides")]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{_setting_hint(unknown, options)}")
    if rest:
        options.overrides = [*options.overrides, *rest]
    return options


def _setting_hint(unknown: Sequence[str], options: argparse.Namespace) -> str:
    """For an unknown option that is the name of a setting, such as --lr, how to give it; '' if there is none.

    `options.setting_keys`, if the verb defines it, is a function that returns the keys of its settings.
    """
    keys: list[str] = options.setting_keys() if hasattr(options, "setting_keys") else []
    for text, following in zip(unknown, [*unknown[1:], ""], strict=True):
        name, equals, value = text.lstrip("-").partition("=")
        name = name.replace("-", "_")
        found = [key for key in keys if name in (key, key.rpartition(".")[2])]
        if text.startswith("-") and found:
            # `--lr=3e-4` or, as two arguments, `--lr 3e-4`.
            value = value if equals or following.startswith("-") else following
            return "; settings are given without dashes: " + " or ".join(f"{key}={value or '...'}" for key in found)
    return ""


def add_verb(
    verbs: Verbs[argparse.ArgumentParser],
    name: str,
    run: Callable[[argparse.Namespace], int | None],
    text: str,
    example: str,
) -> argparse.ArgumentParser:
    """Add a verb with a help text, an example and `--debug`. Return its parser, to which the caller adds arguments.

    run: called with the parsed options; returns the exit code, or None for 0.
    """
    verb = verbs.add_parser(name, help=text, description=text, epilog=f"example: {example}")
    verb.add_argument("--debug", action="store_true", help="show the traceback of an error")
    verb.set_defaults(run=run)
    return verb


def whole_number(least: int = 1, most: int = MAX_NUMBER) -> Callable[[str], int]:
    """The `type` of an argparse argument that is a whole number from `least` to `most`."""

    def parse(text: str) -> int:
        try:
            number = int(text)
        except ValueError:  # also more than 4,300 digits
            raise argparse.ArgumentTypeError(f"{text[:50]!r} is not a whole number") from None
        return _within(number, least, most)

    return parse


def number(least: float, most: float = MAX_NUMBER) -> Callable[[str], float]:
    """The `type` of an argparse argument that is a number from `least` to `most`; NaN is none."""

    def parse(text: str) -> float:
        try:
            return _within(float(text), least, most)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text[:50]!r} is not a number") from None

    return parse


def whole_numbers(least: int = 1, most: int = MAX_SIZE) -> Callable[[str], tuple[int, ...]]:
    """The `type` of an argparse argument such as `8,7,7`, which is parsed to (8, 7, 7)."""

    def parse(text: str) -> tuple[int, ...]:
        try:
            numbers = tuple(int(part) for part in text.split(","))
        except ValueError:
            message = f"invalid value {text[:50]!r}: use whole numbers such as 8,7,7"
            raise argparse.ArgumentTypeError(message) from None
        return tuple(_within(part, least, most) for part in numbers)

    return parse


def _within(value: Number, least: float, most: float) -> Number:
    if not least <= value <= most:  # written so that NaN fails
        raise argparse.ArgumentTypeError(f"must be from {least:,} to {most:,}")
    return value
