"""The one training loop. A task is a module: a batch in, a dict of named, weighted scalar losses out."""

from __future__ import annotations

import contextlib
import math
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from clip_base import checkpoint
from clip_base.config import option
from clip_base.errors import InputError
from clip_base.progress import Progress
from clip_base.run import RunFolder


@dataclass
class TrainConfig:
    """How a task is trained."""

    steps: int = option(0, "optimiser steps in all; 0: as many as `epochs` says")
    epochs: float = option(0.0, "passes over the data; 0: as `steps` says")
    batch_size: int = option(256, "images a step")
    optimizer: str = option("adamw", "adamw: decoupled weight decay; sgd: momentum", choices=("adamw", "sgd"))
    lr: float = option(5e-4, "peak learning rate")
    beta1: float = option(0.9, "Adam's first decay, or the momentum of SGD")
    beta2: float = option(0.98, "Adam's second decay")
    eps: float = option(1e-6, "Adam's epsilon")
    weight_decay: float = option(0.2, "decay of everything but gains, biases and the logit scale")
    warmup_steps: int = option(0, "steps in which the learning rate rises linearly from zero")
    schedule: str = option("cosine", "course of the learning rate", choices=("cosine", "step", "constant"))
    milestones: list[float] = option([], "schedule=step: shares of the steps after which lr falls to a tenth")
    max_grad_norm: float = option(0.0, "gradients are scaled down to this norm; 0: never")
    precision: str = option(
        "auto", "auto takes bf16 where the processor computes in it", choices=("auto", "fp32", "bf16")
    )
    compile: bool = option(False, "torch.compile the task")
    seed: int = option(0, "decides initial weights, order and augmentation")
    workers: int = option(0, "processes that load data; 0: the training process itself", free=True)
    save_every: float = option(60.0, "seconds between checkpoints", free=True)
    log_every: int = option(10, "steps between lines in log.jsonl")
    evaluate_every: int = option(0, "steps between evaluations along the way; 0: none")
    device: str = option("auto", "auto takes a GPU when there is one", free=True)

    def __post_init__(self) -> None:
        if self.steps > 0 and self.epochs > 0:
            raise InputError(
                f"train.steps={self.steps} and train.epochs={self.epochs:g} both say how long to train; "
                "set the one that shall not count to 0"
            )
        if self.batch_size < 1:
            raise InputError(f"batch_size must be at least 1, found {self.batch_size}")


class Batch(Protocol):
    """What a loader yields and a task receives."""

    def to(self, device: torch.device | str) -> Any:
        """Returns the batch on `device`."""


def pick_device(name: str) -> torch.device:
    """Returns the device called `name`; "auto" is the first GPU, else the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def computes_in_bf16(device: torch.device) -> bool:
    """Whether `device` multiplies bfloat16 matrices in hardware (AVX512-BF16, AMX, Ampere and later)."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "cpu":
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return False


