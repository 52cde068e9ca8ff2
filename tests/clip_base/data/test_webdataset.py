from __future__ import annotations

import io
import itertools
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import pytest

from clip_base.data.loader import Loader
from clip_base.data.sources import SOURCES, Pairs
from clip_base.data.webdataset import Records
from clip_base.images.decode import decode
from clip_base.jobs import cli
from clip_base.jobs.config import build_plugin
from clip_base.models.tokenizer import Tokenizer
from clip_base.runtime.errors import InputError
from clip_base.storage import tars
from clip_base.storage.tars import TarIndex, read_index, scan
from clip_base.training.pretrain import CaptionedImages


def records(shards: object, **options: Any) -> Records:
    found: Records = build_plugin(SOURCES, {"name": "webdataset", "shards": str(shards), **options}).pairs()
    return found


def write(path: Path, members: list[tuple[str, bytes]], form: int = tarfile.USTAR_FORMAT) -> Path:
    with tarfile.open(path, "w", format=form) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


@pytest.fixture
def shards(pictures: Path, tmp_path: Path) -> str:
    """Three shards of four records each."""
    for shard in range(3):
        members = []
        for number in range(4):
            key = f"{shard:02d}{number:02d}"
            note = json.dumps({"alt": [f"alt {key}", f"other {key}"], "none": None})
            members += [
                (f"{key}.png", (pictures / f"{4 * shard + number}.png").read_bytes()),
                (f"{key}.txt", f"text  {key}\n".encode()),
                (f"{key}.json", note.encode()),
            ]
        write(tmp_path / f"s-{shard}.tar", members)
    return str(tmp_path / "s-{0..2}.tar")


def texts(found: Pairs) -> list[tuple[str, ...]]:
    return [found[index].captions for index in range(len(found))]


def test_braces_and_colons_name_several_tars(shards: str, pictures: Path, tmp_path: Path) -> None:
    found = records(shards)
    assert texts(found) == [(f"text {s:02d}{n:02d}",) for s in range(3) for n in range(4)]
    for index in (0, 7, 11):
        assert (decode(found[index].image) == decode(pictures / f"{index}.png")).all()
    listed = records(f"{tmp_path}/s-2.tar::{tmp_path}/s-{{0..0}}.tar")
    assert texts(listed) == texts(found)[8:] + texts(found)[:4]


def test_all_named_members_are_captions(shards: str) -> None:
    found = records(shards, captions=["txt", "json.alt", "json.none"])
    assert found[5].captions == ("text 0101", "alt 0101", "other 0101")


def test_records_are_webdatasets_own(shards: str) -> None:
    wds = pytest.importorskip("webdataset")
    theirs = list(wds.WebDataset(shards, shardshuffle=False))
    found = records(shards)
    assert len(theirs) == len(found)
    for index, record in enumerate(theirs):
        assert found[index].image.read_bytes() == record["png"]
        assert str(found[index].image).endswith(f"{record['__key__']}.png")


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_long_names_folders_and_notes_are_understood(tmp_path: Path, form: int) -> None:
    long = "folder.v1/" + ("x" * 60 + "/" if form == tarfile.USTAR_FORMAT else "x" * 150)
    members = [
        ("__notes__", b"-"),
        (f"{long}a.b.jpg", b"-"),
        (f"{long}a.jpg", b"1"),
        (f"{long}a.txt", b"one"),
    ]
    members += [("LICENSE", b"-"), ("c.TXT", b"two"), ("c.Jpg", b"2")]
    found = records(write(tmp_path / "t.tar", members, form))
    assert texts(found) == [("one",), ("two",)]
    assert [found[i].image.read_bytes() for i in range(2)] == [b"1", b"2"]


def test_incomplete_records_are_unusable_by_name(tmp_path: Path) -> None:
    members = [
        ("a.jpg", b"-"),
        ("b.txt", b"b"),
        ("c.jpg", b"-"),
        ("c.txt", b"\xff"),
        ("d.jpg", b"-"),
        ("d.txt", b"d"),
    ]
    found = records(write(tmp_path / "t.tar", members))
    assert len(found) == 4
    for index, reason in enumerate(
        [r"t\.tar/a\.jpg: the record has no caption", r"/b\.txt: the record has no image"]
    ):
        with pytest.raises(InputError, match=reason):
            found[index]
    with pytest.raises(InputError, match=r"c\.txt cannot be read: it is not UTF-8"):
        found[2]
    assert found[3].captions == ("d",)


