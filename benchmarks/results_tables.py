"""Tables and statistics of the finished rows of the results: means, spreads, paired differences per seed."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from results_rows import AP, AP50, COMPARISONS, ROWS, TOP1, Comparison, Row, row_key
from results_steps import WORLDS

from clip_base.storage.files import read_json

PARTS = ("base", "novel", "all")
TABLES: dict[str, dict[str, str]] = {
    "students": {
        **dict(zip(TOP1, (f"top-1 {part}" for part in PARTS), strict=True)),
        **dict(zip(AP50, (f"AP50 {part}" for part in PARTS), strict=True)),
        **dict(zip(AP, ("AP all",), strict=True)),
    },
    "detectors": {
        **dict(zip(AP50, (f"AP50 {part}" for part in PARTS), strict=True)),
        **dict(zip(AP, ("AP all",), strict=True)),
    },
}
"""Columns of each table: metric and heading."""

QUANTILES = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)
"""0.975 quantiles of Student's t with 1, 2, … degrees of freedom; the last one serves for more than 9."""

Found = dict[int, dict[str, float]]  # metrics of a row by seed


def report(folder: Path, preset: str) -> tuple[str, str]:
    """Returns as Markdown the tables of all datasets, and the comparisons of their rows.

    Args:
        folder: of the finished rows: DATASET/seed-N/ROW.json.
        preset: which of configs/*/PRESET.yaml the rows must have been made with. A row that was made with
            other options than today's is left out, and named at the end.
    """
    rows, differences = [], []
    for world in WORLDS:
        found, stale = finished_rows(folder / world, world, preset)
        if any(found.values()):
            rows += [f"### Dataset `{world}`", *tables(found)]
            differences += [f"### Dataset `{world}`", compared(found)]
        if stale:
            rows.append(f"Left out, as they were made with other options: {', '.join(stale)}.")
    return "\n\n".join(rows) or "No row is finished.", "\n\n".join(differences)


def finished_rows(folder: Path, world: str, preset: str) -> tuple[dict[str, Found], list[str]]:
    """Returns the metrics of a dataset's rows by key and seed, and which files have other options."""
    found: dict[str, Found] = {row.key: {} for row in ROWS}
    stale = []
    for row in ROWS:
        for path in sorted(folder.glob(f"seed-*/{row.key}.json")):
            seed, content = int(path.parent.name.removeprefix("seed-")), read_json(path, "finished row")
            if content["options"] == row_key(row, world, seed, preset):
                found[row.key][seed] = content["metrics"]
            else:
                stale.append(f"{path.parent.name}/{row.key}")
    return found, stale


def tables(found: dict[str, Found]) -> list[str]:
    """Returns a table of each kind, rows without a finished seed left out."""
    made = []
    for name, columns in TABLES.items():
        rows = [row for row in ROWS if row.table == name and found[row.key]]
        heading = f"| {name} | seeds | {' | '.join(columns.values())} |\n|{'---|' * (len(columns) + 2)}"
        if rows:
            made.append("\n".join([heading, *(line(row, found[row.key], list(columns)) for row in rows)]))
    return ["Percent, mean ± standard deviation over the seeds; a row of one seed has no deviation.", *made]


def line(row: Row, seeds: Found, metrics: Sequence[str]) -> str:
    cells = [spread([100 * one[metric] for one in seeds.values() if metric in one]) for metric in metrics]
    return f"| {row.title} | {len(seeds)} | {' | '.join(cells)} |"


def spread(values: Sequence[float]) -> str:
    if not values:
        return "–"
    deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{deviation}"


@dataclass(frozen=True)
class Difference:
    """Paired differences of two rows, in percent.

    Attributes:
        values: one per seed that both rows have.
    """

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.mean(self.values)

    @property
    def error(self) -> float:
        """The standard error of the mean; needs two seeds."""
        return float(statistics.stdev(self.values) / len(self.values) ** 0.5)

    @property
    def holds(self) -> bool:
        """Whether the mean's sign is shown: five seeds agree, or Student's 95 % interval leaves 0 out."""
        count = len(self.values)
        if count < 2:
            return False
        agree = count >= 5 and (min(self.values) > 0 or max(self.values) < 0)
        return agree or abs(self.mean) > QUANTILES[min(count - 2, len(QUANTILES) - 1)] * self.error


def difference(found: dict[str, Found], asked: Comparison) -> Difference:
    """Returns the paired differences of a comparison, over the seeds that both rows have."""
    one, other = found[asked.better], found[asked.worse]
    pairs = [
        (one[seed].get(asked.metric), other[seed].get(asked.worse_metric or asked.metric))
        for seed in sorted(one.keys() & other.keys())
    ]
    return Difference(tuple(100 * (a - b) for a, b in pairs if a is not None and b is not None))


def compared(found: dict[str, Found]) -> str:
    """Returns a table of all comparisons that two finished rows allow."""
    lines = [
        "| paired difference, points | metric | mean ± standard error | by seed | shown |",
        "|---|---|---|---|---|",
    ]
    titles = {row.key: row.title for row in ROWS}
    for asked in COMPARISONS:
        values = difference(found, asked)
        if not values.values:
            continue
        error = f" ± {values.error:.1f}" if len(values.values) > 1 else ""
        names = f"{titles[asked.better]} − {titles[asked.worse]}"
        metric = f"{asked.metric} − {asked.worse_metric}" if asked.worse_metric else asked.metric
        by_seed = ", ".join(f"{value:+.1f}" for value in values.values)
        shown = "yes" if values.holds else "one seed" if len(values.values) == 1 else "no"
        lines.append(f"| {names} | `{metric}` | {values.mean:+.1f}{error} | {by_seed} | {shown} |")
    return "\n".join(lines)
