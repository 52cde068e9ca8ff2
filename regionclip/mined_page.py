"""The page of the report on mined pairs, section by section, from facts that are read already."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from regionclip import gallery, page
from regionclip.coverage import ConceptUse, Coverage, reasons
from regionclip.evaluation import NOTHING
from regionclip.figures import DASH, histogram, percent
from regionclip.judged import JudgedRegions
from regionclip.mined_truth import truth_sections
from regionclip.shards import MinedRegion

BINS = 20
MOST_REGIONS = 12  # the last bar of regions an image holds all images with more


@dataclass(frozen=True)
class Sizes:
    """How much goes on the page; the fields are those of `ReportConfig`."""

    regions: int
    concepts: int
    examples: int
    megabytes: float
    listed: int


@dataclass(frozen=True)
class Facts:
    """What is known of a mined set.

    Attributes:
        manifest: of the mined folder.
        images: folder that the regions' file names are relative to.
        regions: as mined.
        coverage: what they cover.
        skipped: entries of `skipped.jsonl`.
        judged: the regions with the truth's verdicts; None: there is no truth.
    """

    manifest: Mapping[str, Any]
    images: Path
    regions: Sequence[MinedRegion]
    coverage: Coverage
    skipped: Sequence[Mapping[str, Any]]
    judged: JudgedRegions | None

    def histogram(self, what: str) -> list[int]:
        """Returns how many regions lie in each of BINS equal bins of their "probability" or "objectness"."""
        counts = [0] * BINS
        for region in self.regions:
            value = region.concept_probs[0] if what == "probability" else region.objectness
            counts[min(max(int(value * BINS), 0), BINS - 1)] += 1
        return counts


def make_page(facts: Facts, sizes: Sizes) -> str:
    """Returns the page; it opens from disk and loads nothing else."""
    album = gallery.Album(facts.images, round(sizes.megabytes * 2**20))
    sections = [
        *truth_sections(facts.judged, sizes.listed),
        _scores(facts),
        _coverage(facts.coverage, sizes),
        *_gallery(facts, sizes, album),
        _never_matched(facts.coverage, sizes),
        _skipped(facts.skipped, sizes),
        _places(facts.judged is not None),
    ]
    values = {
        "lead": _lead(facts),
        "tiles": page.tiles(_tiles(facts)),
        "made": _made(facts.manifest),
        "sections": "\n".join(sections),
    }
    return page.document("mined_report.html", "Mined region-phrase pairs: can one trust them?", values)


def _lead(facts: Facts) -> str:
    counts = facts.coverage.metrics()
    if not facts.regions:
        return f"No region was kept in {counts['images']:,.0f} images: the sections below may say why."
    judged = "with true boxes to judge them by" if facts.judged else "without true boxes to judge them by"
    return (
        f"{counts['regions']:,.0f} regions of {counts['images']:,.0f} images were given a name of a pool of "
        f"{counts['concepts']:,.0f} concepts. Here is what they look like and what they cover, {judged}."
    )


def _tiles(facts: Facts) -> dict[str, str]:
    counts = facts.coverage.metrics()
    shown = {
        "images with pairs": f"{percent(counts['images_with_pairs'] / max(counts['images'], 1))} %",
        "regions an image": f"{counts['regions_an_image']:.1f}",
        "concepts with pairs": f"{counts['concepts_with_pairs']:,.0f} of {counts['concepts']:,.0f}",
        "of the captions’ phrases matched": f"{percent(counts['phrases_matched'])} %",
    }
    if facts.judged is not None:
        truth = facts.judged.metrics()
        for measure in ("precision", "recall"):
            for part in ("_base", "_novel") if facts.judged.split else ("",):
                shown[f"{measure}{part.replace('_', ', ')}"] = _percent(truth[measure + part])
    return shown


def _percent(share: float) -> str:
    return DASH if share == NOTHING else f"{percent(share)} %"


def _made(manifest: Mapping[str, Any]) -> str:
    config = manifest["config"]
    parts = {
        "Matcher": _options(manifest["matcher"]),
        "proposer": _options(manifest["proposer"]),
        "teacher": f"{Path(config['weights']).name} ({config['teacher']})",
    }
    return escape("; ".join(f"{what}: {value}" for what, value in parts.items()) + ".")


def _options(part: Mapping[str, Any]) -> str:
    others = [
        f"{key}={Path(value).name if isinstance(value, str) else value}"
        for key, value in part.items()
        if key != "name" and value != ""
    ]
    return str(part["name"]) + (f" ({', '.join(others)})" if others else "")


def _scores(facts: Facts) -> str:
    labels = [f"{place / BINS:.1f}" if place % 2 == 0 else "" for place in range(BINS)]
    return page.section(
        "Scores",
        page.charts(
            histogram(
                "Probability of the first concept", labels, facts.histogram("probability"), "probability"
            ),
            histogram("Objectness of the regions", labels, facts.histogram("objectness"), "objectness"),
        ),
    )


def _coverage(coverage: Coverage, sizes: Sizes) -> str:
    counts = coverage.metrics()
    fewest = Counter[int]()
    for number, images in coverage.regions_an_image.items():
        fewest[min(number, MOST_REGIONS)] += images
    labels = [str(number) for number in range(MOST_REGIONS)] + [f"{MOST_REGIONS}+"]
    bars = [fewest[number] for number in range(MOST_REGIONS + 1)]
    text = (
        f"{counts['images_with_captions']:,.0f} of {counts['images']:,.0f} images have captions and "
        f"{counts['images_with_pairs']:,.0f} have pairs. The captions name {counts['concepts_named']:,.0f} "
        f"of the pool’s {counts['concepts']:,.0f} concepts, and {counts['concepts_with_pairs']:,.0f} have "
        f"pairs. Counted once an image, the captions hold {counts['phrases']:,.0f} phrases of the pool, of "
        f"which {percent(counts['phrases_matched'])} % found a region in their image, and "
        f"{counts['phrases_outside_the_pool']:,.0f} that no concept of the pool stands for."
    )
    sizes_of = Counter(min(len(str(use.regions)), 6) * bool(use.regions) for use in coverage.by_regions())
    decades = ["0", "1+", "10+", "100+", "1k+", "10k+", "100k+"]
    rows = [_use_row(use) for use in coverage.by_regions() if use.regions or use.images]
    return page.section(
        "Coverage",
        page.paragraph(text),
        page.charts(
            histogram("Images by their number of regions", labels, bars, "regions an image"),
            histogram(
                "Concepts by their number of regions",
                decades,
                [sizes_of[place] for place in range(len(decades))],
                "regions a concept",
            ),
        ),
        page.plain_table(
            ("concept", "regions", "mean probability", "images naming it", "% with a region of it"),
            rows[: sizes.listed],
        ),
        page.more(len(rows), sizes.listed, "concepts.csv"),
    )


def _use_row(use: ConceptUse) -> list[str]:
    probability = f"{use.probability:.2f}" if use.regions else DASH
    matched = percent(use.matched / use.images) if use.images else DASH
    return [use.concept, f"{use.regions:,}", probability, f"{use.images:,}", matched]


def _gallery(facts: Facts, sizes: Sizes, album: gallery.Album) -> list[str]:
    """Returns the galleries by score and by concept; none without regions."""
    regions = facts.regions
    if not regions:
        return []
    words: Sequence[str | None] = facts.judged.words if facts.judged else [None] * len(regions)

    def figures(places: Sequence[int]) -> str:
        made = album.figures([regions[place] for place in places], [words[place] for place in places])
        return f'<div class="pairs">{made}</div>' if made else ""

    sections = []
    if sizes.regions:
        by_score = figures(gallery.pick_pairs(regions, sizes.regions))
        sections.append(page.section("Regions by score", page.paragraph(BY_SCORE + _tags(facts)), by_score))
    of_concept: dict[str, list[int]] = {}
    for place, region in enumerate(regions):
        of_concept.setdefault(region.concept, []).append(place)
    parts = []
    counts = {name: len(places) for name, places in of_concept.items()}
    for name in gallery.pick_concepts(counts, sizes.concepts):
        places = of_concept[name]
        chosen = gallery.pick_pairs([regions[place] for place in places], sizes.examples)
        made = figures([places[number] for number in chosen])
        if made:
            parts.append(
                f'<h3 class="concept">{escape(name)}<span>{_facts_of(places, words)}</span></h3>{made}'
            )
    if sizes.concepts and sizes.examples:
        some = f"{len(parts)} of {len(counts):,} concepts with regions{WHICH}"
        text = some if len(parts) < len(counts) else f"All {len(counts):,} concepts with regions."
        sections.append(page.section("Regions by concept", page.paragraph(text), *parts, _left_out(album)))
    return sections


BY_SCORE = (
    "A sample over all probabilities and concepts, the surest first: a region with some of its surroundings, "
    "its concept and probability, and the caption that names it, the phrase underlined."
)
WHICH = ": half of them are the most frequent, the others are spread over the rest."


def _tags(facts: Facts) -> str:
    if facts.judged is None:
        return ""
    return (
        " Right: an object of that name is there; wrong name: an object of another name; no object: none "
        "fills that box (IoU below 0.5); cannot be judged: no category of the annotations."
    )


def _facts_of(places: Sequence[int], words: Sequence[str | None]) -> str:
    counts = Counter(words[place] for place in places)
    judged = sum(count for word, count in counts.items() if word not in (None, "unknown"))
    right = f", {percent(counts['right'] / judged)} % right" if judged else ""
    return f"{len(places):,} region{'s' * (len(places) != 1)}{right}"


def _left_out(album: gallery.Album) -> str:
    notes = []
    if album.left_out:
        notes.append(f"{album.left_out:,} pictures were left out to keep the page small (megabytes=)")
    if album.unreadable:
        notes.append(f"{album.unreadable:,} pictures could not be read")
    return f'<p class="note">{"; ".join(notes)}.</p>' if notes else ""


def _never_matched(coverage: Coverage, sizes: Sizes) -> str:
    never = coverage.never_matched()
    known = [use for use in never if use.in_pool]
    unknown = [use for use in never if not use.in_pool]
    parts = []
    for uses, text in (
        (known, "Concepts of the pool that captions name and that no region of those images was given:"),
        (unknown, "Phrases that no concept of the pool stands for, by their head noun:"),
    ):
        if uses:
            rows = [[use.concept, f"{use.images:,}", " · ".join(use.examples)] for use in uses]
            table = _phrase_table(rows[: sizes.listed])
            parts += [page.paragraph(text), table, page.more(len(uses), sizes.listed, "never_matched.jsonl")]
    if not parts:
        parts = [page.paragraph("Every phrase of the captions found a region in at least one image.")]
    return page.section("Phrases never matched", *parts)


def _phrase_table(rows: Sequence[Sequence[str]]) -> str:
    titles = ("phrase", "images", "captions that name it")
    return page.plain_table(titles, rows, words=1, texts=(2,))


def _skipped(skipped: Sequence[Mapping[str, Any]], sizes: Sizes) -> str:
    if not skipped:
        return page.section("Skipped images", page.paragraph("Every image gave at least one region."))
    rows = [[reason, f"{count:,}", ", ".join(names)] for reason, count, names in reasons(skipped)]
    text = f"{len(skipped):,} images gave no region; skipped.jsonl in the mined folder names each."
    table = page.plain_table(("reason", "images", "such as"), rows[: sizes.listed], texts=(2,))
    return page.section("Skipped images", page.paragraph(text), table)


def _places(judged: bool) -> str:
    files = {
        "metrics.json": "the figures of this page",
        "concepts.csv": "every concept: regions, probability, images that name it",
        "never_matched.jsonl": "every phrase that was never matched, with captions",
    }
    if judged:
        files["categories.csv"] = "every category: precision, wrong names, no object, recall"
        files["confusions.csv"] = "what was taken for what"
    lines = "\n".join(f"{name:<20}  {what}" for name, what in files.items())
    return page.section("Beside this page", f"<pre>{escape(lines)}</pre>")
