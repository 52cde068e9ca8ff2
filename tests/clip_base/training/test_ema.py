from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from clip_base.jobs.config import option
from clip_base.jobs.run import RunFolder
from clip_base.runtime.errors import InputError
from clip_base.training import checkpoint
from clip_base.training.ema import EMA
from clip_base.training.loop import TrainConfig, fit

TRAIN = TrainConfig(
    steps=30, batch_size=4, lr=0.05, precision="fp32", ema=0.8, save_every=0, evaluate_every=10
)


@dataclass
class Job:
    out: str = option("", "folder", runtime_only=True)
    train: TrainConfig = option(TRAIN, "loop")


class Batch:
    def __init__(self, x: Tensor) -> None:
        self.x = x

    def to(self, device: torch.device | str) -> Batch:
        return self


class Batches:
    """A stream without end that can be moved."""

    def __init__(self) -> None:
        self.step = 0

    def __len__(self) -> int:
        return 10

    def seek(self, step: int) -> None:
        self.step = step

    def __iter__(self) -> Iterator[Batch]:
        while True:
            yield Batch(torch.randn(4, 3, generator=torch.Generator().manual_seed(self.step)))
            self.step += 1


class Task(nn.Module):
    """Remembers its weights after each step; may be killed after one."""

    def __init__(self, killed_at: int = 0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
        self.killed_at = killed_at
        self.seen: list[dict[str, Tensor]] = []

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        if self.killed_at and len(self.seen) == self.killed_at:
            raise RuntimeError("killed")
        return {"square": (self.net(batch.x) - 2 * batch.x).square().mean()}

    def after_step(self) -> None:
        self.seen.append({key: value.clone() for key, value in self.state_dict().items()})


def run_of(path: Path, config: TrainConfig = TRAIN) -> RunFolder:
    return RunFolder(str(path), Job(train=config), "job")


def averaged(start: dict[str, Tensor], seen: list[dict[str, Tensor]], decay: float) -> dict[str, Tensor]:
    average = {key: value.clone() for key, value in start.items() if value.is_floating_point()}
    for step, weights in enumerate(seen):
        kept = min(decay, (1 + step) / (10 + step))
        average = {key: kept * value + (1 - kept) * weights[key] for key, value in average.items()}
    return average


def test_the_final_weights_are_the_average_and_the_checkpoint_holds_the_last(tmp_path: Path) -> None:
    task = Task()
    start = {key: value.clone() for key, value in task.state_dict().items()}
    seen: list[dict[str, Tensor]] = []

    def evaluate(step: int) -> dict[str, float]:
        seen.append({key: value.clone() for key, value in task.state_dict().items()})
        return {}

    fit(task, Batches(), TRAIN, run_of(tmp_path), evaluate)
    assert len(task.seen) == 30
    for weights, step in ((task.state_dict(), 30), (seen[0], 10), (seen[1], 20)):
        expected = averaged(start, task.seen[:step], 0.8)
        torch.testing.assert_close({key: weights[key] for key in expected}, expected)
    found = checkpoint.newest(tmp_path / "checkpoints")
    assert found is not None
    assert all(torch.equal(found[1][key], value) for key, value in task.seen[-1].items())
    assert not torch.equal(found[1]["net.0.weight"], task.net[0].weight)


def test_a_killed_run_ends_with_the_same_average_bit_for_bit(tmp_path: Path) -> None:
    whole, killed, resumed = Task(), Task(killed_at=13), Task()
    fit(whole, Batches(), TRAIN, run_of(tmp_path / "whole"))
    with pytest.raises(RuntimeError, match="killed"):
        fit(killed, Batches(), TRAIN, run_of(tmp_path / "killed"))
    fit(resumed, Batches(), TRAIN, run_of(tmp_path / "killed"))
    assert len(resumed.seen) == 17
    for key, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[key], value), key
    # A finished run gives its average again.
    again = Task()
    fit(again, Batches(), TRAIN, run_of(tmp_path / "killed"))
    assert not again.seen
    assert all(torch.equal(again.state_dict()[key], value) for key, value in whole.state_dict().items())


def test_training_itself_is_the_same_with_and_without_an_average(tmp_path: Path) -> None:
    plain = replace(TRAIN, ema=0.0)
    with_average, without = Task(), Task()
    fit(with_average, Batches(), TRAIN, run_of(tmp_path / "with"))
    fit(without, Batches(), plain, run_of(tmp_path / "without", plain))
    for one, other in zip(with_average.seen, without.seen, strict=True):
        assert all(torch.equal(one[key], value) for key, value in other.items())
    assert all(torch.equal(without.state_dict()[key], value) for key, value in without.seen[-1].items())


def test_swapping_twice_changes_nothing() -> None:
    task = Task()
    average = EMA(task, 0.9)
    with torch.no_grad():
        task.net[0].weight.add_(1)
    before = {key: value.clone() for key, value in task.state_dict().items()}
    with average.applied():
        torch.testing.assert_close(task.net[0].weight, before["net.0.weight"] - 1)
    assert all(torch.equal(task.state_dict()[key], value) for key, value in before.items())


@pytest.mark.parametrize("decay", [-0.1, 1.0, 1.5])
def test_a_decay_outside_its_range_is_refused(decay: float) -> None:
    with pytest.raises(InputError, match=r"ema must be in \[0, 1\)"):
        TrainConfig(ema=decay)
