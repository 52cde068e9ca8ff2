"""Which things captions talk about: counted noun phrases, cut by frequency, make the pool of concepts.

    regionclip concepts captions=captions_train.json min_count=100 out=concepts.jsonl classes=[coco65]

RegionCLIP's pool (arXiv 2112.09106, section 4.1) holds the concepts seen at least 100 times: 4,764 in COCO's
training captions.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from clip_base.config import REQUIRED, fields_of, option
from clip_base.errors import InputError
from clip_base.files import ENCODING_HELP, existing, read_json, read_json_lines, write_json, write_text
from clip_base.progress import track
from regionclip.captions import read_texts
from regionclip.class_lists import parse_names, read_classes
from regionclip.engines import cores
from regionclip.phrase_store import PhraseStore, phrases_file
from regionclip.phrases import PhraseParser, read_invisible

FORMAT = "regionclip.concepts"
VERSION = 2
EXAMPLES = 3
SAME = ("version", "captions_sha256", "classes_sha256", "invisible_sha256")


@dataclass
class ConceptsConfig:
    """Captions in, a pool of concepts out."""

    captions: str = option(
        REQUIRED, "captions: COCO's JSON, .txt (one a line), or .jsonl, .csv, .tsv with a caption column"
    )
    out: str = option(REQUIRED, "file to write, JSON Lines: concept, count, examples, kind")
    min_count: int = option(100, "captions that must name a concept for it to stay")
    classes: list[str] = option(
        [], "class lists whose names always stay: coco, coco65, coco_base, coco_novel, or files"
    )
    language: str = option("", "spaCy model; empty: the small English one")
    invisible: str = option(
        "", "file of heads and phrases to drop, one a line; empty: the list that comes with us"
    )
    column: str = option("", "caption's column or key; empty: caption, text or title")
    encoding: str = option("", ENCODING_HELP)
    keep_phrases: bool = option(
        True,
        "keep the captions' phrases in OUT.phrases.db, so that mining need not parse them again",
        free=True,
    )
    workers: int = option(1, "processes that parse; 0: one a core", free=True)
    batch_size: int = option(256, "captions that spaCy analyses at once", free=True)
    explain: str = option("", "a phrase: say where it comes from, or why it is not in the pool", free=True)

    def __post_init__(self) -> None:
        """Checks the numbers."""
        for name, least in {"min_count": 1, "workers": 0, "batch_size": 1}.items():
            if getattr(self, name) < least:
                raise InputError(f"{name} must be at least {least}, got {getattr(self, name)}")


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
class Tally:
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


def build(config: ConceptsConfig) -> None:
    """Counts the noun phrases of captions and writes the pool of concepts."""
    out, meta_path = Path(config.out), meta_file(config.out)
    if out.is_dir():
        raise InputError(f"out={out} is a folder; give a file, such as {out / 'concepts.jsonl'}")
    captions = existing(config.captions, "captions file")
    provenance = _provenance(config, captions)
    if out.exists():
        _require_same(out, meta_path, provenance)
        print(f"{out} is there already, made with the same options: {len(read_concepts(out))} concepts")
    else:
        _make(config, out, meta_path, provenance)
    if config.explain:
        # Imported here: only this option needs it, and it needs this module.
        from regionclip.explain import explain

        print(explain(config, read_concepts(out)))


def _make(config: ConceptsConfig, out: Path, meta_path: Path, provenance: dict[str, Any]) -> None:
    classes = given_classes(config.classes)
    parser = parser_of(config, classes)
    kept = phrases_file(out) if config.keep_phrases else ""
    parser.memory = store = PhraseStore(kept, parser.fingerprint, provenance["captions_sha256"])
    captions = sum(1 for _ in read_texts(config.captions, config.column, config.encoding))
    tally = count(
        read_texts(config.captions, config.column, config.encoding), captions, parser, aliases_of(classes)
    )
    if not classes and max(tally.counts.values(), default=0) < config.min_count:
        raise _nothing_left(config, tally)
    concepts = pool(tally, classes, config.min_count)
    held, absent = _held(parse_names("coco80"), tally.counts, config.min_count, aliases_of(classes))
    text = "".join(json.dumps(concept.record(), ensure_ascii=False) + "\n" for concept in concepts)
    meta = provenance | {
        "language_model": parser.model,
        "captions_read": captions,
        "distinct_captions": len(store),
        "concepts": len(concepts),
        "concepts_before_the_cut": len(tally.counts),
        "at_cut": {str(cut): _at(tally.counts, cut) for cut in (10, 25, 100)},
        "coco80_held": len(held),
        "coco80_absent": absent,
        "sha256": hashlib.sha256(text.encode()).hexdigest(),
    }
    store.close()
    # The pool last: where it stands, the job has ended.
    write_json(meta_path, meta, indent=2)
    write_text(out, text)
    _print_summary(out, concepts, meta, config.min_count)


def parser_of(config: ConceptsConfig, classes: list[tuple[str, ...]]) -> PhraseParser:
    """Returns the parser of a pool's captions; the names of its given classes stay whole."""
    words = [word for entry in classes for word in entry]
    return PhraseParser(
        config.language, config.batch_size, config.workers or cores(), config.invisible, words
    )


