"""The approximate index finds what the exact one does when all cells are searched, and never stale images."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from clip_base.runtime.errors import InputError
from clip_base.search.approximate import ABOUT, FILE, Approximate, build, cells_of, recall
from clip_base.search.index import Index

pytest.importorskip("faiss")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An index of 900 images around 30 centers, in shards of 200."""
    monkeypatch.setattr("clip_base.search.index.SHARD_ROWS", 200)
    torch.manual_seed(0)
    centers = torch.randn(30, 16)
    vectors = centers.repeat(30, 1) + 0.4 * torch.randn(900, 16)
    index = Index(16)
    index.add([f"{number}.jpg" for number in range(900)], vectors)
    index.save(tmp_path / "my.index")
    return tmp_path / "my.index"


def test_all_cells_find_what_the_exact_search_finds_and_few_find_most(folder: Path) -> None:
    index = Index.load(folder)
    build(index, folder)
    near = Approximate(index, folder)
    queries = F.normalize(torch.randn(20, 16), dim=1)
    exact = [index.search(query, 10) for query in queries]
    assert cells_of(900) == 22
    for query, hits in zip(queries, exact, strict=True):
        found = near.search(query, 10, probes=22)
        assert {hit.key for hit in found} == {hit.key for hit in hits}
        assert [hit.score for hit in found] == pytest.approx([hit.score for hit in hits], abs=2e-3)
    shares = [recall(exact, [near.search(query, 10, probes) for query in queries]) for probes in (1, 4, 22)]
    assert shares[0] < shares[1] <= shares[2] == 1
    assert shares[1] > 0.6
    assert near.search(queries[0], 5000, probes=1)[0].score <= 1.01  # fewer than asked for, none repeated
    keys = [hit.key for hit in near.search(queries[0], 900, probes=22)]
    assert len(keys) == len(set(keys)) == 900


def test_an_index_that_changed_or_is_damaged_is_refused(folder: Path) -> None:
    index = Index.load(folder)
    with pytest.raises(InputError, match="has no approximate index"):
        Approximate(index, folder)
    build(index, folder)
    index.add(["new.jpg"], torch.ones(1, 16))
    index.save(folder)
    with pytest.raises(InputError, match="is older than its images"):
        Approximate(Index.load(folder), folder)
    build(index, folder)
    assert Approximate(Index.load(folder), folder).search(torch.ones(16), 1, 99)[0].key == "new.jpg"
    (folder / FILE).write_bytes((folder / FILE).read_bytes()[:1000])
    with pytest.raises(InputError, match="is damaged"):
        Approximate(index, folder)
    (folder / ABOUT).unlink()
    with pytest.raises(InputError, match="has no approximate index"):
        Approximate(index, folder)


def test_without_faiss_it_is_said_how_to_install_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(InputError, match=r"pip install 'regionclip\[faiss\]'"):
        build(Index.load(folder), folder)
