"""Validation and indexing shared by the flat structures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

Which = TypeVar("Which", bound=Tensor | Sequence[int] | slice | int)


def check_tensor(
    name: str, value: Tensor, shape: tuple[int | None, ...], dtype: torch.dtype | None = None
) -> None:
    """Raises a ValueError that states the expected and the found shape and type; None means any."""
    fits = value.ndim == len(shape) and all(
        want in (None, got) for want, got in zip(shape, value.shape, strict=True)
    )
    if not fits:
        wanted = ", ".join("any" if want is None else str(want) for want in shape)
        raise ValueError(f"{name} must be [{wanted}], got {list(value.shape)}")
    if dtype is not None and value.dtype != dtype:
        raise ValueError(f"{name} must be {dtype}, got {value.dtype}")


def rows(which: Which, count: int) -> Which | slice:
    """Returns what picks the same of `count` rows and leaves them rows: of one number, a slice.

    Raises:
        IndexError: there is no row of that number.
    """
    if not isinstance(which, int):
        return which
    if not -count <= which < count:
        raise IndexError(f"there is no row {which} of {count}")
    return slice(which, which + 1 or None)
