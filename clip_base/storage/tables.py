"""User-written tables, YAML files and class lists, each opened by one function."""

from __future__ import annotations

import csv
import itertools
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from omegaconf import OmegaConf

from clip_base.runtime.errors import InputError, quote
from clip_base.storage.files import existing_file, open_text, read_json, read_json_lines, read_text

EXACT = 1 << 53  # whole numbers up to which a float has room for each
DELIMITER_HELP = "what separates fields: one character, or tab; empty: found in the file"
_DELIMITERS = ("\t", ",", ";", "|")
_HEAD = 200  # lines by which the delimiter is found


def read_yaml(path: str | Path, what: str = "YAML file") -> Any:
    """Returns what a YAML file holds as OmegaConf's containers; a key that stands twice is an error.

    Raises:
        InputError: the file is missing, not UTF-8, or not valid YAML.
    """
    text = read_text(path, what)
    try:
        return OmegaConf.create(text)
    # OmegaConf passes on the errors of the parser, of its grammar, and of conversions to numbers and dates.
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{what} {path} is not valid YAML: {reason:.200}") from None


@dataclass(frozen=True)
class Table:
    """A table in a text file, of which all rows were found to have as many fields as the first.

    Attributes:
        path: the file.
        what: what it is to the user, for messages.
        columns: the fields of its first row, which are names in a table that has some.
        dialect: how the rows are written: the keywords of `csv.reader`.
        encoding: see `clip_base.storage.files.read_text`.
    """

    path: Path
    what: str
    columns: tuple[str, ...]
    dialect: dict[str, Any]
    encoding: str | None

    def rows(self) -> Iterator[tuple[int, list[str]]]:
        """Yields the line number and the fields of each row, the first one too; empty lines are none."""
        with open_text(self.path, self.what, self.encoding) as file:
            yield from _rows(file, self.dialect)

    def records(self) -> Iterator[dict[str, str]]:
        """Yields each row but the first by the names in the first."""
        for _, row in itertools.islice(self.rows(), 1, None):
            yield dict(zip(self.columns, row, strict=True))

    def index(self, column: str) -> int:
        """Returns the place of a column that the first row names, -1 when it does not.

        Raises:
            InputError: two columns have that name.
        """
        if self.columns.count(column) > 1:
            raise InputError(f"{self.what} {self.path} has {column!r} twice in its first line; rename one")
        return self.columns.index(column) if column in self.columns else -1


def open_table(
    path: str | Path,
    what: str = "table",
    wanted: Sequence[Collection[str]] = (),
    delimiter: str = "",
    encoding: str | None = None,
) -> Table:
    """Finds out how a CSV or TSV file is written, and checks all of it.

    Quotes mean something only where the whole file uses them as RFC 4180 says: a field that begins with one
    ends with one, and within it they are doubled. Tab-separated files are often written without any quoting,
    and a lone quote in one must not swallow the rows that follow. Reads the file twice.

    Args:
        path: the file.
        what: what it is to the user, for messages.
        wanted: for each column that the caller needs, the names it may have. A delimiter by which the first
            line names all of them is taken.
        delimiter: one character, or "tab"; "" finds it: tab, comma, semicolon or bar.
        encoding: see `clip_base.storage.files.read_text`.

    Raises:
        InputError: the file is missing, empty or undecodable; a row has more or fewer fields than the first
            line; quotes that may be meant in two ways.
    """
    path = Path(path)
    name = f"{what} {path}"
    with open_text(path, what, encoding) as file:
        head = list(itertools.islice((line for line in file if line.strip()), _HEAD))
    if not head:
        raise InputError(f"{name} is empty; write it again or give another path")
    mark = _delimiter(delimiter) if delimiter else _sniffed(head, wanted, path.suffix.lower())
    plain = {"delimiter": mark, "skipinitialspace": mark != "\t", "quoting": csv.QUOTE_NONE}
    quoted = {**plain, "quoting": csv.QUOTE_MINIMAL, "strict": True}
    with open_text(path, what, encoding) as file:
        literal = _read(file, plain)
    with open_text(path, what, encoding) as file:
        by_rule = _read(file, quoted) if literal.opens else literal
    dialect = _chosen(name, mark, literal, by_rule, plain, quoted)
    with open_text(path, what, encoding) as file:
        columns = tuple(field.strip() for field in next(_rows(file, dialect))[1])
    return Table(path, what, columns, dialect, encoding)


@dataclass
class _Reading:
    """What came of reading a table in one of both ways.

    Attributes:
        fields: of the first row.
        fault: what is wrong with it, the line named; "" when nothing is.
        broken: whether the fault is one of quoting.
        opens: whether a field begins with a quote.
        spans: the first and last line of the first row that spans several; None when none does.
    """

    fields: int = 0
    fault: str = ""
    broken: bool = False
    opens: bool = False
    spans: tuple[int, int] | None = None


