"""An index finds what exact arithmetic finds, is kept whole, and takes only its own model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from clip_base.runtime.errors import InputError
from clip_base.search import index as module
from clip_base.search.index import Index


def vectors(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 16, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def index(monkeypatch: pytest.MonkeyPatch) -> Index:
    """50 images in shards of 20."""
    monkeypatch.setattr(module, "SHARD_ROWS", 20)
    made = Index(16, "a model", "abc")
    made.add([f"{number}.jpg" for number in range(50)], vectors(50), [f"s{number}" for number in range(50)])
    return made


def test_it_finds_what_exact_arithmetic_finds(index: Index, tmp_path: Path) -> None:
    query = vectors(1, seed=1)[0]
    cosines = F.normalize(vectors(50), dim=1) @ F.normalize(query, dim=0)
    values, rows = cosines.topk(7)
    index.save(tmp_path / "index")
    for one in (index, Index.load(tmp_path / "index")):
        assert len(one) == 50
        hits = one.search(3 * query, 7)
        assert [hit.key for hit in hits] == [f"{row}.jpg" for row in rows.tolist()]
        assert [hit.score for hit in hits] == pytest.approx(values.tolist(), abs=2e-3)
    assert len(index.search(query, 1000)) == 50


def test_duplicates_are_all_pairs_above_the_threshold(index: Index) -> None:
    index.add(["copy.jpg"], vectors(50)[7:8] * 5)
    assert [(a, b) for a, b, _ in index.duplicates(0.999)] == [("7.jpg", "copy.jpg")]
    units = F.normalize(torch.cat([vectors(50), vectors(50)[7:8]]), dim=1)
    wanted = int(((units @ units.T).triu(1) >= 0.5).sum())
    assert abs(len(list(index.duplicates(0.5))) - wanted) <= 1  # one may lie at the edge of half precision


def test_what_is_dropped_and_added_is_saved(index: Index, tmp_path: Path) -> None:
    folder = tmp_path / "index"
    index.save(folder)
    stamps = {f"{number}.jpg": f"s{number}" for number in range(50) if number != 5}
    stamps["6.jpg"] = "changed"
    opened = Index.load(folder)
    assert opened.keep(stamps) == 2
    opened.add(["6.jpg"], vectors(1, seed=2), ["changed"])
    opened.save(folder)
    again = Index.load(folder)
    assert sorted(again.keys) == sorted(stamps)
    assert again.search(vectors(1, seed=2)[0], 1)[0].key == "6.jpg"
    assert again.keep(stamps) == 0


def test_an_image_in_two_shards_counts_once_as_it_was_last(index: Index, tmp_path: Path) -> None:
    """What a kill between writing the new shard and deleting the old one leaves."""
    folder = tmp_path / "index"
    index.add(["6.jpg"], vectors(1, seed=2), ["changed"])
    index.save(folder)
    opened = Index.load(folder)
    assert len(opened) == 50
    assert opened.search(vectors(1, seed=2)[0], 1)[0].key == "6.jpg"


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_a_vector_without_direction_is_refused(index: Index, value: float) -> None:
    with pytest.raises(InputError, match=r"the embedding of bad\.jpg is zero or not finite"):
        index.add(["good.jpg", "bad.jpg"], torch.stack([torch.ones(16), torch.full((16,), value)]))


def test_another_models_index_is_refused(index: Index, tmp_path: Path) -> None:
    index.save(tmp_path / "index")
    with pytest.raises(InputError, match=r"is an index of another model \(a model\)"):
        Index(16, "other", "def").save(tmp_path / "index")


def test_what_is_no_index_is_one_line(index: Index, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        Index.load(tmp_path / "none")
    with pytest.raises(InputError, match="is no index; `clip-base index` makes one"):
        Index.load(tmp_path)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(InputError, match="already exists and is no index"):
        index.save(tmp_path / "other")
    index.save(tmp_path / "index")
    shard = min((tmp_path / "index").glob("shard-*"))
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(InputError, match="is damaged"):
        Index.load(tmp_path / "index")
