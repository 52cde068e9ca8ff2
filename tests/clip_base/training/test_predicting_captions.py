"""Pretraining by predicting captions, from the command to zero-shot classification."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from clip_base.jobs import cli
from clip_base.runtime.errors import InputError
from clip_base.training import loop
from clip_base.weights.load import load_clip
from clip_base.weights.native import read_weights, write_weights
from clip_base.weights.predictors import load_predictor

COLORS = {"blue": (230, 40, 20), "green": (40, 200, 30), "red": (20, 30, 220)}
OBJECTIVES = {
    "bag_of_words": ["objective.name=bag_of_words"],
    "captioning": ["objective.name=captioning"],
    "masked_lm": ["objective.name=masked_lm", "objective.masked=0.4"],
    "joint": ["objective.name=captioning", "objective.contrastive=0.5"],
}
TINY = """
tower:
  embed_dim: 16
  vision: {kind: vit, layers: [1], width: 32, patch: 16, resolution: 32, head_width: 16}
  text: {width: 32, heads: 2, layers: 1, context_length: 12}
train: {steps: 60, batch_size: 12, lr: 5.0e-3, log_every: 10, precision: fp32, schedule: constant}
cache: true
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Captioned images of three colors, and the same by class."""
    root = tmp_path_factory.mktemp("world")
    rows = ["image,caption"]
    for index in range(24):
        name = list(COLORS)[index % 3]
        noise = np.random.default_rng(index).integers(-20, 20, (40, 40, 3))
        pixels = np.clip(np.array(COLORS[name]) + noise, 0, 255).astype(np.uint8)
        (root / "test" / name).mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(root / f"{index}.png"), pixels)
        cv2.imwrite(str(root / "test" / name / f"{index}.png"), pixels)
        rows.append(f"{index}.png,{['a photo of a {} thing', 'something {}'][index % 2].format(name)}")
    (root / "table.csv").write_text("\n".join(rows))
    (root / "templates.txt").write_text("a photo of a {} thing\nsomething {}\n")
    (root / "tiny.yaml").write_text(TINY)
    return root


def options(world: Path, name: str) -> list[str]:
    table = ["source.name=csv", f"source.file={world / 'table.csv'}"]
    return ["pretrain", str(world / "tiny.yaml"), *table, *OBJECTIVES[name]]


@pytest.fixture(scope="module")
def trained(world: Path) -> Callable[[str], Path]:
    """Gives the finished folder of a training, made when it is first asked for."""

    def make(name: str) -> Path:
        out = world / "runs" / name
        validation = [f"evaluate.images={world / 'test'}", f"evaluate.templates={world / 'templates.txt'}"]
        assert cli.main([*options(world, name), *validation, f"out={out}"]) == 0
        return out

    return make


@pytest.mark.parametrize("name", list(OBJECTIVES))
def test_every_objective_learns_to_classify_by_names(
    name: str, trained: Callable[[str], Path], world: Path, tmp_path: Path
) -> None:
    out = trained(name)
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["val_zeroshot_top1"] == 1.0
    weights = out / ("predictor.safetensors" if name == "joint" else "model.safetensors")
    words = [f"images={world / 'test'}", f"templates={world / 'templates.txt'}", "precision=fp32"]
    assert cli.main(["zeroshot", f"weights={weights}", *words, f"out={tmp_path / 'zeroshot'}"]) == 0
    assert json.loads((tmp_path / "zeroshot/metrics.json").read_text())["top1"] == 1.0
    named = ["classes=green, red", f"templates={world / 'templates.txt'}", "report=false"]
    job = ["classify", str(world / "test" / "red"), f"weights={weights}", *named]
    assert cli.main([*job, f"out={tmp_path / 'classes'}"]) == 0
    rows = list(csv.DictReader((tmp_path / "classes/predictions.csv").open()))
    assert {row["name_1"] for row in rows} == {"red"}
    assert all(abs(float(row["probability_1"]) + float(row["probability_2"]) - 1) < 1e-4 for row in rows)


def test_the_log_names_each_loss(trained: Callable[[str], Path]) -> None:
    for name, losses in (("captioning", {"captioning"}), ("joint", {"captioning", "contrastive"})):
        lines = [json.loads(line) for line in (trained(name) / "log.jsonl").read_text().splitlines()]
        assert losses <= lines[0].keys()
        assert ("contrastive" in lines[0]) == (name == "joint")


def test_both_together_leave_a_clip_and_a_predictor(trained: Callable[[str], Path]) -> None:
    out = trained("joint")
    clip, predictor = load_clip(out / "model.safetensors"), load_predictor(out / "predictor.safetensors")
    pixels = torch.randn(2, 3, 32, 32)
    cells, embeddings = clip.visual.cells_and_embedding(pixels)
    torch.testing.assert_close(embeddings, clip.encode_image(pixels))
    torch.testing.assert_close(predictor.encode_image(pixels), cells)


def resumed(command: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    """Runs a training whole and stopped after step `at`, and compares all weights bit for bit."""
    assert cli.main([*command, f"out={folder / 'whole'}"]) == 0
    step = loop._Loop.step

    def stopping(self: Any, number: int, batch: Any) -> None:
        step(self, number, batch)
        if number == at:
            self.save(number + 1)
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loop._Loop, "step", stopping)
        cli.main([*command, f"out={folder / 'halved'}"])
    assert not (folder / "halved/model.safetensors").exists()
    torch.rand(3)  # a new process would not go on with this one's random numbers
    assert cli.main([*command, f"out={folder / 'halved'}"]) == 0
    for file in sorted(folder.glob("whole/*.safetensors")):
        one, two = (read_weights(folder / run / file.name)[0] for run in ("whole", "halved"))
        assert one.keys() == two.keys()
        assert all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.parametrize("name", ["masked_lm", "bag_of_words"])
def test_a_resumed_run_ends_with_the_same_weights(
    name: str, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resumed([*options(world, name), "train.steps=12", "train.ema=0.9"], tmp_path, monkeypatch, at=6)
    assert (tmp_path / "whole/model_raw.safetensors").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "text_precision=bf16 with train.optimizer=adamw would lose most updates"),
        (["train.optimizer=adamw_bf16", "train.ema=0.9"], "an average in bfloat16 stands still"),
        (["train.optimizer=adamw_bf16", "train.parallel=fsdp"], "use train.parallel=ddp"),
        (["train.optimizer=adamw_bf16", "objective.contrastive=0"], "trains no text tower; omit it"),
    ],
)
def test_half_precision_text_weights_are_refused_where_they_would_lose(
    words: list[str], message: str, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [*options(world, "joint"), "text_precision=bf16", *words]
    assert cli.main([*given, f"out={tmp_path / 'out'}"]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("captioning", []),
        ("masked_lm", ["train.parallel=fsdp"]),
        ("joint", ["train.optimizer=adamw_bf16", "text_precision=bf16"]),
        ("captioning", ["train.optimizer=adamw_bf16", "train.parallel=fsdp"]),
    ],
)
def test_two_processes_compute_what_one_does(
    name: str, more: list[str], world: Path, tmp_path: Path, launch: Callable[..., Any]
) -> None:
    short = [*options(world, name), *more, "train.steps=4", "train.log_every=1", "train.lr=1e-3"]
    assert cli.main([*short, f"out={tmp_path / 'one'}"]) == 0
    for ended in launch([[*short, f"out={tmp_path / 'two'}"]]):
        assert ended.returncode == 0, ended.stderr
    one, two = (read_weights(tmp_path / run / "model.safetensors")[0] for run in ("one", "two"))
    # A gradient near zero may round to either sign, which Adam makes a step of the learning rate.
    for key, value in one.items():
        torch.testing.assert_close(two[key].float(), value.float(), rtol=1e-2, atol=4e-3, msg=key)
    losses = [
        [json.loads(line)["captioning" if name != "masked_lm" else name] for line in lines]
        for lines in ((tmp_path / run / "log.jsonl").read_text().splitlines() for run in ("one", "two"))
    ]
    assert losses[1] == pytest.approx(losses[0], rel=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw_bf16", "adamw_8bit"])
def test_half_precision_text_weights_resume_bit_for_bit(
    optimizer: str, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if optimizer == "adamw_8bit":
        pytest.importorskip("torchao")
    short = [*options(world, "joint"), "train.steps=8", f"train.optimizer={optimizer}", "text_precision=bf16"]
    resumed(short, tmp_path, monkeypatch, at=4)
    weights = read_weights(tmp_path / "whole/model.safetensors")[0]
    assert weights["text.token_embedding.weight"].dtype == torch.bfloat16
    assert weights["visual.conv1.weight"].dtype == torch.float32
    assert load_clip(tmp_path / "whole/model.safetensors").text.text_projection.dtype == torch.float32


def test_unknown_words_in_a_class_name_are_told(
    trained: Callable[[str], Path], world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = trained("bag_of_words") / "model.safetensors"
    capsys.readouterr()
    job = ["classify", str(world / "test" / "red"), f"weights={weights}", "report=false"]
    assert cli.main([*job, "classes=red, zeppelin", "templates=simple", f"out={tmp_path / 'out'}"]) == 0
    told = capsys.readouterr().err
    assert "'zeppelin': no caption that the model was trained on had all of these words" in told
    assert "'red'" not in told


@pytest.mark.parametrize(
    ("job", "message"),
    [
        (["linear-probe", "train=TEST", "test=TEST"], "has no text tower: `zeroshot` and `classify` take it"),
        (["convert", "to=open_clip"], "has no text tower"),
        (["export"], "has no text tower"),
    ],
)
def test_what_needs_a_clip_refuses_a_predictor(
    job: list[str],
    message: str,
    trained: Callable[[str], Path],
    world: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    weights = trained("captioning") / "model.safetensors"
    given = f"weights={weights}" if job[0] == "linear-probe" else str(weights)
    words = [word.replace("TEST", str(world / "test")) for word in job[1:]]
    capsys.readouterr()
    assert cli.main([job[0], given, *words, f"out={tmp_path / 'out.safetensors'}"]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["accumulate=2"], "accumulate=2 is for losses over embeddings"),
        (["evaluate.source.name=csv", "evaluate.source.file=TABLE"], "trains no text tower to measure"),
        (["tower.text.kind=bow"], "omit text.kind"),
    ],
)
def test_what_an_objective_cannot_do_is_refused(
    words: list[str], message: str, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [word.replace("TABLE", str(world / "table.csv")) for word in words]
    sizes = ["tower.text.layers=12", "tower.text.heads=8"] if "tower.text.kind=bow" in words else []
    assert cli.main([*options(world, "captioning"), *given, *sizes, f"out={tmp_path / 'out'}"]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("spec", [{"name": "antigravity:geohash"}, {"name": "contrastive"}, ["captioning"]])
def test_a_file_cannot_name_what_no_package_declares(
    spec: Any, trained: Callable[[str], Path], tmp_path: Path
) -> None:
    weights, metadata = read_weights(trained("captioning") / "model.safetensors")
    file = tmp_path / "edited.safetensors"
    write_weights(file, weights, {**metadata, "objective": json.dumps(spec)})
    with pytest.raises(InputError, match="an objective that no installed package declares"):
        load_predictor(file)
    assert "antigravity" not in sys.modules


def test_a_file_whose_token_ids_are_not_ascending_is_damaged(
    trained: Callable[[str], Path], tmp_path: Path
) -> None:
    weights, metadata = read_weights(trained("captioning") / "model.safetensors")
    file, ids = tmp_path / "edited.safetensors", "objective.vocabulary.ids"
    write_weights(file, {**weights, ids: weights[ids].flip(0)}, metadata)
    with pytest.raises(InputError, match="has no list of token ids"):
        load_predictor(file)
