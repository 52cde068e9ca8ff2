"""The page of the report on mined pairs: what its template shows, from data that is read already."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import nan
from pathlib import Path
from typing import Any

from torch import Tensor

from regionclip.metrics.average_precision import NOTHING
from regionclip.mining.coverage import ConceptUse, Coverage, reasons
from regionclip.mining.quality import PairQuality
from regionclip.mining.shards import MinedRegion
from regionclip.reports import html
from regionclip.reports.charts import Chart, histogram, line_chart, stacked_bars
from regionclip.reports.crops import RGB, Crop, CropBudget
from regionclip.reports.html import DASH, percent

BINS = 20
MAX_REGIONS = 12  # the last bar of regions per image holds all images with more
MAX_CAPTION = 140  # letters of a caption that are shown; captions of the web may fill a page
THRESHOLDS = (*(step / 50 for step in range(50)), 0.99)
# Rows of the tables by threshold.
SHOWN_THRESHOLDS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.96, 0.99)
SHARES = ("precision", "wrong_name", "no_object", "recall")
OUTCOME_COLORS = ("green", "red", "gray")  # correct, misclassified, background
_BOX_COLORS: dict[str | None, RGB] = {
    None: (47, 111, 208),
    "correct": (60, 200, 110),
    "misclassified": (235, 70, 80),
}
_GRAY: RGB = (200, 204, 208)


@dataclass(frozen=True)
class ReportLimits:
    """How much goes on the page.

    Attributes:
        regions: shown over all scores.
        concepts: shown.
        examples: regions per concept.
        max_report_mb: MiB of images.
        table_rows: per table.
    """

    regions: int
    concepts: int
    examples: int
    max_report_mb: float
    table_rows: int


@dataclass(frozen=True)
class ReportData:
    """What is known of a mined set.

    Attributes:
        manifest: of the mined folder.
        images: folder that the regions' file names are relative to.
        regions: as mined.
        coverage: what they cover.
        skipped: entries of `skipped.jsonl`.
        quality: the regions, compared with the ground truth; None: there is none.
    """

    manifest: Mapping[str, Any]
    images: Path
    regions: Sequence[MinedRegion]
    coverage: Coverage
    skipped: Sequence[Mapping[str, Any]]
    quality: PairQuality | None

    def histogram(self, what: str) -> list[int]:
        """Returns how many regions are in each of BINS equal bins of their "probability" or "objectness"."""
        counts = [0] * BINS
        for region in self.regions:
            value = region.concept_probs[0] if what == "probability" else region.objectness
            counts[min(max(int(value * BINS), 0), BINS - 1)] += 1
        return counts


@dataclass(frozen=True)
class LabeledImage:
    """A mined region for a page; its caption is `before`, the `phrase` that names it, and `after`."""

    crop: Crop
    concept: str
    probability: float
    outcome: str | None
    before: str
    phrase: str
    after: str


def make_page(data: ReportData, limits: ReportLimits) -> str:
    """Returns the page; it opens from disk and loads nothing else."""
    budget = CropBudget(round(limits.max_report_mb * 2**20))
    by_score = pick_pairs(data.regions, limits.regions)
    concepts: dict[str, list[int]] = {}
    for place, region in enumerate(data.regions):
        concepts.setdefault(region.concept, []).append(place)
    never = data.coverage.never_matched()
    return html.render(
        "mining.html",
        limits=limits,
        counts=data.coverage.metrics(),
        figures=_figures(data),
        sources=_sources(data.manifest),
        quality=_quality(data.quality) if data.quality else None,
        score_charts=_score_charts(data),
        coverage_charts=_coverage_charts(data.coverage),
        concept_rows=[_concept_row(use) for use in data.coverage.by_regions() if use.regions or use.images],
        by_score=_labeled(data, by_score, budget),
        by_concept=_by_concept(data, concepts, limits, budget),
        num_concepts=len(concepts),
        budget=budget,
        never_matched=[
            (
                text,
                [
                    [use.concept, f"{use.images:,}", " · ".join(use.examples)]
                    for use in never
                    if use.in_pool == known
                ],
            )
            for text, known in (
                (
                    "Concepts of the pool that captions name and that no region of those images was given:",
                    True,
                ),
                ("Phrases that no concept of the pool stands for, by their head noun:", False),
            )
        ],
        skipped=[[reason, f"{count:,}", ", ".join(names)] for reason, count, names in reasons(data.skipped)],
        num_skipped=len(data.skipped),
    )


def pick_pairs(regions: Sequence[MinedRegion], count: int) -> list[int]:
    """Picks pairs from all scores and over the concepts, whether they are correct or not.

    The pairs, sorted by probability, are cut into `count` equal parts; from each comes the first pair of the
    concept that was picked least so far.

    Returns:
        Places in `regions`, the most probable first.
    """
    order = sorted(range(len(regions)), key=lambda place: (-regions[place].concept_probs[0], place))
    count = min(count, len(order))
    used: Counter[str] = Counter()
    images: Counter[int] = Counter()
    chosen = []
    for part in range(count):
        places = order[part * len(order) // count : (part + 1) * len(order) // count]
        best = min(places, key=lambda place: (used[regions[place].concept], images[regions[place].image_id]))
        used[regions[best].concept] += 1
        images[regions[best].image_id] += 1
        chosen.append(best)
    return chosen


def pick_concepts(counts: Mapping[str, int], limit: int) -> list[str]:
    """Picks concepts to show: half are the most frequent ones, half are spread evenly over the rest.

    Args:
        counts: concept -> regions.
        limit: most concepts to pick.

    Returns:
        Names, the most frequent first.
    """
    names = [name for name, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])) if count]
    if len(names) <= limit:
        return names
    frequent = limit - limit // 2
    rest = names[frequent:]
    spread = limit // 2
    return names[:frequent] + [rest[(2 * place + 1) * len(rest) // (2 * spread)] for place in range(spread)]


def labeled_image(
    folder: Path, region: MinedRegion, outcome: str | None, budget: CropBudget
) -> LabeledImage | None:
    """Returns a mined region for a page, or None when the budget gives no crop of it.

    Args:
        folder: what the region's file name is relative to.
        region: the pair.
        outcome: one of `regionclip.mining.quality.VERDICTS`; None: there is no ground truth.
        budget: makes the crop.
    """
    alt = f"a region of {Path(region.file_name).name} named {region.concept}"
    crop = budget.crop(folder / region.file_name, region.box, _BOX_COLORS.get(outcome, _GRAY), alt)
    if crop is None:
        return None
    caption = caption_around(region.caption, region.phrase)
    return LabeledImage(crop, region.concept, region.concept_probs[0], outcome, *caption)


def caption_around(caption: str | None, phrase: str | None) -> tuple[str, str, str]:
    """Cuts a caption to about MAX_CAPTION letters: what stands before its phrase, the phrase, the rest.

    A phrase that stands there in another form ("people" for "person") is put before the caption.
    """
    if not caption:
        return "not named in a caption", "", ""
    phrase = phrase or ""
    start = caption.casefold().find(phrase.casefold())
    if not phrase or start < 0:
        return "", phrase, (": " if phrase else "") + _cut(caption, len(caption) - MAX_CAPTION)
    end = start + len(phrase)
    room = max(MAX_CAPTION - len(phrase), 0)
    before, within, after = caption[:start], caption[start:end], caption[end:]
    drop_before = max(len(before) - max(room // 2, room - len(after)), 0)
    drop_after = len(after) - (room - len(before) + drop_before)
    return "…" * (drop_before > 0) + before[drop_before:], within, _cut(after, drop_after)


def _cut(text: str, letters: int) -> str:
    return text[:-letters] + "…" if letters > 0 else text


def _figures(data: ReportData) -> dict[str, str]:
    """Returns the most important figures: what each counts -> itself."""
    counts = data.coverage.metrics()
    shown = {
        "images with pairs": f"{percent(counts['images_with_pairs'] / max(counts['images'], 1))} %",
        "regions per image": f"{counts['regions_an_image']:.1f}",
        "concepts with pairs": f"{counts['concepts_with_pairs']:,.0f} of {counts['concepts']:,.0f}",
        "of the captions’ phrases matched": f"{percent(counts['phrases_matched'])} %",
    }
    if data.quality is not None:
        metrics = data.quality.metrics()
        for measure in ("precision", "recall"):
            for part in ("_base", "_novel") if data.quality.split else ("",):
                share = metrics[measure + part]
                shown[f"{measure}{part.replace('_', ', ')}"] = (
                    DASH if share == NOTHING else f"{percent(share)} %"
                )
    return shown


def _sources(manifest: Mapping[str, Any]) -> str:
    config = manifest["config"]
    teacher = f"{Path(config['weights']).name} ({config['teacher']})"
    parts = (_options(manifest[part]) for part in ("matcher", "proposer"))
    return "Matcher: {}; proposer: {}; teacher: {}.".format(*parts, teacher)


def _options(part: Mapping[str, Any]) -> str:
    others = [
        f"{key}={Path(value).name if isinstance(value, str) else value}"
        for key, value in part.items()
        if key != "name" and value != ""
    ]
    return str(part["name"]) + (f" ({', '.join(others)})" if others else "")


def _quality(quality: PairQuality) -> dict[str, Any]:
    """Returns what the page says of the ground truth."""
    rows = sorted(quality.by_category(), key=lambda row: (row["part"] != "novel", -row["pairs"], row["name"]))
    values = {"probability": quality.probabilities, "objectness": quality.objectness}
    return {
        "metrics": quality.metrics(),
        "is_split": quality.split is not None,
        "by_value": [_by_value(quality, *pair) for pair in values.items()] if quality.can_be_judged else [],
        "categories": [
            [
                ("★ " if row["part"] == "novel" else "") + row["name"],
                f"{row['objects']:,}",
                f"{row['pairs']:,}",
                *(percent(row[key]) for key in SHARES),
            ]
            for row in rows
        ],
        "confusions": [
            [named, shown, f"{number:,}"] for named, shown, number in quality.judgement.confusions()
        ],
    }


def _by_value(quality: PairQuality, what: str, values: Tensor) -> dict[str, Any]:
    """Returns charts and a table by the regions' probability or objectness: values [P]."""
    rows = quality.by_threshold(values, THRESHOLDS)
    parts = ("_base", "_novel") if quality.split else ("",)
    best = quality.least_mistaken(rows)
    shown: list[Mapping[str, float]] = []
    for row in rows:
        wanted = row["threshold"] in SHOWN_THRESHOLDS and (not shown or row["pairs"] != shown[-1]["pairs"])
        if wanted or row["threshold"] == best:
            shown.append(row)
    curves = {
        f"{measure}{part.replace('_', ', ')}": [
            (row["threshold"], nan if row[measure + part] == NOTHING else row[measure + part]) for row in rows
        ]
        for measure in ("precision", "recall")
        for part in parts
    }
    title = f"Outcomes by {what}, and the number of regions"
    return {
        "charts": [
            line_chart(f"Precision and recall by {what}", curves, f"{what} of at least", shares=True),
            stacked_bars(title, *quality.by_bin(values), colors=OUTCOME_COLORS),
        ],
        "titles": (what, "regions", *("correct", "misclassified", "background", "recall") * len(parts)),
        "groups": [("", 2), *((part[1:], len(SHARES)) for part in parts)] if quality.split else [],
        "best": [place for place, row in enumerate(shown) if row["threshold"] == best],
        "rows": [
            [
                f"≥ {row['threshold']:.2f}",
                f"{row['pairs']:,.0f}",
                *(percent(row[key + part]) for part in parts for key in SHARES),
            ]
            for row in shown
        ],
    }


