"""Tables of what a campaign found, and their places in `docs/reliability.md`."""

from __future__ import annotations

import re
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "reliability.md"


def processor() -> str:
    """Returns the processor's name, where the system tells."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else "an unknown processor"


def write_table(name: str, text: str, page: Path = PAGE) -> None:
    """Puts a text between the comments `<!-- NAME -->` and `<!-- /NAME -->` of a page.

    Raises:
        ValueError: the page has no such place.
    """
    start, end = f"<!-- {name} -->\n", f"<!-- /{name} -->\n"
    before, found, rest = page.read_text(encoding="utf-8").partition(start)
    _, ended, after = rest.partition(end)
    if not (found and ended):
        raise ValueError(f"{page} has no place for {name}: {start.strip()} … {end.strip()}")
    page.write_text(f"{before}{start}\n{text.strip()}\n\n{end}{after}", encoding="utf-8")
