"""Noun phrases of captions, normalized to concepts: "two red umbrellas" names the concept "red umbrella".

A phrase is one of spaCy's base noun chunks, cut at its head noun and freed of what does not describe the
thing: determiners, pronouns, numbers standing alone, words of quantity. The head is lemmatised. Words that
only count what follows ("a pair of scissors", "a group of people") are chunks of their own in spaCy's
analysis; they stand on the list of stop words, so that "scissors" and "person" are what remains.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import spacy
from spacy.language import Language
from spacy.symbols import ADP, ADV, CCONJ, DET, INTJ, NOUN, NUM, PART, PRON, PROPN, PUNCT, SPACE, SYM, X
from spacy.tokens import Span, Token

from clip_base.runtime.errors import InputError
from clip_base.runtime.workers import Report, cores, run
from clip_base.storage.files import read_text
from regionclip.concepts.spacy_models import load_language, model_name
from regionclip.data.categories import parse_names

DATA_FILES = Path(__file__).parents[1] / "data_files"
RULES = 1
"""Raised when the same captions begin to give other phrases, so that kept ones are not mixed with new."""

# Dropped wherever they stand in a phrase.
_FUNCTION_WORDS = frozenset({DET, PRON, NUM, SPACE})
# Dropped only before the first describing word: "very large dog", but "black and white cat" and "man's hat".
_LEADING_WORDS = frozenset({ADV, ADP, CCONJ, INTJ, PART, PUNCT, SYM, X})


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_QUANTITIES = _words(
    """several many few multiple various different numerous other more most much such own same certain
    countless assorted"""
)
# Tagged as nouns now and then; a color never belongs to a compound's name.
_COLORS = _words(
    """red blue green yellow black white brown gray gray pink purple orange silver gold golden tan beige"""
)
# Things whose name is a plural: the lemmatiser would make "scissor" of them.
_PLURAL_ONLY = _words(
    """scissors pants jeans trousers shorts sunglasses eyeglasses goggles binoculars tweezers pliers tongs
    pajamas pyjamas leggings overalls tights headphones earphones earbuds clothes skis stairs slacks
    sweatpants suspenders clippers shears groceries bleachers"""
)
# What the English lemmatiser gets wrong, or leaves as it is when the word is taken for a name.
_IRREGULAR = {
    "people": "person",
    "men": "man",
    "women": "woman",
    "children": "child",
    "vases": "vase",
}
_TASK = 2000  # captions sent to a process at once: large against the cost of sending them
_REMEMBERED = 20_000  # captions whose phrases memory keeps, so that one that returns is not parsed again


@dataclass(frozen=True, slots=True)
class Phrase:
    """A noun phrase of a caption.

    Attributes:
        text: the concept: lower case, without determiners, pronouns and bare numbers, the head lemmatised
            ("red umbrella").
        head: the head noun with the nouns compounded with it ("umbrella", "fire hydrant").
        start: where the first word that was kept begins, in characters of the caption.
        end: where the head ends (exclusive), in characters of the caption.
    """

    text: str
    head: str
    start: int
    end: int


Found = dict[str, list[Phrase]]
Compounds = dict[str, list[tuple[str, ...]]]


def read_stop_words(path: str = "") -> frozenset[str]:
    """Returns the heads and phrases to drop, one per line in a file; "" is the list that comes with us.

    A line that begins with + keeps a compound although its last word is dropped.
    """
    file = Path(path) if path else DATA_FILES / "stop_words.txt"
    text = read_text(file, "stop words")
    lines = (line.partition("#")[0].strip().lower() for line in text.splitlines())
    return frozenset(line for line in lines if line)


def hidden_by(phrase: Phrase, stop_words: frozenset[str]) -> str | None:
    """Returns the entry of the list of stop words that drops a phrase; None: it stays.

    The longest ending of the head that the list knows decides: "background" drops "blotchy background", and
    with "+parking lot" beside "lot" a "dirt parking lot" stays.
    """
    if phrase.text in stop_words:
        return phrase.text
    words = phrase.head.split(" ")
    for ending in (" ".join(words[start:]) for start in range(len(words))):
        if f"+{ending}" in stop_words:
            return None
        if ending in stop_words:
            return ending
    return None


class PhraseCache(Protocol):
    """Phrases of captions that were parsed before, whatever is invisible among them."""

    def find(self, captions: Iterable[str]) -> Found:
        """Returns the phrases of those of the captions that it knows."""
        ...

    def add(self, found: Mapping[str, list[Phrase]]) -> None:
        """Takes phrases up."""
        ...


class LRUPhraseCache:
    """A memory that holds the captions seen lately."""

    def __init__(self) -> None:
        self._phrases: Found = {}

    def find(self, captions: Iterable[str]) -> Found:
        """See `Memory`."""
        return {caption: self._phrases[caption] for caption in captions if caption in self._phrases}

    def add(self, found: Mapping[str, list[Phrase]]) -> None:
        """Takes phrases up and forgets the oldest."""
        self._phrases.update(found)
        while len(self._phrases) > _REMEMBERED:
            del self._phrases[next(iter(self._phrases))]


class PhraseParser:
    """Finds the phrases of captions.

    Args:
        language: a spaCy model; "" is the small English one. It is loaded when a caption needs it.
        batch_size: captions that spaCy analyzes at once.
        workers: processes; 1 parses in this one; 0: one per core. A script that asks for more needs the usual
            `if __name__ == "__main__":` guard, since the processes are spawned.
        stop_words: what to drop, as a file or a set; "" is the list that comes with us.
        names: names of several words that must not be torn apart, besides COCO's: the small English model
            takes "fire hydrant" for a "fire" every second time.
        memory: what was parsed before, by a parser of the same `fingerprint`; None remembers recent captions.
        executor: where the processes are, see `clip_base.runtime.workers`.
    """

    def __init__(
        self,
        language: str = "",
        batch_size: int = 256,
        workers: int = 1,
        stop_words: str | frozenset[str] = "",
        names: Iterable[str] = (),
        memory: PhraseCache | None = None,
        executor: str = "local",
    ) -> None:
        """Looks the model up; an InputError when it is not installed."""
        if batch_size < 1 or workers < 0:
            raise InputError(f"batch_size must be at least 1, workers 0, got {batch_size} and {workers}")
        self.model = model_name(language)
        self.stop_words = read_stop_words(stop_words) if isinstance(stop_words, str) else stop_words
        self.compounds = compounds_of([*parse_names("coco80"), *names])
        self.memory: PhraseCache = LRUPhraseCache() if memory is None else memory
        self._language, self._batch_size, self._workers = language, batch_size, workers
        self._executor = executor

    @functools.cached_property
    def nlp(self) -> Language:
        """The spaCy pipeline."""
        return load_language(self._language)

    @property
    def fingerprint(self) -> str:
        """What decides a caption's phrases before any is dropped: equal parsers have equal ones."""
        decisive = [RULES, spacy.about.__version__, self.model, sorted(self.compounds.items())]
        return hashlib.sha256(json.dumps(decisive).encode()).hexdigest()

    def parse(self, captions: Iterable[str]) -> Iterator[list[Phrase]]:
        """Yields the visible phrases of each caption, in their order; what `memory` knows is not parsed.

        Captions are read a few thousand ahead of the results. The phrases' order is that of the caption.
        """
        tasks = _chunks(captions, _TASK)
        here = self._executor == "local" and (self._workers or cores()) == 1
        for task, found in self._parse_here(tasks) if here else self._parse_elsewhere(tasks):
            for caption in task:
                yield [phrase for phrase in found[caption] if hidden_by(phrase, self.stop_words) is None]

    def _parse_here(self, tasks: Iterable[list[str]]) -> Iterator[tuple[list[str], Found]]:
        for task in tasks:
            known = self.memory.find(task)
            unseen = [caption for caption in task if caption not in known]
            found = parse_batch(self.nlp, unseen, self.compounds, self._batch_size) if unseen else {}
            self.memory.add(found)
            yield task, known | found

    def _parse_elsewhere(self, tasks: Iterable[list[str]]) -> Iterator[tuple[list[str], Found]]:
        # Our own processes and not spaCy's n_process: phrases are a fraction of the size of its documents.
        start = functools.partial(_Worker, self._language, self.compounds, self._batch_size)
        waiting: deque[tuple[list[str], Found, set[int]]] = deque()
        results: dict[int, Found] = {}
        has: dict[str, int] = {}  # caption -> the task under way that parses it, so that it is sent once

        def send() -> Iterator[tuple[int, list[str]]]:
            for number, task in enumerate(tasks):
                known = self.memory.find(task)
                unseen = dict.fromkeys(caption for caption in task if caption not in known)
                mine = [caption for caption in unseen if caption not in has]
                has.update(dict.fromkeys(mine, number))
                waiting.append((task, known, {has[caption] for caption in unseen}))
                yield number, mine

        for (number, _), found in run(self._executor, start, send(), self._workers):
            self.memory.add(found)
            results[number] = found
            while waiting and waiting[0][2] <= results.keys():
                task, known, needed = waiting.popleft()
                for one in needed:
                    known |= results[one]
                yield task, known
            still = set[int]().union(*(needed for _, _, needed in waiting))
            for one in results.keys() - still:
                for caption in results.pop(one):
                    del has[caption]


