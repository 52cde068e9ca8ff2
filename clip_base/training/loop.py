"""The one training loop. A task is a module: a batch in, a dict of named, weighted scalar losses out."""

from __future__ import annotations

import contextlib
import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from types import FrameType
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from clip_base.jobs.config import REQUIRED, option
from clip_base.jobs.run import RunFolder
from clip_base.jobs.skipped import max_skipped_option, require_share
from clip_base.models.clip import set_checkpointing
from clip_base.runtime import distributed
from clip_base.runtime.errors import InputError, shortened
from clip_base.runtime.precision import PRECISIONS, autocast, compiled, pick_device
from clip_base.runtime.progress import Progress
from clip_base.runtime.progress import rate as rate_of
from clip_base.storage.files import write_json
from clip_base.training import checkpoint
from clip_base.training.boards import Board, open_boards
from clip_base.training.curves import CURVES, write_curves
from clip_base.training.ema import EMA
from clip_base.training.optimizers import OPTIMIZERS, build_optimizer, set_learning_rate
from clip_base.training.parallel import KINDS, Parallel
from clip_base.weights.native import load_exactly

REMEDY = "lower train.lr or use train.precision=fp32"  # for numbers that are not finite


@dataclass
class TrainConfig:
    """How a task is trained."""

    steps: int = option(0, "total optimizer steps; 0: as many as `epochs` take")
    epochs: float = option(0.0, "passes over the data, when steps is 0")
    batch_size: int = option(256, "images per step")
    optimizer: str = option(
        "adamw",
        "adamw: decoupled weight decay, also with statistics of 16 or 8 bits; sgd: momentum",
        choices=OPTIMIZERS,
    )
    lr: float = option(5e-4, "peak learning rate")
    beta1: float = option(0.9, "Adam's first decay, or the momentum of SGD")
    beta2: float = option(0.98, "Adam's second decay")
    eps: float = option(1e-6, "Adam's epsilon")
    weight_decay: float = option(0.2, "decay of everything but gains, biases and the logit scale")
    warmup_steps: int = option(0, "steps in which the learning rate rises linearly from zero")
    schedule: str = option("cosine", "learning-rate schedule", choices=("cosine", "step", "constant"))
    milestones: list[float] = option(
        [], "schedule=step: fractions of the steps after which lr is divided by ten"
    )
    max_grad_norm: float = option(0.0, "gradients are scaled down to this norm; 0: never")
    precision: str = option(
        "auto", "auto uses bf16 where the hardware supports it; fp16 is for GPUs", choices=PRECISIONS
    )
    compile: bool = option(False, "torch.compile the task")
    checkpointing: bool = option(
        False, "recompute activations in the backward pass: less memory", runtime_only=True
    )
    parallel: str = option(
        "auto",
        "several processes (torchrun): ddp, or fsdp to split the weights",
        choices=KINDS,
        runtime_only=True,
    )
    ema: float = option(0.0, "decay of the moving average that becomes the final weights; 0: none")
    max_skipped: float = max_skipped_option(0.1)
    seed: int = option(0, "determines initial weights, order and augmentation")
    workers: int = option(0, "processes that load data; 0: the training process itself", runtime_only=True)
    save_every: float = option(60.0, "seconds between checkpoints", runtime_only=True)
    log_every: int = option(10, "steps between lines in log.jsonl")
    tensorboard: bool = option(False, "also write the log to out/tensorboard", runtime_only=True)
    wandb: str = option(
        "",
        "project of Weights & Biases that also gets the log (WANDB_MODE=offline: out/wandb); empty: none",
        runtime_only=True,
    )
    evaluate_every: int = option(
        0, "steps between evaluations during training; 0: only at the end", runtime_only=True
    )
    device: str = option("auto", "auto uses a GPU if there is one", runtime_only=True)

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise InputError(f"batch_size must be at least 1, found {self.batch_size}")
        require_share(self.max_skipped)
        if not 0 <= self.ema < 1:
            raise InputError(f"ema must be in [0, 1), found {self.ema:g}; 0.9999 is usual for long runs")


@dataclass(kw_only=True)
class TrainingOptions:
    """Where a training writes, and what it keeps of its data."""

    out: str = option(REQUIRED, "folder for weights, log and metrics", runtime_only=True)
    cache: bool = option(False, "keep decoded images in memory (for small datasets)", runtime_only=True)


class Batch(Protocol):
    """What a loader yields and a task receives."""

    def to(self, device: torch.device | str) -> Any:
        """Returns the batch on `device`."""


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
    """Returns the optimizer over the task's trainable parameters; see `build_optimizer`."""
    betas = (config.beta1, config.beta2)
    return build_optimizer(
        task, config.optimizer, config.lr, betas, config.eps, config.weight_decay, config.seed
    )


