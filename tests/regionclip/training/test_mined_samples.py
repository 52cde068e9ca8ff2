"""Mined regions are read from disk as they are drawn, in any order or in groups of shards."""

from __future__ import annotations

import gzip
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from clip_base.jobs.cli import main_regionclip
from clip_base.runtime.errors import InputError
from clip_base.storage.files import read_json
from clip_base.synthetic.scenes import ScenesConfig, generate
from clip_base.weights.native import open_safetensors
from regionclip.mining.shards import read_regions
from regionclip.training.mined import MinedSamples
from regionclip.training.samples import RegionDataset

Command = Callable[..., tuple[int, str]]
Swap = Callable[..., list[str]]


@pytest.fixture(scope="module")
def tars(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The scenes of `world`, as three tars."""
    folder = tmp_path_factory.mktemp("tars") / "w"
    sizes: dict[str, Any] = {"images": 12, "val_images": 4, "size": 64, "object_min": 0.3, "seed": 5}
    generate(ScenesConfig(out=str(folder), format="webdataset", tar_images=5, workers=1, **sizes))
    return folder


def mine(images: str, options: list[str], out: Path) -> Path:
    kept = [one for one in options if not one.startswith(("captions=", "images="))]
    assert main_regionclip(["mine", *kept, f"images={images}", f"out={out}"]) == 0
    return out


@pytest.fixture(scope="module")
def mined_tars(tars: Path, mining_options: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return mine(f"{tars}/train-*.tar", mining_options, tmp_path_factory.mktemp("mined") / "mined")


@pytest.fixture(scope="module")
def mined_gz(tars: Path, mining_options: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gz")
    for path in tars.glob("train-*.tar"):
        (folder / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
    return mine(f"{folder}/train-*.tar.gz", mining_options, folder / "mined")


def test_samples_are_the_shards_rows_whatever_the_images_are_in(
    mined: Path, mined_tars: Path, mined_gz: Path, tmp_path: Path
):
    rows = list(read_regions(mined))
    wanted = MinedSamples(mined, tmp_path / "a")
    assert wanted.regions == len(rows) == sum(len(sample.boxes) for sample in wanted)
    assert torch.equal(wanted[0].boxes[0], torch.tensor(rows[0].box))
    for number, other in enumerate((mined_tars, mined_gz)):
        found = MinedSamples(other, tmp_path / str(number))
        assert len(found) == len(wanted)
        for one, two in zip(found, wanted, strict=True):
            assert one.path.read_bytes() == two.path.read_bytes()
            assert (one.captions, one.size) == (two.captions, two.size)
            for name in ("boxes", "concept_ids", "concept_probs"):
                assert torch.equal(getattr(one, name), getattr(two, name))


def test_groups_of_shards_hold_every_sample_once(mined_tars: Path, tmp_path: Path):
    samples = MinedSamples(mined_tars, tmp_path / "cache")
    order = samples.order(2, torch.Generator().manual_seed(3)).tolist()
    assert sorted(order) == list(range(len(samples)))
    ends = [sum(samples.counts[: number + 1]) for number in range(3)]
    shards = [next(number for number, end in enumerate(ends) if index < end) for index in order]
    first = shards[: sum(samples.counts[shard] for shard in dict.fromkeys(shards[:5]))]
    assert len(set(shards)) == 3
    assert len(set(first)) <= 2  # the third shard is read behind both
    assert samples.order(2, torch.Generator().manual_seed(4)).tolist() != order


def pretrain(mined: Path, clip_file: Path, out: Path, *more: str) -> dict[str, torch.Tensor]:
    options = [
        f"mined={mined}",
        f"weights={clip_file}",
        "train.batch_size=4",
        "train.steps=6",
        "train.lr=0.01",
    ]
    options += [
        "resize.short=[64]",
        "resize.long=64",
        "train.precision=fp32",
        "train.schedule=constant",
        *more,
    ]
    assert main_regionclip(["pretrain", *options, f"out={out}"]) == 0
    with open_safetensors(out / "model.safetensors", "weights") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def test_training_on_tars_gives_the_folders_weights(
    mined: Path, mined_tars: Path, clip_file: Path, tmp_path: Path
):
    wanted = pretrain(mined, clip_file, tmp_path / "folder")
    found = pretrain(mined_tars, clip_file, tmp_path / "tars", "train.workers=2")
    assert wanted.keys() == found.keys()
    for name, weight in wanted.items():
        assert torch.equal(weight, found[name]), name
    assert not (tmp_path / "tars" / ".samples").exists()
    keys = ("steps", "images", "regions")
    metrics = [read_json(tmp_path / name / "metrics.json") for name in ("folder", "tars")]
    assert [metrics[0][key] for key in keys] == [metrics[1][key] for key in keys]


def test_compressed_tars_are_read_in_groups_and_resume_exactly(
    mined_gz: Path, clip_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    options = ("shuffle_shards=1", "train.save_every=0")
    wanted = pretrain(mined_gz, clip_file, tmp_path / "whole", *options)
    item, drawn = RegionDataset.item, list[int]()

    def stopping(self: RegionDataset, index: int, generator: torch.Generator) -> Any:
        drawn.append(index)
        if len(drawn) == 14:  # in the fourth batch, and in the second epoch
            raise KeyboardInterrupt
        return item(self, index, generator)

    monkeypatch.setattr(RegionDataset, "item", stopping)
    with pytest.raises(AssertionError):
        pretrain(mined_gz, clip_file, tmp_path / "stopped", *options)
    monkeypatch.undo()
    assert len(list((tmp_path / "stopped" / ".samples" / "tars").glob("*.tar"))) == 2  # of three
    found = pretrain(mined_gz, clip_file, tmp_path / "stopped", *options, "train.workers=1")
    for name, weight in wanted.items():
        assert torch.equal(weight, found[name]), name


def test_a_tar_that_changed_is_refused(mined_tars: Path, tars: Path, clip_file: Path, tmp_path: Path):
    folder = shutil.copytree(tars, tmp_path / "moved")
    moved = f"{folder}/train-*.tar"
    assert len(MinedSamples(mined_tars, tmp_path / "a", moved)) == 12
    with (folder / "train-0001.tar").open("ab") as file:
        file.write(bytes(512))
    with pytest.raises(InputError, match="another size than when it was mined"):
        MinedSamples(mined_tars, tmp_path / "b", moved)
    with pytest.raises(InputError, match="must be the tars that were mined"):
        MinedSamples(mined_tars, tmp_path / "c", str(tmp_path))