def count(texts: Iterable[str], total: int, parser: PhraseParser, aliases: Mapping[str, str]) -> Tally:
    """Counts in how many captions each concept occurs; full phrase and head noun are concepts of their own.

    Args:
        texts: captions, as often as they occur.
        total: how many they are.
        parser: finds the phrases.
        aliases: form in a caption -> the given class it is counted for.
    """
    tally = Tally()
    captions, to_parse = itertools.tee(texts)
    parsed = track(parser.parse(to_parse), "parsing captions", total)
    for caption, phrases in zip(captions, parsed, strict=True):
        heads = {aliases.get(phrase.head, phrase.head): None for phrase in phrases}
        names = heads | {aliases.get(phrase.text, phrase.text): None for phrase in phrases}
        tally.add(caption, names, heads)
    return tally


def pool(tally: Tally, classes: list[tuple[str, ...]], min_count: int) -> list[Concept]:
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
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise InputError(
                f"concept pool {path}, line {number} is no concept ({type(error).__name__}: {error}); "
                "a line is {concept, count, examples} in JSON, was the file cut off?"
            ) from None
        if concept.concept in concepts:
            raise InputError(
                f"concept pool {path}, line {number}: {concept.concept!r} is there twice; remove one"
            )
        concepts[concept.concept] = concept
    return list(concepts.values())


def meta_file(out: str | Path) -> Path:
    """Returns the file beside a pool that says how it was made."""
    return Path(f"{out}.meta.json")


def pool_language(out: str | Path) -> str:
    """Returns the spaCy model that a pool was made with; "", the small English one, when nothing tells."""
    path = meta_file(out)
    meta = read_json(path, "description of the pool") if path.exists() else {}
    return str(meta.get("options", {}).get("language", ""))


def given_classes(lists: list[str]) -> list[tuple[str, ...]]:
    """Returns (name, synonyms…) of all class lists; a class that two lists name has the synonyms of both."""
    merged: dict[str, dict[str, None]] = {}
    for text in lists:
        for name, *synonyms in read_classes(text):
            merged.setdefault(name, {}).update(dict.fromkeys(synonyms))
    return [(name, *(word for word in words if word not in merged)) for name, words in merged.items()]


def aliases_of(classes: list[tuple[str, ...]]) -> dict[str, str]:
    """Returns form in a caption -> given class. A class's own name goes before other classes' synonyms."""
    aliases: dict[str, str] = {}
    for entry in classes:
        aliases.setdefault(_plain(entry[0]), entry[0])
    for entry in classes:
        for form in forms(entry[0]):
            aliases.setdefault(form, entry[0])
    for entry in classes:
        for synonym in entry[1:]:
            for form in forms(synonym):
                aliases.setdefault(form, entry[0])
    return aliases


