"""A sample of the pairs of each query that depends on neither their order nor who reads them.

Each pair has a priority, a hash of the seed and its key: a number drawn at random once and for all. A
query's sample is its pairs of the lowest priorities, which is a draw without replacement. What a unit holds
is written to a file, so that memory does not grow with the number of pairs; a query's sample is all up to a
limit.
"""

# U queries found in a unit, M (query, pair) matches in it, R records, Q queries in all
from __future__ import annotations

import contextlib
import hashlib
import json
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from clip_base.curation.texts import Matcher
from clip_base.curation.units import Record
from clip_base.runtime.errors import InputError
from clip_base.storage.files import replacing

Integers = npt.NDArray[np.int64]
UNLIMITED = np.iinfo(np.int64).max
_ENTRIES = 1 << 23  # priorities that are held at once


@dataclass(frozen=True)
class UnitMatches:
    """Which queries the records of a unit contain.

    Attributes:
        queries: [U] numbers of the queries that occur, rising.
        starts: [U + 1] where each query's pairs begin among `pairs`.
        pairs: [M] places of records in the unit; those of a query by rising priority.
        priorities: [R] in [0, 2^63).
        captions: texts that were read.
        unmatched: usable records without any query.
        skipped: the records that cannot be used, with the reason.
    """

    queries: Integers
    starts: Integers
    pairs: npt.NDArray[np.int32]
    priorities: Integers
    captions: int
    unmatched: int
    skipped: list[dict[str, str]]

    @property
    def rows(self) -> Integers:
        """[M] the query of each match, as a place in `queries`."""
        return np.repeat(np.arange(len(self.queries)), np.diff(self.starts))


def priority(seed: int, key: str) -> int:
    """Returns a pair's priority, uniform in [0, 2^63)."""
    data = f"{seed} {key}".encode(errors="surrogateescape")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest()) >> 1


def match_records(records: Iterator[Record], matcher: Matcher, seed: int) -> UnitMatches:
    """Returns which queries the records of a unit contain; a pair counts once per query."""
    found, lengths = array("q"), array("q")
    priorities, skipped = array("q"), list[dict[str, str]]()
    captions = 0
    for record in records:
        own = array("q")
        if record.fault:
            skipped.append({"pair": record.key, "reason": record.fault})
        else:
            captions += len(record.captions)
            for text in record.captions:
                own.extend(matcher.find(text))
        found.extend(own)
        lengths.append(len(own))
        priorities.append(priority(seed, record.key))
    count, ranks = len(lengths), np.array(priorities, np.int64)
    by_priority = np.argsort(ranks, kind="stable")
    place = np.empty_like(by_priority)  # of a record in that order
    place[by_priority] = np.arange(count)
    owner = np.repeat(place, np.array(lengths, np.int64))
    key = np.sort(np.array(found, np.int64) * max(count, 1) + owner)
    query, owner = np.divmod(key[np.diff(key, prepend=-1) > 0], max(count, 1))  # once per pair and query
    starts = np.flatnonzero(np.diff(query, prepend=-1))
    pairs = by_priority[owner].astype(np.int32)
    return UnitMatches(
        query[starts],
        np.append(starts, len(query)),
        pairs,
        ranks,
        captions,
        count - len(skipped) - int((np.bincount(pairs, minlength=count) > 0).sum()),
        skipped,
    )


def save_matches(matches: UnitMatches, path: Path) -> None:
    """Writes a unit's matches, atomically."""
    tensors = {name: getattr(matches, name) for name in ("queries", "starts", "pairs", "priorities")}
    about = {"captions": matches.captions, "unmatched": matches.unmatched, "skipped": matches.skipped}
    with replacing(path) as temporary:
        save_file(tensors, temporary, {"about": json.dumps(about)})


def load_matches(path: Path) -> UnitMatches:
    """Reads what `save_matches` wrote.

    Raises:
        InputError: the file is damaged.
    """
    with _opened(path) as file:
        about = json.loads(file.metadata()["about"])
        tensors = {name: file.get_tensor(name) for name in ("queries", "starts", "pairs", "priorities")}
    return UnitMatches(**tensors, **about)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, "numpy") as file:
            yield file
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} is damaged ({error}); delete it and give the same command again") from None


def count_pairs(files: Sequence[Path], queries: int) -> Integers:
    """Returns [Q], how many pairs contain each query, over all units."""
    counts = np.zeros(queries, np.int64)
    for path in files:
        with _opened(path) as file:
            counts[file.get_tensor("queries")] += np.diff(file.get_tensor("starts"))
    return counts


def limits(files: Sequence[Path], counts: Integers, most: int) -> Integers:
    """Returns [Q], the highest priority in each query's sample.

    Args:
        files: units' matches.
        counts: [Q] as `count_pairs` returns.
        most: pairs per query.

    Memory holds as many priorities as fit the samples of some queries at a time, of all units together.
    """
    found = np.full(len(counts), UNLIMITED)
    above = np.flatnonzero(counts > most)  # the others keep all their pairs
    per_part = max(_ENTRIES // most, 1)
    for start in range(0, len(above), per_part):
        part = above[start : start + per_part]
        found[part] = _limits_of(files, part, most)
    return found


def _limits_of(files: Sequence[Path], part: Integers, most: int) -> Integers:
    """Returns the highest priority in the samples of some queries, each of which has more than `most`."""
    queries, ranks = np.empty(0, np.int64), np.empty(0, np.int64)
    waiting, length = list[tuple[Integers, Integers]](), 0
    for number, path in enumerate(files):
        with _opened(path) as file:
            own, starts = file.get_tensor("queries"), file.get_tensor("starts")
            places = np.flatnonzero(np.isin(own, part, assume_unique=True))
            pairs, priorities = file.get_slice("pairs"), file.get_tensor("priorities")
            for place in places.tolist():
                # A unit's pairs stand by priority: the first ones are enough.
                begin, end = int(starts[place]), min(int(starts[place + 1]), int(starts[place]) + most + 1)
                some = priorities[pairs[begin:end]]
                waiting.append((np.full(len(some), own[place]), some))
                length += len(some)
        if length > _ENTRIES or number == len(files) - 1:
            queries = np.concatenate([queries, *(ids for ids, _ in waiting)])
            ranks = np.concatenate([ranks, *(values for _, values in waiting)])
            order = np.lexsort((ranks, queries))
            queries, ranks = queries[order], ranks[order]
            _, starts = np.unique(queries, return_index=True)
            sizes = np.diff(np.append(starts, len(queries)))
            kept = np.arange(len(queries)) - np.repeat(starts, sizes) <= most
            queries, ranks = queries[kept], ranks[kept]
            waiting, length = [], 0
    # Below the first one that is too many: pairs of equal keys, which are repetitions, are in it all or none.
    return ranks[np.searchsorted(queries, part, side="right") - 1] - 1


def kept_pairs(matches: UnitMatches, highest: Integers) -> npt.NDArray[np.bool_]:
    """Returns [R], which records of a unit are in a sample; `highest` [Q] is what `limits` returns."""
    kept = np.zeros(len(matches.priorities), bool)
    chosen = matches.priorities[matches.pairs] <= highest[matches.queries][matches.rows]
    kept[matches.pairs[chosen]] = True
    return kept


def count_kept(matches: UnitMatches, kept: npt.NDArray[np.bool_]) -> Integers:
    """Returns [U], how many of the kept records contain each query, for whatever query they were sampled."""
    return np.bincount(matches.rows[kept[matches.pairs]], minlength=len(matches.queries))
