"""What can be asked of a training beside its course: precision, compilation, logs, figures along the way."""

from __future__ import annotations

import builtins
import json
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from matplotlib.axes import Axes

from clip_base.data.batch import ImageTextBatch
from clip_base.images.decode import DEVIATION, MEAN, decode
from clip_base.jobs import cli
from clip_base.models.clip import CLIP
from clip_base.models.configs import CLIPConfig, TextConfig, VisionConfig
from clip_base.models.positions import resample_positions
from clip_base.runtime import progress
from clip_base.runtime.errors import InputError, InputNote
from clip_base.runtime.precision import autocast
from clip_base.runtime.progress import Progress
from clip_base.training.tasks import ContrastiveTask
from clip_base.training.validation import Validation, ValidationConfig
from clip_base.weights.load import load_clip
from clip_base.weights.native import save_clip

TINY = """
tower:
  embed_dim: 16
  vision: {kind: vit, layers: [1], width: 32, patch: 16, resolution: 32, head_width: 16}
  text: {width: 32, heads: 2, layers: 1, context_length: 12}
train: {steps: 6, batch_size: 6, lr: 1.0e-3, log_every: 2, precision: fp32}
"""


@pytest.fixture
def options(pictures: Path, tmp_path: Path) -> list[str]:
    rows = [f"{index}.png,image number {index}" for index in range(12)]
    (pictures / "table.csv").write_text("\n".join(["image,caption", *rows]))
    (tmp_path / "tiny.yaml").write_text(TINY)
    return [str(tmp_path / "tiny.yaml"), "source.name=csv", f"source.file={pictures / 'table.csv'}"]