def forms(name: str) -> list[str]:
    """Returns how a class's name may stand among the phrases, whose heads are singular: "skis", "ski"."""
    plain = _plain(name)
    singular = [plain[:-1]] if plain.endswith("s") and not plain.endswith("ss") else []
    singular += [f"{plain[:-3]}y"] if plain.endswith("ies") else []
    return [plain, *singular]


def _plain(name: str) -> str:
    # LVIS tells "bow (weapon)" from "bow (decorative ribbons)"; captions do not.
    return name.partition("(")[0].replace("_", " ").strip().lower()


def _held(
    names: list[str], counts: Counter[str], min_count: int, aliases: Mapping[str, str]
) -> tuple[list[str], list[str]]:
    """Returns which of the names captions hold often enough, and which not."""
    often = [name for name in names if any(counts[aliases.get(f, f)] >= min_count for f in forms(name))]
    return often, [name for name in names if name not in often]


def _at(counts: Counter[str], cut: int) -> int:
    return sum(times >= cut for times in counts.values())


def _provenance(config: ConceptsConfig, captions: Path) -> dict[str, Any]:
    """Returns what decides the result: two runs with equal provenance write equal pools."""
    free = {key for key, field_, _ in fields_of(ConceptsConfig) if field_.metadata.get("free")}
    options = {key: value for key, value in asdict(config).items() if key not in free and key != "out"}
    options["captions"] = captions.name
    if captions.is_dir():
        raise InputError(f"captions={captions} is a folder; give the file of captions in it")
    with captions.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {
        "format": FORMAT,
        "version": VERSION,
        "options": options,
        "captions_sha256": digest,
        "classes_sha256": _hash(given_classes(config.classes)),
        "invisible_sha256": _hash(sorted(read_invisible(config.invisible))),
    }


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _require_same(out: Path, meta_path: Path, provenance: dict[str, Any]) -> None:
    remedy = "delete it or give another out="
    if not meta_path.exists():
        raise InputError(
            f"{out} is there and was not made by this job ({meta_path.name} is missing); {remedy}"
        )
    meta = read_json(meta_path, "description of the pool")
    there = (meta.get("options") or {}) | {key: meta.get(key) for key in SAME}
    here = provenance["options"] | {key: provenance[key] for key in SAME}
    differing = [
        f"{key}={there.get(key)!r} there, {here.get(key)!r} here"
        for key in sorted(there.keys() | here.keys())
        if there.get(key) != here.get(key)
    ]
    if differing:
        raise InputError(f"{out} was made with other options ({'; '.join(differing[:3])}); {remedy}")


def _nothing_left(config: ConceptsConfig, tally: Tally) -> InputError:
    if not tally.counts:
        return InputError(
            f"no noun phrase was found in {config.captions}; is language={config.language or 'en'} right?"
        )
    name, most = max(tally.counts.items(), key=lambda item: item[1])
    # About the hundred most frequent concepts, so that the suggestion leaves a pool and not one name.
    hundredth = sorted(tally.counts.values(), reverse=True)[:100][-1]
    return InputError(
        f"no concept of {config.captions} is named by {config.min_count} captions; the most frequent, "
        f"{name!r}, by {most}: try min_count={max(min(hundredth, most), 1)}"
    )


def _print_summary(out: Path, concepts: list[Concept], meta: dict[str, Any], min_count: int) -> None:
    print(f"{meta['captions_read']:,} captions, {meta['distinct_captions']:,} of them distinct")
    kinds = Counter(concept.kind for concept in concepts)
    split = ", ".join(f"{number:,} {kind}" for kind, number in sorted(kinds.items()))
    print(f"{len(concepts):,} concepts at min_count={min_count} ({split}) in {out}")
    print(f"{meta['coco80_held']} of COCO's 80 names are among them by their count")
    print("most frequent: " + ", ".join(f"{concept.concept} {concept.count:,}" for concept in concepts[:10]))
