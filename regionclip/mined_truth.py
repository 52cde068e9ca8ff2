"""The part of the report on mined pairs that compares with true boxes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import nan

from regionclip import page
from regionclip.evaluation import NOTHING
from regionclip.figures import line_chart, percent, stacked_bars
from regionclip.judged import JudgedRegions

THRESHOLDS = (*(step / 50 for step in range(50)), 0.99)
# Rows of the tables by threshold.
SHOWN_THRESHOLDS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.96, 0.99)


def truth_sections(judged: JudgedRegions | None, listed: int) -> list[str]:
    """Returns the sections that compare with true boxes; none without them.

    Args:
        judged: the regions with the truth's verdicts; None: there is no truth.
        listed: most rows of a table.
    """
    if judged is None:
        return []
    if not judged.can_be_judged:
        text = "None of the regions can be judged: their concepts name no category of the annotations."
        return [page.section("Against the truth", page.paragraph(text))]
    return [_precision(judged), _confusion(judged, listed)]


def _precision(judged: JudgedRegions) -> str:
    metrics = judged.metrics()
    intro = (
        f"{metrics['judged']:,.0f} of the {metrics['pairs']:,.0f} regions name a category of the annotations "
        f"and can be judged: {percent(metrics['precision'])} % are right (IoU of at least 0.5 with an object "
        f"of that name), {percent(metrics['wrong_name'])} % show an object of another name, "
        f"{percent(metrics['no_object'])} % show no object as a whole. Recall is the share of true objects "
        "that a right region covers."
    )
    parts = [page.paragraph(intro)]
    for what, values in (("probability", judged.probabilities), ("objectness", judged.objectness)):
        rows = judged.by_threshold(values, THRESHOLDS)
        curves = _curves(rows, judged.split is not None)
        parts.append(
            page.charts(
                line_chart(f"Precision and recall by {what}", curves, f"{what} of at least", shares=True),
                stacked_bars(f"Verdicts by {what}, and the number of regions", *judged.by_bin(values)),
            )
        )
        parts.append(_threshold_table(what, rows, judged))
    return page.section("Against the truth", *parts)


def _curves(rows: Sequence[Mapping[str, float]], split: bool) -> dict[str, list[tuple[float, float]]]:
    keys = [f"{measure}_{part}" for measure in ("precision", "recall") for part in ("base", "novel")]
    return {
        key.replace("_", ", "): [(row["threshold"], nan if row[key] == NOTHING else row[key]) for row in rows]
        for key in (keys if split else ["precision", "recall"])
    }


def _threshold_table(what: str, rows: Sequence[Mapping[str, float]], judged: JudgedRegions) -> str:
    parts = ("_base", "_novel") if judged.split else ("",)
    best = judged.least_mistaken(rows)
    shown: list[Mapping[str, float]] = []
    for row in rows:
        wanted = row["threshold"] in SHOWN_THRESHOLDS and (not shown or row["pairs"] != shown[-1]["pairs"])
        if wanted or row["threshold"] == best:
            shown.append(row)
    columns = ("right", "wrong name", "no object", "recall")
    titles = (what, "regions", *columns * len(parts))
    groups = [("", 2), *((part[1:], len(columns)) for part in parts)] if judged.split else []
    cells = [
        [
            f"≥ {row['threshold']:.2f}",
            f"{row['pairs']:,.0f}",
            *(
                percent(row[key + part])
                for part in parts
                for key in ("precision", "wrong_name", "no_object", "recall")
            ),
        ]
        for row in shown
    ]
    marked = [place for place, row in enumerate(shown) if row["threshold"] == best]
    table = page.plain_table(titles, cells, marked=marked, groups=groups)
    return f'{table}<p class="note">Percent. Bold: where precision and recall balance best (F1).</p>'


def _confusion(judged: JudgedRegions, listed: int) -> str:
    rows = judged.by_category()
    order = sorted(rows, key=lambda row: (row["part"] != "novel", -row["pairs"], row["name"]))
    titles = ("category", "objects", "pairs", "right", "wrong name", "no object", "recall")
    cells = [
        [
            ("★ " if row["part"] == "novel" else "") + row["name"],
            f"{row['objects']:,}",
            f"{row['pairs']:,}",
            *(percent(row[key]) for key in ("precision", "wrong_name", "no_object", "recall")),
        ]
        for row in order
    ]
    pairs = [[named, shown, f"{count:,}"] for named, shown, count in judged.judgement.confusions()]
    stars = "" if judged.split is None else " Novel categories carry a star."
    most = max(listed // 2, 1)  # these rows say less
    left = page.plain_table(titles, cells[:listed])
    left += page.more(len(cells), listed, "categories.csv")
    right = page.plain_table(("named", "but shows", "regions"), pairs[:most], words=2)
    right += page.more(len(pairs), most, "confusions.csv")
    return page.section(
        "Wrong name, or no object",
        page.paragraph(
            "A wrong name is the matcher’s or the teacher’s mistake; a region without an object is the "
            "proposer’s: a gate on objectness is a remedy, and so is to keep only the best of several "
            f"regions of a name. Shares in percent.{stars}"
        ),
        f'<div class="twin"><div>{left}</div><div>{right if pairs else ""}</div></div>',
    )
