"""CSV and TSV files: the delimiter is found, quotes count where the file uses them, ragged rows are refused.

Covered: the source `csv` of image-text pairs, the captions of `regionclip concepts`, and lists of classes.
"""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clip_base.data.sources import SOURCES
from clip_base.jobs.config import build_plugin
from clip_base.runtime.errors import InputError
from clip_base.storage.tables import open_table
from regionclip.data.captions import read_texts
from regionclip.data.categories import parse_names


def sourced(path: Path, **options: str) -> list[tuple[str, str]]:
    found = build_plugin(SOURCES, {"name": "csv", "file": str(path), **options}).pairs()
    return [(pair.image.name, text) for pair in found for text in pair.captions]


def both(path: Path) -> list[tuple[str, str]]:
    """Reads a table with both readers, which must agree on the captions."""
    pairs = sourced(path)
    assert list(read_texts(path)) == [text for _, text in pairs]
    return pairs


def write(path: Path, *rows: str) -> Path:
    path.write_text("\n".join(rows) + "\n")
    return path


def test_lone_quotes_in_a_tsv_swallow_no_rows(tmp_path: Path) -> None:
    rows = [f"{n}.jpg\ta cat {n}" for n in range(40)]
    rows[3], rows[5], rows[20] = '3.jpg\t"a cat', '5.jpg\ta cat"', '20.jpg\t"stop" sign'
    found = both(write(tmp_path / "a.tsv", "image\tcaption", *rows))
    assert len(found) == 40
    assert found[3:6] == [("3.jpg", '"a cat'), ("4.jpg", "a cat 4"), ("5.jpg", 'a cat"')]
    assert found[20] == ("20.jpg", '"stop" sign')


def test_lone_quotes_in_a_csv_are_text_or_refused(tmp_path: Path) -> None:
    head = "image,caption"
    ruler = write(tmp_path / "a.csv", head, 'a.jpg,a 12" ruler', 'b.jpg,"big" dog')
    assert both(ruler) == [("a.jpg", 'a 12" ruler'), ("b.jpg", '"big" dog')]
    mixed = write(tmp_path / "b.csv", head, 'a.jpg,"a cat, asleep"', 'b.jpg,"big" dog')
    with pytest.raises(InputError, match="in line 3 a quoted text does not end where its field does"):
        both(mixed)
    two = write(tmp_path / "c.csv", head, 'a.jpg,"a cat', "b.jpg,a dog", 'c.jpg,a cow"')
    with pytest.raises(InputError, match="a quote that opens in line 2 closes in line 4"):
        both(two)


@pytest.mark.parametrize("mark", [",", "\t", ";", "|"])
@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_the_delimiter_is_found_whatever_the_file_is_called(tmp_path: Path, mark: str, suffix: str) -> None:
    file = tmp_path / f"a{suffix}"
    with file.open("w", newline="") as out:
        csv.writer(out, delimiter=mark).writerows(
            [["image", "n", "caption"], ["a.jpg", 1, f"a cat{mark} asleep"], ["b.jpg", 2, "two\nlines, both"]]
        )
    assert both(file) == [("a.jpg", f"a cat{mark} asleep".replace("\t", "")), ("b.jpg", "two lines, both")]


@pytest.mark.parametrize("mark", [",", "\t", ";", "|"])
@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_the_delimiter_of_a_class_list_is_found(tmp_path: Path, mark: str, suffix: str) -> None:
    rows = [mark.join(row) for row in (("id", "name", "frequency"), ("2", "dog", "r"), ("1", "red cup", "c"))]
    assert parse_names(str(write(tmp_path / f"a{suffix}", *rows))) == ["red cup", "dog"]


def test_open_clips_tab_separated_csv_is_read(tmp_path: Path) -> None:
    file = write(tmp_path / "train.csv", "filepath\ttitle", "a.jpg\ta cat, asleep", "b.jpg\ta dog")
    options = {"image_column": "filepath", "caption_column": "title"}
    assert sourced(file, **options) == [("a.jpg", "a cat, asleep"), ("b.jpg", "a dog")]
    assert list(read_texts(file)) == ["a cat, asleep", "a dog"]


