from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from clip_base.evaluation import ranking
from clip_base.evaluation.retrieval import RetrievalConfig, ranks_of, recall_at, retrieval
from clip_base.jobs import cli
from clip_base.models.clip import CLIP
from clip_base.models.configs import CLIPConfig, TextConfig, VisionConfig
from clip_base.runtime.errors import InputError
from clip_base.weights.native import save_clip


def unit(*shape: int, seed: int = 0) -> Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    vision = VisionConfig(kind="vit", layers=[1], width=64, patch=16, resolution=32)
    model = CLIP(CLIPConfig(32, vision, TextConfig(width=64, heads=1, layers=1, context_length=20)))
    path = tmp_path_factory.mktemp("weights") / "w.safetensors"
    save_clip(model, path)
    return str(path)


@pytest.fixture
def captions(pictures: Path) -> Path:
    """Captions of the twelve images: seven of the first, five of the others; and a broken image."""
    (pictures / "12.png").write_bytes(b"broken")
    images = [{"id": index, "file_name": f"{index}.png"} for index in range(13)]
    texts = [
        {"image_id": i, "caption": f"picture {i} told {n}"}
        for i in range(13)
        for n in range(7 if i == 0 else 5)
    ]
    path = pictures.parent / "captions.json"
    path.write_text(json.dumps({"images": images, "annotations": texts}))
    return path


def run(weights: str, captions: Path, out: Path, **options: Any) -> dict[str, Any]:
    config = RetrievalConfig(
        weights=weights, captions=str(captions), images=str(captions.parent / "pictures"), out=str(out),
        precision="fp32", **options,
    )  # fmt: skip
    retrieval(config)
    metrics: dict[str, Any] = json.loads((out / "metrics.json").read_text())
    return metrics


def test_recall_is_that_of_sorting_every_query() -> None:
    images, texts = unit(30, 8), unit(90, 8, seed=1)
    owner = torch.randint(30, (90,), generator=torch.Generator().manual_seed(2))
    figures = recall_at(images, texts, owner, ks=(1, 3, 10))
    scores = images @ texts.T
    for k in (1, 3, 10):
        best = scores.topk(k, dim=1).indices
        has = [i for i in range(30) if (owner == i).any()]
        right = [bool((owner[best[i]] == i).any()) for i in has]
        assert figures[f"image_to_text_R@{k}"] == pytest.approx(sum(right) / len(has))
        best = scores.T.topk(k, dim=1).indices
        assert figures[f"text_to_image_R@{k}"] == pytest.approx(
            float((best == owner[:, None]).any(1).double().mean())
        )


def test_matching_features_are_found_first_and_rows_may_be_scored_in_parts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    images = unit(20, 32)
    owner = torch.arange(20).repeat_interleave(5)
    texts = F.normalize(images[owner] + 0.1 * unit(100, 32, seed=3), dim=-1)
    assert set(recall_at(images, texts, owner).values()) == {1.0}
    noisy = unit(100, 32, seed=4)
    whole = ranks_of(images, noisy, owner)
    monkeypatch.setattr(ranking, "ROWS", 7)
    parts = ranks_of(images, noisy, owner)
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))


def test_owners_must_be_one_a_text() -> None:
    with pytest.raises(ValueError, match=r"owner must be \[3\]"):
        recall_at(unit(2, 4), unit(3, 4), torch.tensor([0, 1]))


def test_the_job_leaves_metrics_a_row_a_query_and_kept_features(
    weights: str,
    captions: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    kept = str(tmp_path / "kept")
    metrics = run(weights, captions, tmp_path / "out", features=kept)
    assert (metrics["images"], metrics["texts"], metrics["skipped"]) == (12, 60, 1)
    assert "text to image" in capsys.readouterr().out
    rows = list(csv.DictReader((tmp_path / "out/per_query.csv").open()))
    assert len(rows) == 72
    for direction in ("image_to_text", "text_to_image"):
        ranks = [int(row["rank"]) for row in rows if row["direction"] == direction]
        for k in (1, 5, 10):
            share = sum(rank <= k for rank in ranks) / len(ranks)
            assert metrics[f"{direction}_R@{k}"] == pytest.approx(share)
    assert "12.png does not decode" in (tmp_path / "out/skipped.jsonl").read_text()

    def read_no_more(*_: object) -> None:
        raise AssertionError("an image was decoded again")

    monkeypatch.setattr("clip_base.evaluation.features.decode_stored", read_no_more)
    assert run(weights, captions, tmp_path / "again", features=kept) == metrics
    (file,) = Path(kept).iterdir()
    monkeypatch.undo()
    file.write_bytes(b"damaged")
    assert run(weights, captions, tmp_path / "third", features=kept) == metrics
    all_texts = run(weights, captions, tmp_path / "all", features=kept, captions_per_image=0)
    assert all_texts["texts"] == 62


def test_too_many_broken_pictures_and_a_prompt_without_a_place_are_refused(
    weights: str, captions: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="1 of 13 images cannot be used"):
        run(weights, captions, tmp_path / "out", max_skipped=0.05)
    with pytest.raises(InputError, match=r"has no \{\}"):
        run(weights, captions, tmp_path / "prompt", prompt="a photo")


def test_the_command_measures_real_captions(
    weights: str, shared_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = json.loads((shared_data / "coco_mini/captions_val.json").read_text())
    content["images"] = content["images"][:6]
    some = {image["id"] for image in content["images"]}
    content["annotations"] = [entry for entry in content["annotations"] if entry["image_id"] in some]
    (tmp_path / "few.json").write_text(json.dumps(content))
    options = [
        f"captions={tmp_path / 'few.json'}",
        f"images={shared_data / 'coco_mini/val'}",
        f"weights={weights}",
    ]
    assert cli.main(["retrieval", *options, f"out={tmp_path / 'out'}"]) == 0
    assert "6 images, 30 captions" in capsys.readouterr().out
