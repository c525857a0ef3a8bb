"""Errors a user can mend: one line that names the file or key, what is wrong, and what to do."""

from __future__ import annotations


class UserError(Exception):
    """The work failed for a reason outside the program: the command line prints the message alone and exits with 1."""

    exit_code = 1


class UsageError(UserError):
    """The request itself is wrong (argument, configuration key, class list): the command line exits with 2."""

    exit_code = 2
