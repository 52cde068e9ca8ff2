"""The report's tables and lists as HTML, from figures that `regionclip.report` has read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template

from clip_base.progress import clock
from regionclip.figures import DASH, percent

# Pixels of the longest bar in a table.
METER = 180


def document(template: str, title: str, values: Mapping[str, object]) -> str:
    """Returns a page that stands alone.

    Args:
        template: file in the package, what is between <main> and </main>.
        title: the browser's, plain text.
        values: what the template's placeholders become; HTML.
    """
    body = Template(_packaged(template)).substitute(values)
    frame = Template(_packaged("page.html"))
    return frame.substitute(title=escape(title), css=_packaged("report.css"), body=body)


def _packaged(name: str) -> str:
    return (files("regionclip") / "data_files" / name).read_text(encoding="utf-8")


def difference(before: float, after: float) -> str:
    """Returns the change of a share in points, with its sign; a dash where one of both was not measured."""
    return DASH if min(before, after) < 0 else f"{100 * (after - before):+.1f}"


def result_table(groups: Sequence[str], parts: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns the result table.

    Args:
        groups: titles of the column groups.
        parts: titles of the columns in each group; "novel" is emphasised.
        rows: the title and the cells of each row; one titled "difference" is coloured by sign.
    """
    styles = [
        " ".join(["first"] * (not place) + ["novel"] * (part == "novel")) for place, part in enumerate(parts)
    ]
    head = "".join(f'<th class="group first" colspan="{len(parts)}">{escape(title)}</th>' for title in groups)
    columns = "".join(
        f'<th class="{style}">{escape(part)}</th>'
        for _ in groups
        for style, part in zip(styles, parts, strict=True)
    )
    body = ""
    for title, *cells in rows:
        signed = title == "difference"
        kinds = [
            styles[place % len(parts)] + (_direction(cell) if signed else "")
            for place, cell in enumerate(cells)
        ]
        shown = "".join(
            f'<td class="{kind}">{escape(cell)}</td>' for kind, cell in zip(kinds, cells, strict=True)
        )
        body += f'<tr{" class=difference" * signed}><th scope="row">{escape(title)}</th>{shown}</tr>'
    head = f"<tr><th></th>{head}</tr><tr><th></th>{columns}</tr>"
    return _table(head, body, "result")


def _direction(cell: str) -> str:
    if not cell.strip("+-0."):
        return ""
    return {"+": " up", "-": " down"}.get(cell[0], "")


def verdict(novel: Mapping[str, tuple[float, float]]) -> str:
    """Says in words how the figures of novel categories moved, whichever way they did.

    Args:
        novel: what was measured and how -> the share before and after.
    """
    moves = [
        f"{difference(*pair)} points of {escape(what)}" for what, pair in novel.items() if min(pair) >= 0
    ]
    if not moves:
        return "No novel category was measured."
    return f"What region pretraining changed on novel categories: {'; '.join(moves)}."


def per_class_table(
    before: Mapping[str, float], after: Mapping[str, float], objects: Mapping[str, int], novel: Sequence[str]
) -> str:
    """Returns AP50 of each category, novel ones first, the best first.

    Args:
        before: category -> AP50 of the detector from CLIP.
        after: the same of the one from RegionCLIP.
        objects: category -> true objects.
        novel: names of the novel categories.
    """
    rows = ""
    for name in sorted(after, key=lambda name: (name not in novel, -after[name], name)):
        pair = before[name], after[name]
        meters = "".join(
            f'<span class="{kind}">{_meter(max(value, 0))}</span>'
            for kind, value in zip(("before", "after"), pair, strict=True)
        )
        cells = (str(objects[name]), percent(pair[0]), percent(pair[1]), difference(*pair))
        rows += f"<tr{' class=novel-row' * (name in novel)}><td>{'★ ' * (name in novel)}{escape(name)}</td>"
        rows += "".join(f"<td>{cell}</td>" for cell in cells) + f'<td class="meter-cell">{meters}</td></tr>'
    titles = ("category", "objects", "from CLIP", "from RegionCLIP", "difference", "")
    return _table(f"<tr>{''.join(f'<th>{title}</th>' for title in titles)}</tr>", rows)