def log_of(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.mark.filterwarnings("ignore:CUDA is not available")
def test_fp16_is_refused_where_nothing_computes_in_it(
    options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*options, "train.precision=fp16", "train.device=cpu", f"out={tmp_path / 'out'}"]
    assert cli.main(["pretrain", *arguments]) == 2
    assert "precision=fp16 needs a CUDA device, found cpu; use precision=auto" in capsys.readouterr().err
    with pytest.raises(InputError, match="needs a CUDA device"), autocast("fp16", torch.device("cpu")):
        pass
    assert isinstance(autocast("fp16", torch.device("cuda")), torch.autocast)


def test_gradient_checkpointing_changes_nothing_but_memory(options: list[str], tmp_path: Path) -> None:
    for name, extra in (("plain", []), ("checkpointing", ["train.checkpointing=true"])):
        assert cli.main(["pretrain", *options, *extra, f"out={tmp_path / name}"]) == 0
    plain, recomputed = (log_of(tmp_path / name) for name in ("plain", "checkpointing"))
    assert [line["contrastive"] for line in recomputed] == [line["contrastive"] for line in plain]


@pytest.mark.slow
def test_a_compiled_task_trains_as_a_plain_one(options: list[str], tmp_path: Path) -> None:
    for name, extra in (("plain", []), ("compiled", ["train.compile=true"])):
        assert cli.main(["pretrain", *options, *extra, "train.steps=2", f"out={tmp_path / name}"]) == 0
    plain, compiled = (log_of(tmp_path / name)[-1]["contrastive"] for name in ("plain", "compiled"))
    assert compiled == pytest.approx(plain, rel=1e-4)


def test_the_log_shows_logit_scale_learning_rate_and_speed(options: list[str], tmp_path: Path) -> None:
    assert cli.main(["pretrain", *options, f"out={tmp_path / 'out'}"]) == 0
    for line in log_of(tmp_path / "out"):
        assert set(line) == {"step", "contrastive", "logit_scale", "lr", "images_per_second"}
        assert line["logit_scale"] == pytest.approx(1 / 0.07, rel=0.01)
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["loss"] == log_of(tmp_path / "out")[-1]["contrastive"]


def test_the_live_line_shows_what_the_log_does(
    options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    assert cli.main(["pretrain", *options, f"out={tmp_path / 'out'}"]) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if "images/s" in line]
    assert lines
    for part in ("out: 6/6", " left", "contrastive ", "logit scale 14.", "lr ", " images/s"):
        assert part in lines[-1]


def test_a_loss_that_is_not_a_number_names_the_batch(
    options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = ContrastiveTask.forward

    def broken(self: ContrastiveTask, batch: ImageTextBatch) -> dict[str, torch.Tensor]:
        return {name: loss * float("nan") for name, loss in forward(self, batch).items()}

    monkeypatch.setattr(ContrastiveTask, "forward", broken)
    out = tmp_path / "out"
    assert cli.main(["pretrain", *options, f"out={out}"]) == 2
    message = capsys.readouterr().err
    held = json.loads((out / "not_finite.json").read_text())
    assert "the loss is not finite at step 1 (contrastive nan)" in message
    assert f"the batch begins with {held['samples'][0]}, its 6 samples are listed in {out}" in message
    assert held["step"] == 1
    assert len({Path(name).name for name in held["samples"]}) == 6
    assert all(Path(name).exists() for name in held["samples"])


def test_tensorboard_shows_the_logs_figures(options: list[str], tmp_path: Path) -> None:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    out = tmp_path / "out"
    assert cli.main(["pretrain", *options, "train.tensorboard=true", f"out={out}"]) == 0
    events = event_accumulator.EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    shown = {event.step: event.value for event in events.Scalars("contrastive")}
    assert shown == pytest.approx({line["step"]: line["contrastive"] for line in log_of(out)})
    assert {"lr", "logit_scale", "images_per_second"} <= set(events.Tags()["scalars"])


def test_wandb_gets_the_logs_figures_in_one_run_also_after_a_resume(
    options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = pytest.importorskip("wandb")
    logged: list[dict[str, float]] = []
    ids = []

    def spied(**given: Any) -> Any:
        run = start(**given)
        ids.append(given["id"])
        monkeypatch.setattr(run, "log", logged.append)
        return run

    start = wandb.init
    monkeypatch.setattr(wandb, "init", spied)
    monkeypatch.setenv("WANDB_MODE", "offline")
    out = tmp_path / "out"
    assert cli.main(["pretrain", *options, "train.wandb=tests", f"out={out}"]) == 0
    assert logged == log_of(out)
    assert list(out.glob("wandb/offline-run-*/*.wandb"))
    (out / "metrics.json").unlink()
    assert cli.main(["pretrain", *options, "train.wandb=tests", f"out={out}"]) == 0
    assert ids[0] == ids[1]


def test_a_training_ends_with_its_curves(
    options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: dict[str, list[float]] = {}

    def spied(axes: Any, xs: Any, ys: Any, label: str = "", **others: Any) -> Any:
        drawn[label] = list(ys)
        return plot(axes, xs, ys, label=label, **others)

    plot = Axes.plot
    monkeypatch.setattr(Axes, "plot", spied)
    out = tmp_path / "out"
    assert cli.main(["pretrain", *options, f"out={out}"]) == 0
    assert drawn["contrastive"] == [line["contrastive"] for line in log_of(out)]
    assert drawn["lr"] == [line["lr"] for line in log_of(out)]
    assert min(decode(out / "curves.png").shape[:2]) > 300


def test_without_tensorboard_the_command_to_install_it_is_told(
    options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def absent(name: str, *arguments: Any, **others: Any) -> Any:
        if name.startswith(("tensorboard", "torch.utils.tensorboard")):
            raise ImportError(name)
        return real(name, *arguments, **others)

    monkeypatch.setattr(builtins, "__import__", absent)
    assert cli.main(["pretrain", *options, "train.tensorboard=true", f"out={tmp_path / 'out'}"]) == 2
    assert "pip install 'regionclip[tensorboard]'" in capsys.readouterr().err


def test_an_evaluation_within_a_training_shows_no_second_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with Progress("training", 2) as outer:
        for _ in range(2):
            with Progress("evaluation", 1) as inner:
                inner.advance()
            outer.advance(note="loss 1")
    with Progress("next", 1) as after:
        after.advance()


class Clairvoyant(CLIP):
    """Embeds an image by the color of its corner, and a text by the number in it."""

    def encode_image(self, pixels: torch.Tensor) -> torch.Tensor:
        blue = (pixels[:, 2, 0, 0] * DEVIATION[2] + MEAN[2]) * 255
        return self.spread(blue / 20)

    def encode_text(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.spread((tokens[:, 1] - self.zero).float())

    def spread(self, number: torch.Tensor) -> torch.Tensor:
        angle = number / 12
        return torch.stack([angle.cos(), angle.sin()], -1)


@pytest.fixture
def clairvoyant() -> Clairvoyant:
    from clip_base.models.tokenizer import Tokenizer

    vision = VisionConfig(kind="vit", layers=[1], width=16, patch=16, resolution=32, head_width=16)
    model = Clairvoyant(CLIPConfig(2, vision, TextConfig(width=16, heads=1, layers=1, context_length=8)))
    ids = [int(Tokenizer(8)([str(number)])[0, 1]) for number in range(10)]
    model.zero = ids[0]
    assert ids == list(range(ids[0], ids[0] + 10))  # single digits follow each other in the vocabulary
    return model.eval()


def test_retrieval_and_zeroshot_along_the_way_are_their_definitions(
    clairvoyant: Clairvoyant, pictures: Path, tmp_path: Path
) -> None:
    # Of ten images, 3 and 7 have each other's caption; image 10 does not decode.
    (pictures / "10.png").write_bytes(b"no picture")
    captions = {index: index for index in range(11)} | {3: 7, 7: 3, 10: 1}
    rows = [f"{index}.png,{number}" for index, number in captions.items()]
    (pictures / "val.csv").write_text("\n".join(["image,caption", *rows]))
    for index in range(10):
        folder = tmp_path / "classes" / str(index)
        folder.mkdir(parents=True)
        cv2.imwrite(str(folder / "a.png"), np.ascontiguousarray(decode(pictures / f"{index}.png")[..., ::-1]))
    (tmp_path / "classes" / "0" / "b.png").write_bytes((pictures / "5.png").read_bytes())
    (tmp_path / "templates.txt").write_text("{}")
    config = ValidationConfig(
        source={"name": "csv", "file": str(pictures / "val.csv")},
        images=str(tmp_path / "classes"),
        templates=str(tmp_path / "templates.txt"),
        batch_size=3,
    )
    with torch.no_grad():
        assert Validation(config, clairvoyant)(5) == pytest.approx(
            {"val_image_to_text_R@1": 0.8, "val_text_to_image_R@1": 0.8, "val_zeroshot_top1": 10 / 11}
        )
    assert not Validation(ValidationConfig(), clairvoyant)
    limited = ValidationConfig(source=config.source, limit=4)
    assert [pair.image.name for pair in Validation(limited, clairvoyant).pairs] == [
        "0.png",
        "2.png",
        "5.png",
        "8.png",
    ]


def test_a_pair_without_a_caption_is_not_measured_and_does_not_end_the_run(
    clairvoyant: Clairvoyant, tmp_path: Path
) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.png").touch()
    (tmp_path / "a.txt").write_text("0")
    config = ValidationConfig(source={"name": "folder", "folder": str(tmp_path)})
    with pytest.warns(
        InputNote, match="1 of 2 pairs to evaluate on are skipped, the first: image .*b.png has"
    ):
        assert len(Validation(config, clairvoyant).pairs) == 1
    (tmp_path / "a.txt").unlink()
    with pytest.raises(InputError, match="2 of 2 pairs to evaluate on cannot be used"):
        Validation(config, clairvoyant)


def test_figures_along_the_way_stand_in_the_log(options: list[str], tmp_path: Path, pictures: Path) -> None:
    source = [f"evaluate.{option.removeprefix('source.')}" for option in options[1:]]
    evaluate = [
        "evaluate.source.name=csv",
        f"evaluate.source.file={pictures / 'table.csv'}",
        "train.evaluate_every=3",
    ]
    assert source
    assert cli.main(["pretrain", *options, *evaluate, f"out={tmp_path / 'out'}"]) == 0
    measured = [line for line in log_of(tmp_path / "out") if "val_image_to_text_R@1" in line]
    assert [line["step"] for line in measured] == [3, 6]
    assert all(0 <= line["val_text_to_image_R@1"] <= 1 for line in measured)


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_initial_weights_at_another_resolution_are_resampled(
    kind: str, options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = {
        "vit": VisionConfig(kind="vit", layers=[1], width=32, patch=16, resolution=64, head_width=16),
        "resnet": VisionConfig(kind="resnet", layers=[1, 1, 1, 1], width=8, resolution=64, head_width=32),
    }[kind]
    text = TextConfig(width=32, heads=2, layers=1, context_length=12)
    start = CLIP(CLIPConfig(16, sizes, text))
    save_clip(start, tmp_path / "start.safetensors")
    tower = {
        "vit": "{kind: vit, layers: [1], width: 32, patch: 16, resolution: 96, head_width: 16}",
        "resnet": "{kind: resnet, layers: [1, 1, 1, 1], width: 8, resolution: 96, head_width: 32}",
    }[kind]
    (tmp_path / "tiny.yaml").write_text(TINY.replace(TINY.splitlines()[3], f"  vision: {tower}"))
    init, out = f"init={tmp_path / 'start.safetensors'}", tmp_path / "out"
    arguments = [*options, init, "train.steps=1", "train.lr=0", f"out={out}"]
    assert cli.main(["pretrain", *arguments]) == 0
    cells = "4 × 4 to 6 × 6" if kind == "vit" else "2 × 2 to 3 × 3"
    told = f"position embeddings interpolated from {cells} cells, for 96 pixels instead of 64"
    assert told in capsys.readouterr().out
    trained = load_clip(out / "model.safetensors")
    assert trained.config.vision.resolution == 96
    key = "visual.positional_embedding" if kind == "vit" else "visual.attnpool.positional_embedding"
    side = 6 if kind == "vit" else 3
    expected = resample_positions(start.state_dict()[key], side, side)
    torch.testing.assert_close(trained.state_dict()[key], expected)
    torch.testing.assert_close(trained.text.text_projection, start.text.text_projection)
