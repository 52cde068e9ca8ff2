"""The HTML report on mined pairs: data for its template."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import nan
from pathlib import Path
from typing import Any

from torch import Tensor

from clip_base.images.headers import Stored
from regionclip.metrics.average_precision import NOTHING
from regionclip.mining.coverage import Coverage
from regionclip.mining.quality import PairQuality
from regionclip.mining.shards import MinedImage, MinedRegion
from regionclip.mining.survey import BINS, Survey
from regionclip.reports import html
from regionclip.reports.charts import Chart, histogram, line_chart, share_bars, short
from regionclip.reports.crops import CropBudget, LabeledImage
from regionclip.reports.html import DASH, percent, share

MAX_REGIONS = 12  # the last bar of regions per image holds all images with more
MAX_CAPTION = 140  # letters of a caption that are shown; captions of the web may fill a page
THRESHOLDS = (*(step / 50 for step in range(50)), 0.99)
# Rows of the tables by threshold.
SHOWN_THRESHOLDS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.96, 0.99)
SHARES = ("precision", "misclassified", "background", "recall")
GRAY = (200, 204, 208)
_COLORS = {None: (47, 111, 208), "correct": (60, 200, 110), "misclassified": (235, 70, 80)}


@dataclass(frozen=True)
class ReportLimits:
    """Limits of the report.

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
    table_rows: int = 40


@dataclass(frozen=True)
class ReportData:
    """What is known of a mined set.

    Attributes:
        manifest: of the mined folder.
        survey: counts of all regions, and a sample of them.
        coverage: what they cover.
        skipped: (reason, images, examples) of the images without regions.
        quality: the sample, compared with the ground truth; None: there is none.
    """

    manifest: Mapping[str, Any]
    survey: Survey
    coverage: Coverage
    skipped: Sequence[tuple[str, int, Sequence[str]]]
    quality: PairQuality | None

    @property
    def regions(self) -> Sequence[MinedRegion]:
        """The sample."""
        return self.survey.regions

    @property
    def num_skipped(self) -> int:
        """How many images have no regions."""
        return sum(count for _, count, _ in self.skipped)


Places = Callable[[MinedImage], Path | Stored]


def make_page(data: ReportData, limits: ReportLimits, places: Places) -> str:
    """Returns the page; it opens from disk and loads nothing else.

    Args:
        data: what is shown.
        limits: how much of it.
        places: returns where an image is.
    """
    budget = CropBudget(round(limits.max_report_mb * 2**20))
    coverage, never = data.coverage, data.coverage.never_matched()
    by_score = _labeled(data, pick_pairs(data.regions, limits.regions), budget, places)
    concepts: dict[str, list[int]] = {}
    for place, region in enumerate(data.regions):
        concepts.setdefault(region.concept, []).append(place)
    return html.render(
        "mining.html",
        limits=limits,
        counts=coverage.metrics(),
        sources=_sources(data.manifest) + _sampling(data.survey),
        quality=_quality(data.quality) if data.quality else None,
        score_charts=_score_charts(data),
        coverage_charts=_coverage_charts(coverage),
        concept_rows=[
            [
                use.concept,
                use.regions,
                f"{use.probability:.2f}" if use.regions else DASH,
                use.images,
                use.matched / use.images if use.images else NOTHING,
            ]
            for use in coverage.by_regions()
            if use.regions or use.images
        ],
        by_score=by_score,
        by_concept=_by_concept(data, concepts, limits, budget, places),
        num_concepts=sum(bool(use.regions) for use in coverage.uses),
        budget=budget,
        never_matched=[
            [[use.concept, use.images, " · ".join(use.examples)] for use in never if use.in_pool == in_pool]
            for in_pool in (True, False)
        ],
        skipped=[[reason, count, ", ".join(names)] for reason, count, names in data.skipped],
        num_skipped=data.num_skipped,
    )


def outcome_chart(title: str, quality: PairQuality, values: Tensor) -> Chart:
    """Returns the outcomes of regions by bins of values [P] in [0, 1], and the number of regions."""
    bins, shares, counts = quality.by_bin(values)
    labels = [f"{label}\n{short(count)}" for label, count in zip(bins, counts, strict=True)]
    return share_bars(title, labels, shares, stacked=True, colors=("green", "red", "gray"))


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
    place: Path | Stored, region: MinedRegion, outcome: str | None, budget: CropBudget
) -> LabeledImage | None:
    """Returns a mined region for a page, or None when the budget gives no crop of it.

    Args:
        place: where the region's image is.
        region: the pair.
        outcome: one of `regionclip.mining.quality.OUTCOMES`; None: there is no ground truth.
        budget: makes the crop.
    """
    before, phrase, after = caption_around(region.caption, region.phrase)
    caption = [
        ("name", region.concept),
        ("score", f" {region.concept_probs[0]:.2f}"),
        *([(f"tag {outcome}", outcome)] if outcome else []),
        *(("quote", before), ("phrase", phrase), ("quote", after)),
    ]
    alt = f"a region of {Path(region.file_name).name} named {region.concept}"
    color, size = _COLORS.get(outcome, GRAY), (region.height, region.width)
    return budget.crop(place, size, region.box, color, alt, caption)


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


def _sources(manifest: Mapping[str, Any]) -> str:
    config = manifest["config"]
    backend = config.get("backend", {}).get("name", "clip")
    weights = Path(config["weights"]).name if backend == "clip" else f"{backend} {config['weights']}"
    teacher = f"{weights} ({config['teacher']})"
    parts = (_options(manifest[part]) for part in ("matcher", "proposer"))
    return "Matcher: {}; proposer: {}; teacher: {}.".format(*parts, teacher)