def timings_table(timings: Mapping[str, float]) -> str:
    """Returns how long each stage took; `timings` holds seconds."""
    longest = max([*timings.values(), 1e-9])
    rows = "".join(
        f"<tr><td>{escape(title)}</td><td>{clock(seconds)}</td>"
        f'<td class="meter-cell">{_meter(seconds / longest)}</td></tr>'
        for title, seconds in timings.items()
    )
    total = clock(sum(timings.values()))
    return _table("", f"{rows}<tr><td><b>in all</b></td><td><b>{total}</b></td><td></td></tr>")


def section(title: str, *parts: str) -> str:
    """Returns a section of the page; the parts are HTML."""
    return f"<section>\n<h2>{escape(title)}</h2>\n" + "\n".join(parts) + "\n</section>"


def paragraph(text: str) -> str:
    """Returns a paragraph of plain text."""
    return f"<p>{escape(text)}</p>"


def charts(*figures: str) -> str:
    """Returns charts side by side."""
    return f'<div class="charts">{"".join(figures)}</div>'


def more(rows: int, listed: int, file: str) -> str:
    """Returns a note on the rows that a table leaves out and the file that holds them; nothing when none."""
    return f'<p class="note">{rows - listed:,} more in <code>{file}</code>.</p>' if rows > listed else ""


def plain_table(
    titles: Sequence[str],
    rows: Sequence[Sequence[str]],
    words: int = 1,
    texts: Sequence[int] = (),
    marked: Sequence[int] = (),
    groups: Sequence[tuple[str, int]] = (),
) -> str:
    """Returns a table of texts.

    Args:
        titles: of the columns.
        rows: the cells.
        words: how many of the first columns hold words; they are set flush left and may wrap, numbers not.
        texts: places of further columns that hold words.
        marked: places of rows that are emphasised.
        groups: (heading, number of columns below it), for a line above the titles.
    """
    starts = {sum(width for _, width in groups[:number]) for number in range(1, len(groups))}
    kinds = [
        " class=text" if place < words or place in texts else " class=first" if place in starts else ""
        for place in range(len(titles))
    ]
    above = "".join(
        f'<th class="group{" first" * bool(number)}" colspan="{width}">{escape(title)}</th>'
        for number, (title, width) in enumerate(groups)
    )
    head = "".join(f"<th{kind}>{escape(title)}</th>" for kind, title in zip(kinds, titles, strict=True))
    body = ""
    for place, row in enumerate(rows):
        cells = "".join(f"<td{kind}>{escape(cell)}</td>" for kind, cell in zip(kinds, row, strict=True))
        body += f"<tr{' class=marked' * (place in marked)}>{cells}</tr>"
    return _table(f"<tr>{above}</tr><tr>{head}</tr>" if groups else f"<tr>{head}</tr>", body)


def tiles(figures: Mapping[str, str]) -> str:
    """Returns the most important figures side by side: what each counts -> the figure."""
    shown = "".join(f"<div><b>{escape(value)}</b>{escape(title)}</div>" for title, value in figures.items())
    return f'<div class="tiles">{shown}</div>'


def _meter(share: float) -> str:
    return f'<i class="meter" style="width: {METER * share:.0f}px"></i>'


def _table(head: str, body: str, style: str = "plain") -> str:
    head = f"<thead>{head}</thead>" if head else ""
    return f'<div class="wide"><table class="{style}">{head}<tbody>{body}</tbody></table></div>'


def places(folder: Path) -> str:
    """Returns a list of what a quickstart leaves in its folder."""
    listed = {
        "world": "the scenes, their captions and boxes in COCO's form, the split",
        "clip/model.safetensors": "CLIP before region pretraining",
        "regionclip/model.safetensors": "and after",
        "rpn/model.safetensors": "the proposal network",
        "concepts.jsonl": "the concept pool",
        "mined": "the region-phrase pairs, as Parquet",
        "detector-regionclip/model.safetensors": "the detector",
        "evaluation": "metrics, results in COCO's form, figures of each category",
        "metrics.json": "the figures of this page",
    }
    wide = max(len(str(folder / place)) for place in listed)
    return escape("\n".join(f"{folder / place!s:<{wide}}  {what}" for place, what in listed.items()))


def detect_call(folder: Path, names: Sequence[str]) -> str:
    """Returns a command that looks for `names` in validation scenes."""
    lines = (
        f"regionclip detect {folder}/world/images/val",
        f"weights={folder}/detector-regionclip/model.safetensors",
        f'vocabulary="{", ".join(names)}" out=found',
    )
    return escape(" \\\n    ".join(lines))
