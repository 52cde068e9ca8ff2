"""Inputs that a job cannot use: how many may be, and what becomes of the job when they are more."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from clip_base.jobs.config import option
from clip_base.runtime.errors import InputError, JobError, shortened
from clip_base.storage.files import is_folder, write_text
from clip_base.storage.tars import tar_of

_SAMPLE = 200  # files that are looked for before all are
MAX_SKIPPED = 0.5  # what is trained or measured in clip_base has a smaller default


def max_skipped_option(default: float = MAX_SKIPPED, renamed_from: str = "") -> float:
    """Declares the option `max_skipped` of a job's config; check it with `require_share`."""
    meaning = "share of unusable images above which the job fails, in [0, 1]; all of them always fail it"
    return option(default, meaning, runtime_only=True, renamed_from=renamed_from)


def require_share(max_skipped: float) -> None:
    """Raises an InputError when the option's value is no share."""
    if not 0 <= max_skipped <= 1:
        raise InputError(f"max_skipped must be in [0, 1], found {max_skipped}")


def write_skipped(path: Path, entries: Iterable[dict[str, Any]]) -> None:
    """Writes the unusable inputs as JSON Lines, atomically."""
    write_text(path, "".join(json.dumps(entry) + "\n" for entry in entries))


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


def require_present(files: Sequence[Any], max_skipped: float, where: str) -> None:
    """Raises a JobError, before any work, when so many image files are missing that the work would fail.

    Args:
        files: paths; what else holds an image, such as a tar's member, is not looked for.
        max_skipped: the share in [0, 1] that may be missing; all of them never may.
        where: the option or file that names them, for the message.
    """
    paths = [file for file in files if isinstance(file, Path) and tar_of(file) is None]
    if not paths:
        return
    some = paths if len(paths) <= _SAMPLE else paths[:: len(paths) // _SAMPLE]
    for looked in (some, paths):  # all are asked for only where some suggest it
        missing = [path for path in looked if not _exists(path)]
        if len(missing) < len(looked) and len(missing) <= max(max_skipped * len(looked), 1):
            return
    folder = missing[0].parent
    here = "which exists" if is_folder(folder) else "which does not exist"
    raise JobError(
        f"{where}: {len(missing):,} of {len(paths):,} images are missing, more than "
        f"max_skipped={max_skipped:g} allows; the first is {shortened(missing[0].name)} in "
        f"{shortened(str(folder), 200)}, {here}; give the folder that the file names are relative to"
    )


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a name that no file can have
        return False
