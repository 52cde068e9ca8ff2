"""Alternating rounds of rivals in one process, and a table of their ratios."""

from __future__ import annotations

import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

Work = Callable[[], object]


@dataclass(frozen=True)
class Row:
    """One comparison.

    Attributes:
        task: what was done.
        rival: whom ours was compared with.
        unit: what `ours` and `theirs` count.
        ours: median of ours.
        theirs: median of the rival's.
        ratios: how many times as good ours was, one a round.
        note: what else is to say.
    """

    task: str
    rival: str
    unit: str
    ours: float
    theirs: float
    ratios: Sequence[float]
    note: str = ""

    @property
    def ratio(self) -> float:
        return statistics.median(self.ratios)


def alternate(
    rivals: Mapping[str, Work], rounds: int, wait: Work = lambda: None, warm_up: bool = True
) -> dict[str, list[float]]:
    """Returns the seconds that each rival took in each round.

    Every round runs all of them, and begins with another one each time, so that a machine that slows down
    slows all alike. One round more, before the others, warms up and does not count.

    Args:
        rivals: what to time, by name.
        rounds: rounds that count.
        wait: called before the clock is read, for devices that work on their own.
        warm_up: False leaves out the round that does not count.
    """
    seconds: dict[str, list[float]] = {name: [] for name in rivals}
    names = list(rivals)
    for number in range(0 if warm_up else 1, rounds + 1):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            wait()
            start = time.perf_counter()
            rivals[name]()
            wait()
            if number:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def compare(
    task: str, unit: str, amount: float, seconds: dict[str, list[float]], note: str = ""
) -> list[Row]:
    """Returns a row for each rival of "ours"; rates are `amount` of `unit` over the seconds of a round."""
    ours = seconds["ours"]
    return [
        Row(
            task,
            rival,
            unit,
            amount / statistics.median(ours),
            amount / statistics.median(theirs),
            [b / a for a, b in zip(ours, theirs, strict=True)],
            note,
        )
        for rival, theirs in seconds.items()
        if rival != "ours"
    ]


def markdown(rows: Sequence[Row]) -> str:
    """Returns the rows as a Markdown table; the spread is the lowest and the highest round."""
    lines = ["| task | against | ours | theirs | ratio | spread | |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        spread = f"{min(row.ratios):.2f} to {max(row.ratios):.2f}"
        rates = f"{shown(row.ours)} {row.unit} | {shown(row.theirs)} {row.unit}"
        lines.append(f"| {row.task} | {row.rival} | {rates} | **{row.ratio:.2f}** | {spread} | {row.note} |")
    return "\n".join(lines)


def shown(value: float) -> str:
    """Returns a number with three digits that count."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def machine(threads: int) -> str:
    """Returns the kind of the processor, its cores and what it computes in; never the machine's name."""
    name, flags = platform.processor() or platform.machine(), ""
    information = Path("/proc/cpuinfo")
    if information.exists():
        parts = (line.partition(":") for line in information.read_text().splitlines() if ":" in line)
        fields = {key.strip(): value.strip() for key, _, value in parts}
        name, flags = fields.get("model name", name), fields.get("flags", "")
    has = [label for flag, label in _ABILITIES.items() if flag in flags.split()]
    return f"{name}, {os.cpu_count()} cores ({', '.join(has) or 'no AVX2'}), {threads} threads"


_ABILITIES = {"avx2": "AVX2", "avx512f": "AVX-512", "avx512_bf16": "AVX512-BF16", "amx_bf16": "AMX"}


def versions(*packages: str) -> str:
    """Returns Python's version and those of the packages."""
    return ", ".join(
        [f"Python {platform.python_version()}", *(f"{p} {metadata.version(p)}" for p in packages)]
    )


def command() -> str:
    """Returns the command that is running, without the folders of this machine."""
    words = [Path(sys.argv[0]).name, *sys.argv[1:]]
    kept = [word if not word.startswith("/") else f"…/{Path(word).name}" for word in words]
    return f"python benchmarks/{' '.join(kept)}"


def processor(device: str = "cpu") -> str:
    """Returns the kind of what computes, without numbers of cores or threads."""
    if device == "cuda":
        import torch

        return str(torch.cuda.get_device_name())
    kind = machine(1)
    cores = kind.rindex(", ", 0, kind.index(" cores ("))
    return f"{kind[:cores]} {kind[kind.index('(') : kind.rindex(')') + 1]}"


def put_kind(page: Path, name: str, kind: str, text: str) -> None:
    """Puts `text` into section `name` of a page under the heading of its kind of processor."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    held = page.read_text(encoding="utf-8").partition(begin)[2].partition(end)[0]
    blocks = {}
    for block in held.split("### ")[1:]:
        heading, _, rest = block.partition("\n")
        blocks[heading.strip()] = rest.strip()
    blocks[kind] = text
    put(page, name, "\n\n".join(f"### {heading}\n\n{blocks[heading]}" for heading in sorted(blocks)))


def put(page: Path, name: str, text: str) -> None:
    """Puts `text` between the comments that begin and end section `name` of a Markdown page."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, found, rest = page.read_text(encoding="utf-8").partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise SystemExit(f"{page} lacks the lines {begin} and {end}")
    page.write_text(f"{before}{begin}\n{text}\n{end}{after}", encoding="utf-8")
