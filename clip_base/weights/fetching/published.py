"""One published file, and what everything that fetches one needs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

MIB = 1 << 20


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

    def kept_in(self, folder: Path) -> Path | None:
        """Returns the copy in the folder of published files, in folders of its own or without; None: none."""
        return next((place for place in (folder / self.url, folder / self.name) if place.is_file()), None)


def length(path: Path) -> int:
    """Returns a file's bytes, 0 when there is none."""
    return path.stat().st_size if path.exists() else 0
