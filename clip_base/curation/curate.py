"""The job `curate`: from any source of pairs to a subset that is balanced over queries.

clip-base curate source.name=webdataset source.shards=tars corpus=wikipedia.txt out=runs/curated

Two passes over units of pairs, see `units`: the first one finds each pair's queries, the second one writes
the pairs that are in a query's sample. Processes share the units, and what a unit gives depends on it alone.
"""

# Q queries
from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from clip_base.curation.lines import units_of, write_all, write_lines
from clip_base.curation.page import Curated, write_page, write_table
from clip_base.curation.queries import (
    CAPTIONS,
    FILE,
    Query,
    QueryOptions,
    collect,
    read_queries,
    write_queries,
)
from clip_base.curation.sampling import (
    Integers,
    count_kept,
    count_pairs,
    kept_pairs,
    limits,
    load_matches,
    match_records,
    save_matches,
)
from clip_base.curation.texts import Matcher
from clip_base.curation.units import Unit, Units
from clip_base.data.inputs import absolute, source_inputs
from clip_base.data.sources import SOURCES
from clip_base.jobs.config import REQUIRED, Plugin, option, plugin
from clip_base.jobs.everyday import everyday
from clip_base.jobs.run import RunFolder, files_of
from clip_base.jobs.skipped import max_skipped_option, require_share, require_usable, write_skipped
from clip_base.runtime.errors import InputError, JobError
from clip_base.runtime.progress import track
from clip_base.runtime.workers import EXECUTOR_HELP, EXECUTORS, Report, run
from clip_base.storage.files import make_folder, replacing

TABLE, PAGE, SKIPPED = "per_query.csv", "report.html", "skipped.jsonl"
_WORK = ".work"


@everyday(
    "curate source.name=webdataset source.shards=tars corpus=wikipedia.txt out=runs/curated",
    input="source.name corpus titles lemmas queries",
    output="out output",
    quality="min_count min_pmi per_query seed",
    speed="workers executor",
)
@dataclass
class CurateConfig(QueryOptions):
    """Options of `curate`."""

    source: Plugin = plugin(SOURCES, "coco", "source of image-text pairs")
    out: str = option(REQUIRED, "folder for the subset and its report", runtime_only=True)
    per_query: int = option(20_000, "pairs that are sampled for each query at most")
    seed: int = option(0, "determines which pairs are sampled")
    output: str = option(
        "same",
        "same: tars from tars, Parquet from Parquet, JSON Lines of paths and texts from any other source; "
        "index: JSON Lines from tars too",
        choices=("same", "index"),
    )
    executor: str = option("local", EXECUTOR_HELP, choices=EXECUTORS, runtime_only=True)
    workers: int = option(1, "processes; 0: one per core", runtime_only=True)
    max_skipped: float = max_skipped_option(0.5)

    def __post_init__(self) -> None:
        self.require_queries()
        for name, least in (("per_query", 1), ("seed", 0), ("workers", 0)):
            if getattr(self, name) < least:
                raise InputError(f"{name} must be at least {least}, found {getattr(self, name)}")
        require_share(self.max_skipped)


def curate(config: CurateConfig) -> None:
    """Chooses a subset of image-text pairs that is balanced over queries; writes it with a report."""
    inputs = source_inputs(config.source) | files_of(config, "titles", "lemmas", "queries")
    if config.corpus != [CAPTIONS]:
        inputs |= files_of(config, "corpus")
    folder = RunFolder(config.out, config, "curate", inputs)
    done = folder.finished()
    if done is not None:
        print(f"{folder.path} is complete: {done['kept']:,} of {done['pairs']:,} pairs are kept")
        return
    work = make_folder(folder.path / _WORK).absolute()
    spec = absolute(config.source)
    write_lines(spec, work)
    pairs = _Pairs(spec, work, config.output == "index")
    units = pairs.open().units()
    queries = _queries(config, folder.path, pairs)
    _find(config, pairs, units, folder.path / FILE)
    curated, parts = _write(config, pairs, units, queries, folder.path)
    where = write_all(pairs.open(), parts, folder.path)
    _finish(config, folder, curated)
    shutil.rmtree(work)
    print(
        f"{where}: {curated.kept:,} of {curated.pairs:,} pairs; {curated.unmatched:,} contain no query, "
        f"{curated.unsampled:,} are in no sample, {len(curated.skipped):,} cannot be used"
    )
    print(f"open {folder.path / PAGE} in a browser")


