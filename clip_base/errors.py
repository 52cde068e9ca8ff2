"""The one error that a person who types a command should ever read."""


class InputError(ValueError):
    """Something the caller gave cannot be used: a path, a file's content, an option, weights that do not fit.

    Its message is one line that says what was wrong, what was found and how to mend it. The command line
    prints it without a traceback and ends with exit code 2.
    """


def quote(value: object, length: int = 80) -> str:
    """Returns `value` as Python writes it, cut to `length` characters, for a message."""
    text = repr(value)
    return text if len(text) <= length else f"{text[: length - 1]}…"
