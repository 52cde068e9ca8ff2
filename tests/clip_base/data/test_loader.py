from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from clip_base.data.loader import Loader
from clip_base.runtime.errors import InputError

Item = tuple[int, float]


class Numbers:
    """Samples that say which they are and what chance gave them; some are unusable."""

    def __init__(self, size: int, broken: tuple[int, ...] = ()) -> None:
        self.size, self.broken = size, broken

    def __len__(self) -> int:
        return self.size

    def item(self, index: int, generator: torch.Generator) -> Item:
        if index in self.broken:
            raise InputError(f"sample {index} is broken")
        return index, torch.rand((), generator=generator).item()


def same(items: list[Item]) -> list[Item]:
    return items


def batches(
    count: int, start: int = 0, size: int = 10, batch_size: int = 4, **options: Any
) -> list[list[Item]]:
    loader = Loader(Numbers(size, options.pop("broken", ())), same, batch_size, **options)
    loader.seek(start)
    return list(itertools.islice(loader, count))


def test_batches_are_a_function_of_seed_and_step() -> None:
    whole = batches(12, seed=3)
    torch.rand(5)
    assert batches(12, seed=3) == whole
    assert batches(12, seed=4) != whole
    assert batches(7, start=5, seed=3) == whole[5:]


def test_an_epoch_shows_every_sample_once_in_a_new_order() -> None:
    shown = [index for batch in batches(10, seed=1) for index, _ in batch]
    epochs = [shown[start : start + 10] for start in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_a_sample_is_augmented_anew_each_epoch() -> None:
    chances = Counter(chance for batch in batches(10, seed=1) for _, chance in batch)
    assert max(chances.values()) == 1


def test_a_batch_may_be_larger_than_the_data() -> None:
    (batch,) = batches(1, size=3, batch_size=7)
    assert sorted(Counter(index for index, _ in batch).values()) == [2, 2, 3]


def test_an_iteration_goes_on_where_the_last_one_stopped() -> None:
    loader = Loader(Numbers(10), same, 4)
    first = list(itertools.islice(loader, 3))
    assert first + list(itertools.islice(loader, 3)) == batches(6)


@pytest.mark.parametrize(("size", "batch_size", "length"), [(10, 4, 2), (10, 3, 3), (3, 100, 1), (8, 4, 2)])
def test_the_length_is_the_batches_of_an_epoch(size: int, batch_size: int, length: int) -> None:
    assert len(Loader(Numbers(size), same, batch_size)) == length


def test_workers_change_nothing_neither_batches_nor_the_tasks_chance(tmp_path: Path) -> None:
    options: dict[str, Any] = {"size": 30, "broken": (3, 4), "start": 2, "seed": 7}
    expected = batches(10, skipped=tmp_path / "0.jsonl", **options)
    state = torch.get_rng_state()
    assert batches(10, workers=2, skipped=tmp_path / "2.jsonl", **options) == expected
    assert torch.equal(torch.get_rng_state(), state)
    assert (tmp_path / "2.jsonl").read_text() == (tmp_path / "0.jsonl").read_text()


def test_broken_samples_are_replaced_by_their_neighbor_and_listed_once(tmp_path: Path) -> None:
    skipped = tmp_path / "skipped.jsonl"
    loader = Loader(Numbers(30, (3, 4)), same, 5, skipped=skipped)
    shown = Counter(index for batch in itertools.islice(loader, 12) for index, _ in batch)
    assert shown[5] == 6
    assert {shown[index] for index in range(30)} == {0, 2, 6}
    lines = [json.loads(line) for line in skipped.read_text().splitlines()]
    assert sorted((line["sample"], line["reason"]) for line in lines) == [
        (3, "sample 3 is broken"),
        (4, "sample 4 is broken"),
    ]


def test_a_resumed_list_of_broken_samples_is_an_undisturbed_one(tmp_path: Path) -> None:
    whole, torn = tmp_path / "whole.jsonl", tmp_path / "torn.jsonl"
    options: dict[str, Any] = {"size": 60, "broken": (3, 4, 40, 50)}
    batches(40, skipped=whole, **options)
    batches(20, skipped=torn, **options)
    with torn.open("a") as file:
        file.write('{"sample": 4')
    loader = Loader(Numbers(60, (3, 4, 40, 50)), same, 4, skipped=torn)
    loader.seek(20)
    list(itertools.islice(loader, 20))
    assert torn.read_text() == whole.read_text()
    assert sorted(loader.broken) == [3, 4, 40, 50]


@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_broken_samples_stop_the_run_with_one_line(tmp_path: Path, workers: int) -> None:
    skipped = tmp_path / "skipped.jsonl"
    with pytest.raises(
        InputError,
        match=r"of 10 samples are unusable, more than train.max_skipped=0.1 allows; the last: sample \d is",
    ) as caught:
        batches(20, broken=(1, 2, 3), skipped=skipped, workers=workers)
    assert str(skipped) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("workers", [0, 1])
def test_data_without_one_usable_sample_stop_with_one_line(workers: int) -> None:
    with pytest.raises(InputError, match="unusable") as caught:
        batches(1, size=3, broken=(0, 1, 2), max_skipped=1.0, workers=workers)
    assert "\n" not in str(caught.value)


def test_no_data_are_refused_at_once() -> None:
    with pytest.raises(InputError, match="no usable sample"):
        Loader(Numbers(0), same, 4)
