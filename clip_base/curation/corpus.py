"""Words of a text corpus, and its bigrams of high pointwise mutual information."""

# V words that are frequent enough, B bigrams of them
from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import regex  # type: ignore[import-untyped]

from clip_base.runtime.errors import InputError
from clip_base.runtime.progress import track

# A word may have apostrophes in it (don't), but for a possessive's, which is a token of its own.
_PATTERN = r"\w+?(?='s\b)|'s\b|\w+(?:'\w+)*|[^\w\s]"
_ascii_words = re.compile(_PATTERN).findall
_words = regex.compile(_PATTERN).findall
_AT_ONCE = 1 << 23  # bigrams that are sorted at once

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Counted:
    """What a corpus has often.

    Attributes:
        words: word -> how often it occurs.
        bigrams: (two words -> how often they follow each other, their pointwise mutual information in bits).
        total: words in the corpus, frequent or not.
    """

    words: dict[str, int]
    bigrams: dict[str, tuple[int, float]]
    total: int


def words_of(line: str) -> list[str]:
    """Returns the words of a line, case folded, and between them the characters that are part of none."""
    if line.isascii():
        return _ascii_words(line.lower())
    folded = unicodedata.normalize("NFC", unicodedata.normalize("NFC", line).casefold().replace("’", "'"))
    return list(_words(folded))


def is_word(token: str) -> bool:
    """Whether a token is a word: it begins with a letter or digit, and has a letter."""
    return token[0].isalnum() and any(letter.isalpha() for letter in token)


def count(lines: Callable[[], Iterable[str]], min_count: int, min_pmi: float, what: str) -> Counted:
    """Returns the words that occur at least `min_count` times, and the bigrams of them that do.

    Args:
        lines: gives the corpus, once for the words and once more for the bigrams.
        min_count: of words and of bigrams.
        min_pmi: the least pointwise mutual information of a bigram in bits; infinity: no bigrams are counted.
        what: the corpus, for messages.

    Raises:
        InputError: the corpus has no words, or none that is frequent enough.
    """
    found = Counter[str]()
    for line in track(lines(), "counting words"):
        found.update(words_of(line))
    words = {word: number for word, number in found.items() if is_word(word)}
    if not words:
        raise InputError(f"{what} has no words; give a text")
    frequent = {word: number for word, number in words.items() if number >= min_count}
    if not frequent:
        most, number = max(words.items(), key=lambda item: item[1])
        raise InputError(
            f"{what}: no word occurs {min_count:,} times; the most frequent one, {most[:40]!r}, occurs "
            f"{number:,} times; lower min_count or give more text"
        )
    total = sum(words.values())
    bigrams = _bigrams(lines, frequent, min_count, min_pmi, total) if min_pmi < math.inf else {}
    return Counted(frequent, bigrams, total)


def _bigrams(
    lines: Callable[[], Iterable[str]], words: dict[str, int], min_count: int, min_pmi: float, total: int
) -> dict[str, tuple[int, float]]:
    """Returns the bigrams of frequent words; 16 bytes of memory per distinct one, frequent or not."""
    names = list(words)
    number_of = {word: number for number, word in enumerate(names)}
    kept, counts = np.empty(0, np.int64), np.empty(0, np.int64)
    for keys in _keys(lines(), number_of):
        both, place = np.unique(np.concatenate([kept, keys]), return_inverse=True)
        counts = np.bincount(place, np.concatenate([counts, np.ones(len(keys))])).astype(np.int64)
        kept = both
    often = counts >= min_count
    kept, counts = kept[often], counts[often]
    single = np.array([words[name] for name in names], np.float64)
    first, second = np.divmod(kept, len(names))
    information = np.log2(counts / total) - np.log2(single[first] / total) - np.log2(single[second] / total)
    return {
        f"{names[first[row]]} {names[second[row]]}": (int(counts[row]), float(information[row]))
        for row in np.flatnonzero(information >= min_pmi).tolist()
    }


def _keys(lines: Iterable[str], number_of: dict[str, int]) -> Iterator[Integers]:
    """Yields the bigrams of frequent words in parts, as first * V + second."""
    size, waiting, length = len(number_of), list[Integers](), 0
    for line in track(lines, "counting bigrams"):
        ids = np.array([number_of.get(word, -1) for word in words_of(line)], np.int64)
        pairs = (ids[:-1] >= 0) & (ids[1:] >= 0)
        keys = ids[:-1][pairs] * size + ids[1:][pairs]
        waiting.append(keys)
        length += len(keys)
        if length >= _AT_ONCE:
            yield np.concatenate(waiting)
            waiting, length = [], 0
    if waiting:
        yield np.concatenate(waiting)
