"""Coverage of mined pairs: images and concepts with regions, and phrases without."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from regionclip.concepts.phrases import Phrase, hidden_by
from regionclip.mining.miner import row_of

EXAMPLES = 3
_AT_ONCE = 4096  # images whose captions are parsed together


@dataclass
class ConceptUse:
    """How captions and regions use one concept.

    Attributes:
        concept: its name; for a phrase outside the pool its head noun.
        in_pool: whether mining knew it.
        images: images whose captions name it.
        matched: those of them with a region of it.
        regions: regions of it.
        probability: mean over those regions; 0 when there are none.
        examples: up to three captions that name it, of images without a region of it.
    """

    concept: str
    in_pool: bool
    images: int = 0
    matched: int = 0
    regions: int = 0
    probability: float = 0.0
    examples: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Coverage:
    """Counts over a mined set.

    Attributes:
        images: listed in the captions file.
        captioned: of these, with a caption.
        with_pairs: of these, with a region.
        regions_per_image: number of regions -> images with so many, of all images.
        uses: every concept of the pool and every phrase outside it.
    """

    images: int
    captioned: int
    with_pairs: int
    regions_per_image: Mapping[int, int]
    uses: Sequence[ConceptUse]

    def metrics(self) -> dict[str, float]:
        """Returns the counts by name, and the shares that they make; a share of nothing is 0."""
        pool = [use for use in self.uses if use.in_pool]
        phrases, matched = sum(use.images for use in pool), sum(use.matched for use in pool)
        regions = sum(count * images for count, images in self.regions_per_image.items())
        return {
            "images": self.images,
            "images_with_captions": self.captioned,
            "images_with_pairs": self.with_pairs,
            "regions": regions,
            "regions_per_image": regions / max(self.images, 1),
            "concepts": len(pool),
            "concepts_named": sum(bool(use.images) for use in pool),
            "concepts_with_pairs": sum(bool(use.regions) for use in pool),
            "phrases": phrases,
            "phrases_matched": matched / max(phrases, 1),
            "phrases_outside_the_pool": sum(use.images for use in self.uses if not use.in_pool),
        }

    def never_matched(self) -> list[ConceptUse]:
        """Returns what captions name and no image has a region of, the most frequent first."""
        never = (use for use in self.uses if use.images and not use.matched)
        return sorted(never, key=lambda use: (-use.images, use.concept))

    def by_regions(self) -> list[ConceptUse]:
        """Returns the concepts of the pool, those with the most regions first."""
        pool = (use for use in self.uses if use.in_pool)
        return sorted(pool, key=lambda use: (-use.regions, -use.images, use.concept))


@dataclass(frozen=True)
class CoveredImage:
    """What coverage needs of one image.

    Attributes:
        captions: of it, cleaned.
        concepts: (concept, probability) of each of its regions.
    """

    captions: Sequence[str]
    concepts: Sequence[tuple[str, float]]


def cover(
    images: Iterable[CoveredImage],
    pool: Sequence[str],
    rows: dict[str, int],
    parse: Callable[[Sequence[str]], Iterable[list[Phrase]]],
    stop_words: Collection[str] = (),
) -> Coverage:
    """Measures what mining covered; of the images some thousand are in memory at a time.

    A concept counts once an image, however many captions and phrases name it; a phrase stands for the concept
    that mining takes it for (`regionclip.mining.miner.row_of`).

    Args:
        images: all that were mined, those without regions too.
        pool: the concepts that mining knew.
        rows: form in a caption -> place in the pool (`regionclip.mining.miner.rows_of`).
        parse: turns captions into the phrases of each, in their order.
        stop_words: heads and phrases that no image shows; outside the pool they are not missed.
    """
    uses = {name: ConceptUse(name, True) for name in pool}
    sums: dict[str, float] = {}
    unseen = frozenset(stop_words)
    counts: Counter[int] = Counter()
    captioned = 0
    images = iter(images)
    while some := list(itertools.islice(images, _AT_ONCE)):
        parsed = iter(parse([text for image in some for text in image.captions]))
        for image in some:
            found = {concept for concept, _ in image.concepts}
            counts[len(image.concepts)] += 1
            captioned += bool(image.captions)
            for concept, probability in image.concepts:
                uses.setdefault(concept, ConceptUse(concept, True)).regions += 1
                sums[concept] = sums.get(concept, 0.0) + probability
            phrases = [(text, phrase) for text in image.captions for phrase in next(parsed)]
            _count_phrases(phrases, found, uses, pool, rows, unseen)
    for name, total in sums.items():
        uses[name].probability = total / uses[name].regions
    with_pairs = sum(number for regions, number in counts.items() if regions)
    return Coverage(counts.total(), captioned, with_pairs, counts, list(uses.values()))


def _count_phrases(
    phrases: Sequence[tuple[str, Phrase]],
    found: Collection[str],
    uses: dict[str, ConceptUse],
    pool: Sequence[str],
    rows: dict[str, int],
    unseen: frozenset[str],
) -> None:
    """Counts what one image's captions name; `phrases` with the captions that they stand in."""
    seen: set[str] = set()
    for text, phrase in phrases:
        row = row_of(phrase, rows)
        name = phrase.head if row is None else pool[row]
        if name in seen or (row is None and hidden_by(phrase, unseen) is not None):
            continue
        seen.add(name)
        use = uses.setdefault(name, ConceptUse(name, False))
        use.images += 1
        if name in found:
            use.matched += 1
        elif len(use.examples) < EXAMPLES:
            use.examples.append(text)


def reasons(skipped: Iterable[Mapping[str, Any]]) -> list[tuple[str, int, list[str]]]:
    """Groups the entries of `skipped.jsonl`.

    Returns:
        (reason without the file's own name, images, up to three file names), the most frequent first.
    """
    counts: Counter[str] = Counter()
    examples: dict[str, list[str]] = {}
    for entry in skipped:
        name = str(entry["file_name"])
        words = ("…" if word.endswith(name) else word for word in str(entry["reason"]).split(" "))
        reason = " ".join(words)
        counts[reason] += 1
        own = examples.setdefault(reason, [])
        if len(own) < EXAMPLES:
            own.append(name)
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return [(reason, count, examples[reason]) for reason, count in ordered]