def _score_charts(data: ReportData) -> list[Chart]:
    labels = [f"{place / BINS:.1f}" if place % 2 == 0 else "" for place in range(BINS)]
    titles = {"probability": "Probability of the first concept", "objectness": "Objectness of the regions"}
    return [histogram(title, labels, data.histogram(what), what) for what, title in titles.items()]


def _coverage_charts(coverage: Coverage) -> list[Chart]:
    images = Counter[int]()
    for number, count in coverage.regions_an_image.items():
        images[min(number, MAX_REGIONS)] += count
    decades = ["0", "1+", "10+", "100+", "1k+", "10k+", "100k+"]
    concepts = Counter(min(len(str(use.regions)), 6) * bool(use.regions) for use in coverage.by_regions())
    labels = [*map(str, range(MAX_REGIONS)), f"{MAX_REGIONS}+"]
    return [
        histogram(
            "Images by their number of regions",
            labels,
            [images[n] for n in range(len(labels))],
            "regions per image",
        ),
        histogram(
            "Concepts by their number of regions",
            decades,
            [concepts[n] for n in range(len(decades))],
            "regions per concept",
        ),
    ]


def _concept_row(use: ConceptUse) -> list[str]:
    probability = f"{use.probability:.2f}" if use.regions else DASH
    matched = percent(use.matched / use.images) if use.images else DASH
    return [use.concept, f"{use.regions:,}", probability, f"{use.images:,}", matched]


