"""Exceptions for errors that a user can fix. The message is one line: the file or key, what is wrong, and the fix."""

from __future__ import annotations

import os
import re

from video_swinv2.escaping import for_terminal

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


def first_line(error: Exception) -> str:
    """The first line of the text of an exception, or its type if it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def shows_tracebacks() -> bool:
    """Whether errors of the user are to be shown with their tracebacks."""
    return bool(os.environ.get(DEBUG_VARIABLE))
