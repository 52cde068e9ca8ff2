from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from clip_base.data.sources import Pair
from clip_base.images.decode import decode
from clip_base.jobs import cli
from clip_base.jobs.config import check
from clip_base.models.configs import CLIPConfig
from clip_base.models.tokenizer import Tokenizer
from clip_base.training.pretrain import CaptionedImages, PretrainConfig, make_model
from clip_base.training.tasks import ContrastiveTask
from clip_base.weights.native import load_clip, read_weights

TINY = """
tower:
  embed_dim: 16
  vision: {kind: vit, layers: [1], width: 32, patch: 16, resolution: 32, head_width: 16}
  text: {width: 32, heads: 2, layers: 1, context_length: 12}
train: {steps: 12, epochs: 0, batch_size: 6, lr: 1.0e-3, log_every: 4, precision: fp32}
"""


@pytest.fixture
def table(pictures: Path) -> Path:
    rows = [f"{index}.png,image number {index}" for index in range(12)]
    table = pictures / "table.csv"
    table.write_text("\n".join(["image,caption", *rows, "broken.png,cannot be read"]))
    (pictures / "broken.png").write_bytes(b"\x89PNG no more")
    return table


@pytest.fixture
def options(table: Path, tmp_path: Path) -> list[str]:
    file = tmp_path / "tiny.yaml"
    file.write_text(TINY)
    return [str(file), "source.name=csv", f"source.file={table}"]


def tiny() -> CLIPConfig:
    vision = {"kind": "vit", "layers": [1], "width": 32, "patch": 16, "resolution": 32, "head_width": 16}
    text = {"width": 32, "heads": 2, "layers": 1, "context_length": 12}
    return check(CLIPConfig, {"embed_dim": 16, "vision": vision, "text": text}, "here")


def test_the_command_trains_and_leaves_what_it_promises(
    options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    command = [
        sys.executable,
        "-c",
        "import sys; from clip_base.jobs.cli import main; sys.exit(main())",
        "pretrain",
    ]
    child = subprocess.run([*command, *options, f"out={out}"], capture_output=True, text=True)
    told = [line for line in child.stderr.splitlines() if " left" not in line]  # progress, every ten seconds
    assert (child.returncode, told) == (0, [])
    assert child.stdout.startswith(f"{out / 'model.safetensors'}: 12 steps on 13 images, loss ")
    metrics = json.loads((out / "metrics.json").read_text())
    assert (metrics["steps"], metrics["pairs"], metrics["skipped"]) == (12, 13, 1)
    (skipped,) = [json.loads(line) for line in (out / "skipped.jsonl").read_text().splitlines()]
    assert "broken.png does not decode" in skipped["reason"]
    assert [json.loads(line)["step"] for line in (out / "log.jsonl").read_text().splitlines()] == [4, 8, 12]
    assert load_clip(out / "model.safetensors").config == tiny()

    assert cli.main(["pretrain", *options, f"out={out}"]) == 0
    assert capsys.readouterr().out == f"{out} is complete: {out / 'model.safetensors'}\n"


def test_a_runs_config_repeats_it_and_other_options_are_refused(
    options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    assert cli.main(["pretrain", *options, f"out={first}"]) == 0
    assert (
        cli.main(["pretrain", str(first / "config.yaml"), f"out={second}", "cache=true", "train.workers=1"])
        == 0
    )
    one, two = (read_weights(out / "model.safetensors")[0] for out in (first, second))
    # A cached image is scaled down once more on the way, so that only the course is the same.
    assert one.keys() == two.keys()
    capsys.readouterr()
    assert cli.main(["pretrain", *options, f"out={first}", "crop=0.5"]) == 2
    assert "crop=0.9 there, 0.5 here" in capsys.readouterr().err


def test_sizes_that_do_not_fit_the_initial_weights_are_refused(
    options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["pretrain", *options, f"out={tmp_path / 'a'}", "train.steps=1"]) == 0
    init = f"init={tmp_path / 'a' / 'model.safetensors'}"
    assert cli.main(["pretrain", *options, f"out={tmp_path / 'b'}", init, "train.steps=1"]) == 0
    capsys.readouterr()
    assert cli.main(["pretrain", *options, f"out={tmp_path / 'c'}", init, "tower.embed_dim=8"]) == 2
    assert "change model= or tower=" in capsys.readouterr().err


def test_data_without_pictures_are_refused_in_one_line(
    options: list[str], table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for picture in table.parent.glob("*.png"):
        picture.unlink()
    assert cli.main(["pretrain", *options, f"out={tmp_path / 'out'}"]) == 1
    message = capsys.readouterr().err
    assert "13 of 13 images are missing" in message
    assert message.count("\n") == 1


def test_the_seed_decides_the_initial_weights() -> None:
    config = PretrainConfig(out="x", tower=tiny())
    one = make_model(config)
    torch.rand(3)
    assert torch.equal(one.text.token_embedding.weight, make_model(config).text.token_embedding.weight)
    config.train.seed = 1
    assert not torch.equal(one.text.token_embedding.weight, make_model(config).text.token_embedding.weight)


def test_a_sample_is_a_square_crop_and_one_of_the_captions(pictures: Path) -> None:
    pairs = [Pair(pictures / "3.png", ("one", "two", "three"))]
    data = CaptionedImages(pairs, Tokenizer(12), 32, 1.0, cache=False)
    generator = torch.Generator().manual_seed(0)
    items = [data.item(0, generator) for _ in range(40)]
    assert {text for _, text in items} == {"one", "two", "three"}
    assert {image.shape for image, _ in items} == {(32, 32, 3)}
    assert tuple(items[0][0][-1, 0]) == tuple(decode(pictures / "3.png")[-1, 0])
    batch = data.collate(items[:5])
    assert (batch.images.pixels.shape, batch.tokens.shape) == ((5, 3, 32, 32), (5, 12))


def test_the_logit_scale_stays_in_its_published_range() -> None:
    task = ContrastiveTask(make_model(PretrainConfig(out="x", tower=tiny())))
    for value, expected in ((9.0, 100.0), (-1.0, 1.0), (2.0, 7.389056)):
        with torch.no_grad():
            task.model.logit_scale.fill_(value)
        task.after_step()
        assert task.model.logit_scale.exp().item() == pytest.approx(expected)