def _read(file: TextIO, dialect: dict[str, Any]) -> _Reading:
    found, before = _Reading(), 0
    reader = csv.reader(file, **dialect)
    try:
        for row in reader:
            first, before = before + 1, reader.line_num
            if _is_blank(row):
                continue
            found.fields = found.fields or len(row)
            found.opens = found.opens or any(field.startswith('"') for field in row)
            if before > first and found.spans is None:
                found.spans = (first, before)
            if len(row) != found.fields:
                found.fault = (
                    f"line {first} has {len(row)} fields, the first line has {found.fields}: {quote(row)}"
                )
                break
    except csv.Error as error:
        found.broken = True
        found.fault = f"in line {before + 1} a quoted text does not end where its field does"
        if "field limit" in str(error):
            found.fault = f"in line {before + 1} a field has more than {csv.field_size_limit():,} characters"
    return found


def _chosen(
    name: str,
    mark: str,
    literal: _Reading,
    by_rule: _Reading,
    plain: dict[str, Any],
    quoted: dict[str, Any],
) -> dict[str, Any]:
    """Returns the dialect by which the whole file makes sense; an InputError when none or both do."""
    if not by_rule.fault:
        if by_rule.spans is None or literal.fault:
            return quoted
        # A text of several lines that each hold just as many tabs as the table has is no text.
        if mark == "\t" and literal.fields > 1:
            return plain
        first, last = by_rule.spans
        raise InputError(
            f"{name}: a quote that opens in line {first} closes in line {last}, which may be one text of "
            "several lines or two lone quotes; remove the line breaks, or double a quote within a text"
        )
    if not literal.fault:
        return plain
    called = {"\t": "tabs", ",": "commas", ";": "semicolons", "|": "bars"}.get(mark, repr(mark))
    raise InputError(
        f"{name}: {by_rule.fault}; fields are taken to be separated by {called}: put quotes around a text "
        "that contains some, and double a quote within it"
    )


def _rows(file: TextIO, dialect: dict[str, Any]) -> Iterator[tuple[int, list[str]]]:
    reader, before = csv.reader(file, **dialect), 0
    for row in reader:
        first, before = before + 1, reader.line_num
        if not _is_blank(row):
            yield first, row


def _is_blank(row: list[str]) -> bool:
    return not row or (len(row) == 1 and not row[0].strip())


def _delimiter(text: str) -> str:
    mark = {"tab": "\t", "\\t": "\t"}.get(text, text)
    if len(mark) != 1 or mark in '"\r\n':
        raise InputError(f"delimiter must be one character or tab, got {quote(text)}")
    return mark


def _sniffed(head: list[str], wanted: Sequence[Collection[str]], suffix: str) -> str:
    """Returns the delimiter of a table: by the names in its first line, else by equal numbers of fields."""
    usual = "\t" if suffix in (".tsv", ".tab") else ","
    marks = sorted(_DELIMITERS, key=lambda mark: mark != usual)
    for mark in marks if wanted else ():
        names = _fields(head[0], mark)
        if all(any(name in names for name in one) for one in wanted):
            return mark
    for mark in marks:
        counts = {line.count(mark) for line in head}
        if len(counts) == 1 and counts != {0}:
            return mark
    return max(marks, key=lambda mark: (mark in head[0], mark == usual, head[0].count(mark)))


def _fields(line: str, mark: str) -> list[str]:
    """Returns a line's fields; none of one that is too long, which reading the table tells."""
    try:
        return [
            field.strip() for field in next(csv.reader([line], delimiter=mark, skipinitialspace=True), [])
        ]
    except csv.Error:
        return []


class TableWriter:
    """Writes a table as CSV, in which no text is a formula.

    Spreadsheets compute cells that begin with `=`, `+`, `-` or `@`; names come from data, so such a text gets
    an apostrophe before it. Numbers stay as they are.
    """

    def __init__(self, file: TextIO) -> None:
        self._writer = csv.writer(file, lineterminator="\n")

    def writerow(self, cells: Iterable[object]) -> None:
        """Writes one row."""
        self._writer.writerow([_no_formula(cell) for cell in cells])

    def writerows(self, rows: Iterable[Iterable[object]]) -> None:
        """Writes several rows."""
        for row in rows:
            self.writerow(row)


def _no_formula(cell: object) -> object:
    if not isinstance(cell, str) or not cell.startswith(("=", "+", "-", "@", "\t", "\r")):
        return cell
    try:
        float(cell)
    except ValueError:
        return f"'{cell}"
    return cell


CLASS_FILES = (".txt", ".names", ".json", ".jsonl", ".ndjson", ".yaml", ".yml", ".csv", ".tsv", ".tab")
# What a column or key of names may be called, the most confident first.
_NAMES = (
    "name",
    "class_name",
    "classname",
    "class",
    "category",
    "category_name",
    "label",
    "display_name",
    "concept",
)


