"""Logging to TensorBoard."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from clip_base.runtime.errors import InputError


class TensorBoardLog:
    """Writes scalars to a folder that `tensorboard --logdir` shows.

    Args:
        folder: where the event files go.
        step: where the run resumes; what an earlier, interrupted run wrote after it is hidden.

    Raises:
        InputError: TensorBoard is not installed.
    """

    def __init__(self, folder: Path, step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415 (optional)
        except ImportError:
            raise InputError(
                "train.tensorboard=true needs TensorBoard, which is not installed: "
                "`pip install 'regionclip[tensorboard]'`"
            ) from None
        options: dict[str, Any] = {"purge_step": step + 1} if step else {}
        self._writer: Any = SummaryWriter(str(folder), **options)

    def add(self, step: int, figures: dict[str, float]) -> None:
        """Adds one point to the curve of each figure."""
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        """Ends the event file."""
        self._writer.close()