class _Stop:
    """Turns SIGTERM and the first Ctrl-C into a request to save and leave after the current step."""

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _Stop:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._request)
        return self

    def _request(self, number: int, frame: FrameType | None) -> None:
        if self.requested:  # asked twice: at once, from the last checkpoint on
            raise KeyboardInterrupt
        self.requested = True
        print("stopping after this step; its state is saved", file=sys.stderr)

    def __exit__(self, *_: object) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)


def fit(
    task: nn.Module,
    loader: Iterable[Batch],
    config: TrainConfig,
    run: RunFolder,
    evaluate: Callable[[int], dict[str, float]] | None = None,
) -> int:
    """Trains `task`: forward, sum the losses, backward, clip, step, log, evaluate, save; resumes `run`.

    Args:
        task: a batch in, a dict of named, already weighted scalar losses out. Trained in place. It may have
            `after_step()`, and `log_scalars()` with further numbers for the log.
        loader: starts again when it ends; `seek(step)` moves it, `len` is the number of batches in an epoch,
            `names(step)` says what a batch's samples are called.
        config: how to train.
        run: takes the log and the checkpoints.
        evaluate: called with the step every `evaluate_every` steps and at the end; its figures go to the log.

    Returns:
        The number of steps made in all. With `config.ema` the task ends with the averaged weights; those of
        the last step are in its checkpoint.

    Raises:
        InputError: a loss or a weight is not finite (the step is named), or the newest checkpoint is damaged.
        KeyboardInterrupt: after SIGTERM or Ctrl-C, once the state is saved.
    """
    distributed.start()
    device = pick_device(config.device)
    steps = config.steps or round(config.epochs * len(cast(Any, loader)))
    if steps < 1:
        raise InputError("set train.steps or train.epochs: nothing would be trained")
    task.to(device).train()
    loop = _Loop(task, config, run, device, steps, getattr(loader, "names", None))
    step = loop.resume()
    if step < steps:
        step = _steps(loop, loader, step, evaluate)
    loop.finish()
    return step


