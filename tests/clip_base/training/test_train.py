from __future__ import annotations

import importlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from clip_base.jobs.config import option
from clip_base.jobs.run import RunFolder
from clip_base.runtime.errors import InputError
from clip_base.training import checkpoint
from clip_base.training.loop import TrainConfig, fit, learning_rate, make_optimizer

# A job in which every kind of chance counts: initial weights, order, augmentation, dropout in the task.
TOY = '''
import os, sys, time
from dataclasses import dataclass
from importlib.metadata import EntryPoint

import torch
from torch import nn

from clip_base.jobs import cli, plugins
from clip_base.jobs.config import REQUIRED, option
from clip_base.data.loader import Loader
from clip_base.jobs.run import RunFolder
from clip_base.training.loop import TrainConfig, fit


class Batch:
    def __init__(self, x):
        self.x = x

    def to(self, device):
        return Batch(self.x.to(device))


class Data:
    def __len__(self):
        return 30

    def item(self, index, generator):
        return torch.full((8,), index / 30) + torch.randn(8, generator=generator)

    def collate(self, items):
        return Batch(torch.stack(items))


class Task(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 8))
        self.steps = 0
        if "TOY_WAITS_FOR" in os.environ:
            time.monotonic = lambda: float(self.steps)  # a step takes a second, for what saves by the clock

    def forward(self, batch):
        copy = (self.net(batch.x) - batch.x).square().mean()
        return {"copy": copy, "small": 0.1 * self.net[0].weight.abs().mean()}

    def after_step(self):
        self.steps += 1
        while "TOY_WAITS_FOR" in os.environ and self.steps == 14:
            if os.path.exists(os.environ["TOY_WAITS_FOR"]):
                break
            time.sleep(0.02)


@dataclass
class ToyConfig:
    out: str = option(REQUIRED, "folder", runtime_only=True)
    train: TrainConfig = option(
        TrainConfig(steps=40, batch_size=4, lr=0.01, warmup_steps=4, log_every=3, evaluate_every=8),
        "the loop",
    )


def toy(config: ToyConfig) -> None:
    """Learns to copy."""
    data = Data()
    torch.manual_seed(config.train.seed)
    run = RunFolder(config.out, config, "toy")
    loader = Loader(data, data.collate, config.train.batch_size, workers=config.train.workers)
    fit(Task(), loader, config.train, run, lambda step: {"step_again": float(step)})


if __name__ == "__main__":
    plugins.found = lambda group: {"toy": EntryPoint("toy", "toy_job:toy", group)}
    sys.exit(cli.main(["toy", *sys.argv[1:]]))
'''


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The job's module, imported here too."""
    path = tmp_path_factory.mktemp("toy") / "toy_job.py"
    path.write_text(TOY)
    sys.path.insert(0, str(path.parent))
    yield importlib.import_module("toy_job")
    sys.path.remove(str(path.parent))
    del sys.modules["toy_job"]


def start(toy: Any, out: Path) -> subprocess.Popen[str]:
    """Types the job's command: saves after step 8, logs after steps 9 and 12, waits in step 14 for a file."""
    return subprocess.Popen(
        [sys.executable, toy.__file__, f"out={out}", "train.save_every=7.5"],
        env={**os.environ, "TOY_WAITS_FOR": str(out.with_name("go on")), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def undisturbed(toy: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    toy.toy(toy.ToyConfig(out=str(out)))
    return out


def is_ahead_of_its_checkpoint(out: Path) -> bool:
    """Whether the run has logged something after its newest checkpoint: a resumed run must take that back."""
    saved = max(checkpoint.steps(out / "checkpoints"), default=0)
    log = (out / "log.jsonl").read_text() if (out / "log.jsonl").exists() else ""
    logged = [json.loads(line)["step"] for line in log.splitlines(keepends=True) if line.endswith("\n")]
    return 8 == saved < max(logged, default=0)


def log_of(out: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "images_per_second"} for line in lines]


def end_of(out: Path) -> tuple[int, dict[str, Tensor], dict[str, Any]]:
    found = checkpoint.newest(out / "checkpoints")
    assert found is not None
    return found


@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 130)])
def test_a_run_that_was_stopped_ends_bit_for_bit_as_an_undisturbed_one(
    toy: Any, undisturbed: Path, tmp_path: Path, patience: float, number: signal.Signals, code: int
) -> None:
    out = tmp_path / "out"
    child = start(toy, out)
    deadline = time.monotonic() + patience
    while not is_ahead_of_its_checkpoint(out):
        assert child.poll() is None, child.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    child.send_signal(number)
    (tmp_path / "go on").touch()
    assert child.wait(patience) == code
    errors = child.communicate()[1]
    stopped = max(checkpoint.steps(out / "checkpoints"))
    # The line of step 9 may be seen before the next step ends: SIGTERM finds the run at any step after it.
    assert stopped in ([8] if number == signal.SIGKILL else range(9, 15))
    if number == signal.SIGTERM:
        assert errors.endswith("stopped; the same command resumes from here\n")
    # With workers this time: they are a free option and change nothing.
    config = toy.ToyConfig(out=str(out))
    config.train.workers = 1
    toy.toy(config)
    step, weights, training = end_of(out)
    expected_step, expected, expected_training = end_of(undisturbed)
    assert step == expected_step == 40
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[key], expected[key]) for key in expected)
    assert torch.equal(training["random"], expected_training["random"])
    assert log_of(out) == log_of(undisturbed)


