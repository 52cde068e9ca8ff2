"""Why a phrase is in a pool of concepts, or why not."""

from __future__ import annotations

from collections import Counter

from clip_base.progress import track
from regionclip.captions import read_texts
from regionclip.concepts import EXAMPLES, Concept, ConceptsConfig, aliases_of, given_classes, parser_of
from regionclip.phrases import PhraseParser, hidden_by, read_invisible

_LISTED = 5  # phrases shown that hold the same word


def explain(config: ConceptsConfig, concepts: list[Concept]) -> str:
    """Returns lines that say where `config.explain` comes from, or what kept it out of the pool.

    Only the captions that may hold the phrase are parsed again.

    Args:
        config: the options that the pool was made with.
        concepts: the pool, in the order of its file.
    """
    classes = given_classes(config.classes)
    parser = parser_of(config, classes)
    parser.invisible = frozenset()  # it must see what the pool's parser dropped
    asked = " ".join(config.explain.lower().split())
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
    dropped = read_invisible(config.invisible)
    source = config.invisible or "the list that comes with us"
    # The lemmatiser changes the end of a word, and of the irregular ones ("people", "men") a good part of it.
    stems = [word[: max(1, len(word) - 4)] for word in name.split()]
    likely = Counter(
        text
        for text in read_texts(config.captions, config.column, config.encoding)
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
            f"{name!r} is not in the pool: {word!r} is dropped as invisible by {source} ({times:,} captions)"
        ]
    elif times:
        lines = [f"{name!r} is not in the pool: {times:,} captions name it, min_count={config.min_count}"]
    else:
        lines = [f"{name!r} is not in the pool: no caption names it as a noun phrase or head noun"]
        near = ", ".join(f"{phrase} {number:,}" for phrase, number in related.most_common(_LISTED))
        lines += [f"  phrases with the same words: {near}"] if near else []
    return "\n".join([*lines, *(f"  {example}" for example in examples)])
