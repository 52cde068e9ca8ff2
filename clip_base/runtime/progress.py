"""Progress of longer work: a bar in a terminal, a line every ten seconds in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sized
from types import TracebackType
from typing import ClassVar, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

T = TypeVar("T")
SECONDS_BETWEEN_LINES = 10.0


def clock(seconds: float) -> str:
    """Returns a duration as people read it: 42 s, 3 min 05 s, 2 h 10 min."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


class Progress:
    """Counts towards a total and shows it on stderr.

    Args:
        description: what is being done.
        total: how many steps there are; None when it is not known.
        done: steps that an earlier, interrupted run has already made.
        quiet: show nothing, as all but the first of several processes do.
    """

    _live: ClassVar[Progress | None] = None

    def __init__(
        self, description: str, total: int | None = None, done: int = 0, quiet: bool = False
    ) -> None:
        self.description, self.total, self.done = description, total, done
        self._first, self._start, self._printed = done, time.monotonic(), time.monotonic()
        self._bar: Bar | None = None
        self._quiet = quiet
        if sys.stderr.isatty() and not quiet:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
            )
            # What is printed meanwhile goes above the bar; into a file or a pipe it goes as ever.
            above = sys.stdout.isatty()
            self._bar = Bar(*columns, console=Console(stderr=True), transient=False, redirect_stdout=above)
            self._task = self._bar.add_task(description, total=total, completed=done, note="")

    def __enter__(self) -> Progress:
        if self._bar is not None and Progress._live is not None:
            # Another bar is on the screen, where there is room for one: an evaluation within a training.
            self._bar, self._quiet = None, True
        if self._bar is not None:
            self._bar.start()
            Progress._live = self
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
            Progress._live = None

    def advance(self, steps: int = 1, note: str = "") -> None:
        """Counts `steps` more; `note` is shown behind the bar."""
        self.done += steps
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, note=note)
            return
        now = time.monotonic()
        if now - self._printed >= SECONDS_BETWEEN_LINES and not self._quiet:
            self._printed = now
            print(self._line(now, note), file=sys.stderr, flush=True)

    def _line(self, now: float, note: str) -> str:
        elapsed = now - self._start
        line = f"{self.description}: {self.done}"
        if self.total:
            left = elapsed / max(self.done - self._first, 1) * (self.total - self.done)
            line += f"/{self.total}, {clock(left)} left"
        return f"{line}, {note}" if note else line


def track(iterable: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """Yields what `iterable` holds and shows progress meanwhile."""
    if total is None and isinstance(iterable, Sized):
        total = len(iterable)
    with Progress(description, total) as progress:
        for item in iterable:
            yield item
            progress.advance()
