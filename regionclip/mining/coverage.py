"""Coverage of mined pairs: images and concepts with regions, and phrases without."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from regionclip.concepts.phrases import Phrase, hidden_by
from regionclip.mining.miner import row_of
from regionclip.mining.shards import MinedRegion

EXAMPLES = 3


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


def cover(
    regions: Iterable[MinedRegion],
    captions: Mapping[int, Sequence[str]],
    images: Iterable[int],
    pool: Sequence[str],
    rows: dict[str, int],
    parse: Callable[[Sequence[str]], Iterable[list[Phrase]]],
    stop_words: Collection[str] = (),
) -> Coverage:
    """Measures what mining covered.

    A concept counts once an image, however many captions and phrases name it; a phrase stands for the concept
    that mining takes it for (`regionclip.mining.miner.row_of`).

    Args:
        regions: as mined.
        captions: image id -> its captions.
        images: ids of all images.
        pool: the concepts that mining knew.
        rows: form in a caption -> place in the pool (`regionclip.mining.miner.rows_of`).
        parse: turns captions into the phrases of each, in their order.
        stop_words: heads and phrases that no image shows; outside the pool they are not missed.
    """
    ids = list(images)
    found: dict[int, Counter[str]] = {key: Counter() for key in ids}
    probabilities: dict[str, list[float]] = {}
    for region in regions:
        found.setdefault(region.image_id, Counter())[region.concept] += 1
        probabilities.setdefault(region.concept, []).append(region.concept_probs[0])
    uses = {name: ConceptUse(name, True) for name in pool}
    unseen = frozenset(stop_words)
    owners = [key for key in ids for _ in captions.get(key, ())]
    texts = [text for key in ids for text in captions.get(key, ())]
    seen: set[tuple[int, str]] = set()
    for key, text, phrases in zip(owners, texts, parse(texts), strict=True):
        for phrase in phrases:
            row = row_of(phrase, rows)
            name = phrase.head if row is None else pool[row]
            if (key, name) in seen or (row is None and hidden_by(phrase, unseen) is not None):
                continue
            seen.add((key, name))
            use = uses.setdefault(name, ConceptUse(name, False))
            use.images += 1
            if name in found[key]:
                use.matched += 1
            elif len(use.examples) < EXAMPLES:
                use.examples.append(text)
    for name, values in probabilities.items():
        use = uses.setdefault(name, ConceptUse(name, True))
        use.regions, use.probability = len(values), fmean(values)
    counts = Counter(own.total() for own in found.values())
    with_pairs = sum(images for number, images in counts.items() if number)
    return Coverage(len(ids), len(set(owners)), with_pairs, counts, list(uses.values()))


def reasons(skipped: Iterable[Mapping[str, Any]]) -> list[tuple[str, int, list[str]]]:
    """Groups the entries of `skipped.jsonl`.

    Returns:
        (reason without the file's own name, images, up to three file names), the most frequent first.
    """
    groups: dict[str, list[str]] = {}
    for entry in skipped:
        name = str(entry["file_name"])
        words = ("…" if word.endswith(name) else word for word in str(entry["reason"]).split(" "))
        groups.setdefault(" ".join(words), []).append(name)
    ordered = sorted(groups.items(), key=lambda item: (-len(item[1]), item[0]))
    return [(reason, len(names), names[:EXAMPLES]) for reason, names in ordered]