def _sampling(found: Survey) -> str:
    if not found.is_sampled:
        return ""
    return (
        f" Images and comparisons with the ground truth are of {len(found.regions):,} of the "
        f"{found.total:,} regions, those of images drawn at random; all else counts every region."
    )


def _options(part: Mapping[str, Any]) -> str:
    others = [
        f"{key}={Path(value).name if isinstance(value, str) else value}"
        for key, value in part.items()
        if key != "name" and value != ""
    ]
    return str(part["name"]) + (f" ({', '.join(others)})" if others else "")


def _quality(quality: PairQuality) -> dict[str, Any]:
    """Returns what the page says of the ground truth."""
    metrics = quality.metrics()
    parts = ("_base", "_novel") if quality.split else ("",)
    rows = sorted(quality.by_category(), key=lambda row: (row["part"] != "novel", -row["pairs"], row["name"]))
    values = {"probability": quality.probabilities, "objectness": quality.objectness}
    return {
        "metrics": metrics,
        "figures": {
            f"{measure}{part.replace('_', ', ')}": share(metrics[measure + part])
            for measure in ("precision", "recall")
            for part in parts
        },
        "is_split": quality.split is not None,
        "by_value": [_by_value(quality, parts, *pair) for pair in values.items() if quality.has_ground_truth],
        "categories": [
            [
                "★ " * (row["part"] == "novel") + row["name"],
                *(row[key] for key in ("objects", "pairs", *SHARES)),
            ]
            for row in rows
        ],
        "confusions": quality.labels.confusions(),
    }


def _by_value(quality: PairQuality, parts: Sequence[str], what: str, values: Tensor) -> dict[str, Any]:
    """Returns charts and a table by the regions' probability or objectness: values [P]."""
    rows = quality.by_threshold(values, THRESHOLDS)
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
    return {
        "charts": [
            line_chart(f"Precision and recall by {what}", curves, f"{what} of at least", shares=True),
            outcome_chart(f"Outcomes by {what}, and the number of regions", quality, values),
        ],
        "titles": (what, "regions", *("correct", "misclassified", "background", "recall") * len(parts)),
        "groups": [("", 2), *((part[1:], len(SHARES)) for part in parts)] if quality.split else [],
        "best": [place for place, row in enumerate(shown) if row["threshold"] == best],
        "rows": [
            [
                f"≥ {row['threshold']:.2f}",
                row["pairs"],
                *(row[key + part] for part in parts for key in SHARES),
            ]
            for row in shown
        ],
    }


def _score_charts(data: ReportData) -> list[Chart]:
    labels = [f"{place / BINS:.1f}" if place % 2 == 0 else "" for place in range(BINS)]
    titles = {"probability": "Probability of the first concept", "objectness": "Objectness of the regions"}
    return [histogram(title, labels, data.survey.histograms[what], what) for what, title in titles.items()]


def _coverage_charts(coverage: Coverage) -> list[Chart]:
    images = Counter[int]()
    for number, count in coverage.regions_per_image.items():
        images[min(number, MAX_REGIONS)] += count
    labels = [*map(str, range(MAX_REGIONS)), f"{MAX_REGIONS}+"]
    decades = ["0", "1+", "10+", "100+", "1k+", "10k+", "100k+"]
    concepts = Counter(min(len(str(use.regions)), 6) * bool(use.regions) for use in coverage.by_regions())
    return [
        histogram(f"{what} by their number of regions", bins, [counts[n] for n in range(len(bins))], x_label)
        for what, bins, counts, x_label in (
            ("Images", labels, images, "regions per image"),
            ("Concepts", decades, concepts, "regions per concept"),
        )
    ]


def _labeled(
    data: ReportData, numbers: Sequence[int], budget: CropBudget, places: Places
) -> list[LabeledImage]:
    words = data.quality.words if data.quality else None
    made = []
    for number in numbers:
        region = data.regions[number]
        place = places(data.survey.images[region.image_id])
        made.append(labeled_image(place, region, words[number] if words else None, budget))
    return [one for one in made if one is not None]


def _by_concept(
    data: ReportData,
    concepts: Mapping[str, Sequence[int]],
    limits: ReportLimits,
    budget: CropBudget,
    images_of: Places,
) -> list[tuple[str, str, list[LabeledImage]]]:
    """Returns concepts with a note on their regions, and examples; those without an image are left out."""
    counts = {name: len(places) for name, places in concepts.items()}
    totals = {use.concept: use.regions for use in data.coverage.uses}
    shown = []
    for name in pick_concepts(counts, limits.concepts):
        places = concepts[name]
        chosen = pick_pairs([data.regions[place] for place in places], limits.examples)
        images = _labeled(data, [places[number] for number in chosen], budget, images_of)
        if images:
            shown.append((name, _note(data, totals[name], places), images))
    return shown


def _note(data: ReportData, total: int, places: Sequence[int]) -> str:
    note = f"{total:,} region{'s' * (total != 1)}"
    if data.quality is None:
        return note
    outcomes = Counter(data.quality.words[place] for place in places)
    evaluated = outcomes.total() - outcomes["ignored"]
    return note + (f", {percent(outcomes['correct'] / evaluated)} % correct" if evaluated else "")
