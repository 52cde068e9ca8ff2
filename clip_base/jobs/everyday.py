"""Which of a job's options `--help` shows first, with an example; `--help-all` has the rest."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

SECTIONS = ("input", "output", "model", "training", "quality", "speed")
_MARK = "__everyday__"
C = TypeVar("C", bound=type)


@dataclass(frozen=True)
class Everyday:
    """What `JOB --help` shows.

    Attributes:
        example: a command, without the program's name.
        sections: the keys of options by section, dotted as on the command line.
        unused: keys of inherited options that do nothing in this job: it does not have them.
    """

    example: str
    sections: Mapping[str, tuple[str, ...]]
    unused: tuple[str, ...] = ()


def everyday(example: str, *, unused: str = "", **sections: str) -> Callable[[C], C]:
    """Declares the options of a job's dataclass that most calls need; about ten.

    Args:
        example: a command that works, without the program's name: `detect photo.jpg vocabulary="cat"`.
        unused: keys of inherited options that the job does not read, separated by spaces; giving one is an
            error, as of an option that does not exist.
        sections: keys of options, separated by spaces, for some of `SECTIONS`.

    Raises:
        ValueError: there is no such section.
    """
    unknown = set(sections) - set(SECTIONS)
    if unknown:
        raise ValueError(f"there is no section {min(unknown)!r} of everyday options: {', '.join(SECTIONS)}")
    named = {name: tuple(sections[name].split()) for name in SECTIONS if name in sections}

    def mark(schema: C) -> C:
        setattr(schema, _MARK, Everyday(example, named, tuple(unused.split())))
        return schema

    return mark


def everyday_of(schema: type) -> Everyday:
    """Returns what was declared for this dataclass itself; for others nothing, and all options are shown."""
    declared: Everyday = schema.__dict__.get(_MARK, Everyday("", {}))
    return declared
