"""Damaged files of every kind are read or refused in one line; `make fuzz` reads 20,000."""

from __future__ import annotations

from pathlib import Path

import pytest
from campaign import Bench, Tally, shares, table
from fuzz_kinds import KINDS, Kind
from fuzz_mutators import FORMS
from fuzz_report import PAGE, write_table

from clip_base.runtime.errors import InputError

FILES = 400  # of all kinds together
SEED = 20


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("fuzz"))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_damaged_files_are_read_or_refused(bench: Bench, kind: Kind) -> None:
    total = Tally()
    for number in range(shares(FILES)[kind.name]):
        total.add(bench.check(kind, SEED, number))
    assert not total.faults


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "seed", "number"),
    [
        ("JSON: results", 2, 132),  # a file name of 70,000 letters
        ("CSV: class list", 2, 214),  # a field longer than csv reads
        ("safetensors: detector", 2, 216),  # a region head of no known name
        ("config of Hugging Face", 2, 261),  # an activation that is a long list
        ("JSON Lines: pool", 3, 199),  # a count that is infinite
        ("safetensors: proposal network", 3, 132),  # strides that are long lists
        ("run: record of inputs", 2, 99),  # a name of 3,000 brackets
    ],
)
def test_what_a_campaign_found_stays_mended(bench: Bench, name: str, seed: int, number: int) -> None:
    (kind,) = (kind for kind in KINDS if kind.name == name)
    assert not bench.check(kind, seed, number).faults


def test_every_form_of_damage_is_used() -> None:
    assert {kind.form for kind in KINDS} == set(FORMS)


@pytest.mark.parametrize(
    ("error", "fault"),
    [
        (KeyError("x"), "KeyError"),
        (MemoryError(), "MemoryError"),
        (InputError("a\nb"), "a message of 3 characters"),
        (InputError("x" * 700), "a message of 700 characters"),
        (InputError("short"), ""),
    ],
)
def test_what_is_a_fault(tmp_path: Path, error: Exception, fault: str) -> None:
    damaged = []

    def read(folder: Path) -> None:
        if (folder / "a").read_bytes() != b"whole":
            damaged.append(folder)
            raise error

    kind = Kind("toy", "a", "bytes", read, lambda folder: (folder / "a").write_bytes(b"whole"))
    tally = Bench(tmp_path).check(kind, 0, 0)
    assert damaged
    assert (tally.refused, len(tally.faults)) == ((0, 1) if fault else (1, 0))
    assert all(f"toy 0: {fault}" in told for told in tally.faults)
    assert "| toy | 1 | 0 |" in table({"toy": tally})


def test_a_file_is_made_of_its_seed_and_number(tmp_path: Path) -> None:
    kind = next(kind for kind in KINDS if kind.name == "CSV: pairs")
    bench = Bench(tmp_path)
    first, again, other = (
        (bench.damaged(kind, 1, number) / kind.target).read_bytes() for number in (5, 5, 6)
    )
    assert first == again != other


def test_the_page_lists_every_kind_of_file_and_every_job() -> None:
    from kills import JOBS

    page = PAGE.read_text(encoding="utf-8")
    rows = {line.split("|")[1].strip() for line in page.splitlines() if "|" in line}
    assert {kind.name for kind in KINDS} | set(JOBS) <= rows


def test_a_table_takes_the_place_of_the_last_one(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- files -->\nold\n<!-- /files -->\nb\n")
    for text in ("new", "newer"):
        write_table("files", text, page)
    assert page.read_text() == "a\n<!-- files -->\n\nnewer\n\n<!-- /files -->\nb\n"
    with pytest.raises(ValueError, match="no place for kills"):
        write_table("kills", "x", page)
