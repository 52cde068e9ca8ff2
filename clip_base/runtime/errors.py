"""Errors and notes that are shown to the user of a command."""

from __future__ import annotations

import warnings


class InputError(ValueError):
    """Something the caller gave cannot be used: a path, a file's content, an option, weights that do not fit.

    Its message is one line that says what was wrong, what was found and how to fix it. The command line
    prints it without a traceback and ends with exit code 2.
    """

    exit_code = 2


class JobError(InputError):
    """A job did not do its work: nothing of what it was given could be used, or too little of it.

    The call itself was right; the command line ends with exit code 1.
    """

    exit_code = 1


class InputNote(UserWarning):
    """Something was assumed about what the caller gave, and the result depends on it.

    In Python a warning; the command line prints it as one line on stderr that begins with `note:`.
    """


def note(message: str, stacklevel: int = 3) -> None:
    """Tells what was assumed, as an `InputNote`; the same message from the same place is shown once.

    Args:
        message: one line.
        stacklevel: the frame that a Python warning names, counted from here; 3: the caller's caller.
    """
    warnings.warn(message, InputNote, stacklevel=stacklevel)


def quote(value: object, length: int = 80) -> str:
    """Returns `value` as Python writes it, cut to `length` characters, for a message."""
    return shortened(repr(value), length)


def shortened(text: str, length: int = 80) -> str:
    """Returns a text cut to `length` characters, for a message."""
    return text if len(text) <= length else f"{text[: length - 1]}…"
