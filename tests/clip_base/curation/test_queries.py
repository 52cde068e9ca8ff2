"""What a text contains, and where queries come from."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest

from clip_base.curation.corpus import count
from clip_base.curation.queries import Query, QueryOptions, collect, read_queries, write_queries
from clip_base.curation.texts import Matcher
from clip_base.runtime.errors import InputError

pytest.importorskip("ahocorasick")


@pytest.mark.parametrize(
    ("query", "text", "contained"),
    [
        ("car", "The CAR.", True),
        ("car", "a car-park", True),
        ("car", "a cart and a scar", False),
        ("new york", "New  York at night", True),
        ("new york", "new, York", False),
        ("york new", "new york new", True),
        ("straße", "STRASSE", True),
        ("café", "a cafe\N{COMBINING ACUTE ACCENT} in Paris", True),
        ("cafe", "a café", False),
        ("don't", "they don’t", True),
        ("john", "John's hat", True),
        ("c++", "C++ code", True),
        ("c++", "C code", False),
        ("ac/dc", "AC/DC live", True),
        ("क", "की", False),  # a vowel sign is part of the word
        ("東京", "東京 の夜", True),
    ],
)
def test_a_query_is_found_between_the_boundaries_of_words(query: str, text: str, contained: bool) -> None:
    assert (0 in Matcher([query]).find(text)) == contained


def test_queries_within_each_other_are_all_found() -> None:
    matcher = Matcher(["red", "red car", "car", "red car park", "ed"])
    assert sorted(matcher.find("a red car park")) == [0, 1, 2, 3]
    assert list(matcher.find("red red")) == [0, 0]
    assert list(matcher.find("")) == []


def test_words_and_bigrams_of_a_corpus_are_counted_and_weighed() -> None:
    lines = ["Red car, red car.", "The red car's door", "a red, car", "don't don't", "4 4 4"]
    found = count(lambda: lines, 2, -math.inf, "corpus")
    assert found.words == {"red": 4, "car": 4, "don't": 2}
    assert found.total == 13  # 4, which is no word, does not count
    # "red, car" is none, nor is "car's door" one of car and door.
    expected = math.log2((3 / 13) / (4 / 13) ** 2)
    assert found.bigrams == {"red car": (3, pytest.approx(expected))}
    assert count(lambda: lines, 2, expected + 0.01, "corpus").bigrams == {}
    assert count(lambda: lines, 2, math.inf, "corpus").bigrams == {}


def test_bigrams_are_the_same_when_they_are_counted_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ["a b a b c", "b c a b", "c a"] * 5
    at_once = count(lambda: lines, 1, -math.inf, "corpus")
    monkeypatch.setattr("clip_base.curation.corpus._AT_ONCE", 2)
    assert count(lambda: lines, 1, -math.inf, "corpus") == at_once


def test_queries_of_all_kinds_are_collected_once(tmp_path: Path) -> None:
    files = {
        "corpus.txt": "New York is new. New York is old.\n",
        "titles.txt": "Mercury_(planet)\nnew york\n(What's the Story) Morning Glory?\n\n",
        "index.noun": "  1 This is under a license\nice_cream n 2 3 @ ~ 1 0 07614500\nold n 1 0\n",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    options = QueryOptions(
        corpus=[str(tmp_path / "corpus.txt")],
        min_count=2,
        min_pmi=-9,
        titles=str(tmp_path / "titles.txt"),
        lemmas=str(tmp_path / "index.noun"),
    )
    found = collect(options, list)
    assert [(query.query, query.kind, query.count) for query in found] == [
        ("new", "word", 3),
        ("is", "word", 2),
        ("york", "word", 2),
        ("new york", "bigram", 2),
        ("york is", "bigram", 2),
        ("Mercury", "title", None),
        ("(What's the Story) Morning Glory?", "title", None),
        ("ice cream", "lemma", None),
        ("old", "lemma", None),
    ]
    write_queries(tmp_path / "queries.jsonl", found)
    assert list(read_queries(str(tmp_path / "queries.jsonl"))) == found
    assert collect(QueryOptions(queries=str(tmp_path / "queries.jsonl")), list) == found


def test_the_pairs_own_texts_are_a_corpus() -> None:
    options = QueryOptions(corpus=["captions"], min_count=2, bigrams=False)
    assert collect(options, lambda: ["a dog", "the dog"]) == [Query("dog", "word", 2)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"corpus": ["image.png"]}, "corpus image.png cannot be read as text: .* PNG image"),
        ({"corpus": ["numbers.txt"]}, "corpus numbers.txt has no words"),
        ({"corpus": ["rare.txt"]}, "no word occurs 100 times; the most frequent one, 'dog', occurs 2 times"),
        ({"corpus": ["empty"]}, "corpus empty has no .txt files"),
        ({"corpus": ["nowhere.txt"]}, "corpus nowhere.txt does not exist"),
        ({"titles": "blank.txt"}, "the files have no queries"),
        ({"queries": "other.jsonl"}, "queries other.jsonl, line 2: a query is an object with 'query'"),
        ({"titles": "latin.txt"}, "titles latin.txt cannot be read: .* it looks like cp1252"),
    ],
)
def test_what_gives_no_queries_is_one_clear_line(
    options: dict[str, object], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("image.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\xff\xfe")
    Path("numbers.txt").write_text("1 2 3\n")
    Path("rare.txt").write_text("dog dog cat\n")
    Path("blank.txt").write_text("\n \n")
    Path("empty").mkdir()
    Path("other.jsonl").write_text(json.dumps({"query": "dog"}) + "\n" + json.dumps({"caption": "x"}) + "\n")
    Path("latin.txt").write_bytes("une forêt\nun café\n".encode("cp1252"))
    with pytest.raises(InputError, match=message) as raised:
        collect(QueryOptions(**options), list)  # type: ignore[arg-type]
    assert "\n" not in str(raised.value)


def test_without_the_package_it_is_said_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ahocorasick", None)
    with pytest.raises(InputError, match=r"pip install 'regionclip\[curate\]'"):
        Matcher(["dog"])