class _Worker:
    """Parses in a process of its own; sends no spaCy documents, which are large."""

    def __init__(self, language: str, compounds: Compounds, batch_size: int) -> None:
        self.nlp, self.compounds, self.batch_size = load_language(language), compounds, batch_size

    def __call__(self, task: tuple[int, list[str]], report: Report) -> Found:
        return parse_batch(self.nlp, task[1], self.compounds, self.batch_size)


def parse_batch(nlp: Language, captions: list[str], compounds: Compounds, batch_size: int) -> Found:
    """Returns the phrases of each distinct caption, stop words among them."""
    # A full stop tells the model that a sentence ends here; without one it errs more ("a red fire hydrant").
    distinct = list(dict.fromkeys(captions))
    found: Found = {}
    for caption, doc in zip(distinct, nlp.pipe(map(_stopped, distinct), batch_size=batch_size), strict=True):
        phrases = (as_phrase(chunk, compounds) for chunk in doc.noun_chunks)
        found[caption] = [phrase for phrase in phrases if phrase is not None]
    return found


def compounds_of(names: Iterable[str]) -> Compounds:
    """Returns first word -> the words after it, the longest first, for each name of several words."""
    compounds: dict[str, set[tuple[str, ...]]] = {}
    for name in names:
        first, *others = name.lower().split() or [""]
        if others:
            compounds.setdefault(first, set()).add(tuple(others))
    return {
        first: sorted(found, key=lambda words: (-len(words), words)) for first, found in compounds.items()
    }


