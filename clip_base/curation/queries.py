"""Queries: what pairs are looked for by, where each comes from, and how often it was counted there."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from clip_base.curation.corpus import Counted, count
from clip_base.curation.texts import token_text
from clip_base.images.folders import list_files
from clip_base.jobs.config import option
from clip_base.runtime.errors import InputError, quote
from clip_base.storage.files import ENCODING_HELP, existing, open_text, read_json_lines, write_text

KINDS = ("word", "bigram", "title", "lemma")
CAPTIONS = "captions"  # the corpus that is the pairs' own texts
FILE = "queries.jsonl"


@dataclass(frozen=True)
class Query:
    """What pairs are looked for by.

    Attributes:
        query: a text.
        kind: one of KINDS.
        count: how often it occurs in the corpus; None: it comes from a file.
        pmi: of a bigram, its pointwise mutual information in bits.
    """

    query: str
    kind: str
    count: int | None = None
    pmi: float | None = None


@dataclass(kw_only=True)
class QueryOptions:
    """Where queries come from."""

    corpus: list[str] = option(
        [],
        "text files, or folders of .txt: their frequent words and bigrams are queries; captions: the pairs' "
        "own texts",
    )
    min_count: int = option(100, "how often a word or bigram occurs in the corpus at least")
    bigrams: bool = option(True, "bigrams of the corpus are queries too")
    min_pmi: float = option(5.0, "least pointwise mutual information of a bigram, in bits")
    titles: str = option("", "text file of titles, one per line (Wikipedia's list of article titles)")
    lemmas: str = option("", "text file of lemmas, one per line, or an index file of WordNet (index.noun)")
    queries: str = option("", "queries.jsonl of an earlier run, or a text file of queries, one per line")
    encoding: str = option("", ENCODING_HELP)

    def require_queries(self) -> None:
        """Raises an InputError when nothing gives queries, or an option is out of range."""
        if not (self.corpus or self.titles or self.lemmas or self.queries):
            raise InputError(
                "nothing gives queries: give corpus=FILE (or corpus=captions), titles=, lemmas= or queries="
            )
        if self.min_count < 1:
            raise InputError(f"min_count must be at least 1, found {self.min_count}")
        if CAPTIONS in self.corpus and len(self.corpus) > 1:
            raise InputError(f"corpus={CAPTIONS} stands for the pairs' own texts: give no file beside it")


def collect(options: QueryOptions, captions: Callable[[], Iterable[str]]) -> list[Query]:
    """Returns all queries; of those with equal tokens the first: given ones, words, bigrams, titles, lemmas.

    Args:
        options: where they come from.
        captions: gives the pairs' texts.

    Raises:
        InputError: a file is missing or no text, or has nothing that can be a query.
    """
    found: dict[str, Query] = {}
    for query in _all(options, captions):
        key = token_text(query.query)
        if key.strip() and key not in found:
            found[key] = query
    if not found:
        raise InputError("the files have no queries; write one per line")
    return list(found.values())


def _all(options: QueryOptions, captions: Callable[[], Iterable[str]]) -> Iterator[Query]:
    if options.queries:
        yield from read_queries(options.queries, options.encoding)
    if options.corpus:
        yield from _of_corpus(options, captions)
    if options.titles:
        yield from (Query(text, "title") for text in _titles(options.titles, options.encoding))
    if options.lemmas:
        yield from (Query(text, "lemma") for text in _lemmas(options.lemmas, options.encoding))


def _of_corpus(options: QueryOptions, captions: Callable[[], Iterable[str]]) -> Iterator[Query]:
    if options.corpus == [CAPTIONS]:
        lines, what = captions, "the pairs' texts (corpus=captions)"
    else:
        files = [file for path in options.corpus for file in corpus_files(path)]
        shown = str(files[0]) + (" …" if len(files) > 1 else "")

        def lines() -> Iterator[str]:
            for file in files:
                with open_text(file, "corpus", options.encoding) as opened:
                    yield from opened

        what = f"corpus {shown}"
    min_pmi = options.min_pmi if options.bigrams else float("inf")
    counted: Counted = count(lines, options.min_count, min_pmi, what)
    words = sorted(counted.words.items(), key=lambda item: (-item[1], item[0]))
    yield from (Query(word, "word", number) for word, number in words)
    bigrams = sorted(counted.bigrams.items(), key=lambda item: (-item[1][0], item[0]))
    yield from (Query(text, "bigram", number, round(pmi, 3)) for text, (number, pmi) in bigrams)


def corpus_files(path: str) -> list[Path]:
    """Returns a corpus's files: a file, or the .txt files of a folder.

    Raises:
        InputError: there is none.
    """
    place = existing(path, "corpus")
    if not place.is_dir():
        return [place]
    files = list_files(place, (".txt",), what="corpus").files
    if not files:
        raise InputError(f"corpus {path} has no .txt files; give a folder of them, or files")
    return files


def _lines(path: str, what: str, encoding: str) -> Iterator[str]:
    with open_text(path, what, encoding) as file:
        for line in file:
            if line.strip():
                yield line.rstrip("\r\n")


def _titles(path: str, encoding: str) -> Iterator[str]:
    """Yields titles; without what tells those of one name apart: Mercury_(planet) is Mercury."""
    for line in _lines(path, "titles", encoding):
        yield re.sub(r"(?<=.)\s*\([^()]*\)$", "", " ".join(line.replace("_", " ").split()))


def _lemmas(path: str, encoding: str) -> Iterator[str]:
    """Yields lemmas; of WordNet's own files the first field, without the indented lines of the license."""
    is_index = Path(path).name.startswith("index.")
    for line in _lines(path, "lemmas", encoding):
        if not (is_index and line[:1].isspace()):
            yield " ".join((line.split()[0] if is_index else line).replace("_", " ").split())


def read_queries(path: str, encoding: str = "") -> Iterator[Query]:
    """Yields what `write_queries` wrote, or the lines of a text as titles.

    Raises:
        InputError: a line of a .jsonl file is no query.
    """
    if Path(path).suffix.lower() not in (".jsonl", ".ndjson"):
        yield from (Query(" ".join(line.split()), "title") for line in _lines(path, "queries", encoding))
        return
    for number, entry in read_json_lines(path, "queries", encoding):
        entry = entry if isinstance(entry, dict) else {"query": entry}
        text, kind = entry.get("query"), entry.get("kind", "title")
        counted, pmi = entry.get("count"), entry.get("pmi")
        if not isinstance(text, str) or kind not in KINDS or not isinstance(counted, int | None):
            raise InputError(
                f"queries {path}, line {number}: a query is an object with 'query', a text, and 'kind', one "
                f"of {', '.join(KINDS)}; found {quote(entry)}"
            )
        yield Query(text, kind, counted, pmi if isinstance(pmi, int | float) else None)


def write_queries(path: Path, queries: Iterable[Query]) -> None:
    """Writes queries as JSON Lines."""
    lines = ({k: v for k, v in asdict(query).items() if v is not None} for query in queries)
    write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