def _steps(
    loop: _Loop, loader: Iterable[Batch], step: int, evaluate: Callable[[int], dict[str, float]] | None
) -> int:
    """Trains from `step` on; returns the number of steps made in all."""
    config, run, steps = loop.config, loop.run, loop.steps
    if hasattr(loader, "seek"):
        loader.seek(step)
    loop.start_clock()
    progress = Progress(run.path.name, steps, step, quiet=not distributed.is_first())
    with progress, _Stop() as stop:
        for batch in _endless(loader):
            loop.step(step, batch.to(loop.device))
            step += 1
            progress.advance(note=loop.note)
            due = config.evaluate_every and step % config.evaluate_every == 0
            if evaluate is not None and (due or step == steps):
                loop.evaluate(step, evaluate)
            stopping, saving = distributed.any_of(stop.requested, loop.save_is_due())
            if step == steps or stopping or saving:
                loop.save(step)
            if stopping and step < steps:
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
        config: TrainConfig,
        run: RunFolder,
        device: torch.device,
        steps: int,
        names: Callable[[int], list[str]] | None,
    ) -> None:
        self.task, self.config, self.run = task, config, run
        self.device, self.steps, self.names, self.note = device, steps, names, ""
        if config.checkpointing:
            set_checkpointing(task)
        self.parallel = Parallel(task, config.parallel, device)
        self.optimizer = make_optimizer(task, config)
        forward = self.parallel.forward
        self.forward = compiled(forward, device) if config.compile else forward
        self.average = EMA(task, config.ema) if config.ema else None
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")
        self.folder = run.path / "checkpoints"
        self.boards: list[Board] = []
        self._saved = self._logged = time.monotonic()
        self._sums: dict[str, Tensor] = {}
        self._images = 0

    def resume(self) -> int:
        if distributed.is_first():
            checkpoint.sweep(self.folder)
        found = checkpoint.newest(self.folder)
        step = 0
        if found is not None:
            step, weights, training = found
            path = self.folder / f"{step:08d}"
            load_exactly(self.task, weights, path)
            try:
                self._restore(training)
            except (LookupError, TypeError, ValueError, RuntimeError, AttributeError) as error:
                reason = shortened(str(error).partition("\n")[0] or type(error).__name__, 200)
                raise InputError(
                    f"checkpoint {path} is damaged ({reason}); delete that folder and start again"
                ) from error
        self.run.rewind_log(step)
        if distributed.is_first():
            boards = (self.config.tensorboard, self.config.wandb, asdict(self.config))
            self.boards = open_boards(self.run.path, step, *boards)
        return step

    def _restore(self, training: dict[str, Any]) -> None:
        distributed.load_optimizer(self.optimizer, training["optimizer"])
        torch.set_rng_state(training["random"])
        self._sums = training["sums"]
        if self.average is not None:
            self.average.load(training["average"])
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(training["scaler"])

    def step(self, step: int, batch: Any) -> None:
        config = self.config
        set_learning_rate(self.optimizer, learning_rate(config, step, self.steps))
        with autocast(config.precision, self.device):
            losses = self.forward(batch)
        total = torch.stack([loss.float() for loss in losses.values()]).sum()
        if not torch.isfinite(total):
            raise InputError(self._not_finite(step, losses))
        torch.autograd.backward(self.scaler.scale(total))
        self.parallel.after_backward()
        self._count(losses)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        if config.max_grad_norm:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        after = getattr(self.task, "after_step", None)
        if after is not None:
            after()
        if self.average is not None:
            self.average.update(step)
        self._images += config.batch_size
        if (step + 1) % config.log_every == 0 or step + 1 == self.steps:
            self._log(step + 1)

    def _not_finite(self, step: int, losses: dict[str, Tensor]) -> str:
        """Returns what to tell about a loss that is not a number; lists the batch's samples in a file."""
        shown = ", ".join(f"{name} {float(loss.detach()):.4g}" for name, loss in losses.items())
        message = f"the loss is not finite at step {step + 1} ({shown}); {REMEDY}"
        if self.names is None:
            return message
        samples = self.names(step)
        path = distributed.own_file(self.run.path / "not_finite.json")
        write_json(path, {"step": step + 1, "samples": samples}, indent=1)
        return (
            f"{message}; the batch begins with {samples[0]}, its {len(samples)} samples are listed in {path}"
        )

    def _count(self, losses: dict[str, Tensor]) -> None:
        for name, loss in losses.items():
            before = self._sums.get(name, torch.zeros(2, dtype=torch.float64))
            self._sums[name] = before + torch.tensor([float(loss.detach()), 1.0], dtype=torch.float64)

    def _log(self, step: int) -> None:
        now = time.monotonic()
        seconds = max(now - self._logged, 1e-9)
        speed = float(f"{self._images / seconds:.4g}")
        sums = {name: distributed.mean(both) for name, both in self._sums.items()}
        means = {name: float(total / count) for name, (total, count) in sums.items()}
        lr = float(self.optimizer.param_groups[0]["lr"])
        figures: dict[str, float] = getattr(self.task, "log_scalars", dict)()
        self._write(step, {**means, **figures, "lr": lr, "images_per_second": speed})
        shown = [f"{name} {mean:.3f}" for name, mean in means.items()]
        shown += [f"{name.replace('_', ' ')} {value:.4g}" for name, value in figures.items()]
        self.note = f"{', '.join(shown)}, lr {lr:.2e}, {rate_of(self._images, seconds)}"
        self._sums, self._logged, self._images = {}, now, 0

    def _write(self, step: int, figures: dict[str, float]) -> None:
        self.run.log({"step": step, **figures})
        for board in self.boards:
            board.add(step, figures)

    def evaluate(self, step: int, evaluate: Callable[[int], dict[str, float]]) -> None:
        averaged = contextlib.nullcontext() if self.average is None else self.average.applied()
        self.task.eval()
        with averaged, self.parallel.whole(), torch.no_grad(), autocast(self.config.precision, self.device):
            figures = evaluate(step)
        self.task.train()
        self._write(step, figures)

    def start_clock(self) -> None:
        """Begins to measure: what was loaded before is no step."""
        self._saved = self._logged = time.monotonic()

    def save_is_due(self) -> bool:
        return time.monotonic() - self._saved >= self.config.save_every

    def save(self, step: int) -> None:
        training = {
            "optimizer": distributed.full(self.optimizer.state_dict()),
            "random": torch.get_rng_state(),
            "sums": {name: distributed.mean(both) for name, both in self._sums.items()},
        }
        if self.average is not None:
            training["average"] = distributed.full(self.average.weights)
        if self.scaler.is_enabled():
            training["scaler"] = self.scaler.state_dict()
        weights = distributed.full(self.task.state_dict())
        self._require_finite(step, weights)
        if distributed.is_first():
            checkpoint.save(self.folder, step, weights, training)
        distributed.wait()
        self._saved = time.monotonic()

    def _require_finite(self, step: int, weights: dict[str, Tensor]) -> None:
        """Raises an InputError rather than keep weights from which no later start would recover."""
        trained = [name for name, parameter in self.task.named_parameters() if parameter.requires_grad]
        bad = [name for name in trained if not bool(torch.isfinite(weights[name]).all())]
        if bad:
            raise InputError(
                f"{len(bad)} of {len(trained)} weights, such as {bad[0]}, are not finite after step {step}; "
                f"{REMEDY}"
            )

    def finish(self) -> None:
        """Leaves the averaged weights in the task, if there are any, and draws the log."""
        if self.average is not None:
            self.average.swap()
        for board in self.boards:
            board.close()
        if distributed.is_first():
            write_curves(self.run.log_path, self.run.path / CURVES)
