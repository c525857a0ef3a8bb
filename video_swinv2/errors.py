"""Exceptions for errors that a user can fix. The message is one line: the file or key, what is wrong, and the fix."""

from __future__ import annotations

import os
import re

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
    """The message of an error as one line.

    The DataLoader puts the traceback of a worker in front of the message of an error that was raised there, and the
    type of the error before the message. The message itself is always one line, the last.
    """
    *traceback, message = str(error).strip().splitlines()
    return re.sub(r"^[\w.]+Error: ", "", message) if traceback else message


def shows_tracebacks() -> bool:
    """Whether errors of the user are to be shown with their tracebacks."""
    return bool(os.environ.get(DEBUG_VARIABLE))
