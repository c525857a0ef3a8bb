"""Exceptions for errors that a user can fix. The message is one line: the file or key, what is wrong, and the fix."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable

from video_swinv2.escaping import for_terminal

# The share of characters that two names must have in common, in order, for one to be suggested for the other (difflib's
# ratio). Below it, a suggestion is more often a wrong guess than a slip of the keyboard put right.
NEAR = 0.6
# Set by --debug: errors of the user, too, are shown with their tracebacks. An environment variable, so that processes
# started by this one know it too.
DEBUG_VARIABLE = "VIDEO_SWINV2_DEBUG"


class UserError(Exception):
    """The work failed for a reason outside the program.

    The command line prints the message without a traceback and exits with code 1.
    """

    exit_code = 1


class UsageError(UserError):
    """The request is wrong: an argument, a configuration key or a class list, for example. The exit code is 2."""

    exit_code = 2


def error_line(error: UserError) -> str:
    """The message of an error as one line for a terminal, whatever the names in it contain.

    To the message of an error that was raised in a worker, the DataLoader adds a heading and the worker's traceback in
    front, the last line of which begins with the type of the error.
    """
    message = str(error).strip()
    if message.startswith("Caught "):
        message = re.split(r"^[\w.]+Error: ", message, flags=re.MULTILINE)[-1]
    return for_terminal(message)


def nearest_name(name: str, known: Iterable[str]) -> str | None:
    """The known name that is most similar to a mistyped one; None if none is near."""
    return next(iter(difflib.get_close_matches(name, list(known), n=1, cutoff=NEAR)), None)


def nearest_key(key: str, known: Iterable[str]) -> str | None:
    """`nearest_name` of a dotted key such as `optim.lr`, of which the last part decides what is near.

    A section that two keys share makes them similar whatever follows it, and one that was left out makes them differ.
    """
    last = key.rpartition(".")[2]
    near = [other for other in known if nearest_name(last, [other.rpartition(".")[2]])]
    # With cutoff=0.0, the most similar of these is found even if its section is another one.
    return next(iter(difflib.get_close_matches(key, near, n=1, cutoff=0.0)), None)


def first_line(error: Exception) -> str:
    """The first line of the text of an exception, or its type if it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def shows_tracebacks() -> bool:
    """Whether errors of the user are to be shown with their tracebacks."""
    return bool(os.environ.get(DEBUG_VARIABLE))
