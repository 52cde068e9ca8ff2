"""What work is: a function of a task alone; and what went wrong with it, told in another process."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from clip_base.runtime.errors import InputError

Task = TypeVar("Task")
Result = TypeVar("Result")
Report = Callable[[int, str], None]  # takes how many steps more of the task are done, and a note
Work = Callable[[Task, Report], Result]


@dataclass(frozen=True)
class Failure:
    """What went wrong in another process.

    Attributes:
        error: what the user can fix, raised here as it is; None for anything else.
        last_line: of the traceback.
        text: the traceback.
    """

    error: Exception | None
    last_line: str
    text: str

    @classmethod
    def of(cls, error: Exception) -> Failure:
        """Keeps an error that is being handled."""
        text = traceback.format_exc()
        kept = error if isinstance(error, InputError | OSError) else None
        return cls(kept, text.strip().splitlines()[-1], text)

    def again(self) -> Exception:
        """Returns an error to raise here."""
        error = self.error or RuntimeError(f"a worker failed: {self.last_line}")
        error.add_note(self.text)  # what --debug shows
        return error
