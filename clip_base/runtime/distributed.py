"""All communication between the processes of a distributed run.

`torchrun --nproc-per-node=8 $(which clip-base) pretrain …` starts one process a GPU (nccl); without a GPU the
processes talk through gloo. Process r of W, its rank, computes rows r·b … (r+1)·b of every batch of W·b. In a
single process nothing here does anything.
"""

# W processes, b rows of a batch a process
from __future__ import annotations

import atexit
import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from clip_base.runtime.errors import InputError, JobError

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


_LOST = ("gloo", "Connection closed by peer", "Connection reset by peer", "NCCL", "Broken pipe")


def start() -> None:
    """Joins the process group that torchrun's environment variables describe; without them does nothing.

    Only rank 0 prints from now on.

    Raises:
        InputError: the variables are incomplete, or there are fewer GPUs than processes on this machine.
    """
    if dist.is_initialized() or int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise InputError(
            f"WORLD_SIZE={os.environ['WORLD_SIZE']} asks for several processes, but {', '.join(missing)} is "
            "not set; start with torchrun, or unset WORLD_SIZE"
        )
    backend = "gloo"
    if torch.cuda.is_available():
        place, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if place >= count:
            raise InputError(f"this machine has {count} GPUs; use torchrun --nproc-per-node={count} at most")
        torch.cuda.set_device(place)
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend)
    atexit.register(_leave)
    if not is_first():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (open until the process ends)


@contextlib.contextmanager
def naming_lost_processes() -> Iterator[None]:
    """Turns what gloo or nccl say when another process of the run has ended into a JobError.

    Raises:
        JobError: another process has ended; it has said why, unless it was killed.
    """
    try:
        yield
    except RuntimeError as error:  # torch's DistError is one
        text = str(error)
        if world() < 2 or not (isinstance(error, dist.DistError) or any(word in text for word in _LOST)):
            raise
        raise JobError(
            f"process {rank()} of {world()} has lost another one, which failed or was killed (it says why, "
            "unless it was killed); the same command resumes from the last checkpoint"
        ) from error


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """Returns this process's place, 0 to W - 1."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """Returns W, the number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_first() -> bool:
    """Whether this is the process that writes files, logs and shows progress."""
    return rank() == 0


def share(batch_size: int) -> int:
    """Returns b, the rows of a batch that each process computes.

    Raises:
        InputError: the batch cannot be split evenly.
    """
    rows, rest = divmod(batch_size, world())
    if rest or not rows:
        raise InputError(
            f"batch_size {batch_size} cannot be split evenly among {world()} processes; "
            f"use a multiple of {world()}"
        )
    return rows


def own_file(path: Path) -> Path:
    """Returns where this process may write what only it knows: `path` for rank 0, `NAME-1.…` for rank 1."""
    return path if is_first() else path.with_stem(f"{path.stem}-{rank()}")


