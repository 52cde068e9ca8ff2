"""Inputs that a job cannot use: how many may be, and what becomes of the job when they are more."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from clip_base.jobs.config import option
from clip_base.runtime.errors import InputError, JobError

MAX_SKIPPED = 0.5  # what is trained or measured in clip_base has a smaller default


def max_skipped_option(default: float = MAX_SKIPPED, renamed_from: str = "") -> float:
    """Declares the option `max_skipped` of a job's config; check it with `require_share`."""
    meaning = "share of unusable images above which the job fails, in [0, 1]; all of them always fail it"
    return option(default, meaning, runtime_only=True, renamed_from=renamed_from)


def require_share(max_skipped: float) -> None:
    """Raises an InputError when the option's value is no share."""
    if not 0 <= max_skipped <= 1:
        raise InputError(f"max_skipped must be in [0, 1], found {max_skipped}")


def require_usable(
    reasons: Sequence[str], total: int, max_skipped: float, listed: Path | None = None, what: str = "images"
) -> None:
    """Raises a JobError when so many inputs were unusable that the job's result means little.

    Args:
        reasons: why each unusable input is.
        total: how many inputs there were, usable or not.
        max_skipped: the share in [0, 1] that is allowed; all of them never are.
        listed: the file that lists them.
        what: what they are.
    """
    count = len(reasons)
    if not count or (count <= max_skipped * total and count < total):
        return
    where = f"; all are listed in {listed}" if listed else ""
    raise JobError(
        f"{count:,} of {total:,} {what} cannot be used, more than max_skipped={max_skipped:g} allows "
        f"(first: {reasons[0]}){where}"
    )
