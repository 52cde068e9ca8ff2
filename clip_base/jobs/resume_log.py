"""A log of a job's results so far, so that a stopped run resumes and memory does not grow."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from clip_base.runtime.errors import InputError, shortened
from clip_base.storage.files import write_text


class ResumeLog:
    """Entries of units of work, appended as they are found; a unit counts once it has ended.

    Opened again after a run was stopped, it holds the units that had ended and nothing of the next one. Use
    it in a `with` statement.

    Args:
        path: the file.
        header: what decides the result: a run with another header must not resume here.

    Attributes:
        units: how many units have ended.
        images: how many images those had.

    Raises:
        InputError: the file holds another run that was stopped.
    """

    def __init__(self, path: Path, header: dict[str, Any]) -> None:
        self.path, self.units, self.images = path, 0, 0
        if path.exists():
            self._go_on(header)
        else:
            write_text(path, _line("header", header))
        self._file = path.open("a", encoding="utf-8")

    def __enter__(self) -> ResumeLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def _go_on(self, header: dict[str, Any]) -> None:
        place, whole = 0, 0  # bytes read, and of the header with the units that have ended
        with self.path.open("rb+") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    break  # cut off by a kill
                place += len(line)
                kind, value = self._read(line)
                if kind == "header":
                    if not isinstance(value, dict):
                        raise self._damaged()
                    self._require_same(value, json.loads(json.dumps(header)))
                    whole = place
                elif kind == "end":
                    if not isinstance(value, int):
                        raise self._damaged()
                    self.units, self.images, whole = self.units + 1, self.images + value, place
            file.truncate(whole)

    def _read(self, line: str | bytes) -> tuple[Any, Any]:
        """Returns the kind and the value of a line; InputError when it is none of ours."""
        try:
            kind, value = json.loads(line)
        except (ValueError, TypeError, RecursionError):
            raise self._damaged() from None
        return kind, value

    def _damaged(self) -> InputError:
        return InputError(f"{self.path}, what a stopped run left, is damaged; delete it to start again")

    def _require_same(self, there: dict[str, Any], here: dict[str, Any]) -> None:
        differing = [key for key in {**there, **here} if there.get(key) != here.get(key)]
        if differing:
            named = shortened(", ".join(differing[:3]))
            raise InputError(
                f"{self.path.parent} holds a run that was stopped and had other {named}: "
                f"give the same command to resume it, another out=, or delete {self.path} to start again"
            )

    def add(self, kind: str, entry: dict[str, Any]) -> None:
        """Appends an entry to the unit under way; `kind` is any word but "header" and "end"."""
        self._file.write(_line(kind, entry))

    def end(self, images: int) -> None:
        """Ends the unit under way, which had so many images."""
        self._file.write(_line("end", images))
        self._file.flush()
        self.units, self.images = self.units + 1, self.images + images

    def entries(self, kind: str) -> Iterator[dict[str, Any]]:
        """Yields all entries of one kind, in order."""
        self._file.flush()
        with self.path.open("rb") as file:  # as it was checked when it was opened
            for line in file:
                found, value = self._read(line)
                if found == kind:
                    if not isinstance(value, dict):
                        raise self._damaged()
                    yield value

    def remove(self) -> None:
        """Deletes the file: what it held is written elsewhere."""
        self.path.unlink()


def _line(kind: str, value: Any) -> str:
    return json.dumps([kind, value], ensure_ascii=False) + "\n"
