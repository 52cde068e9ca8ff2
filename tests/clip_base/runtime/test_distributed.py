from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from clip_base.data.loader import Loader
from clip_base.jobs import cli
from clip_base.runtime import distributed
from clip_base.runtime.errors import InputError
from clip_base.training import checkpoint
from clip_base.weights.native import read_weights

Launch = Callable[[list[list[str]]], list[subprocess.CompletedProcess[str]]]

# Twelve images, three of which say the same, so that equal captions meet across processes.
TINY = """
tower:
  embed_dim: 16
  vision: {kind: vit, layers: [2], width: 32, patch: 16, resolution: 32, head_width: 16}
  text: {width: 32, heads: 2, layers: 1, context_length: 12}
train:
  {steps: 6, batch_size: 6, lr: 1.0e-3, log_every: 2, precision: fp32, max_grad_norm: 1.0, evaluate_every: 3}
"""
RUNS = {
    "ddp": ["train.ema=0.9"],
    "fsdp": ["train.ema=0.9", "train.parallel=fsdp"],
    "sgd": ["train.optimizer=sgd", "train.parallel=fsdp"],
    "sigmoid": ["objective.name=sigmoid"],
    "chunked": ["objective.name=chunked", "objective.rows=2", "accumulate=3"],
}


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("pictures")
    rows = ["image,caption"]
    for index in range(12):
        pixels = np.full((40, 48, 3), (20 * index, 255 - 20 * index, 60), np.uint8)
        pixels[10:20, 3 * index : 3 * index + 10] = 255
        cv2.imwrite(str(folder / f"{index}.png"), pixels)
        rows.append(f"{index}.png,image number {index if index % 4 else 0}")
    (folder / "table.csv").write_text("\n".join(rows))
    (folder / "tiny.yaml").write_text(TINY)
    table = f"file={folder / 'table.csv'}"
    for label in "ab":
        (folder / "classes" / label).mkdir(parents=True)
        shutil.copy(folder / "1.png", folder / "classes" / label)
    source = ["source.name=csv", f"source.{table}", "evaluate.source.name=csv", f"evaluate.source.{table}"]
    return [str(folder / "tiny.yaml"), *source, f"evaluate.images={folder / 'classes'}"]


