"""Exceptions for errors that a user can fix. The message is one line: the file or key, what is wrong, and the fix."""

from __future__ import annotations


class UserError(Exception):
    """The work failed for a reason outside the program.

    The command line prints the message without a traceback and exits with code 1.
    """

    exit_code = 1


class UsageError(UserError):
    """The request is wrong: an argument, a configuration key or a class list, for example. The exit code is 2."""

    exit_code = 2
