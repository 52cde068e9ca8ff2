"""The job `concepts`: counts noun phrases of captions and writes the pool of frequent concepts.

    regionclip concepts captions=captions_train.json min_count=100 out=concepts.jsonl classes=[coco65]

RegionCLIP's pool (arXiv 2112.09106, section 4.1) holds the concepts seen at least 100 times: 4,764 in COCO's
training captions.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from clip_base.data.inputs import WEBDATASET, source_inputs
from clip_base.data.sources import SOURCES
from clip_base.jobs.config import REQUIRED, Plugin, option, plugin, runtime_only
from clip_base.jobs.everyday import everyday
from clip_base.jobs.run import differences, hashes_of
from clip_base.runtime.errors import InputError, JobError
from clip_base.runtime.progress import track
from clip_base.runtime.workers import EXECUTOR_HELP, EXECUTORS
from clip_base.storage.files import ENCODING_HELP, existing, read_json, write_json, write_text
from clip_base.storage.hashing import content_hash, text_hash
from clip_base.storage.lock import lock_file
from clip_base.storage.tars import names_tars
from regionclip.concepts.phrase_cache import PhraseStore, phrases_file
from regionclip.concepts.phrases import PhraseParser, hidden_by, read_stop_words
from regionclip.concepts.pool import EXAMPLES, Concept, ConceptCounts, count, meta_file, pool, read_concepts
from regionclip.concepts.synonyms import aliases_of, forms, given_classes
from regionclip.data.captions import cleaned, read_texts
from regionclip.data.categories import parse_names
from regionclip.data.pairs import source_texts

FORMAT = "regionclip.concepts"
VERSION = 3  # raised when the same captions begin to give another pool
SAME = ("version", "captions_sha256", "classes_sha256", "stop_words_sha256")
_LISTED = 5  # phrases shown that hold the same word


@everyday(
    "concepts captions=captions.json out=concepts.jsonl min_count=20",
    input="captions classes column language",
    output="out min_count explain",
    speed="workers",
)
@dataclass
class ConceptsConfig:
    """Captions in, a pool of concepts out."""

    captions: str = option(
        "",
        "captions: COCO's JSON, .txt (one per line), .jsonl, .csv, .tsv with a caption column, or webdataset "
        "tars",
    )
    source: Plugin = plugin(SOURCES, "none", "source of image-text pairs, instead of captions=")
    out: str = option(REQUIRED, "file to write, JSON Lines: concept, count, examples, kind")
    min_count: int = option(100, "minimum number of captions that mention a concept")
    classes: list[str] = option(
        [], "class lists whose names are always kept: coco, coco65, coco_base, coco_novel, or files"
    )
    language: str = option("", "spaCy model; empty: the small English one")
    stop_words: str = option(
        "",
        "file of heads and phrases to drop, one per line; empty: the built-in list",
        renamed_from="invisible",
    )
    column: str = option("", "caption's column or key; empty: caption, text or title")
    encoding: str = option("", ENCODING_HELP)
    cache_phrases: bool = option(
        True,
        "store the captions' phrases in OUT.phrases.db, so that mining does not parse them again",
        runtime_only=True,
        renamed_from="keep_phrases",
    )
    executor: str = option("local", EXECUTOR_HELP, runtime_only=True, choices=EXECUTORS)
    workers: int = option(1, "processes that parse; 0: one per core", runtime_only=True)
    batch_size: int = option(256, "captions that spaCy analyzes at once", runtime_only=True)
    explain: str = option(
        "", "a phrase: print where it comes from, or why it is not in the pool", runtime_only=True
    )

    def __post_init__(self) -> None:
        """Checks the numbers."""
        for name, least in {"min_count": 1, "workers": 0, "batch_size": 1}.items():
            if getattr(self, name) < least:
                raise InputError(f"{name} must be at least {least}, got {getattr(self, name)}")
        given = self.source["name"] != "none"
        if not self.captions and not given:
            raise InputError(
                "missing: captions, a file or webdataset tars; or give source.name= and its options"
            )
        if self.captions and given:
            raise InputError("give captions=, or source.name= and its options, not both")

    @property
    def pairs(self) -> dict[str, Any] | None:
        """The source of pairs and its options; None: `captions` is a file of captions."""
        if names_tars(self.captions):
            return {"name": WEBDATASET, "shards": self.captions}
        return None if self.captions else dict(self.source)

    def texts(self) -> Iterator[str]:
        """Yields the captions, cleaned."""
        if self.pairs is None:
            yield from read_texts(self.captions, self.column, self.encoding)
        else:
            yield from source_texts(self.pairs)


def build(config: ConceptsConfig) -> None:
    """Counts the noun phrases of captions and writes the pool of concepts."""
    out, meta_path = Path(config.out), meta_file(config.out)
    if out.is_dir():
        raise InputError(f"out={out} is a folder; give a file, such as {out / 'concepts.jsonl'}")
    provenance = _provenance(config)
    with lock_file(out):
        if out.exists():
            _require_same(out, meta_path, provenance)
            print(
                f"{out} already exists and was made with the same options: {len(read_concepts(out))} concepts"
            )
        else:
            _make(config, out, meta_path, provenance)
    if config.explain:
        print(explain(config, read_concepts(out)))


def _make(config: ConceptsConfig, out: Path, meta_path: Path, provenance: dict[str, Any]) -> None:
    classes = given_classes(config.classes)
    parser = parser_of(config, classes)
    kept = phrases_file(out) if config.cache_phrases else ""
    parser.memory = store = PhraseStore(kept, parser.fingerprint, provenance["captions_sha256"])
    captions = sum(1 for _ in config.texts())
    tally = count(config.texts(), captions, parser, aliases_of(classes))
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
        config.language,
        config.batch_size,
        config.workers,
        config.stop_words,
        words,
        executor=config.executor,
    )


def _held(
    names: list[str], counts: Counter[str], min_count: int, aliases: Mapping[str, str]
) -> tuple[list[str], list[str]]:
    """Returns which of the names captions hold often enough, and which not."""
    often = [name for name in names if any(counts[aliases.get(f, f)] >= min_count for f in forms(name))]
    return often, [name for name in names if name not in often]


def _at(counts: Counter[str], cut: int) -> int:
    return sum(times >= cut for times in counts.values())


def _provenance(config: ConceptsConfig) -> dict[str, Any]:
    """Returns what decides the result: two runs with equal provenance write equal pools."""
    free = runtime_only(ConceptsConfig)
    options = {key: value for key, value in asdict(config).items() if key not in free and key != "out"}
    if config.pairs is None:
        captions = existing(config.captions, "captions file")
        if captions.is_dir():
            raise InputError(f"captions={captions} is a folder; give the file of captions in it")
        options["captions"], digest = captions.name, content_hash(captions)
    else:
        digest = text_hash([json.dumps(hashes_of(source_inputs(config.pairs)), sort_keys=True)])
    return {
        "format": FORMAT,
        "version": VERSION,
        "options": options,
        "captions_sha256": digest,
        "classes_sha256": text_hash(given_classes(config.classes)),
        "stop_words_sha256": text_hash(sorted(read_stop_words(config.stop_words))),
    }


def _require_same(out: Path, meta_path: Path, provenance: dict[str, Any]) -> None:
    remedy = "delete it or give another out="
    if not meta_path.exists():
        raise InputError(
            f"{out} exists but was not written by this job ({meta_path.name} is missing); {remedy}"
        )
    meta = read_json(meta_path, "description of the pool")
    there = (meta.get("options") or {}) | {key: meta.get(key) for key in SAME}
    here = provenance["options"] | {key: provenance[key] for key in SAME}
    differing = differences(there, here)
    if differing:
        raise InputError(f"{out} was made with other options ({'; '.join(differing[:3])}); {remedy}")


def _nothing_left(config: ConceptsConfig, tally: ConceptCounts) -> JobError:
    where = config.captions or f"the source {config.source['name']}"
    if not tally.counts:
        return JobError(f"no noun phrase was found in {where}; is language={config.language or 'en'} right?")
    name, most = max(tally.counts.items(), key=lambda item: item[1])
    # About the hundred most frequent concepts, so that the suggestion leaves a pool and not one name.
    hundredth = sorted(tally.counts.values(), reverse=True)[:100][-1]
    return JobError(
        f"no concept of {where} is named by {config.min_count} captions; the most frequent, {name!r}, by "
        f"{most}: try min_count={max(min(hundredth, most), 1)}"
    )


def _print_summary(out: Path, concepts: list[Concept], meta: dict[str, Any], min_count: int) -> None:
    print(f"{meta['captions_read']:,} captions, {meta['distinct_captions']:,} of them distinct")
    kinds = Counter(concept.kind for concept in concepts)
    split = ", ".join(f"{number:,} {kind}" for kind, number in sorted(kinds.items()))
    print(f"{len(concepts):,} concepts at min_count={min_count} ({split}) in {out}")
    print(f"{meta['coco80_held']} of COCO's 80 names are among them by their count")
    print("most frequent: " + ", ".join(f"{concept.concept} {concept.count:,}" for concept in concepts[:10]))


def explain(config: ConceptsConfig, concepts: list[Concept]) -> str:
    """Returns lines that say where `config.explain` comes from, or what kept it out of the pool.

    Only the captions that may hold the phrase are parsed again.

    Args:
        config: the options that the pool was made with.
        concepts: the pool, in the order of its file.
    """
    classes = given_classes(config.classes)
    parser = parser_of(config, classes)
    parser.stop_words = frozenset()  # it must see what the pool's parser dropped
    asked = cleaned(config.explain.lower())
    phrase = next(iter(next(parser.parse([asked]))), None)
    aliases = aliases_of(classes)
    name = asked
    ranks = {concept.concept: rank for rank, concept in enumerate(concepts, start=1)}
    for candidate in (asked, phrase.text if phrase else asked):
        name = aliases.get(candidate, candidate)
        if name in ranks:
            return _present(asked, concepts[ranks[name] - 1], ranks[name], len(concepts))
    return _absent(config, parser, name)


def _present(asked: str, concept: Concept, rank: int, total: int) -> str:
    kinds = {
        "given": "given by a class list",
        "head": "the head noun of phrases",
        "phrase": "a full phrase",
    }
    called = "" if asked == concept.concept else f" as {concept.concept!r}"
    lines = [
        f"{asked!r} is in the pool{called}: {kinds.get(concept.kind, concept.kind)}, named by "
        f"{concept.count:,} captions, rank {rank:,} of {total:,}"
    ]
    if concept.synonyms:
        lines.append(f"  counted with it: {', '.join(concept.synonyms)}")
    return "\n".join([*lines, *(f"  {example}" for example in concept.examples)])


def _absent(config: ConceptsConfig, parser: PhraseParser, name: str) -> str:
    dropped = read_stop_words(config.stop_words)
    source = config.stop_words or "the list that comes with us"
    # The lemmatiser changes the end of a word, and of the irregular ones ("people", "men") a good part of it.
    stems = [word[: max(1, len(word) - 4)] for word in name.split()]
    likely = Counter(
        text
        for text in config.texts()
        if all(any(word.startswith(stem) for word in text.lower().split()) for stem in stems)
    )
    times_named, examples, hiding = 0, list[str](), Counter[str]()
    related: Counter[str] = Counter()
    parsed = track(parser.parse(likely), "looking at captions", total=len(likely))
    for (text, times), phrases in zip(likely.items(), parsed, strict=True):
        hits = [phrase for phrase in phrases if name in (phrase.text, phrase.head)]
        related.update({phrase.text for phrase in phrases if set(name.split()) & set(phrase.text.split())})
        if not hits:
            continue
        times_named += times
        examples += [text] if len(examples) < EXAMPLES else []
        hiding.update({word for phrase in hits if (word := hidden_by(phrase, dropped))})
    return _reason(config, name, times_named, examples, hiding, related, source)


def _reason(
    config: ConceptsConfig,
    name: str,
    times: int,
    examples: list[str],
    hiding: Counter[str],
    related: Counter[str],
    source: str,
) -> str:
    if hiding:
        word = hiding.most_common(1)[0][0]
        lines = [
            f"{name!r} is not in the pool: {word!r} is dropped as a stop word of {source} ({times:,} times)"
        ]
    elif times:
        lines = [f"{name!r} is not in the pool: {times:,} captions name it, min_count={config.min_count}"]
    else:
        lines = [f"{name!r} is not in the pool: no caption names it as a noun phrase or head noun"]
        near = ", ".join(f"{phrase} {number:,}" for phrase, number in related.most_common(_LISTED))
        lines += [f"  phrases with the same words: {near}"] if near else []
    return "\n".join([*lines, *(f"  {example}" for example in examples)])