class _Gather(torch.autograd.Function):
    """Concatenates the rows of all processes; a process gets back the gradients of all for its own rows."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        parts = [torch.empty_like(rows, memory_format=torch.contiguous_format) for _ in range(world())]
        dist.all_gather(parts, rows.contiguous())
        ctx.rows = len(rows)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (gradient,) = gradients
        if gradient.is_cuda:
            mine = gradient.new_empty(ctx.rows, *gradient.shape[1:])
            dist.reduce_scatter_tensor(mine, gradient.contiguous())
            return mine
        gradient = gradient.contiguous().clone()  # gloo scatters no sums
        dist.all_reduce(gradient)
        return gradient[rank() * ctx.rows : (rank() + 1) * ctx.rows]


def gather(rows: Tensor, counts: list[int] | None = None) -> Tensor:
    """Returns the rows of all processes, [W·b, …], in the order of their ranks, of [b, …] here.

    Gradients flow back: a row's gradient is the sum over all processes of what they made of it. As DDP and
    FSDP take the mean of the weights' gradients over processes, the result is the gradient of the mean of the
    processes' losses.

    Args:
        rows: of this process.
        counts: how many rows each process holds, from `row_counts`; None: as many everywhere.
    """
    if world() == 1:
        return rows
    if counts is None:
        return cast(Tensor, _Gather.apply(rows))
    longest = max(counts)
    if not longest:
        return rows
    filler = rows.new_zeros(longest - len(rows), *rows.shape[1:])
    padded = cast(Tensor, _Gather.apply(torch.cat([rows, filler])))
    return torch.cat([part[:count] for part, count in zip(torch.split(padded, longest), counts, strict=True)])


def row_counts(rows: Tensor) -> list[int]:
    """Returns how many rows each process holds, by rank, where they may differ."""
    if world() == 1:
        return [len(rows)]
    return cast(list[int], _Gather.apply(torch.tensor([len(rows)], device=rows.device)).tolist())


def permutation(parts: list[int], device: torch.device) -> Tensor:
    """Returns a random order of this process's rows: that in which one process's order of all has them.

    All processes draw alike, whose generators must be, and each keeps what is its own.

    Args:
        parts: how many rows there are, in parts: one process would hold the first part of all processes, then
            the second of all, and so on.
        device: that draws, and where the order is.
    """
    if world() == 1:
        return torch.randperm(sum(parts), device=device)
    counts = gather(torch.tensor([parts], device=device)).cpu()  # [W, parts]
    starts = (counts.T.flatten().cumsum(0) - counts.T.flatten()).view(len(parts), -1)[:, rank()]
    mine = torch.cat([torch.arange(n) + first for n, first in zip(parts, starts.tolist(), strict=True)])
    order = torch.randperm(int(counts.sum()), device=device)
    places = torch.full_like(order, -1).index_copy(
        0, mine.to(device), torch.arange(len(mine), device=device)
    )[order]
    return places[places >= 0]


def mean(values: Tensor) -> Tensor:
    """Returns the mean over all processes of a tensor that each of them holds."""
    if world() == 1:
        return values
    total = values.clone()
    dist.all_reduce(total)
    return total / world()


def any_of(*flags: bool) -> tuple[bool, ...]:
    """Returns for each flag whether it is set in at least one process; the same answer in all of them."""
    if world() == 1:
        return flags
    votes = torch.tensor(flags, dtype=torch.int32)
    if dist.get_backend() == "nccl":
        votes = votes.cuda()
    dist.all_reduce(votes, dist.ReduceOp.MAX)
    return tuple(bool(vote) for vote in votes.tolist())


def wait() -> None:
    """Returns when all processes have come to this point."""
    if world() > 1:
        any_of(False)


def is_shard(value: Any) -> bool:
    """Whether a tensor is one process's part of a sharded one."""
    # Where nothing has imported DTensor, which takes a while, there is none.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def full(value: Any) -> Any:
    """Returns `value` with every sharded tensor in it whole; dicts and lists are followed.

    All processes must call it together.
    """
    if is_shard(value):
        return cast("DTensor", value).full_tensor()
    if isinstance(value, dict):
        return {key: full(item) for key, item in value.items()}
    if isinstance(value, list):
        return [full(item) for item in value]
    return value


def shard_like(value: Tensor, example: Tensor) -> Tensor:
    """Returns a whole tensor, sharded as `example` of the same shape is; all processes must call it."""
    if not is_shard(example) or is_shard(value):
        return value
    from torch.distributed.tensor import distribute_tensor  # noqa: PLC0415 (slow, and seldom needed)

    shard = cast("DTensor", example)
    return distribute_tensor(value.to(shard.device), shard.device_mesh, shard.placements)


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Loads an optimizer's state as `full` has made it whole, however the parameters are sharded now.

    How its step is computed stays this run's: torch's fused SGD takes no shards.
    """
    fused = [group.get("fused") for group in optimizer.param_groups]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    placed = {
        index: {
            key: shard_like(item, parameters[index])
            if isinstance(item, Tensor) and item.shape == parameters[index].shape
            else item
            for key, item in slots.items()
        }
        for index, slots in state["state"].items()
    }
    groups = [
        {**group, "fused": own} if "fused" in group else group
        for group, own in zip(state["param_groups"], fused, strict=True)
    ]
    optimizer.load_state_dict({**state, "state": placed, "param_groups": groups})