def test_a_stated_delimiter_is_used(tmp_path: Path) -> None:
    file = write(tmp_path / "a.csv", "image~caption", "a.jpg~a cat, asleep")
    with pytest.raises(InputError, match="fields are taken to be separated by commas"):
        sourced(file)
    assert sourced(file, delimiter="~") == [("a.jpg", "a cat, asleep")]
    tabs = write(tmp_path / "b.csv", "image\tcaption", "a.jpg\tx")
    assert sourced(tabs, delimiter="tab") == sourced(tabs, delimiter="\\t") == [("a.jpg", "x")]
    for wrong in ("::", '"'):
        with pytest.raises(InputError, match="delimiter must be one character or tab"):
            sourced(tabs, delimiter=wrong)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("b.jpg,a cat, asleep", "line 3 has 3 fields, the first line has 2"),
        ("b.jpg", "line 3 has 1 fields, the first line has 2"),
        ("b.jpg,a cat,", "line 3 has 3 fields"),
    ],
)
def test_a_row_of_another_length_is_refused_by_its_line(tmp_path: Path, row: str, message: str) -> None:
    file = write(tmp_path / "a.csv", "image,caption", "a.jpg,x", row, "c.jpg,y")
    for read in (sourced, lambda path: list(read_texts(path))):
        with pytest.raises(InputError, match=rf"a\.csv: {message}"):
            read(file)
    tabs = write(tmp_path / "a.tsv", "image\tcaption", "a.jpg\tx", row.replace(",", "\t"))
    with pytest.raises(InputError, match=message):
        sourced(tabs)


def test_a_table_without_names_is_read_by_number(tmp_path: Path) -> None:
    for suffix in (".tsv", ".csv"):
        file = write(tmp_path / f"a{suffix}", "a cat, asleep\thttp://x", "a dog, awake, here\thttp://y")
        assert list(read_texts(file, "0")) == ["a cat, asleep", "a dog, awake, here"]
    with pytest.raises(InputError, match="no column '2', its first line is"):
        list(read_texts(file, "2"))


def test_names_are_taken_without_the_space_after_a_comma_and_never_twice(tmp_path: Path) -> None:
    file = write(tmp_path / "a.csv", "image, caption", 'a.jpg, "a cat, asleep"')
    assert both(file) == [("a.jpg", "a cat, asleep")]
    with pytest.raises(InputError, match="has 'caption' twice in its first line"):
        both(write(tmp_path / "b.csv", "image,caption,caption", "a,b,c"))
    with pytest.raises(InputError, match="is empty"):
        both(write(tmp_path / "c.csv", "", ""))


FIELDS = st.text(st.characters(exclude_categories=["Cs", "Cc"]) | st.sampled_from('",\n\t;|'), max_size=8)


@settings(max_examples=200, deadline=None)
@given(rows=st.lists(st.tuples(FIELDS, FIELDS), min_size=1, max_size=5), mark=st.sampled_from(",;|\t"))
def test_what_python_writes_is_read_back_or_refused(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str]], mark: str
) -> None:
    file = tmp_path_factory.mktemp("t") / "a.csv"
    with file.open("w", newline="", encoding="utf-8") as out:
        csv.writer(out, delimiter=mark).writerows([("image", "caption"), *rows])
    refusal = ""
    try:
        table = open_table(file, "table", [("image",), ("caption",)])
    except InputError as error:
        refusal = str(error)
    if refusal:
        assert "a quote that opens" in refusal  # two readings, and it says so
        return
    found = [tuple(row) for _, row in table.rows()][1:]
    if table.dialect.get("strict") or not any('"' in field for row in found for field in row):
        strip = (lambda field: field.lstrip(" ")) if mark != "\t" else (lambda field: field)
        assert [tuple(map(strip, row)) for row in rows] == [tuple(map(strip, row)) for row in found]