def read_class_list(path: str | Path, what: str = "class list") -> list[tuple[str, ...]]:
    """Reads (name, its synonyms…) for each class of a file, in the order that labels count them.

    Args:
        path: text (.txt, .names, no ending): one class per line, synonyms after it behind commas, `#` begins
            a comment. JSON, JSON Lines: names, or categories with `name` (and `synonyms`), as a list or under
            `categories` or `names`. YAML: `names` as a list or by number, as Ultralytics' data.yaml. CSV,
            TSV: a column `name` or `class`. Categories with an `id` are ordered by it; their underscores
            become spaces.
        what: what the file is to the user, for messages.

    Raises:
        InputError: a missing or malformed file, one of another kind, or one without names.
    """
    path = Path(path)
    kind, where = path.suffix.lower(), f"{what} {path}"
    if kind == ".json":
        classes = _classes(read_json(path, what), where)
    elif kind in (".yaml", ".yml"):
        classes = _classes(OmegaConf.to_container(read_yaml(path, what)), where)
    elif kind in (".jsonl", ".ndjson"):
        classes = _classes([entry for _, entry in read_json_lines(path, what)], where)
    elif kind in (".csv", ".tsv", ".tab"):
        classes = _classes(_named_rows(path, what), where)
    elif kind in ("", ".txt", ".names", ".list", ".lst", ".labels"):
        classes = _plain_classes(read_text(path, what), where)
    else:
        existing_file(path, what)
        raise InputError(
            f"{where} is of an unknown kind; write one name per line in a .txt file, or give JSON, YAML or "
            "CSV"
        )
    if not classes:
        raise InputError(f"{where} holds no names; write one per line")
    return classes


def _classes(content: Any, where: str) -> list[tuple[str, ...]]:
    """Returns the classes of a file that was parsed: a list, an object that holds one, or names by number."""
    size = None
    if isinstance(content, dict):
        key = next((key for key in ("names", "categories", "classes") if key in content), None)
        size, content = content.get("nc"), content if key is None else content[key]
    if isinstance(content, dict):
        numbers = [as_number(key) for key in content]
        if None in numbers or len(set(numbers)) < len(numbers):
            raise InputError(
                f"{where} must be a list of names, or hold one under 'names' or 'categories', "
                f"found {quote(content)}"
            )
        content = [content[key] for _, key in sorted(zip(numbers, content, strict=True))]
    if not isinstance(content, list):
        raise InputError(f"{where} must be a list of names or hold one under 'names' or 'categories'")
    # COCO and LVIS number their categories; the number is the order that embeddings come in.
    if content and all(
        isinstance(entry, dict) and as_number(entry.get("id")) is not None for entry in content
    ):
        content = sorted(content, key=lambda entry: as_number(entry["id"]) or 0)
    classes = [_class_of(entry, f"{where}, entry {place}") for place, entry in enumerate(content)]
    if size is not None and size != len(classes):
        raise InputError(f"{where} says nc: {quote(size)} but has {len(classes)} names; correct one of them")
    return classes


def as_number(value: Any) -> int | None:
    """Returns the whole number that 7, 7.0 or "7" stands for, None for anything else."""
    if isinstance(value, str) and value.strip().isdecimal() and len(value) < 20:
        return int(value)
    if isinstance(value, float) and value.is_integer() and abs(value) < EXACT:
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _class_of(entry: Any, where: str) -> tuple[str, ...]:
    words = [entry]
    if isinstance(entry, dict):
        key = next((name for name in _NAMES if name in entry), None)
        synonyms = entry.get("synonyms") or []
        words = [entry.get(key), *(synonyms if isinstance(synonyms, list) else [synonyms])]
    if not all(isinstance(word, str) and word.strip() for word in words):
        raise InputError(
            f"{where}: {quote(entry)} is neither a name nor a category with a name; write names in quotes"
        )
    if isinstance(entry, dict):
        words = [word.replace("_", " ") for word in words]
    return tuple(dict.fromkeys(" ".join(word.split()) for word in words))


def _named_rows(path: Path, what: str) -> list[dict[str, str]]:
    table = open_table(path, what, [_NAMES])
    columns = [column.lower().replace(" ", "_") for column in table.columns]
    column = next((name for name in _NAMES if name in columns), None)
    if column is None:
        raise InputError(
            f"{what} {path} has no column 'name' in its first line, which is {quote(list(table.columns))}; "
            "name the column, or write one name per line in a .txt file"
        )
    picked = {"name": columns.index(column)} | ({"id": columns.index("id")} if "id" in columns else {})
    return [
        {key: row[place] for key, place in picked.items()}
        for _, row in itertools.islice(table.rows(), 1, None)
    ]


def _plain_classes(text: str, where: str) -> list[tuple[str, ...]]:
    lines = [line for line in (line.partition("#")[0].strip() for line in text.splitlines()) if line]
    numbered = all(re.match(r"[0-9]+\s*:", line) for line in lines)
    if lines and (lines[0][0] in "[{<" or lines[0] == "names:" or numbered):
        raise InputError(
            f"{where} looks like JSON, YAML or XML ({quote(lines[0], 40)}), not like one name per line; "
            "give it the extension of its format (.json, .yaml)"
        )
    classes = (tuple(part.strip() for part in line.split(",") if part.strip()) for line in lines)
    return [entry for entry in classes if entry]
