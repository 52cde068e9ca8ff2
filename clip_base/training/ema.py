"""Exponential moving average of a task's weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from clip_base.runtime import distributed


class EMA:
    """The moving average of everything in a task's state that is a floating-point number.

    After step n (counted from 0) an average moves by 1 - min(decay, (1 + n) / (10 + n)) towards the weights,
    so that the random beginning is soon forgotten (the warm-up of TensorFlow's ExponentialMovingAverage).
    Batch norm's statistics are averaged like the weights that they belong to.

    Args:
        task: whose weights are followed.
        decay: in [0, 1): how much of the average stays from one step to the next.
    """

    def __init__(self, task: nn.Module, decay: float) -> None:
        self.task, self.decay = task, decay
        self.weights = {key: value.detach().clone() for key, value in self._followed().items()}

    def _followed(self) -> dict[str, Tensor]:
        return {key: value for key, value in self.task.state_dict().items() if value.is_floating_point()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Moves the average towards the weights after `step`."""
        share = 1 - min(self.decay, (1 + step) / (10 + step))
        for key, value in self._followed().items():
            self.weights[key].lerp_(value, share)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchanges the task's weights with their average."""
        for key, value in self._followed().items():
            before = value.clone()
            value.copy_(self.weights[key])
            self.weights[key].copy_(before)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """While it lasts, the task has the averaged weights."""
        self.swap()
        try:
            yield
        finally:
            self.swap()

    @torch.no_grad()
    def load(self, weights: dict[str, Tensor]) -> None:
        """Takes the average that a checkpoint holds."""
        for key, value in self.weights.items():
            value.copy_(distributed.shard_like(weights[key], value))