def test_a_cut_tar_gives_what_it_has_and_names_what_is_lost(shards: str, tmp_path: Path) -> None:
    path = tmp_path / "s-1.tar"
    index = scan(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(index.offsets[6]) + 50])  # within the third record's image
    found = records(shards)
    usable, reasons = _usable(found)
    keys = "0000 0001 0002 0003 0100 0101 0200 0201 0202 0203"
    assert usable == [(f"text {key}",) for key in keys.split()]
    assert len(reasons) == 1

    path.write_bytes(whole[: int(index.offsets[6]) - 300])  # within a header
    usable, reasons = _usable(records(shards))
    assert len(usable) == 10
    assert "is damaged at byte" in reasons[0]

    wrong = bytearray(whole)
    wrong[int(index.offsets[6]) - 400] ^= 0xFF
    path.write_bytes(bytes(wrong))
    usable, reasons = _usable(records(shards))
    assert len(usable) == 10
    assert "is damaged at byte" in reasons[0]


def _usable(found: Pairs) -> tuple[list[tuple[str, ...]], list[str]]:
    usable, reasons = [], []
    for index in range(len(found)):
        try:
            pair = found[index]
            decode(pair.image)
            usable.append(pair.captions)
        except InputError as error:
            reasons.append(str(error))
    return usable, reasons


def test_what_is_no_tar_is_refused(tmp_path: Path, shards: str) -> None:
    (tmp_path / "text.tar").write_text("no tar" * 200)
    with tarfile.open(tmp_path / "z.tar", "w:gz") as tar:
        tar.add(tmp_path / "text.tar")
    for name in ("text.tar", "z.tar"):
        with pytest.raises(InputError, match="cannot be read as an uncompressed tar"):
            records(tmp_path / name)
    with pytest.raises(InputError, match="does not exist"):
        records(tmp_path / "s-{2..3}.tar")
    for remote in ("pipe:curl x", "ftp://example.com/a.tar"):
        with pytest.raises(InputError, match="cannot be read; give a path"):
            records(remote)
    with pytest.raises(InputError, match=r"no record has images \(jpg\); .* there: json, png, txt"):
        records(shards, images=["jpg"])
    with pytest.raises(InputError, match=r"no record has captions \(text\)"):
        records(shards, captions=["text"])


def test_an_index_is_kept_until_the_tar_changes(
    shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = str(tmp_path / "index")
    fresh = texts(records(shards, index=kept))
    scanned: list[Path] = []

    def noted(path: Path) -> TarIndex:
        scanned.append(path)
        return scan(path)

    monkeypatch.setattr(tars, "scan", noted)
    assert texts(records(shards, index=kept)) == fresh
    assert scanned == []
    path = tmp_path / "s-0.tar"
    os.utime(path, ns=(1, 1))
    assert texts(records(shards, index=kept)) == fresh
    assert scanned == [path]
    for file in Path(kept).iterdir():
        file.write_bytes(b"PK damaged")
    assert texts(records(shards, index=kept)) == fresh
    assert len(scanned) == 4
    assert read_index(path, kept).names == scan(path).names


def test_a_loader_goes_on_at_the_next_record(shards: str) -> None:
    data = CaptionedImages(records(shards, captions=["json.alt"]), Tokenizer(12), 16, 0.9, cache=False)

    def batches(start: int, count: int) -> list[Any]:
        loader = Loader(data, data.collate, 5, seed=2)
        loader.seek(start)
        return list(itertools.islice(loader, count))

    whole, rest = batches(0, 6), batches(4, 2)
    for a, b in zip(whole[4:], rest, strict=True):
        assert a.tokens.equal(b.tokens)
        assert a.images.pixels.equal(b.images.pixels)


def test_pretraining_reads_shards_skips_and_lists(shards: str, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "s-0.tar", "a") as tar:
        for name, content in (("x.png", b"no picture"), ("x.txt", b"a text")):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    config = tmp_path / "c.yaml"
    config.write_text(
        "tower:\n  embed_dim: 16\n"
        "  vision: {kind: vit, layers: [1], width: 32, patch: 16, resolution: 32, head_width: 16}\n"
        "  text: {width: 32, heads: 2, layers: 1, context_length: 12}\n"
        "train: {steps: 3, epochs: 0, batch_size: 6, precision: fp32}\n"
        f'source: {{name: mix, weights: [0.5, 2.0], sources: [{{name: webdataset, shards: "{shards}"}}, '
        f'{{name: webdataset, shards: "{tmp_path}/s-0.tar"}}]}}\n'
    )
    assert cli.main(["pretrain", str(config), f"out={tmp_path / 'out'}"]) == 0
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    assert (metrics["steps"], metrics["pairs"]) == (3, 18)
    (skipped, *_) = (tmp_path / "out/skipped.jsonl").read_text().splitlines()
    assert "s-0.tar/x.png does not decode" in skipped


def test_a_real_shard_is_read(shared_data: Path) -> None:
    found = records(shared_data / "webdataset" / "cc12m-train-0000.tar")
    assert len(found) == 32
    usable, reasons = _usable(found)
    assert (len(usable), reasons) == (32, [])
    assert all(len(captions) == 1 for captions in usable)
