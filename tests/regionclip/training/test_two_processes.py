"""Proposal networks, detectors and region pretraining in two processes are what one process makes of them.

Images are of one size here, for those of a batch are padded to the largest of them, and a process sees its
share; batch norms are frozen, for those that are not take the statistics of a process's share.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from clip_base.jobs import cli
from clip_base.weights.native import read_weights

Launch = Callable[[list[list[str]]], list[subprocess.CompletedProcess[str]]]
pytestmark = pytest.mark.slow

# Plain SGD without momentum: weights move by their gradients.
TRAINING = [
    "resize.short=[64]",
    "resize.long=64",
    "train.steps=3",
    "train.lr=0.002",
    "train.batch_size=4",
    "train.beta1=0",
    "train.optimizer=sgd",
    "train.weight_decay=0",
    "train.warmup_steps=0",
    "train.max_grad_norm=0",
    "train.schedule=constant",
    "train.precision=fp32",
    "train.log_every=1",
    "train.save_every=0",
]
IN_TWO = [(name, "ddp") for name in ("rpn", "detector", "shared", "pretrain")]
IN_TWO += [(name, "fsdp") for name in ("rpn", "shared", "pretrain")]
RESUMED = [("pretrain", "ddp"), ("rpn", "fsdp")]


@pytest.fixture(scope="module")
def commands(world: Path, clip_file: Path, rpn_file: Path, mined: Path) -> dict[str, list[str]]:
    data = [f"annotations={world / 'instances_train.json'}", f"images={world / 'images'}"]
    data += [f"split={world / 'split.json'}", *TRAINING]
    network = [f"network.backbone_weights={clip_file}", "network.frozen_batch_norm=true"]
    network += ["network.channels=16", "network.samples=32"]
    detector = [
        "region-train-detector",
        *data,
        f"weights={clip_file}",
        "max_proposals=30",
        "rois_per_image=16",
        "starting_share=0.5",
        "refit=0.4",
        "keep_student=always",
    ]
    pretrain = [f"mined={mined}", f"captions={world / 'captions_train.json'}", f"weights={clip_file}"]
    return {
        "rpn": ["region-train-rpn", *data, *network],
        "detector": [*detector, f"rpn={rpn_file}"],
        "shared": [*detector, "rpn=shared", "focal_gamma=0", "network.channels=16", "network.samples=32"],
        "pretrain": ["region-pretrain", *pretrain, *TRAINING, "max_regions=6"],
    }


@pytest.fixture(scope="module")
def outs(commands: dict[str, list[str]], launch: Launch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `one/NAME`, `ddp/NAME` and `fsdp/NAME`: each training in one process and in two.

    Of RESUMED, `resumed-KIND/NAME` was begun by one process, which was lost after step 2.
    """
    folder = tmp_path_factory.mktemp("runs")
    for name, command in commands.items():
        assert cli.main([*command, f"out={folder / 'one' / name}"]) == 0
    in_two = [
        [*commands[name], f"train.parallel={kind}", f"out={folder / kind / name}"] for name, kind in IN_TWO
    ]
    for name, kind in RESUMED:
        begun, resumed = folder / "one" / name, folder / f"resumed-{kind}" / name
        shutil.copytree(begun / "checkpoints" / "00000002", resumed / "checkpoints" / "00000002")
        for file in ("config.yaml", ".inputs.json", "log.jsonl"):
            shutil.copy(begun / file, resumed / file)
        in_two.append([*commands[name], f"train.parallel={kind}", f"out={resumed}"])
    ended = launch(in_two)
    assert [process.returncode for process in ended] == [0, 0], "".join(one.stderr[-3000:] for one in ended)
    return folder


def log_of(out: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "images_per_second"} for line in lines]


def weights_of(out: Path, step: int) -> dict[str, torch.Tensor]:
    return read_weights(out / "checkpoints" / f"{step:08d}" / "model.safetensors")[0]


@pytest.mark.parametrize(("name", "kind"), IN_TWO)
def test_two_processes_have_the_losses_and_gradients_of_one(outs: Path, name: str, kind: str) -> None:
    one, two = outs / "one" / name, outs / kind / name
    expected = log_of(one)
    assert len(expected) == 3
    for found, wanted in zip(log_of(two), expected, strict=True):
        assert found == pytest.approx(wanted, rel=1e-4)
    before, after, other = weights_of(one, 2), weights_of(one, 3), weights_of(two, 3)
    assert after.keys() == other.keys()
    changed = {
        key for key in after if after[key].is_floating_point() and not torch.equal(after[key], before[key])
    }
    assert changed
    for root in {key.split(".")[1] for key in changed}:
        keys = [key for key in changed if key.split(".")[1] == root]
        moved = torch.cat([(after[key] - before[key]).flatten() for key in keys]).norm()
        apart = torch.cat([(after[key] - other[key]).flatten() for key in keys]).norm()
        assert float(apart) <= 0.01 * float(moved), root


@pytest.mark.parametrize(("name", "kind"), [(name, kind) for name, kind in IN_TWO if name != "rpn"])
def test_the_finished_weights_of_two_processes_are_those_of_one(outs: Path, name: str, kind: str) -> None:
    one, two = (read_weights(outs / by / name / "model.safetensors")[0] for by in ("one", kind))
    torch.testing.assert_close(two, one, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize(("name", "kind"), RESUMED)
def test_a_run_goes_on_with_another_number_of_processes(outs: Path, name: str, kind: str) -> None:
    out, one = outs / f"resumed-{kind}" / name, outs / "one" / name
    assert log_of(out)[-1] == pytest.approx(log_of(one)[-1], rel=1e-4)
    weights, expected = (read_weights(folder / "model.safetensors")[0] for folder in (out, one))
    torch.testing.assert_close(weights, expected, rtol=1e-3, atol=2e-5)
