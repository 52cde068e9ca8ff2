from __future__ import annotations

import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from clip_base.data.loader import Loader
from clip_base.data.mixture import weights_of
from clip_base.data.sampler import epoch_length, epoch_order
from clip_base.data.sources import SOURCES, Pair, Pairs
from clip_base.images.decode import decode
from clip_base.jobs.config import build_plugin
from clip_base.runtime.errors import InputError, InputNote


def pairs(name: str, **options: Any) -> Pairs:
    found: Pairs = build_plugin(SOURCES, {"name": name, **options}).pairs()
    return found


def table(path: Path, **columns: list[Any]) -> str:
    pq.write_table(pa.table(columns), path)
    return str(path)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_paths_in_parquet_are_grouped_by_image(tmp_path: Path) -> None:
    images, captions = ["a.jpg", "b.jpg", "a.jpg", None], ["a  cat", "", "the cat", "x"]
    file = table(tmp_path / "t.parquet", image=images, caption=captions)
    assert pairs("parquet", file=file) == [Pair(tmp_path / "a.jpg", ("a cat", "the cat"))]
    assert pairs("parquet", file=file, images="/x")[0].image == Path("/x/a.jpg")


def test_a_folder_of_parquet_files_with_lists_of_captions_is_one_table(tmp_path: Path) -> None:
    folder = tmp_path / "parts"
    folder.mkdir()
    table(folder / "0.parquet", image=["a.jpg"], caption=[["one", "two"]])
    table(folder / "1.parquet", image=["b.jpg"], caption=[["three"]])
    found = pairs("parquet", file=str(folder))
    assert [found[i].captions for i in range(len(found))] == [("one", "two"), ("three",)]
    assert found[1].image == folder / "b.jpg"


def test_images_in_parquet_are_decoded_and_an_empty_one_is_unusable(pictures: Path, tmp_path: Path) -> None:
    data = (pictures / "3.png").read_bytes()
    plain = table(tmp_path / "p.parquet", image=[data, None], caption=["x", "y"])
    nested = table(tmp_path / "n.parquet", image=[{"bytes": data, "path": "3.png"}], caption=["x"])
    for file in (plain, nested):
        first = pairs("parquet", file=file)[0]
        assert (decode(first.image) == decode(pictures / "3.png")).all()
    with pytest.raises(InputError, match=r"p\.parquet, row 1 does not decode: it is empty"):
        decode(pairs("parquet", file=plain)[1].image)


def test_malformed_parquet_is_refused(tmp_path: Path) -> None:
    file = table(tmp_path / "t.parquet", url=["a"], caption=["b"], number=[1])
    with pytest.raises(InputError, match=r"no column 'image' .*; it has url, caption, number"):
        pairs("parquet", file=file)
    with pytest.raises(InputError, match="column 'number' holds int"):
        pairs("parquet", file=file, image_column="number")
    with pytest.raises(InputError, match="row 0: a caption must be a text, found 1"):
        pairs("parquet", file=file, image_column="url", caption_column="number")
    (tmp_path / "t.txt").write_text("no table")
    with pytest.raises(InputError, match="cannot be read as Parquet"):
        pairs("parquet", file=str(tmp_path / "t.txt"))


def test_texts_in_parquet_that_are_not_utf_8_are_refused(tmp_path: Path) -> None:
    raw = pa.array([b"\xff\xfe", b"ok"], type=pa.binary())
    texts = pa.Array.from_buffers(pa.string(), 2, raw.buffers())
    file = tmp_path / "t.parquet"
    pq.write_table(pa.table({"image": ["a", "b"], "caption": texts}), file)
    with pytest.raises(InputError, match="cannot be read as Parquet \\('utf-8' codec can't decode"):
        pairs("parquet", file=str(file))


