"""What is proposed is read again from JSON and from Parquet; damaged and foreign files are named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

from clip_base.jobs.cli import main_regionclip
from clip_base.runtime.errors import InputError
from regionclip.metrics.recall import RecallMeter, described, proposal_recall
from regionclip.proposals import storage
from regionclip.proposals.precomputed import PrecomputedConfig, PrecomputedProposer
from regionclip.proposals.storage import SCHEMA, ProposalTable, writing
from regionclip.structures.regions import ImageInfo

BatchOf = Callable[..., object]


def drawn(images: int, seed: int = 0) -> dict[int, tuple[Tensor, Tensor]]:
    """Returns boxes and scores for images whose ids are in no order; one image has none."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for number in range(images):
        count = 0 if number == 1 else 3 + number % 5
        corner, size = (torch.rand(count, 2, generator=generator) * 50 for _ in range(2))
        scores = torch.rand(count, generator=generator).sort(descending=True).values
        found[(number * 7919) % 1000] = (torch.cat([corner, corner + size], 1), scores)
    return found


def write(path: Path, found: dict[int, tuple[Tensor, Tensor]]) -> Path:
    with writing(path) as file:
        for image_id, (boxes, scores) in found.items():
            file.add(image_id, boxes, scores)
    return path


@pytest.mark.parametrize("name", ["p.json", "p.parquet"])
def test_a_proposer_reads_what_was_written(
    name: str, tmp_path: Path, batch_of: Callable[..., object]
) -> None:
    found = drawn(12)
    proposer = PrecomputedProposer(PrecomputedConfig(str(write(tmp_path / name, found))))
    for image_id, (boxes, scores) in found.items():
        again = proposer(batch_of((100, 100)), [ImageInfo(image_id, 100, 100)])  # type: ignore[arg-type]
        torch.testing.assert_close(again.boxes, boxes, atol=0.02, rtol=0)
        torch.testing.assert_close(again.scores, scores, atol=1e-5, rtol=0)
    assert len(proposer(batch_of((10, 10)), [ImageInfo(5, 10, 10)])) == 0  # type: ignore[arg-type]


def test_row_groups_are_bounded_and_read_once_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "_GROUP", 10)
    found = drawn(60)
    path = write(tmp_path / "p.parquet", found)
    groups = pq.ParquetFile(path).num_row_groups
    assert groups > 10
    read: list[int] = []
    real = pq.ParquetFile.read_row_group

    def watch(file: pq.ParquetFile, group: int, columns: list[str]) -> pa.Table:
        if "box" in columns:
            read.append(group)
        return real(file, group, columns)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", watch)
    table = ProposalTable(path)
    for image_id, (boxes, _) in found.items():
        assert torch.equal(table.of_image(image_id)[0], boxes)
    assert read == list(range(groups))


def test_a_folder_of_files_is_one_table_and_an_image_may_lie_in_several(tmp_path: Path) -> None:
    folder = tmp_path / "many"
    one = torch.tensor([[0.0, 0, 5, 5]])
    write(folder / "a.parquet", {3: (one, torch.tensor([0.5])), 4: (one, torch.tensor([0.4]))})
    write(folder / "b.parquet", {3: (one + 1, torch.tensor([0.6]))})
    boxes, scores = ProposalTable(folder).of_image(3)
    assert boxes.tolist() == [[0, 0, 5, 5], [1, 1, 6, 6]]
    torch.testing.assert_close(scores, torch.tensor([0.5, 0.6]))


def test_mined_shards_are_proposals_too(mined: Path) -> None:
    from regionclip.mining.shards import read_regions

    region = next(read_regions(mined))
    boxes, scores = ProposalTable(mined).of_image(region.image_id)
    assert list(region.box) in boxes.tolist()
    assert region.objectness in scores.tolist()


def test_what_is_no_table_of_proposals_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "p.parquet", drawn(3))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"p\.parquet cannot be read"):
        ProposalTable(path)
    pq.write_table(pa.table({"image_id": [1], "bbox": [[1.0]]}), path)
    with pytest.raises(InputError, match=r"no column box \(its columns: image_id, bbox\)"):
        ProposalTable(path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"holds no \.parquet file"):
        ProposalTable(tmp_path / "empty")