def autocast(precision: str, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Returns the context in which a forward pass runs at `precision` ("auto", "fp32" or "bf16")."""
    if precision == "bf16" or (precision == "auto" and computes_in_bf16(device)):
        return torch.autocast(device.type, torch.bfloat16)
    return contextlib.nullcontext()


def learning_rate(config: TrainConfig, step: int, steps: int) -> float:
    """Returns the learning rate of `step` (counted from 0) out of `steps`."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "cosine":
        share = (step - config.warmup_steps) / max(steps - config.warmup_steps, 1)
        return config.lr * (1 + math.cos(math.pi * share)) / 2
    if config.schedule == "step":
        return float(config.lr * 0.1 ** sum(step >= share * steps for share in config.milestones))
    return config.lr


def make_optimizer(task: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """Returns the optimiser over the task's trainable parameters; gains and biases are not decayed."""
    trainable = [parameter for parameter in task.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if not groups:
        raise InputError("nothing to train: every parameter of the task is frozen")
    if config.optimizer == "adamw":
        betas = (config.beta1, config.beta2)
        return torch.optim.AdamW(groups, lr=config.lr, betas=betas, eps=config.eps, fused=True)
    return torch.optim.SGD(groups, lr=config.lr, momentum=config.beta1, fused=True)


class _Stop:
    """Turns SIGTERM into a request to save and leave after the current step."""

    def __init__(self) -> None:
        self.requested = False
        self._before: Any = None

    def __enter__(self) -> _Stop:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._request)
        return self

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.requested = True

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)


def fit(
    task: nn.Module,
    loader: Iterable[Batch],
    config: TrainConfig,
    run: RunFolder,
    evaluate: Callable[[int], dict[str, float]] | None = None,
) -> int:
    """Trains `task`: forward, sum the losses, backward, clip, step, log, evaluate, save; resumes `run`.

    Args:
        task: a batch in, a dict of named, already weighted scalar losses out. Trained in place.
        loader: begins anew when it ends; `seek(step)` moves it, `len` is the number of batches in an epoch.
        config: how to train.
        run: takes the log and the checkpoints.
        evaluate: called with the step every `evaluate_every` steps and at the end; its figures go to the log.

    Returns:
        The number of steps made in all.

    Raises:
        InputError: a loss is not a number (the step is named), or the newest checkpoint is damaged.
        KeyboardInterrupt: after SIGTERM, once the state is saved.
    """
    device = pick_device(config.device)
    steps = config.steps or round(config.epochs * len(cast(Any, loader)))
    if steps < 1:
        raise InputError("nothing to do: set train.steps or train.epochs")
    task.to(device).train()
    optimizer = make_optimizer(task, config)
    loop = _Loop(task, optimizer, config, run, device, steps)
    step = loop.resume()
    if step >= steps:
        return step
    if hasattr(loader, "seek"):
        loader.seek(step)
    with Progress(run.path.name, steps, step) as progress, _Stop() as stop:
        for batch in _endless(loader):
            loop.step(step, batch.to(device))
            step += 1
            progress.advance(note=loop.note)
            due = config.evaluate_every and step % config.evaluate_every == 0
            if evaluate is not None and (due or step == steps):
                loop.evaluate(step, evaluate)
            if step == steps or stop.requested or loop.save_is_due():
                loop.save(step)
            if stop.requested and step < steps:
                raise KeyboardInterrupt
            if step == steps:
                break
    return step


def _endless(loader: Iterable[Batch]) -> Iterator[Batch]:
    while True:
        empty = True
        for batch in loader:
            empty = False
            yield batch
        if empty:
            raise InputError("the loader yields no batches")


class _Loop:
    """The state of one call of `fit`."""

    def __init__(
        self,
        task: nn.Module,
        optimizer: torch.optim.Optimizer,
        config: TrainConfig,
        run: RunFolder,
        device: torch.device,
        steps: int,
    ) -> None:
        self.task, self.optimizer, self.config, self.run = task, optimizer, config, run
        self.device, self.steps, self.note = device, steps, ""
        self.forward = torch.compile(task) if config.compile else task
        self.folder = run.path / "checkpoints"
        self._saved = self._logged = time.monotonic()
        self._sums: dict[str, Tensor] = {}
        self._images = 0

    def resume(self) -> int:
        found = checkpoint.newest(self.folder)
        if found is None:
            self.run.rewind_log(0)
            return 0
        step, weights, training = found
        checkpoint.load_exactly(self.task, weights, self.folder / f"{step:08d}")
        self.optimizer.load_state_dict(training["optimizer"])
        torch.set_rng_state(training["random"])
        self.run.rewind_log(step)
        self._sums = training["sums"]
        return step

    def step(self, step: int, batch: Any) -> None:
        config = self.config
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(config, step, self.steps)
        with autocast(config.precision, self.device):
            losses = self.forward(batch)
        total = torch.stack([loss.float() for loss in losses.values()]).sum()
        if not torch.isfinite(total):
            shown = ", ".join(f"{name} {float(loss.detach()):.4g}" for name, loss in losses.items())
            remedy = "lower train.lr or use train.precision=fp32"
            raise InputError(f"the loss is not finite at step {step + 1} ({shown}); {remedy}")
        torch.autograd.backward(total)
        self._count(losses)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        if config.max_grad_norm:
            nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        after = getattr(self.task, "after_step", None)
        if after is not None:
            after()
        self._images += config.batch_size
        if (step + 1) % config.log_every == 0 or step + 1 == self.steps:
            self._log(step + 1)

    def _count(self, losses: dict[str, Tensor]) -> None:
        for name, loss in losses.items():
            before = self._sums.get(name, torch.zeros(2, dtype=torch.float64))
            self._sums[name] = before + torch.tensor([float(loss.detach()), 1.0], dtype=torch.float64)

    def _log(self, step: int) -> None:
        now = time.monotonic()
        rate = self._images / max(now - self._logged, 1e-9)
        means = {name: float(total / count) for name, (total, count) in self._sums.items()}
        lr = self.optimizer.param_groups[0]["lr"]
        self.run.log({"step": step, **means, "lr": lr, "images_per_second": round(rate, 1)})
        shown = ", ".join(f"{name} {mean:.3f}" for name, mean in means.items())
        self.note = f"{shown}, lr {lr:.2e}, {rate:.0f} images/s"
        self._sums, self._logged, self._images = {}, now, 0

    def evaluate(self, step: int, evaluate: Callable[[int], dict[str, float]]) -> None:
        self.task.eval()
        with torch.no_grad(), autocast(self.config.precision, self.device):
            figures = evaluate(step)
        self.task.train()
        self.run.log({"step": step, **figures})

    def save_is_due(self) -> bool:
        return time.monotonic() - self._saved >= self.config.save_every

    def save(self, step: int) -> None:
        training = {
            "optimizer": self.optimizer.state_dict(),
            "random": torch.get_rng_state(),
            "sums": self._sums,
        }
        checkpoint.save(self.folder, step, self.task.state_dict(), training)
        self._saved = time.monotonic()