@dataclass(frozen=True)
class _Pairs:
    """The pairs of a run, for any process.

    Attributes:
        spec: the source's options.
        work: what the run keeps until it has ended.
        index: see `units_of`.
    """

    spec: dict[str, Any]
    work: Path
    index: bool

    def open(self) -> Units:
        """Returns the units' reader and writer."""
        return units_of(self.spec, self.work, self.index)

    def matches(self, unit: Unit) -> Path:
        """Returns the file of a unit's matches."""
        return self.work / f"{unit.name}.matches"

    def texts(self) -> Iterator[str]:
        """Yields the texts of all pairs."""
        units = self.open()
        for unit in units.units():
            for record in units.read(unit):
                yield from record.captions


def _queries(config: CurateConfig, out: Path, pairs: _Pairs) -> list[Query]:
    """Returns the run's queries, collected once."""
    path = out / FILE
    if not path.exists():
        write_queries(path, collect(config, pairs.texts))
    return list(read_queries(str(path)))


def _find(config: CurateConfig, pairs: _Pairs, units: Sequence[Unit], queries: Path) -> None:
    """Makes the first pass: writes the matches of all units that have none yet."""
    missing = [unit for unit in units if not pairs.matches(unit).exists()]
    start = functools.partial(_start_finding, pairs, queries.absolute(), config.seed)
    found = run(config.executor, start, missing, config.workers)
    for _ in track(found, "looking for queries", len(missing)):
        pass


def _start_finding(pairs: _Pairs, queries: Path, seed: int) -> Callable[[Unit, Report], None]:
    matcher = Matcher([query.query for query in read_queries(str(queries))])
    units = pairs.open()

    def work(unit: Unit, report: Report) -> None:
        save_matches(match_records(units.read(unit), matcher, seed), pairs.matches(unit))

    return work


def _write(
    config: CurateConfig, pairs: _Pairs, units: Sequence[Unit], queries: Sequence[Query], out: Path
) -> tuple[Curated, list[Path]]:
    """Makes the second pass; returns the run's figures, and the files of those units that have kept pairs."""
    files = [pairs.matches(unit) for unit in units]
    counts = count_pairs(files, len(queries))
    highest = limits(files, counts, config.per_query)
    with replacing(pairs.work / "limits.npy") as temporary, temporary.open("wb") as file:
        np.save(file, highest)
    folder = pairs.work if pairs.open().ending == ".jsonl" else make_folder(out / "pairs")
    folder = folder.absolute()
    curated, parts, tasks = _counted(files, highest, counts, queries), list[Path](), list[tuple[Unit, Path]]()
    if not curated.kept:
        raise JobError(
            f"none of {curated.pairs:,} pairs contains any of {len(queries):,} queries; look at {out / FILE}"
        )
    for unit, kept in zip(units, curated.kept_by_unit, strict=True):
        # Beside the lines of the first pass, whose names begin otherwise.
        path = folder / f"{'kept-' if folder == pairs.work else ''}{unit.name}{pairs.open().ending}"
        if kept:
            parts.append(path)
            if not path.exists():
                tasks.append((unit, path))
    start = functools.partial(_start_writing, pairs)
    for _ in track(run(config.executor, start, tasks, config.workers), "writing pairs", len(tasks)):
        pass
    return curated, parts


def _start_writing(pairs: _Pairs) -> Callable[[tuple[Unit, Path], Report], None]:
    highest, units = np.load(pairs.work / "limits.npy"), pairs.open()

    def work(task: tuple[Unit, Path], report: Report) -> None:
        unit, path = task
        kept = np.flatnonzero(kept_pairs(load_matches(pairs.matches(unit)), highest))
        units.write(unit, kept.tolist(), path)

    return work


def _counted(files: Sequence[Path], highest: Integers, counts: Integers, queries: Sequence[Query]) -> Curated:
    """Returns what the subset has, and what was dropped."""
    curated = Curated(list(queries), counts, np.zeros(len(queries), np.int64))
    for path in track(files, "counting what is kept"):
        matches = load_matches(path)
        kept = kept_pairs(matches, highest)
        curated.counts_after[matches.queries] += count_kept(matches, kept)
        curated.kept_by_unit.append(int(kept.sum()))
        curated.pairs += len(matches.priorities)
        curated.captions += matches.captions
        curated.unmatched += matches.unmatched
        curated.skipped += matches.skipped
    return curated


def _finish(config: CurateConfig, folder: RunFolder, curated: Curated) -> None:
    listed = folder.path / SKIPPED
    write_skipped(listed, curated.skipped)
    reasons = [entry["reason"] for entry in curated.skipped]
    require_usable(reasons, curated.pairs, config.max_skipped, listed, "pairs")
    write_table(folder.path / TABLE, curated, config.per_query)
    write_page(folder.path / PAGE, curated, config.per_query)
    folder.finish(curated.figures(config.per_query))
