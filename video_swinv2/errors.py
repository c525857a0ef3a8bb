"""Errors that the user can fix. Their message is one line: the file or key, what is wrong, and the fix."""

from __future__ import annotations


class UserError(Exception):
    """The work failed for a reason outside the program. The command line prints the message alone and exits with 1."""

    exit_code = 1


class UsageError(UserError):
    """The request is wrong: an argument, a configuration key, a class list. The command line exits with 2."""

    exit_code = 2