def test_a_folder_pairs_images_with_the_lines_of_their_texts(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/b.JPG").touch()
    (tmp_path / "sub/b.txt").write_text("a dog\n\n two  dogs \n")
    (tmp_path / "a.png").touch()
    (tmp_path / "c.png").touch()
    (tmp_path / "c.txt").write_text(" \n")
    found = pairs("folder", folder=str(tmp_path))
    assert len(found) == 3
    assert found[2] == Pair(tmp_path / "sub/b.JPG", ("a dog", "two dogs"))
    with pytest.raises(InputError, match=r"a\.png has no caption: there is no file a\.txt"):
        found[0]
    with pytest.raises(InputError, match=r"c\.txt is empty"):
        found[1]
    (tmp_path / "sub/b.JPG").unlink()
    with pytest.raises(InputError, match="holds no images"):
        pairs("folder", folder=str(tmp_path / "sub"))


class Echo:
    """Samples that are their own number."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def item(self, index: int, generator: torch.Generator) -> tuple[int, float]:
        return index, torch.rand((), generator=generator).item()


def shown(weights: torch.Tensor | None, count: int, start: int = 0, **options: Any) -> list[Any]:
    loader = Loader(Echo(10), lambda items: items, 5, weights=weights, **options)
    loader.seek(start)
    batches = iter(loader)
    return [item for _ in range(count) for item in next(batches)]


def test_weights_decide_how_often_an_epoch_shows_a_sample() -> None:
    weights = torch.tensor([1.0] * 4 + [3.0] * 2 + [0.5] * 4)
    assert epoch_length(10, weights) == 12
    total = torch.zeros(10, dtype=torch.int64)
    for epoch in range(50):
        counts = torch.bincount(epoch_order(10, seeded(epoch), weights), minlength=10)
        assert counts[:4].tolist() == [1] * 4
        assert counts[4:6].tolist() == [3] * 2
        assert counts[6:].sum() == 2
        total += counts
    assert (total[6:] > 10).all()  # now one half of them, now another
    torch.testing.assert_close(epoch_order(10, seeded(3)), torch.randperm(10, generator=seeded(3)))


def test_a_sample_of_no_weight_is_never_drawn() -> None:
    weights = torch.tensor([0.0, 1.0, 0.0, 2.0, 0.0])
    for replacement in (False, True):
        drawn = torch.cat([epoch_order(5, seeded(s), weights, replacement) for s in range(200)])
        assert set(drawn.tolist()) == {1, 3}
        assert float((drawn == 3).double().mean()) == pytest.approx(2 / 3, abs=0.07)
    with pytest.raises(InputError, match="not negative"):
        epoch_length(2, torch.tensor([1.0, -1.0]))
    with pytest.raises(InputError, match="leave 0 samples"):
        epoch_length(2, torch.tensor([0.1, 0.1]))


@pytest.mark.parametrize("options", [{}, {"replacement": True}])
def test_weighted_order_is_a_function_of_seed_and_step(options: dict[str, Any]) -> None:
    weights = torch.tensor([2.0] * 5 + [0.5] * 5)
    whole = shown(weights, 8, **options)
    assert shown(weights, 5, start=3, **options) == whole[15:]
    assert shown(weights, 8, seed=1, **options) != whole
    assert len(set(whole)) == 40  # what is shown twice is augmented anew


def test_a_mix_is_its_sources_end_to_end_with_their_weights(tmp_path: Path) -> None:
    for name, count in (("one", 4), ("two", 2)):
        rows = "".join(f"{name}{i}.jpg,text {i}\n" for i in range(count))
        (tmp_path / f"{name}.csv").write_text(f"image,caption\n{rows}")
    sources = [{"name": "csv", "file": str(tmp_path / f"{name}.csv")} for name in ("one", "two")]
    mixed = pairs("mix", sources=sources, weights=[0.5, 3.0])
    assert [Path(str(mixed[i].image)).stem for i in range(6)] == [
        "one0",
        "one1",
        "one2",
        "one3",
        "two0",
        "two1",
    ]
    weights = weights_of(mixed)
    assert weights is not None
    assert weights.tolist() == [0.5] * 4 + [3.0] * 2
    assert weights_of(pairs("mix", sources=sources)) is None
    nested = pairs("mix", sources=[{"name": "mix", "sources": sources, "weights": [1, 2]}], weights=[2.0])
    assert weights_of(nested).tolist() == [2.0] * 4 + [4.0] * 2  # type: ignore[union-attr]
    with pytest.raises(IndexError):
        mixed[6]


@pytest.mark.parametrize(
    ("weights", "reason"),
    [([1.0], "1 entries for 2 sources"), ([0.0, 0.0], "not all 0"), ([-1.0, 1.0], "not negative")],
)
def test_impossible_weights_are_refused(weights: list[float], reason: str) -> None:
    sources = [{"name": "folder", "folder": "a"}, {"name": "folder", "folder": "b"}]
    with pytest.raises(InputError, match=reason):
        pairs("mix", sources=sources, weights=weights)


def downloaded(folder: Path, pictures: Path) -> Path:
    """A folder as img2dataset leaves it with output_format=parquet: two images of four were got."""
    folder.mkdir()
    data = [(pictures / f"{n}.png").read_bytes() for n in range(2)]
    table(
        folder / "00000.parquet",
        jpg=[data[0], None, data[1], None],
        caption=["a", "b", "c", "d"],
        status=["success", "failed_to_download", "success", "failed_to_resize"],
    )
    (folder / "00000_stats.json").write_text('{"count": 4, "successes": 2}')
    (folder / ".hidden.parquet").write_text("no table")
    return folder


def test_a_folder_of_img2dataset_is_a_table_of_what_was_downloaded(pictures: Path, tmp_path: Path) -> None:
    folder = downloaded(tmp_path / "out", pictures)
    with pytest.warns(InputNote, match="2 of 4 rows are left out: 1 failed_to_download, 1 failed_to_resize"):
        found = pairs("parquet", file=str(folder), image_column="jpg")
    assert [found[i].captions for i in range(len(found))] == [("a",), ("c",)]
    assert (decode(found[1].image) == decode(pictures / "1.png")).all()


def test_a_column_called_status_of_somebody_else_means_nothing(tmp_path: Path) -> None:
    file = table(tmp_path / "t.parquet", image=["a", "b"], caption=["x", "y"], status=["success", "new"])
    assert len(pairs("parquet", file=file)) == 2


def test_rows_without_an_image_or_a_caption_are_counted(pictures: Path, tmp_path: Path) -> None:
    file = table(tmp_path / "t.parquet", image=["a", None, "c"], caption=["x", "y", " "])
    with pytest.warns(InputNote, match="2 of 3 rows lack an image or a caption"):
        assert len(pairs("parquet", file=file)) == 1
    data = (pictures / "0.png").read_bytes()
    file = table(tmp_path / "b.parquet", image=[data, data], caption=["x", None])
    with pytest.warns(InputNote, match="1 of 2 rows lack a caption"):
        assert len(pairs("parquet", file=file)) == 1
    (tmp_path / "t.csv").write_text("image,caption\na,x\nb,\n")
    with pytest.warns(InputNote, match=r"table .*t\.csv: 1 of 2 rows"):
        assert len(pairs("csv", file=str(tmp_path / "t.csv"))) == 1
    (tmp_path / "t.jsonl").write_text('{"image": "a", "caption": ["x", ""]}\n')
    with pytest.warns(InputNote, match=r"t\.jsonl: 1 of 2 rows"):
        assert len(pairs("jsonl", file=str(tmp_path / "t.jsonl"))) == 1


@pytest.mark.parametrize("split_lines", [True, False])
def test_a_text_of_several_lines_means_the_same_beside_an_image_and_in_a_tar(
    tmp_path: Path, split_lines: bool
) -> None:
    (tmp_path / "a.jpg").touch()
    (tmp_path / "a.txt").write_text("a  dog\n\ntwo dogs\n")
    with tarfile.open(tmp_path / "t.tar", "w") as tar:
        for name in ("a.jpg", "a.txt"):
            tar.add(tmp_path / name, name)
    wanted = ("a dog", "two dogs") if split_lines else ("a dog two dogs",)
    for found in (
        pairs("folder", folder=str(tmp_path), split_lines=split_lines),
        pairs("webdataset", shards=str(tmp_path / "t.tar"), split_lines=split_lines),
    ):
        assert found[0].captions == wanted


def test_a_folder_of_tars_stands_for_all_of_them(tmp_path: Path) -> None:
    for number in (10, 2):
        (tmp_path / "a.jpg").write_bytes(b"-")
        (tmp_path / "a.txt").write_text(f"text {number}")
        with tarfile.open(tmp_path / f"{number}.tar", "w") as tar:
            tar.add(tmp_path / "a.jpg", "a.jpg")
            tar.add(tmp_path / "a.txt", "a.txt")
    (tmp_path / "00000_stats.json").write_text("{}")
    found = pairs("webdataset", shards=str(tmp_path))
    assert [found[i].captions for i in range(len(found))] == [("text 2",), ("text 10",)]
    for file in tmp_path.glob("*.tar"):
        file.unlink()
    with pytest.raises(InputError, match=r"holds no \.tar files"):
        pairs("webdataset", shards=str(tmp_path))
    with pytest.raises(InputError, match=r"has no \.parquet files"):
        pairs("parquet", file=str(tmp_path))
