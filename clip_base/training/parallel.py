"""Distributed training of a task with DDP or FSDP2, and gathering of sharded tensors."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from clip_base.models.bottleneck import Bottleneck
from clip_base.models.transformer import ResidualBlock
from clip_base.runtime.distributed import world
from clip_base.runtime.errors import InputError

KINDS = ("auto", "ddp", "fsdp", "none")


class Parallel:
    """A task whose gradients are averaged over all processes, as if one had computed the whole batch.

    Batch norms that take statistics take those of their own process's rows, whichever way is chosen.

    Args:
        task: already on its device. With "fsdp" its parameters become shards, in place.
        kind: "ddp" keeps the weights in every process, "fsdp" (FSDP2) a shard of each in each; "auto" is ddp;
            "none" refuses to run in more than one process.
        device: where the task is.

    Attributes:
        forward: the task, or what must be called in its place.
        sharded: whether parameters are shards.
    """

    def __init__(self, task: nn.Module, kind: str, device: torch.device) -> None:
        self.task, self.forward = task, cast(Callable[[Any], Any], task)
        self._scalars: set[nn.Parameter] = set()
        self.sharded = False
        if world() == 1:
            return
        if kind == "none":
            raise InputError(f"train.parallel=none runs in one process, found {world()}; use ddp or fsdp")
        if kind == "fsdp":
            self._shard(device)
            self.sharded = True
        elif any(parameter.requires_grad for parameter in task.parameters()):
            self.forward = DistributedDataParallel(task, gradient_as_bucket_view=True)

    def _shard(self, device: torch.device) -> None:
        from torch.distributed.device_mesh import init_device_mesh  # noqa: PLC0415
        from torch.distributed.fsdp import fully_shard  # noqa: PLC0415 (a second to import, and seldom used)

        task = self.task
        # FSDP2 takes neither channels-last weights nor scalars; the few scalars stay whole in every process.
        task.to(memory_format=torch.contiguous_format)
        self._scalars = {parameter for parameter in task.parameters() if parameter.ndim == 0}
        options: dict[str, Any] = {
            "mesh": init_device_mesh(device.type, (world(),)),
            "ignored_params": self._scalars,
        }
        for module in list(task.modules()):
            if isinstance(module, ResidualBlock | Bottleneck):
                fully_shard(module, **options)
        fully_shard(task, **options)

    def after_backward(self) -> None:
        """Averages what the wrapper leaves alone."""
        for parameter in self._scalars:
            if parameter.grad is not None:
                dist.all_reduce(parameter.grad)
                parameter.grad /= world()

    @contextlib.contextmanager
    def whole(self) -> Iterator[None]:
        """While it lasts, parts of the task may be called by themselves, as an evaluation does."""
        task = cast(Any, self.task)
        if not self.sharded:
            yield
            return
        task.unshard()
        try:
            yield
        finally:
            task.reshard()
