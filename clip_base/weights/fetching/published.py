"""One published file, and what everything that fetches one needs."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Published:
    """One published file.

    Attributes:
        url: its address.
        sha256: of its content, in hex; "" when its publishers do not say it.
        size: in bytes; 0 when it is not known.
        page: the shared Google Drive folder that it lies in; then `url` is only the file's path there.
    """

    url: str
    sha256: str = ""
    size: int = 0
    page: str = ""

    @property
    def name(self) -> str:
        """The file's own name."""
        return self.url.rpartition("/")[2]


@contextlib.contextmanager
def alone(path: Path) -> Iterator[None]:
    """Lets one process at a time in, where the system has file locks; the lock ends with the process."""
    if sys.platform == "win32":
        yield
        return
    import fcntl  # noqa: PLC0415 (not everywhere)

    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def length(path: Path) -> int:
    """Returns a file's bytes, 0 when there is none."""
    return path.stat().st_size if path.exists() else 0
