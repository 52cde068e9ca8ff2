"""`clip-base curate`: from every kind of source, with any number of processes, resumed, refused."""

from __future__ import annotations

import csv
import io
import json
import re
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clip_base.curation import curate as jobs
from clip_base.curation.lines import LineUnits
from clip_base.data.sources import JsonLinesConfig, JsonLinesSource
from clip_base.data.webdataset import WebdatasetConfig, WebdatasetSource
from clip_base.jobs.cli import main

pytest.importorskip("ahocorasick")

TEXTS = [f"a dog number {number}" for number in range(30)] + ["a rare yak", "an emu", "nothing at all"]
Job = Callable[..., tuple[int, str, str]]


@pytest.fixture
def job(capsys: pytest.CaptureFixture[str]) -> Job:
    """Runs curate with at most five pairs for each of three queries."""

    def run(*options: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(["curate", *options])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


@pytest.fixture
def queries(tmp_path: Path) -> list[str]:
    (tmp_path / "queries.txt").write_text("dog\nyak\nemu\nunicorn\n")
    return [f"queries={tmp_path / 'queries.txt'}", "per_query=5"]


def write_tar(path: Path, texts: list[str]) -> None:
    with tarfile.open(path, "w") as tar:
        for number, text in enumerate(texts):
            members = {"jpg": b"image of " + text.encode(), "txt": text.encode(), "json": b"{}"}
            for extension, data in members.items():
                header = tarfile.TarInfo(f"{number:04d}.{extension}")
                header.size = len(data)
                tar.addfile(header, io.BytesIO(data))


@pytest.fixture
def tars(tmp_path: Path) -> Path:
    folder = tmp_path / "tars"
    folder.mkdir()
    for number in range(3):
        write_tar(folder / f"{number}.tar", TEXTS[11 * number : 11 * number + 11])
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Returns all that a run leaves, but for its config."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "config.yaml"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def members(folder: Path) -> dict[str, bytes]:
    found = {}
    for path in folder.glob("*.tar"):
        with tarfile.open(path) as tar:
            found |= {f"{path.stem}/{one.name}": tar.extractfile(one).read() for one in tar}  # type: ignore[union-attr]
    return found


def test_tars_become_tars_of_whole_records(job: Job, queries: list[str], tars: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, told, _ = job("source.name=webdataset", f"source.shards={tars}", *queries, f"out={out}")
    assert code == 0
    assert "7 of 33 pairs; 1 contain no query, 25 are in no sample, 0 cannot be used" in told
    kept = members(out / "pairs")
    assert len(kept) == 3 * 7
    assert kept.items() <= members(tars).items()
    texts = sorted(data.decode() for name, data in kept.items() if name.endswith(".txt"))
    assert [re.sub(r" number \d+", "", text) for text in texts] == ["a dog"] * 5 + ["a rare yak", "an emu"]
    assert len(WebdatasetSource(WebdatasetConfig(str(out / "pairs"))).pairs()) == 7
    metrics = json.loads((out / "metrics.json").read_text())
    assert (metrics["queries"], metrics["queries_found"], metrics["queries_above_per_query"]) == (4, 3, 1)
    with (out / "per_query.csv").open() as file:
        rows = [[row[key] for key in ("query", "pairs", "sampled", "kept")] for row in csv.DictReader(file)]
    assert rows == [
        ["dog", "30", "5", "5"],
        ["yak", "1", "1", "1"],
        ["emu", "1", "1", "1"],
        ["unicorn", "0", "0", "0"],
    ]
    page = (out / "report.html").read_text()
    assert "7 of 33 pairs" in page
    assert page.count("data:image/png;base64,") == 1
    assert not (out / ".work").exists()
    assert job("source.name=webdataset", f"source.shards={tars}", *queries, f"out={out}")[1].endswith(
        "is complete: 7 of 33 pairs are kept\n"
    )


def test_neither_the_order_of_tars_nor_their_folder_changes_the_sample(
    job: Job, queries: list[str], tars: Path, tmp_path: Path
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    assert job("source.name=webdataset", f"source.shards={tars}", *queries, f"out={one}")[0] == 0
    moved = tars.rename(tmp_path / "moved")
    turned = "::".join(str(moved / f"{number}.tar") for number in (2, 0, 1))
    assert job("source.name=webdataset", f"source.shards={turned}", *queries, f"out={two}")[0] == 0
    assert members(two / "pairs") == members(one / "pairs")
    other = ["source.name=webdataset", f"source.shards={moved}", *queries, f"out={tmp_path / 'x'}"]
    assert job(*other, "seed=1")[0] == 0
    assert members(tmp_path / "x" / "pairs") != members(one / "pairs")


@pytest.mark.slow
def test_several_processes_leave_the_same(job: Job, queries: list[str], tars: Path, tmp_path: Path) -> None:
    source = ["source.name=webdataset", f"source.shards={tars}", *queries]
    assert job(*source, f"out={tmp_path / 'one'}")[0] == 0
    assert job(*source, f"out={tmp_path / 'two'}", "workers=2")[0] == 0
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


@pytest.mark.slow
def test_a_cluster_leaves_the_same(
    cluster: Any, job: Job, queries: list[str], tars: Path, tmp_path: Path
) -> None:
    source = ["source.name=webdataset", f"source.shards={tars}", *queries]
    assert job(*source, f"out={tmp_path / 'local'}")[0] == 0
    code, _, told = job(*source, f"out={tmp_path / 'ray'}", "executor=ray", "workers=3")
    assert code == 0, told
    assert contents(tmp_path / "ray") == contents(tmp_path / "local")


def test_tars_become_an_index_that_is_read_as_jsonl(
    job: Job, queries: list[str], tars: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    source = ["source.name=webdataset", f"source.shards={tars}", "output=index"]
    assert job(*source, *queries, f"out={out}")[0] == 0
    pairs = JsonLinesSource(JsonLinesConfig(str(out / "pairs.jsonl"))).pairs()
    assert len(pairs) == 7
    for pair in pairs:
        tar = Path(str(pair.image)).parent
        assert (
            members(tar.parent)[f"{tar.stem}/{Path(str(pair.image)).name}"]
            == b"image of " + pair.captions[0].encode()
        )


def test_parquet_keeps_all_columns(job: Job, queries: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "table"
    folder.mkdir()
    for number in range(2):
        texts = TEXTS[17 * number : 17 * number + 17]
        images = [{"bytes": text.encode(), "path": None} for text in texts]
        table = pa.table({"url": [f"http://x/{text}" for text in texts], "text": texts, "image": images})
        pq.write_table(table, folder / f"{number}.parquet", row_group_size=4)
    out = tmp_path / "out"
    source = ["source.name=parquet", f"source.file={folder}", "source.caption_column=text"]
    code, told, _ = job(*source, *queries, f"out={out}")
    assert code == 0
    assert "7 of 33 pairs" in told
    found = pa.concat_tables([pq.read_table(path) for path in sorted((out / "pairs").glob("*.parquet"))])
    assert found.schema.equals(pq.read_schema(folder / "0.parquet"))
    for row in found.to_pylist():
        assert row["url"] == f"http://x/{row['text']}"
        assert row["image"]["bytes"] == row["text"].encode()
    assert {"a rare yak", "an emu"} < {row["text"] for row in found.to_pylist()}


def test_rows_keep_their_columns_and_addresses_stay(job: Job, queries: list[str], tmp_path: Path) -> None:
    addresses = [f"https://example.org/{number}.jpg?a=1" for number in range(30)]
    rows = list(zip([*addresses, "yak.jpg", "emu.jpg", ""], TEXTS, strict=True))
    with (tmp_path / "pairs.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["url", "caption", "width"], *((*row, "10") for row in rows)])
    with (tmp_path / "pairs.jsonl").open("w") as file:
        for image, text in rows:
            file.write(json.dumps({"url": image, "caption": [text, "more"], "width": 10}) + "\n")
    for name, options in {"csv": "source.image_column=url", "jsonl": "source.image_key=url"}.items():
        source = [f"source.name={name}", f"source.file={tmp_path / 'pairs.'}{name}", options]
        assert job(*source, *queries, f"out={tmp_path / name}", "max_skipped=1")[0] == 0
        kept = [json.loads(line) for line in (tmp_path / name / "pairs.jsonl").read_text().splitlines()]
        assert len(kept) == 7
        for row in kept[:5]:
            assert row["url"] in addresses
            assert int(row["width"]) == 10
        assert [row["url"] for row in kept[5:]] == [str(tmp_path / "yak.jpg"), str(tmp_path / "emu.jpg")]
        skipped = [json.loads(line) for line in (tmp_path / name / "skipped.jsonl").read_text().splitlines()]
        assert [entry["reason"].rpartition(": ")[2] for entry in skipped] == ["no image"]


def test_a_stopped_run_resumes_behind_the_last_unit(
    job: Job, queries: list[str], tars: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = ["source.name=webdataset", f"source.shards={tars}", *queries]
    assert job(*source, f"out={tmp_path / 'whole'}")[0] == 0
    save, read, done = jobs.save_matches, jobs.match_records, list[str]()

    def stop(matches: Any, path: Path) -> None:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(path.name)
        save(matches, path)

    monkeypatch.setattr(jobs, "save_matches", stop)
    assert job(*source, f"out={tmp_path / 'stopped'}")[0] == 130
    monkeypatch.undo()
    again: list[int] = []
    monkeypatch.setattr(jobs, "match_records", lambda *given: again.append(1) or read(*given))
    assert job(*source, f"out={tmp_path / 'stopped'}")[0] == 0
    assert len(again) == 1
    assert contents(tmp_path / "stopped") == contents(tmp_path / "whole")


@pytest.mark.parametrize("kept", ["kept-lines-000000.jsonl", "kept-lines-000001.jsonl"])
def test_a_run_that_was_stopped_while_it_wrote_resumes_there(
    kept: str, job: Job, queries: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("clip_base.curation.lines.PER_UNIT", 20)
    rows = [{"image": f"{number}.jpg", "caption": text} for number, text in enumerate(TEXTS)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = ["source.name=jsonl", f"source.file={tmp_path / 'pairs.jsonl'}", *queries]
    assert job(*source, f"out={tmp_path / 'whole'}")[0] == 0
    write = LineUnits.write

    def stop(self: LineUnits, unit: Any, chosen: Any, path: Path) -> None:
        write(self, unit, chosen, path)
        if path.name == kept:
            raise KeyboardInterrupt

    monkeypatch.setattr(LineUnits, "write", stop)
    assert job(*source, f"out={tmp_path / 'stopped'}")[0] == 130
    assert (tmp_path / "stopped" / ".work" / kept).exists()
    monkeypatch.setattr(LineUnits, "write", write)
    assert job(*source, f"out={tmp_path / 'stopped'}")[0] == 0
    assert contents(tmp_path / "stopped") == contents(tmp_path / "whole")


def test_damage_and_lacking_texts_are_listed(
    job: Job, queries: list[str], tars: Path, tmp_path: Path
) -> None:
    whole = (tars / "1.tar").read_bytes()
    (tars / "1.tar").write_bytes(whole[: len(whole) // 2])
    with tarfile.open(tars / "3.tar", "w") as tar:
        header = tarfile.TarInfo("0000.jpg")
        tar.addfile(header, io.BytesIO())
    out = tmp_path / "out"
    assert job("source.name=webdataset", f"source.shards={tars}", *queries, f"out={out}")[0] == 0
    reasons = [json.loads(line)["reason"] for line in (out / "skipped.jsonl").read_text().splitlines()]
    assert len(reasons) == 2
    assert "1.tar ends at byte" in reasons[0]
    assert "no caption" in reasons[1]
    code, _, told = job(
        "source.name=webdataset", f"source.shards={tars}", *queries, f"out={tmp_path / 'y'}", "max_skipped=0"
    )
    assert code == 1
    assert told.startswith("error: 2 of ")


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        ([], 2, "nothing gives queries"),
        (["titles=none.txt"], 1, "none of 33 pairs contains any of 1 queries"),
        (["corpus=captions,none.txt"], 2, "corpus=captions stands for the pairs' own texts"),
        (["corpus=0.tar"], 2, "corpus 0.tar cannot be read as text"),
        (["corpus=captions", "per_query=0"], 2, "per_query must be at least 1, found 0"),
        (["corpus=captions", "min_count=0"], 2, "min_count must be at least 1"),
    ],
)
def test_a_bad_call_ends_with_one_line(
    options: list[str], code: int, message: str, job: Job, tars: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tars)
    (tars / "none.txt").write_text("griffin\n")
    found, _, told = job("source.name=webdataset", "source.shards=.", *options, "out=../out")
    assert (found, told.count("\n")) == (code, 1)
    assert told.startswith(f"error: {message}")


def test_what_comes_out_of_real_captions(job: Job, shared_data: Path, tmp_path: Path) -> None:
    lines = (shared_data / "metadata" / "cc3m_validation_captions.tsv").read_text().splitlines()[:2000]
    rows = [dict(zip(("caption", "image"), line.split("\t"), strict=True)) for line in lines]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = ["source.name=jsonl", f"source.file={tmp_path / 'pairs.jsonl'}", "corpus=captions"]
    assert job(*source, "min_count=5", "per_query=20", f"out={tmp_path / 'out'}")[0] == 0
    with (tmp_path / "out" / "per_query.csv").open() as file:
        table = {row["query"]: row for row in csv.DictReader(file)}
    assert {"the", "on the beach", "close up", "beach"} & set(table) == {"the", "close up", "beach"}
    assert all(int(row["sampled"]) == min(int(row["pairs"]), 20) for row in table.values())
    assert all(int(row["sampled"]) <= int(row["kept"]) <= int(row["pairs"]) for row in table.values())
    kept = (tmp_path / "out" / "pairs.jsonl").read_text().splitlines()
    assert len(kept) == len(set(kept))
    assert set(map(str, map(json.loads, kept))) <= set(map(str, rows))
