"""Samples are what a draw without replacement gives, whoever reads the pairs and in what order."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from clip_base.curation.sampling import (
    count_kept,
    count_pairs,
    kept_pairs,
    limits,
    load_matches,
    match_records,
    priority,
    save_matches,
)
from clip_base.curation.texts import Matcher
from clip_base.curation.units import Record
from clip_base.runtime.errors import InputError

pytest.importorskip("ahocorasick")

WORDS = ["the", "cat", "dog", "bird", "emu", "yak"]
MATCHER_QUERIES = [*WORDS, "the cat", "unicorn"]


def pairs(count: int, seed: int = 0) -> list[Record]:
    """Returns pairs with a long tail: each word is half as frequent as the one before."""
    chance = random.Random(seed)
    made = []
    for number in range(count):
        words = [word for place, word in enumerate(WORDS) if chance.random() < 0.8 / 2**place]
        made.append(
            Record(f"pair-{number}", (" ".join(words), "the the") if number % 7 == 0 else (" ".join(words),))
        )
    return made


def sample(
    records: list[Record], most: int, folder: Path, parts: int, seed: int = 0
) -> tuple[set[str], list[int]]:
    """Returns the keys that are kept, and for each query how many of the kept pairs contain it."""
    folder.mkdir()
    matcher, files, units = Matcher(MATCHER_QUERIES), [], []
    for number in range(parts):
        own = records[number::parts]
        files.append(folder / f"{number}.matches")
        save_matches(match_records(iter(own), matcher, seed), files[-1])
        units.append(own)
    highest = limits(files, count_pairs(files, len(MATCHER_QUERIES)), most)
    found, after = set[str](), np.zeros(len(MATCHER_QUERIES), np.int64)
    for path, own in zip(files, units, strict=True):
        matches = load_matches(path)
        kept = kept_pairs(matches, highest)
        found |= {record.key for record, keep in zip(own, kept, strict=True) if keep}
        after[matches.queries] += count_kept(matches, kept)
    return found, after.tolist()


def contains(record: Record, query: str) -> bool:
    return any(f" {query} " in f" {text} " for text in record.captions)


def by_hand(records: list[Record], most: int, seed: int = 0) -> tuple[set[str], list[int]]:
    kept = set[str]()
    for query in MATCHER_QUERIES:
        own = sorted(
            (priority(seed, record.key), record.key) for record in records if contains(record, query)
        )
        kept |= {key for _, key in own[:most]}
    chosen = [record for record in records if record.key in kept]
    return kept, [sum(contains(record, query) for record in chosen) for query in MATCHER_QUERIES]


@pytest.mark.parametrize("most", [1, 7, 40, 10_000])
def test_the_pairs_of_lowest_priority_of_each_query_are_kept(most: int, tmp_path: Path) -> None:
    records = pairs(500)
    expected = by_hand(records, most)
    assert sample(records, most, tmp_path / "one", 1) == expected
    chance = random.Random(1)
    shuffled = chance.sample(records, len(records))
    assert sample(shuffled, most, tmp_path / "seven", 7) == expected


def test_the_limits_are_the_same_when_memory_holds_few_priorities(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = pairs(400)
    expected = by_hand(records, 10)
    monkeypatch.setattr("clip_base.curation.sampling._ENTRIES", 20)
    assert sample(records, 10, tmp_path / "few", 9) == expected


def test_each_pair_of_a_query_is_sampled_as_often_as_any_other() -> None:
    draws, most = 3000, 5
    records = [Record(f"tar/{number}", ("a dog",)) for number in range(20)]
    chosen = np.zeros(len(records))
    for seed in range(draws):
        order = np.argsort([priority(seed, record.key) for record in records])
        chosen[order[:most]] += 1
    share = most / len(records)
    deviation = (draws * share * (1 - share)) ** 0.5
    assert np.abs(chosen - draws * share).max() < 4.5 * deviation


def test_repetitions_of_a_pair_are_never_more_than_a_sample(tmp_path: Path) -> None:
    records = [Record("twin", ("a dog",)) for _ in range(6)] + [Record(str(n), ("a dog",)) for n in range(6)]
    for most in range(1, 12):
        matches = match_records(iter(records), Matcher(["dog"]), 3)
        path = tmp_path / f"{most}.matches"
        save_matches(matches, path)
        kept = kept_pairs(matches, limits([path], count_pairs([path], 1), most))
        assert kept.sum() <= most
        assert kept[:6].sum() in (0, 6)


def test_what_is_dropped_is_counted(tmp_path: Path) -> None:
    records = [Record("0", ("a dog", "dog dog")), Record("1", ("nothing",)), Record("2", (), "no caption")]
    matches = match_records(iter(records), Matcher(["dog", "cat"]), 0)
    assert (matches.captions, matches.unmatched) == (3, 1)
    assert matches.skipped == [{"pair": "2", "reason": "no caption"}]
    assert matches.queries.tolist() == [0]
    assert matches.pairs.tolist() == [0]  # once, though it is there three times
    empty = match_records(iter([]), Matcher(["dog"]), 0)
    save_matches(empty, tmp_path / "empty.matches")
    assert len(load_matches(tmp_path / "empty.matches").priorities) == 0
    (tmp_path / "bad.matches").write_bytes(b"\x08\0\0\0\0\0\0\0{}      ")
    with pytest.raises(InputError, match=r"bad\.matches is damaged"):
        load_matches(tmp_path / "bad.matches")
