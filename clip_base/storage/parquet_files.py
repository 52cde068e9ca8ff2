"""The one place where Parquet files are opened: each failure names the file, and sizes are checked first."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from clip_base.runtime.errors import InputError, shortened
from clip_base.storage.files import existing_file
from clip_base.storage.kinds import kind_of
from clip_base.storage.limits import require_unpacked

_LEAST = 4  # bytes that a row takes in memory at the least
# What a damaged file makes pyarrow raise; texts in it may be no UTF-8, in its names as well.
_FAULTS = (pa.ArrowException, OSError, ValueError, KeyError, TypeError, OverflowError, MemoryError)


@contextlib.contextmanager
def open_parquet(
    path: str | Path, what: str = "Parquet table", remedy: str = "write it again"
) -> Iterator[pq.ParquetFile]:
    """Opens a Parquet file for reading.

    Args:
        path: the file.
        what: what it is to the user, for messages.
        remedy: what to do about a damaged one.

    Raises:
        InputError: the file is missing, damaged (also where it is read within), or declares far more rows
            than it can hold.
    """
    path = existing_file(path, what)
    try:
        with pq.ParquetFile(path) as file:
            size = file.metadata.num_rows * _LEAST
            for group in range(file.metadata.num_row_groups):
                size += max(0, file.metadata.row_group(group).total_byte_size)
            require_unpacked(size, path.stat().st_size, f"{what} {path}")
            yield file
    except InputError:
        raise
    except _FAULTS as error:
        kind = kind_of(path)
        if kind not in ("", "a Parquet table"):
            raise InputError(f"{what} {path} is {kind}, and a Parquet table is needed") from None
        reason = shortened(next(iter(str(error).splitlines()), "") or type(error).__name__, 200)
        raise InputError(f"{what} {path} cannot be read as Parquet ({reason}); {remedy}") from None
