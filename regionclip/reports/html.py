"""HTML pages from Jinja2 templates: all values are escaped; a page opens from disk and loads nothing else."""

from __future__ import annotations

from functools import cache

from jinja2 import Environment

from clip_base.images.html import page_environment
from clip_base.runtime.progress import clock

DASH = "–"


def percent(share: float, digits: int = 1) -> str:
    """Returns a share in [0, 1] as a percentage without the sign: 41.2; a dash where it is negative."""
    return DASH if share < 0 else f"{100 * share:.{digits}f}"


def share(value: float) -> str:
    """Returns a share in [0, 1] with its sign: 41.2 %; a dash where it is negative."""
    return f"{percent(value)} %" if value >= 0 else DASH


def cell(value: str | float) -> str:
    """Returns what stands in a table: text as it is, a count as 1,234, a share (float) as its percentage."""
    return value if isinstance(value, str) else f"{value:,}" if isinstance(value, int) else percent(value)


@cache
def _environment() -> Environment:
    environment = page_environment("regionclip.reports")
    environment.filters |= {"cell": cell, "clock": clock, "count": "{:,.0f}".format, "share": share}
    return environment


def render(template: str, **values: object) -> str:
    """Returns a page.

    Args:
        template: file in `templates`; it extends `base.html`.
        values: what the template names; text is escaped, a `markupsafe.Markup` is not.

    Raises:
        jinja2.UndefinedError: the template names a value that is not given.
    """
    return _environment().get_template(template).render(values) + "\n"