def _labeled(data: ReportData, places: Sequence[int], budget: CropBudget) -> list[LabeledImage]:
    words = data.quality.words if data.quality else None
    made = (
        labeled_image(data.images, data.regions[place], words[place] if words else None, budget)
        for place in places
    )
    return [one for one in made if one is not None]


def _by_concept(
    data: ReportData, concepts: Mapping[str, Sequence[int]], limits: ReportLimits, budget: CropBudget
) -> list[tuple[str, str, list[LabeledImage]]]:
    """Returns concepts with a note on their regions, and examples; those without an image are left out."""
    counts = {name: len(places) for name, places in concepts.items()}
    shown = []
    for name in pick_concepts(counts, limits.concepts):
        places = concepts[name]
        chosen = pick_pairs([data.regions[place] for place in places], limits.examples)
        images = _labeled(data, [places[number] for number in chosen], budget)
        if images:
            shown.append((name, _note(data, places), images))
    return shown


def _note(data: ReportData, places: Sequence[int]) -> str:
    note = f"{len(places):,} region{'s' * (len(places) != 1)}"
    if data.quality is None:
        return note
    outcomes = Counter(data.quality.words[place] for place in places)
    evaluated = outcomes.total() - outcomes["ignored"]
    return note + (f", {percent(outcomes['correct'] / evaluated)} % correct" if evaluated else "")
