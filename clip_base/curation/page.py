"""What a curated subset has and lacks: a table of all queries, and a page with the figure."""

# Q queries
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from clip_base.curation.queries import KINDS, Query
from clip_base.curation.sampling import Integers
from clip_base.images.html import figure_png, page_environment, png_uri
from clip_base.storage.files import replacing, write_text
from clip_base.storage.tables import TableWriter

FIGURE = "pairs_per_query.png"
_SHOWN = 15  # queries at either end


@dataclass
class Curated:
    """The figures of a run.

    Attributes:
        queries: Q queries.
        counts: [Q] pairs of the source that contain each query.
        counts_after: [Q] pairs of the subset that do, for whatever query they were sampled.
        kept_by_unit: for each unit, how many of its pairs are in the subset.
        pairs: of the source, usable or not.
        captions: texts of the usable ones.
        unmatched: usable pairs that contain no query.
        skipped: pairs that cannot be used, with the reason.
    """

    queries: list[Query]
    counts: Integers
    counts_after: Integers
    kept_by_unit: list[int] = field(default_factory=list)
    pairs: int = 0
    captions: int = 0
    unmatched: int = 0
    skipped: list[dict[str, str]] = field(default_factory=list)

    @property
    def kept(self) -> int:
        """Pairs of the subset."""
        return sum(self.kept_by_unit)

    @property
    def unsampled(self) -> int:
        """Pairs that contain queries and are in the sample of none."""
        return self.pairs - len(self.skipped) - self.unmatched - self.kept

    def figures(self, per_query: int) -> dict[str, Any]:
        """Returns what `metrics.json` holds."""
        return {
            "pairs": self.pairs,
            "captions": self.captions,
            "kept": self.kept,
            "dropped_no_query": self.unmatched,
            "dropped_not_sampled": self.unsampled,
            "skipped": len(self.skipped),
            "queries": len(self.queries),
            "queries_found": int((self.counts > 0).sum()),
            "queries_above_per_query": int((self.counts > per_query).sum()),
        }


def write_table(path: Path, curated: Curated, per_query: int) -> None:
    """Writes a row per query, those of the most pairs first."""
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        table = TableWriter(file)
        table.writerow(["query", "kind", "count", "pmi", "pairs", "sampled", "kept"])
        for place in _order(curated.counts).tolist():
            query, before = curated.queries[place], int(curated.counts[place])
            after = int(curated.counts_after[place])
            counted = "" if query.count is None else query.count
            pmi = "" if query.pmi is None else query.pmi
            table.writerow([query.query, query.kind, counted, pmi, before, min(before, per_query), after])


def write_page(path: Path, curated: Curated, per_query: int) -> None:
    """Writes the page, and its figure beside it."""
    picture = path.parent / FIGURE
    drawn = draw(curated.counts, curated.counts_after, per_query)
    with replacing(picture) as temporary:
        temporary.write_bytes(drawn)
    found = [place for place in _order(curated.counts).tolist() if curated.counts[place]]
    rows = [_row(curated, place, per_query) for place in found]
    page = (
        page_environment("clip_base.curation")
        .get_template("curation.html")
        .render(
            figures=curated.figures(per_query),
            per_query=per_query,
            kinds=_by_kind(curated, per_query),
            head=rows[:_SHOWN],
            tail=rows[_SHOWN:][-_SHOWN:],
            figure=png_uri(drawn),
        )
    )
    write_text(path, page + "\n")


def _row(curated: Curated, place: int, per_query: int) -> tuple[str, str, int, int, int]:
    query, before = curated.queries[place], int(curated.counts[place])
    return query.query, query.kind, before, min(before, per_query), int(curated.counts_after[place])


def _by_kind(curated: Curated, per_query: int) -> list[tuple[str, int, int, int]]:
    """Returns for each kind: queries, those in some pair, those in more pairs than are sampled."""
    kinds = np.array([KINDS.index(query.kind) for query in curated.queries])
    rows = []
    for number, kind in enumerate(KINDS):
        own = curated.counts[kinds == number]
        if len(own):
            rows.append((kind, len(own), int((own > 0).sum()), int((own > per_query).sum())))
    return rows


def _order(counts: Integers) -> Integers:
    """Returns the queries by falling number of pairs; those of equal numbers in their order."""
    return np.argsort(-counts, kind="stable")


def draw(before: Integers, after: Integers, per_query: int) -> bytes:
    """Returns a PNG of the pairs per query by rank, head to tail, of the source and of the subset."""
    order = _order(before)
    order = order[before[order] > 0]
    ranks = np.arange(1, len(order) + 1)
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    shown = _thinned(len(order))
    series: Sequence[tuple[str, Integers, str]] = (
        ("source", before[order], "tab:gray"),
        ("subset", after[order], "tab:blue"),
        (
            f"sampled, at most {per_query:,}",
            np.minimum(before[order], per_query),
            "tab:orange",
        ),
    )
    for name, values, color in series:
        width = 0.8 if name == "subset" else 1.8
        axes.plot(ranks[shown], values[shown], label=name, color=color, linewidth=width)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("query, by falling number of pairs")
    axes.set_ylabel("pairs that contain it")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=9)
    return figure_png(figure)


def _thinned(count: int) -> Integers:
    """Returns places in [0, count), evenly on a logarithmic axis; all of few."""
    if count <= 2000:
        return np.arange(count)
    return np.unique(np.geomspace(1, count, 2000).astype(np.int64) - 1)
