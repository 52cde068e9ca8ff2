"""Logging to TensorBoard and to Weights & Biases, beside `log.jsonl`."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Any, Protocol

from clip_base.runtime.errors import InputError
from clip_base.storage.files import read_text, write_text

WANDB_ID = ".wandb_id"


class Board(Protocol):
    """What shows a training's figures elsewhere."""

    def add(self, step: int, figures: dict[str, float]) -> None:
        """Adds one point to the curve of each figure."""

    def close(self) -> None:
        """Ends the log."""


def open_boards(folder: Path, step: int, tensorboard: bool, project: str, config: Any) -> list[Board]:
    """Returns the boards that a training asks for.

    Args:
        folder: the run's.
        step: where the run resumes.
        tensorboard: whether TensorBoard is one.
        project: of Weights & Biases; "" for none.
        config: the training's options, as plain values.

    Raises:
        InputError: one is not installed, or cannot be used.
    """
    boards: list[Board] = []
    if tensorboard:
        boards.append(TensorBoardLog(folder / "tensorboard", step))
    if project:
        boards.append(WandbLog(folder, project, config))
    return boards


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


class WandbLog:
    """Logs to Weights & Biases; a resumed training continues the same run there.

    WANDB_MODE=offline in the environment keeps everything in `folder/wandb`, for `wandb sync` later.

    Args:
        folder: the run's.
        project: where the run is listed.
        config: the training's options, shown beside the curves.

    Raises:
        InputError: wandb is not installed, or refuses, such as for want of a key.
    """

    def __init__(self, folder: Path, project: str, config: Any) -> None:
        try:
            import wandb  # noqa: PLC0415 (optional)
        except ImportError:
            raise InputError(
                f"train.wandb={project} needs wandb, which is absent: `pip install 'regionclip[wandb]'`"
            ) from None
        kept = folder / WANDB_ID
        if not kept.exists():
            write_text(kept, secrets.token_hex(4))
        settings = wandb.Settings(console="off", silent=True)
        try:
            self._run: Any = wandb.init(
                project=project, name=folder.name, id=read_text(kept), resume="allow",
                dir=str(folder), config=config, settings=settings,
            )  # fmt: skip
        except wandb.Error as error:
            reason = " ".join(str(error).split())
            raise InputError(
                f"train.wandb={project}: {reason}; `wandb login`, or set WANDB_MODE=offline"
            ) from None
        # Steps as this log counts them: after a resume some come again, which wandb's own count refuses.
        self._run.define_metric("*", step_metric="step")

    def add(self, step: int, figures: dict[str, float]) -> None:
        """Adds one point to the curve of each figure."""
        self._run.log({"step": step, **figures})

    def close(self) -> None:
        """Ends the run, and waits until everything is sent."""
        self._run.finish()
