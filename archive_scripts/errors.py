"""The error of a command."""

from __future__ import annotations


class CommandError(Exception):
    """A command cannot go on; the message says why and what to do. Printed as one line, without a
    traceback."""
