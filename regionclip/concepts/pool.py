"""A pool of concepts: counted noun phrases cut by frequency, and the file that holds them."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from clip_base.runtime.errors import InputError
from clip_base.runtime.progress import track
from clip_base.storage.files import beside, read_json, read_json_lines
from regionclip.concepts.phrases import PhraseParser

EXAMPLES = 3
META = ".meta.json"  # what the file that describes a pool is called behind the pool's name


@dataclass(frozen=True)
class Concept:
    """A thing that captions name.

    Attributes:
        concept: its name.
        count: captions that name it.
        examples: up to three of them.
        kind: "given" (from a class list), "head" (the head noun of a phrase), or "phrase".
        synonyms: a given class's other names; what captions call it by them is counted here.
    """

    concept: str
    count: int
    examples: tuple[str, ...] = ()
    kind: str = "phrase"
    synonyms: tuple[str, ...] = ()

    def record(self) -> dict[str, Any]:
        """Returns the concept as its line in the file; synonyms only when it has some."""
        return {key: value for key, value in asdict(self).items() if value or key != "synonyms"}


@dataclass
class ConceptCounts:
    """What the captions name, before the cut.

    Attributes:
        counts: captions by concept.
        heads: the concepts that were the head of a phrase at least once.
        examples: up to three captions by concept.
    """

    counts: Counter[str] = field(default_factory=Counter)
    heads: set[str] = field(default_factory=set)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def add(self, caption: str, names: Collection[str], heads: Iterable[str]) -> None:
        """Counts the concepts of one caption, each once."""
        self.heads.update(heads)
        for name in names:
            self.counts[name] += 1
            examples = self.examples.setdefault(name, [])
            if len(examples) < EXAMPLES and caption not in examples:
                examples.append(caption)


def count(
    texts: Iterable[str], total: int, parser: PhraseParser, aliases: Mapping[str, str]
) -> ConceptCounts:
    """Counts in how many captions each concept occurs; full phrase and head noun are concepts of their own.

    Args:
        texts: captions, as often as they occur.
        total: how many they are.
        parser: finds the phrases.
        aliases: form in a caption -> the given class it is counted for.
    """
    tally = ConceptCounts()
    captions, to_parse = itertools.tee(texts)
    parsed = track(parser.parse(to_parse), "parsing captions", total)
    for caption, phrases in zip(captions, parsed, strict=True):
        heads = {aliases.get(phrase.head, phrase.head): None for phrase in phrases}
        names = heads | {aliases.get(phrase.text, phrase.text): None for phrase in phrases}
        tally.add(caption, names, heads)
    return tally


def pool(tally: ConceptCounts, classes: list[tuple[str, ...]], min_count: int) -> list[Concept]:
    """Returns the frequent concepts and all given ones, the most frequent first, then by name."""
    synonyms = {entry[0]: entry[1:] for entry in classes}
    concepts = []
    for name in {*synonyms, *(name for name, times in tally.counts.items() if times >= min_count)}:
        kind = "given" if name in synonyms else "head" if name in tally.heads else "phrase"
        examples = tuple(tally.examples.get(name, ()))
        concepts.append(Concept(name, tally.counts[name], examples, kind, synonyms.get(name, ())))
    return sorted(concepts, key=lambda concept: (-concept.count, concept.concept))


def read_concepts(path: str | Path) -> list[Concept]:
    """Reads a pool of concepts, in the file's order.

    Raises:
        InputError: a missing or malformed file, or a concept that stands there twice.
    """
    concepts: dict[str, Concept] = {}
    for number, entry in read_json_lines(path, "concept pool"):
        try:
            concept = Concept(
                str(entry["concept"]),
                int(entry["count"]),
                tuple(map(str, entry["examples"])),
                str(entry.get("kind", "phrase")),
                tuple(map(str, entry.get("synonyms", ()))),
            )
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
            raise InputError(
                f"concept pool {path}, line {number} is not a concept ({type(error).__name__}: {error}); "
                "a line is {concept, count, examples} in JSON, is the file truncated?"
            ) from None
        if concept.concept in concepts:
            raise InputError(
                f"concept pool {path}, line {number}: {concept.concept!r} occurs twice; remove one"
            )
        concepts[concept.concept] = concept
    return list(concepts.values())


def meta_file(out: str | Path) -> Path:
    """Returns the file beside a pool that says how it was made."""
    return Path(f"{out}{META}")


def pool_language(out: str | Path) -> str:
    """Returns the spaCy model that a pool was made with; "", the small English one, when nothing tells."""
    path = beside(out, META)
    meta = read_json(path, "description of the pool") if path else {}
    return str(meta.get("options", {}).get("language", ""))