@pytest.mark.parametrize(
    ("box", "score", "message"),
    [
        ([0.0, 0, 5, 5], 3.2, "apply a sigmoid"),
        ([0.0, 0, 5, 5], float("nan"), "apply a sigmoid"),
        ([5.0, 0, 0, 5], 0.5, "x1 ≤ x2"),
        ([0.0, 0, float("inf"), 5], 0.5, "x1 ≤ x2"),
        (None, 0.5, "x1 ≤ x2"),
    ],
)
def test_rows_that_are_no_proposals_are_named(
    tmp_path: Path, box: list[float] | None, score: float, message: str
) -> None:
    path = tmp_path / "p.parquet"
    pq.write_table(pa.table({"image_id": [1], "box": [box], "objectness": [score]}, schema=SCHEMA), path)
    with pytest.raises(InputError, match=message):
        ProposalTable(path).of_image(1)


@pytest.mark.parametrize("name", ["p.json", "p.parquet"])
def test_a_file_appears_whole_or_not_at_all(tmp_path: Path, name: str) -> None:
    def interrupted() -> None:
        with writing(tmp_path / name) as file:
            file.add(1, torch.rand(2, 4), torch.rand(2))
            raise RuntimeError("power failed")

    with pytest.raises(RuntimeError, match="power"):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_recall_summed_up_image_by_image_is_that_of_all_at_once() -> None:
    generator = torch.Generator().manual_seed(0)
    truth, proposals, novel = [], [], []
    for number in range(9):
        corner, size = (torch.rand(number % 4, 2, generator=generator) * 50 for _ in range(2))
        truth.append(torch.cat([corner, corner + size + 5], 1))
        near = truth[-1].repeat(6, 1) + torch.randn(6 * len(corner), 4, generator=generator) * 3
        proposals.append(near[torch.randperm(len(near), generator=generator)])
        novel.append(torch.rand(len(corner), generator=generator) < 0.3)
    for apart in (False, True):
        meter = RecallMeter(apart)
        for image in zip(truth, proposals, novel, strict=True):
            meter.add(*image)
        wanted = proposal_recall(truth, proposals, novel if apart else None)
        assert meter.metrics() == pytest.approx(wanted)
        assert 0 < wanted["recall75@10"] < wanted["recall50@10"] == wanted["recall@10"]
        assert ("novel" in described(wanted)) == apart
        steps = [wanted[f"recall{iou}@100"] for iou in range(50, 100, 5)]
        assert wanted["AR@100"] == pytest.approx(sum(steps) / 10)


def test_no_boxes_at_all_are_no_recall() -> None:
    meter = RecallMeter(apart=True)
    assert set(meter.metrics().values()) == {-1.0}
    meter.add(torch.zeros(0, 4), torch.rand(2, 4), torch.zeros(0, dtype=torch.bool))
    assert set(meter.metrics().values()) == {-1.0}


def test_propose_writes_parquet_and_measures_the_same(world: Path, tmp_path: Path) -> None:
    options = [
        "propose",
        f"annotations={world / 'instances_train.json'}",
        f"images={world / 'images'}",
        f"split={world / 'split.json'}",
        "proposer.name=grid",
        "resize.short=[64]",
        "resize.long=64",
    ]
    assert main_regionclip([*options, f"out={tmp_path / 'json'}"]) == 0
    assert main_regionclip([*options, "format=parquet", f"out={tmp_path / 'table'}"]) == 0
    first, second = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("json", "table"))
    assert first == second
    entries = json.loads((tmp_path / "json" / "proposals.json").read_text())
    table = pq.read_table(tmp_path / "table" / "proposals.parquet")
    assert table["image_id"].to_pylist() == [entry["image_id"] for entry in entries]
    assert {
        f"recall{iou}@{k}{part}" for iou in (50, 95) for k in (10, 1000) for part in ("_base", "_novel")
    } <= set(first)


def test_proposals_of_annotations_that_changed_since_are_refused(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    annotations, out = tmp_path / "instances.json", tmp_path / "out"
    annotations.write_bytes((world / "instances_val.json").read_bytes())
    options = ["propose", f"annotations={annotations}", f"images={world / 'images'}", f"out={out}"]
    options += ["proposer.name=grid", "resize.short=[64]", "resize.long=64"]
    assert main_regionclip(options) == 0
    before = (out / "proposals.json").read_bytes()
    annotations.write_bytes(annotations.read_bytes() + b"\n")
    assert main_regionclip(options) == 2
    assert f"annotations ({annotations}) changed since the run in {out} started" in capsys.readouterr().err
    assert (out / "proposals.json").read_bytes() == before
