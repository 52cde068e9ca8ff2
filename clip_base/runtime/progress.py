"""Progress of longer work: a bar in a terminal, a line every ten seconds in a log."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sized
from types import TracebackType
from typing import Any, ClassVar, TypeVar

from clip_base.runtime.announce import after_a_while

T = TypeVar("T")
SECONDS_BETWEEN_LINES = 10.0


def clock(seconds: float) -> str:
    """Returns a duration as people read it: 42 s, 3 min 05 s, 2 h 10 min."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def rate(count: float, seconds: float, unit: str = "image") -> str:
    """Returns a speed as people read it: 240 images/s, 3.1 images/s, 12 s per image."""
    if not count:
        return f"no {unit} yet"
    speed = count / max(seconds, 1e-9)
    if speed >= 1:
        return f"{speed:.0f} {unit}s/s" if speed >= 10 else f"{speed:.1f} {unit}s/s"
    return f"{clock(1 / speed) if speed <= 0.1 else f'{1 / speed:.1f} s'} per {unit}"


class Progress:
    """Counts towards a total and shows it on stderr.

    The time left is told from the second step on: the first one also loads and compiles.

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
        self._printed = time.monotonic()
        self._first: tuple[int, float] | None = None  # what was done after the first step, and when
        self._opening: threading.Timer | None = None
        self._bar: Any = None
        self._quiet = quiet
        if sys.stderr.isatty() and not quiet:
            self._bar = _bar()
            self._task = self._bar.add_task(description, total=total, completed=done, note="", left="")

    def __enter__(self) -> Progress:
        if self._bar is not None and Progress._live is not None:
            # Another bar is on the screen, where there is room for one: an evaluation within a training.
            self._bar, self._quiet = None, True
        if self._bar is not None:
            self._bar.start()
            Progress._live = self
        elif not self._quiet:
            of = f"{self.done}/{self.total} " if self.total else ""
            self._opening = after_a_while(f"{self.description}: {of}…")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._opening is not None:
            self._opening.cancel()
        if self._bar is not None:
            self._bar.stop()
            Progress._live = None

    def advance(self, steps: int = 1, note: str = "") -> None:
        """Counts `steps` more; `note` is shown behind the bar."""
        self.done += steps
        now = time.monotonic()
        left = self._left(now)
        if self._first is None:
            self._first = self.done, now
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, note=note, left=left)
        elif now - self._printed >= SECONDS_BETWEEN_LINES and not self._quiet:
            self._printed = now
            print(self._line(left, note), file=sys.stderr, flush=True)

    def _left(self, now: float) -> str:
        """Returns how long the rest will take; "" where that is not known."""
        if not self.total or self._first is None:
            return ""
        done, since = self._first
        if self.done <= done:
            return ""
        return f"{clock((now - since) / (self.done - done) * max(self.total - self.done, 0))} left"

    def _line(self, left: str, note: str) -> str:
        if self._opening is not None:
            self._opening.cancel()
        done = f"{self.done}/{self.total}" if self.total else f"{self.done}"
        return f"{self.description}: " + ", ".join(part for part in (done, left, note) if part)


def _bar() -> Any:
    """Returns a bar for a terminal. Only there is rich imported: `--help` and completion do without it."""
    from rich import progress  # noqa: PLC0415
    from rich.console import Console  # noqa: PLC0415

    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TimeElapsedColumn(),
        progress.TextColumn("{task.fields[left]}"),
        progress.TextColumn("{task.fields[note]}"),
    )
    # What is printed meanwhile goes above the bar; into a file or a pipe it goes as ever.
    above = sys.stdout.isatty()
    return progress.Progress(*columns, console=Console(stderr=True), transient=False, redirect_stdout=above)


def track(iterable: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """Yields what `iterable` holds and shows progress meanwhile."""
    if total is None and isinstance(iterable, Sized):
        total = len(iterable)
    with Progress(description, total) as progress:
        for item in iterable:
            yield item
            progress.advance()