@pytest.fixture(scope="module")
def outs(options: list[str], launch: Launch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `one/NAME` and `two/NAME`: each run made by one process and by two.

    `two/resumed-KIND` was begun by one process, which was lost after step 5, and was ended by two.
    """
    folder = tmp_path_factory.mktemp("runs")
    for name, extra in RUNS.items():
        saving = [f"out={folder / 'one' / name}", "train.save_every=0"]
        assert cli.main(["pretrain", *options, *extra, *saving]) == 0
    runs = {name: [*extra, f"out={folder / 'two' / name}"] for name, extra in RUNS.items()}
    for kind in ("ddp", "fsdp"):
        begun, out = folder / "one" / "ddp", folder / "two" / f"resumed-{kind}"
        shutil.copytree(begun / "checkpoints" / "00000005", out / "checkpoints" / "00000005")
        for file in ("config.yaml", ".inputs.json", "log.jsonl"):
            shutil.copy(begun / file, out / file)
        runs[out.name] = [*RUNS["ddp"], f"train.parallel={kind}", f"out={out}"]
    first, second = launch([["pretrain", *options, *extra] for extra in runs.values()])
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert first.stdout.count("model.safetensors: 6 steps on 12 images") == len(runs)
    assert second.stdout == ""
    return folder


def log_of(out: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "images_per_second"} for line in lines]


@pytest.mark.parametrize("name", list(RUNS))
def test_two_processes_train_as_one_does(outs: Path, name: str) -> None:
    one, two = outs / "one" / name, outs / "two" / name
    expected = log_of(one)
    assert len(expected) == 5
    for found, wanted in zip(log_of(two), expected, strict=True):
        assert found == pytest.approx(wanted, rel=1e-4)
    for file in ["model.safetensors"] + ["model_raw.safetensors"] * ("ema" in str(RUNS[name])):
        weights, _ = read_weights(two / file)
        torch.testing.assert_close(weights, read_weights(one / file)[0], rtol=1e-3, atol=2e-5)
    figures = [json.loads((out / "metrics.json").read_text()) for out in (two, one)]
    measured_on = [figure.pop("measured_on", None) for figure in figures]
    assert measured_on[0] == measured_on[1]
    assert figures[0] == pytest.approx(figures[1], rel=1e-4)


def test_a_sharded_runs_checkpoint_is_a_whole_ones(outs: Path) -> None:
    sharded, whole = (checkpoint.newest(outs / kind / "fsdp" / "checkpoints") for kind in ("two", "one"))
    assert sharded is not None
    assert whole is not None
    torch.testing.assert_close(sharded[1], whole[1], rtol=1e-3, atol=2e-5)
    for key in ("optimizer", "average"):
        torch.testing.assert_close(sharded[2][key], whole[2][key], rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_run_goes_on_with_another_number_of_processes(outs: Path, kind: str) -> None:
    out = outs / "two" / f"resumed-{kind}"
    assert log_of(out)[-1] == pytest.approx(log_of(outs / "one" / "ddp")[-1], rel=1e-4)
    weights, _ = read_weights(out / "model.safetensors")
    expected, _ = read_weights(outs / "one" / "ddp" / "model.safetensors")
    torch.testing.assert_close(weights, expected, rtol=1e-3, atol=2e-5)


class Numbers:
    def __len__(self) -> int:
        return 10

    def item(self, index: int, generator: torch.Generator) -> tuple[int, float]:
        return index, torch.rand((), generator=generator).item()


def batches(count: int, **options: Any) -> list[list[tuple[int, float]]]:
    stream = iter(Loader(Numbers(), list, 6, seed=2, **options))
    return [next(stream) for _ in range(count)]


@pytest.mark.parametrize("workers", [0, 1])
def test_what_the_processes_load_is_one_processs_order(monkeypatch: pytest.MonkeyPatch, workers: int) -> None:
    expected = batches(4)
    monkeypatch.setattr(distributed, "world", lambda: 3)
    shares = []
    for rank in range(3):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        shares.append(batches(4, workers=workers))
        assert [len(batch) for batch in shares[-1]] == [2] * 4
    assert [[item for share in step for item in share] for step in zip(*shares, strict=True)] == expected


@pytest.mark.parametrize("parts", [[[3], [5], [0]], [[2, 3], [4, 1], [0, 2]]])
def test_processes_order_their_rows_as_one_would(
    monkeypatch: pytest.MonkeyPatch, parts: list[list[int]]
) -> None:
    counts = torch.tensor(parts)
    total = int(counts.sum())
    monkeypatch.setattr(distributed, "world", lambda: len(parts))
    monkeypatch.setattr(distributed, "gather", lambda rows: counts)
    starts = (counts.T.flatten().cumsum(0) - counts.T.flatten()).view(counts.shape[1], -1)
    places = {}  # row of all -> its place in the order
    for rank, own in enumerate(parts):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        torch.manual_seed(3)
        order = distributed.permutation(own, torch.device("cpu"))
        rows = [int(starts[part, rank]) + row for part, count in enumerate(own) for row in range(count)]
        assert sorted(order.tolist()) == list(range(len(rows)))
        places[rank] = [rows[row] for row in order.tolist()]
    torch.manual_seed(3)
    wanted = torch.randperm(total).tolist()
    for rank, found in places.items():
        assert found == [row for row in wanted if row in set(places[rank])]
    assert sorted(row for found in places.values() for row in found) == list(range(total))


def test_a_batch_that_cannot_be_split_evenly_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "world", lambda: 4)
    with pytest.raises(
        InputError, match="batch_size 6 cannot be split evenly among 4 processes; use a multiple"
    ):
        batches(1)


def test_a_half_described_group_is_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch, options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert cli.main(["pretrain", *options, f"out={tmp_path / 'out'}"]) == 2
    message = capsys.readouterr().err
    assert "RANK, MASTER_ADDR, MASTER_PORT is not set; start with torchrun" in message
    assert message.count("\n") == 1


def test_one_process_needs_no_group() -> None:
    rows = torch.ones(2, 3, requires_grad=True)
    assert distributed.gather(rows) is rows
    assert distributed.gather(rows, distributed.row_counts(rows)) is rows
    assert distributed.row_counts(rows) == [2]
    assert distributed.mean(rows) is rows
    assert distributed.any_of(True, False) == (True, False)
    assert (distributed.rank(), distributed.world(), distributed.is_first()) == (0, 1, True)
