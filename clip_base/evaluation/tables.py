"""Tables of metrics over all images and per class, as CSV and in the terminal."""

# N images, C classes
from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import Tensor

from clip_base.storage.tables import TableWriter

_SHOWN = 40  # classes up to which the table lists all of them
_EXTREMES = 5  # classes at either end that it lists otherwise


def figure_lines(figures: Mapping[str, Any]) -> list[str]:
    """Returns a line per figure for the screen, but for lists; -1 is pycocotools' "not measured"."""
    shown = {key: value for key, value in figures.items() if not isinstance(value, list)}
    width = max(map(len, shown), default=0)
    return [f"{key:<{width}}  {_figure(value)}" for key, value in shown.items()]


def _figure(value: Any) -> str:
    if value is None or (isinstance(value, int | float) and value == -1):
        return "not measured"
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def summarize(
    ranks: Tensor, labels: Tensor, names: Sequence[str]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Returns the figures over all images, and those of each class.

    Args:
        ranks: [N] int64, how many other classes come before the true one; -1 is left out.
        labels: [N] int64, the true class.
        names: C class names.

    Returns:
        `top1`, `top5` (shares of images), `mean_per_class` (mean of the classes' top1), `images`,
        `classes`; and for each class `class`, `name`, `images`, `top1`, `top5` (None without images).
    """
    used = ranks >= 0
    ranks, labels = ranks[used], labels[used]
    classes: list[dict[str, Any]] = []
    for label, name in enumerate(names):
        own = ranks[labels == label]
        top1, top5 = (float((own < k).float().mean()) if len(own) else None for k in (1, 5))
        classes.append({"class": label, "name": name, "images": len(own), "top1": top1, "top5": top5})
    seen = [entry["top1"] for entry in classes if entry["top1"] is not None]
    figures = {
        "top1": float((ranks < 1).double().mean()),
        "top5": float((ranks < 5).double().mean()),
        "mean_per_class": sum(seen) / len(seen),
        "images": len(ranks),
        "classes": len(names),
    }
    return figures, classes


def to_csv(rows: list[dict[str, Any]]) -> str:
    """Returns rows with the same keys as CSV with a header line."""
    text = io.StringIO()
    writer = TableWriter(text)
    writer.writerow(rows[0])
    writer.writerows(row.values() for row in rows)
    return text.getvalue()


def print_classes(title: str, figures: dict[str, Any], classes: list[dict[str, Any]], skipped: int) -> None:
    """Prints all classes, or the best and the worst of many, and the figures over all of them."""
    ranked = sorted((entry for entry in classes if entry["images"]), key=lambda entry: -entry["top1"])
    table = Table(title=title, title_justify="left")
    for column in ("class", "images", "top 1", "top 5"):
        table.add_column(column, justify="left" if column == "class" else "right")
    shown = ranked if len(ranked) <= _SHOWN else [*ranked[:_EXTREMES], None, *ranked[-_EXTREMES:]]
    for entry in shown:
        if entry is None:
            table.add_row("…", "", "", "")
        else:
            table.add_row(entry["name"], str(entry["images"]), f"{entry['top1']:.1%}", f"{entry['top5']:.1%}")
    table.add_section()
    table.add_row("all", str(figures["images"]), f"{figures['top1']:.1%}", f"{figures['top5']:.1%}")
    table.add_row("mean of classes", "", f"{figures['mean_per_class']:.1%}", "")
    console = Console(highlight=False, markup=False)
    console.print(table)
    if skipped:
        console.print(f"{skipped} unusable images are listed in skipped.jsonl")
