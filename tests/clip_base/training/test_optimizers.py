from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from clip_base.runtime.errors import InputError
from clip_base.training.optimizers import (
    AdamWBFloat16,
    build_optimizer,
    round_stochastically,
    set_learning_rate,
)


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 128), nn.GELU(), nn.Linear(128, 8)).to(dtype)


def build(task: nn.Module, kind: str, **changes: Any) -> torch.optim.Optimizer:
    given = {"lr": 1e-2, "betas": (0.9, 0.98), "eps": 1e-6, "weight_decay": 0.1, **changes}
    return build_optimizer(task, kind, **given)


def steps(task: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> list[float]:
    """Fits a fixed random function; returns the loss of each step."""
    losses = []
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(64, 32, generator=generator)
        wanted = torch.stack([x[:, i] * x[:, i + 8] for i in range(8)], 1)
        dtype = next(task.parameters()).dtype
        loss = (task(x.to(dtype)).float() - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def numbers(optimizer: torch.optim.Optimizer) -> int:
    """Returns the bytes of an optimizer's statistics."""
    total = 0
    for state in optimizer.state.values():
        for value in state.values():
            if isinstance(value, Tensor) and value.ndim:
                parts = [value.codes, value.scale] if hasattr(value, "codes") else [value]
                total += sum(part.numel() * part.element_size() for part in parts)
    return total


def test_stochastic_rounding_is_right_on_average_and_exact_for_what_fits() -> None:
    generator = torch.Generator().manual_seed(0)
    for value in (1.001, -0.3337, 3e-5):
        rounded = round_stochastically(torch.full((40_000,), value), generator).float()
        assert len(rounded.unique()) == 2
        assert float(rounded.double().mean()) == pytest.approx(value, rel=5e-5)
    exact = torch.tensor([0.0, 1.0, -2.5, 2**-20])
    assert torch.equal(round_stochastically(exact, generator).float(), exact)


@pytest.mark.parametrize(("kind", "share"), [("adamw_bf16", 0.5), ("adamw_8bit", 0.3)])
def test_statistics_take_less_memory_and_training_goes_the_same_way(kind: str, share: float) -> None:
    if kind == "adamw_8bit":
        pytest.importorskip("torchao")
    plain, small = network(), network()
    whole, narrow = build(plain, "adamw"), build(small, kind)
    expected, found = steps(plain, whole, 0, 60), steps(small, narrow, 0, 60)
    assert expected[-1] < 0.8 * expected[0]
    assert found[-1] == pytest.approx(expected[-1], rel=0.05)
    assert found != expected
    # Biases are too small for blocks of 8 bits.
    assert numbers(narrow) <= (share + 0.2 * (kind == "adamw_8bit")) * numbers(whole)


@pytest.mark.parametrize("kind", ["adamw_bf16", "adamw_8bit"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_and_loaded_optimizer_goes_on_bit_for_bit(
    kind: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    if kind == "adamw_8bit":
        pytest.importorskip("torchao")
    task = network(dtype)
    optimizer = build(task, kind)
    steps(task, optimizer, 0, 4)
    held = {"task": task.state_dict(), "optimizer": optimizer.state_dict(), "random": torch.get_rng_state()}
    torch.save(held, tmp_path / "state.pt")
    steps(task, optimizer, 4, 8)
    torch.rand(7)
    again = network(dtype)
    other = build(again, kind)
    loaded = torch.load(tmp_path / "state.pt", weights_only=True)
    again.load_state_dict(loaded["task"])
    other.load_state_dict(loaded["optimizer"])
    torch.set_rng_state(loaded["random"])
    steps(again, other, 4, 8)
    assert all(torch.equal(a, b) for a, b in zip(task.parameters(), again.parameters(), strict=True))
    assert numbers(other) == numbers(optimizer)


def test_small_updates_of_half_precision_weights_are_not_lost() -> None:
    # A hundred updates of a thousandth: to nearest, 1 + 0.001 is 1 in bfloat16.
    weight = nn.Parameter(torch.ones(4000, dtype=torch.bfloat16))
    groups = [{"params": [weight], "weight_decay": 0.0}]
    optimizer = AdamWBFloat16(groups, lr=1e-3, betas=(0.9, 0.98), eps=1e-8)
    for _ in range(100):
        weight.grad = torch.full_like(weight, -0.01)
        optimizer.step()
    assert float(weight.detach().float().mean()) == pytest.approx(1.1, abs=2e-3)


def test_the_second_moment_decays_where_rounding_to_nearest_would_hold_it() -> None:
    weight = nn.Parameter(torch.zeros(4000))
    groups = [{"params": [weight], "weight_decay": 0.0}]
    optimizer = AdamWBFloat16(groups, lr=0.0, betas=(0.9, 0.999), eps=1e-8)
    for step in range(300):
        weight.grad = torch.full_like(weight, 1.0 if step == 0 else 0.0)
        optimizer.step()
    assert float(optimizer.state[weight]["exp_avg_sq"].float().mean()) == pytest.approx(
        1e-3 * 0.999**299, rel=0.02
    )


def test_what_rounding_draws_depends_on_seed_and_step_alone() -> None:
    results = []
    for seed in (1, 1, 2):
        task = network()
        steps(task, build(task, "adamw_bf16", seed=seed), 0, 3)
        torch.rand(5)
        results.append(task[0].weight.detach().clone())
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


@pytest.mark.parametrize("kind", ["adamw", "adamw_bf16", "adamw_8bit", "sgd"])
def test_the_learning_rate_is_set(kind: str) -> None:
    if kind == "adamw_8bit":
        pytest.importorskip("torchao")
    task = network()
    before = [parameter.detach().clone() for parameter in task.parameters()]
    optimizer = build(task, kind)
    set_learning_rate(optimizer, 0.0)
    steps(task, optimizer, 0, 2)
    after = list(task.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_half_precision_weights_need_stochastic_rounding(kind: str) -> None:
    with pytest.raises(InputError, match=r"would lose most updates of weights of type torch\.bfloat16"):
        build(network(torch.bfloat16), kind)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    with pytest.raises(InputError, match=r"pip install 'regionclip\[optimizers\]'"):
        build(network(), "adamw_8bit")
