"""Compute options that many jobs share: device, precision, batch size."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from clip_base.jobs.config import option
from clip_base.runtime.errors import InputError
from clip_base.runtime.precision import pick_device


@dataclass(kw_only=True)
class DeviceOptions:
    """Where a job computes and in which precision."""

    precision: str = option(
        "auto", "auto uses bf16 where the hardware supports it", choices=("auto", "fp32", "bf16")
    )
    device: str = option("auto", "auto uses a GPU if there is one", runtime_only=True)

    def pick_device(self) -> torch.device:
        """Returns the device that the options name.

        Raises:
            InputError: there is no such device.
        """
        return pick_device(self.device)


@dataclass(kw_only=True)
class ComputeOptions(DeviceOptions):
    """How a job computes. Images of one batch are padded to one size, so that its size may move results."""

    batch_size: int = option(8, "images per batch")

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise InputError(f"batch_size must be at least 1, found {self.batch_size}")