def test_the_log_has_a_line_at_its_steps_with_every_loss(undisturbed: Path) -> None:
    lines = log_of(undisturbed)
    trained = [line for line in lines if "lr" in line]
    assert [line["step"] for line in trained] == [*range(3, 40, 3), 40]
    assert set(trained[0]) == {"step", "copy", "small", "lr"}
    assert [line["step"] for line in lines if "step_again" in line] == [8, 16, 24, 32, 40]


@dataclass
class Job:
    out: str = option("", "folder", runtime_only=True)
    train: TrainConfig = option(TrainConfig(), "loop")


class Batch:
    def __init__(self, x: Tensor) -> None:
        self.x = x

    def to(self, device: torch.device | str) -> Batch:
        return Batch(self.x.to(device))


class Line(nn.Module):
    """Finds the line y = 2 x + 1."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.line = nn.Linear(1, 1)
        self.steps = 0

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        return {"square": (self.line(batch.x) - (2 * batch.x + 1)).square().mean()}

    def after_step(self) -> None:
        self.steps += 1


class Fragile(Line):
    def forward(self, batch: Batch) -> dict[str, Tensor]:
        losses = super().forward(batch)
        return losses | {"bad": losses["square"] * (math.nan if self.steps == 4 else 1.0)}


class Lines:
    """A loader that ends after three batches and cannot be moved."""

    def __len__(self) -> int:
        return 3

    def __iter__(self) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(1)
        return iter([Batch(torch.randn(16, 1, generator=generator)) for _ in range(3)])


CONFIG = TrainConfig(steps=60, batch_size=16, lr=0.1, weight_decay=0.0, schedule="constant", precision="fp32")


def run_of(tmp_path: Path, config: TrainConfig = CONFIG) -> RunFolder:
    return RunFolder(str(tmp_path / "out"), Job(train=config), "line")


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_the_loss_falls_and_the_end_is_saved(tmp_path: Path, optimizer: str) -> None:
    task, config = (
        Line(),
        replace(CONFIG, optimizer=optimizer, beta1=0.9, lr=0.1 if optimizer == "adamw" else 0.02),
    )
    assert fit(task, Lines(), config, run_of(tmp_path, config)) == 60
    losses = [line["square"] for line in log_of(tmp_path / "out")]
    assert losses[-1] < losses[0] / 20
    step, weights, _ = end_of(tmp_path / "out")
    assert step == 60
    assert torch.equal(weights["line.weight"], task.line.weight)


def test_epochs_are_counted_in_the_loaders_length(tmp_path: Path) -> None:
    config = replace(CONFIG, steps=0, epochs=2.0)
    assert fit(Line(), Lines(), config, run_of(tmp_path, config)) == 6


def test_a_finished_run_returns_at_once_with_its_weights(tmp_path: Path) -> None:
    first, again = Line(), Line()
    fit(first, Lines(), CONFIG, run_of(tmp_path))
    log = (tmp_path / "out" / "log.jsonl").read_text()
    assert fit(again, Lines(), CONFIG, run_of(tmp_path)) == 60
    assert again.steps == 0
    assert torch.equal(again.line.weight, first.line.weight)
    assert (tmp_path / "out" / "log.jsonl").read_text() == log


def test_evaluation_runs_in_evaluation_mode_and_is_logged(tmp_path: Path) -> None:
    task, modes = Line(), []

    def evaluate(step: int) -> dict[str, float]:
        modes.append((step, task.training, torch.is_grad_enabled()))
        return {"figure": step / 2}

    config = replace(CONFIG, evaluate_every=25)
    fit(task, Lines(), config, run_of(tmp_path, config), evaluate)
    assert modes == [(25, False, False), (50, False, False), (60, False, False)]
    assert task.training
    assert [line["figure"] for line in log_of(tmp_path / "out") if "figure" in line] == [12.5, 25, 30]


def test_a_loss_that_is_not_a_number_stops_and_names_the_step(tmp_path: Path) -> None:
    task = Fragile()
    with pytest.raises(InputError, match=r"not finite at step 5 \(square [\d.]+, bad nan\); lower train\.lr"):
        fit(task, Lines(), CONFIG, run_of(tmp_path))
    assert task.steps == 4
    assert torch.isfinite(task.line.weight).all()


def test_a_damaged_checkpoint_stops_before_anything_is_trained(tmp_path: Path) -> None:
    fit(Line(), Lines(), CONFIG, run_of(tmp_path))
    (tmp_path / "out" / "checkpoints" / "00000060" / "training.pt").write_bytes(b"")
    with pytest.raises(InputError, match=r"00000060 is damaged .*; delete that folder"):
        fit(Line(), Lines(), CONFIG, run_of(tmp_path))


def test_gradients_are_scaled_down_to_the_norm(tmp_path: Path) -> None:
    config = replace(CONFIG, steps=1, optimizer="sgd", beta1=0.0, lr=1.0, max_grad_norm=0.01)
    task, start = Line(), Line()
    fit(task, Lines(), config, run_of(tmp_path, config))
    moved = [(a - b).flatten() for a, b in zip(task.parameters(), start.parameters(), strict=True)]
    assert torch.cat(moved).norm().item() == pytest.approx(0.01, rel=1e-3)


def test_an_empty_batch_is_refused() -> None:
    with pytest.raises(InputError, match="batch_size must be at least 1"):
        TrainConfig(batch_size=0)


def test_steps_count_before_epochs(tmp_path: Path) -> None:
    config = replace(CONFIG, steps=3, epochs=2.0)
    assert fit(Line(), Lines(), config, run_of(tmp_path, config)) == 3


def test_there_must_be_something_to_do(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"set train\.steps or train\.epochs"):
        fit(Line(), Lines(), TrainConfig(), run_of(tmp_path))
    frozen = Line().requires_grad_(False)
    with pytest.raises(InputError, match="nothing to train"):
        fit(frozen, Lines(), CONFIG, run_of(tmp_path / "2"))
    with pytest.raises(InputError, match="yields no batches"):
        fit(Line(), [], CONFIG, run_of(tmp_path / "3"))


def test_the_learning_rate_warms_up_and_falls_as_a_cosine() -> None:
    config = TrainConfig(lr=2.0, warmup_steps=4)
    rates = [learning_rate(config, step, 12) for step in range(12)]
    assert rates[:4] == [0.5, 1.0, 1.5, 2.0]
    assert rates[4:] == pytest.approx([1 + math.cos(math.pi * k / 8) for k in range(8)])


def test_the_learning_rate_falls_to_a_tenth_at_each_milestone() -> None:
    config = TrainConfig(lr=2.0, schedule="step", milestones=[0.5, 0.9])
    rates = [learning_rate(config, step, 10) for step in range(10)]
    assert rates == pytest.approx([2.0] * 5 + [0.2] * 4 + [0.02])
    assert learning_rate(replace(config, schedule="constant"), 9, 10) == 2.0


def test_only_trained_matrices_decay() -> None:
    task = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 4), nn.Linear(4, 4))
    task.register_parameter("logit_scale", nn.Parameter(torch.tensor(1.0)))
    task[3].requires_grad_(False)
    optimizer = make_optimizer(task, TrainConfig(weight_decay=0.3))
    decayed = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    expected = {id(p): 0.3 * (p.ndim > 1) for p in task.parameters() if p.requires_grad}
    assert decayed == expected
    assert len(expected) == 7