def as_phrase(chunk: Span, compounds: Compounds) -> Phrase | None:
    """Makes a phrase of a noun chunk; None when its head is no noun or nothing of it is a word.

    Args:
        chunk: one of spaCy's noun chunks.
        compounds: names that continue after the chunk's head where the caption does, see `compounds_of`.
    """
    root = chunk.root
    if root.pos not in (NOUN, PROPN) or root.like_url or root.like_num:
        return None
    rest = _rest_of_name(root, compounds)
    kept = _describing(list(chunk.doc[chunk.start : root.i + 1]))
    head_from = _head_from(kept)
    lemma = rest[-1] if rest else _lemma(root)
    if rest:
        kept += chunk.doc[root.i + 1 : root.i + 1 + len(rest)]
        root = kept[-1]
    head = _join(kept[head_from:], lemma)
    if sum(letter.isalpha() for letter in lemma) < (2 if lemma.isascii() else 1):
        return None
    text = head if head_from == 0 else _join(kept, lemma)
    return Phrase(text, head, kept[0].idx, root.idx + len(root.text))


def _rest_of_name(root: Token, compounds: Compounds) -> tuple[str, ...]:
    """Returns the words that complete a name of several words of which `root` is the first."""
    for others in compounds.get(root.lower_, ()):
        following = [token.lower_ for token in root.doc[root.i + 1 : root.i + 1 + len(others)]]
        if following[:-1] == list(others[:-1]) and following and following[-1] in _numbers(others[-1]):
            return others
    return ()


def _numbers(word: str) -> tuple[str, str, str]:
    return word, f"{word}s", f"{word}es"


def _stopped(caption: str) -> str:
    return f"{caption}." if caption[-1:].isalnum() else caption


def _describing(tokens: list[Token]) -> list[Token]:
    """Returns the tokens that describe the thing; the last one is the head and always stays."""
    kept: list[Token] = []
    last = tokens[-1]
    for token in tokens:
        if token is last:
            kept.append(token)
        elif token.pos in _FUNCTION_WORDS or token.lower_ in _QUANTITIES:
            # "2-story building": a number bound by a hyphen is part of a word.
            bound = token.nbor(1).text == "-" or (kept and kept[-1].text == "-")
            if bound and token.pos == NUM:
                kept.append(token)
        elif token.pos == PUNCT and token.text not in ("-", "'"):
            continue
        elif kept or token.pos not in _LEADING_WORDS:
            kept.append(token)
    return kept


def _head_from(kept: list[Token]) -> int:
    """Returns where the head's compound begins among the kept tokens."""
    start = len(kept) - 1
    while start > 0:
        token = kept[start - 1]
        if token.dep_ == "compound" and token.lower_ not in _COLORS:
            start -= 1
        elif start > 1 and token.text == "-" and not token.whitespace_ and not kept[start - 2].whitespace_:
            start -= 2  # "t-shirt"
        else:
            break
    return start


def _lemma(head: Token) -> str:
    word: str = head.lower_
    if word in _PLURAL_ONLY:
        return word
    return _IRREGULAR.get(word) or head.lemma_.lower() or word


def _join(tokens: list[Token], lemma: str) -> str:
    parts: list[str] = []
    for token, following in itertools.pairwise(tokens):
        parts.append(token.lower_)
        if token.whitespace_ or following.i != token.i + 1:
            parts.append(" ")
    return "".join([*parts, lemma])


def _chunks(items: Iterable[str], size: int) -> Iterator[list[str]]:
    iterator = iter(items)
    while chunk := list(itertools.islice(iterator, size)):
        yield chunk
