"""Twenty seeded steps of two tiny CLIPs against stored losses, which a refactor must not move.

`python tests/golden/test_clip_training.py` writes the losses anew, for a change that means to move them.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from clip_base.data.batch import ImageBatch, ImageTextBatch
from clip_base.jobs.config import option
from clip_base.jobs.run import RunFolder
from clip_base.models.clip import CLIP
from clip_base.models.configs import CLIPConfig, TextConfig, VisionConfig
from clip_base.training.loop import TrainConfig, fit
from clip_base.training.tasks import ContrastiveTask

STORED = Path(__file__).with_name("clip_training.json")
TEXT = TextConfig(width=32, heads=2, layers=2, context_length=8, vocab_size=64)
TOWERS = {
    "resnet": VisionConfig(kind="resnet", layers=[1, 1, 1, 1], width=8, resolution=32, head_width=32),
    "vit": VisionConfig(kind="vit", layers=[2], width=32, patch=8, resolution=32, head_width=16),
}
TRAIN = TrainConfig(
    steps=20,
    batch_size=8,
    lr=1e-3,
    warmup_steps=5,
    max_grad_norm=1.0,
    precision="fp32",
    log_every=1,
    device="cpu",
)


@dataclass
class GoldenConfig:
    train: TrainConfig = option(TRAIN, "the loop")


def batches() -> list[ImageTextBatch]:
    """Returns five batches of noise; two captions of each are equal."""
    generator = torch.Generator().manual_seed(5)
    made = []
    for _ in range(5):
        tokens = torch.randint(1, 63, (8, 8), generator=generator)
        tokens[:, 6], tokens[:, 7] = 63, 0
        tokens[1] = tokens[0]
        made.append(ImageTextBatch(ImageBatch.whole(torch.randn(8, 3, 32, 32, generator=generator)), tokens))
    return made


def train(kind: str, out: Path) -> list[float]:
    """Returns the loss of each step."""
    torch.manual_seed(11)
    task = ContrastiveTask(CLIP(CLIPConfig(16, TOWERS[kind], TEXT)))
    run = RunFolder(str(out), GoldenConfig(), "golden")
    fit(task, batches(), TRAIN, run)
    return [json.loads(line)["contrastive"] for line in run.log_path.read_text().splitlines()]


@pytest.mark.parametrize("kind", list(TOWERS))
def test_twenty_steps_give_the_stored_losses(kind: str, tmp_path: Path) -> None:
    losses = train(kind, tmp_path / "out")
    # Other processors round differently; twenty small steps keep that below a thousandth of the loss.
    assert losses == pytest.approx(json.loads(STORED.read_text())[kind], rel=3e-4)
    assert losses[-1] < losses[0]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        measured = {kind: train(kind, Path(folder) / kind) for kind in TOWERS}
    STORED.write_text(json.dumps(measured, indent=1) + "\n")
