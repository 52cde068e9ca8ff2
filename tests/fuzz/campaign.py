"""Reads thousands of damaged files of every kind: `python tests/fuzz/campaign.py --files 20000 --seed 1`.

Each file must be read, or be refused with one short line. All else is a fault: another exception, a death of
the process, more than 20 s, more than 2 GiB. Faulty files are kept, and the last lines are the table of
`docs/reliability.md`. A file is made from (seed, kind, number) alone: `--kind "image: PNG" --only 17` makes
it again.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

from fuzz_kinds import KINDS, Kind
from fuzz_mutators import FORMS
from fuzz_report import processor, write_table

from clip_base.runtime.errors import InputError

PATIENCE = 20.0  # seconds for one file
MEMORY = 2 << 30  # bytes that one file may take
LONGEST = 600  # characters of a message beside the path
SLICE = 400  # files that one process reads


@dataclass
class Tally:
    """What came of some files of a kind."""

    read: int = 0
    refused: int = 0
    faults: list[str] = field(default_factory=list)
    slowest: float = 0.0
    memory: int = 0

    @property
    def files(self) -> int:
        return self.read + self.refused + len(self.faults)

    def add(self, other: Tally) -> None:
        self.read, self.refused = self.read + other.read, self.refused + other.refused
        self.faults += other.faults
        self.slowest, self.memory = max(self.slowest, other.slowest), max(self.memory, other.memory)


def address_space() -> int:
    """Returns the largest address space that this process has had, in bytes; 0 where no one tells."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmPeak"):
                return int(line.split()[1]) << 10
    return 0


class Bench:
    """Whole files of each kind, and a place to damage copies of them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._whole: dict[str, Path] = {}
        self._checked: set[str] = set()

    def whole(self, kind: Kind) -> Path:
        """Returns a folder with whole files; what makes them and reads them must not fail."""
        key = f"{kind.make.__module__}.{getattr(kind.make, '__qualname__', '')}.{id(kind.make)}"
        if key not in self._whole:
            folder = self.root / f"whole-{len(self._whole)}"
            folder.mkdir()
            kind.make(folder)
            self._whole[key] = folder
        if kind.name not in self._checked:  # a reader that refuses whole files would find nothing
            self._checked.add(kind.name)
            shutil.copytree(self._whole[key], self.root / "check")
            kind.read(self.root / "check")
            shutil.rmtree(self.root / "check")
        return self._whole[key]

    def damaged(self, kind: Kind, seed: int, number: int) -> Path:
        """Returns a folder in which the kind's file is damaged."""
        folder = self.root / "work" / str(os.getpid())
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.whole(kind), folder)
        rng = random.Random(f"{seed} {kind.name} {number}")
        data = (folder / kind.target).read_bytes()
        changed = FORMS[kind.form](rng, data)
        while changed == data:
            changed = FORMS["bytes"](rng, data)
        (folder / kind.target).write_bytes(changed)
        return folder

    def check(self, kind: Kind, seed: int, number: int, keep: Path | None = None) -> Tally:
        """Reads one damaged file."""
        folder = self.damaged(kind, seed, number)
        before, started, tally, fault = address_space(), time.perf_counter(), Tally(), ""
        try:
            with warnings.catch_warnings(), silenced():
                warnings.simplefilter("ignore")
                kind.read(folder)
            tally.read = 1
        except InputError as error:
            told = str(error).replace(str(folder), "")
            tally.refused = 1
            if "\n" in told or len(told) > LONGEST:
                fault = f"a message of {len(told)} characters: {told[:200]!r}"
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)
            ours = [one for one in where if "/clip_base/" in one.filename or "/regionclip/" in one.filename]
            last = (ours or where)[-1]
            fault = f"{type(error).__name__}: {str(error)[:150]} ({Path(last.filename).name}:{last.lineno})"
        tally.slowest = time.perf_counter() - started
        tally.memory = max(0, address_space() - before)
        if tally.slowest > PATIENCE:
            fault = f"took {tally.slowest:.0f} s"
        if tally.memory > MEMORY:
            fault = f"took {tally.memory / 2**30:.1f} GiB"
        if fault:
            tally.read = tally.refused = 0
            tally.faults = [f"{kind.name} {number}: {fault}"]
            if keep is not None:
                kept = keep / f"{kind.name.replace(' ', '_').replace(':', '')}-{number}"
                shutil.rmtree(kept, ignore_errors=True)
                shutil.copytree(folder, kept)
        return tally


@contextlib.contextmanager
def silenced() -> Iterator[None]:
    """Keeps what decoders in C print, and jobs, from the terminal."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [os.dup(1), os.dup(2)]
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        yield
    finally:
        sys.stdout.flush()
        for place, descriptor in enumerate(kept, 1):
            os.dup2(descriptor, place)
            os.close(descriptor)
        os.close(nowhere)


def shares(files: int) -> dict[str, int]:
    """Returns how many files of each kind a campaign of so many has."""
    whole = sum(kind.weight for kind in KINDS)
    return {kind.name: max(1, round(files * kind.weight / whole)) for kind in KINDS}


def _work(bench: Bench, kind: Kind, seed: int, numbers: range, keep: Path, pipe: Connection) -> None:
    for number in numbers:
        pipe.send((number, None))
        pipe.send((number, bench.check(kind, seed, number, keep)))
    pipe.send((-1, None))


def read_slice(bench: Bench, kind: Kind, seed: int, numbers: range, keep: Path) -> Tally:
    """Reads files in a process of its own, which may hang or die; then another one goes on."""
    context, total, at = multiprocessing.get_context("fork"), Tally(), numbers.start
    while at < numbers.stop:
        ours, theirs = context.Pipe(duplex=False)
        rest = range(at, numbers.stop)
        process = context.Process(target=_work, args=(bench, kind, seed, rest, keep, theirs))
        process.start()
        theirs.close()
        fault = ""
        while True:
            try:
                if not ours.poll(2 * PATIENCE):
                    fault = f"hung for {2 * PATIENCE:.0f} s"
                    break
                number, tally = ours.recv()
            except (EOFError, OSError):
                process.join()
                fault = f"ended its process with {process.exitcode}"
                break
            if number < 0:
                at = numbers.stop
                break
            at = number
            if tally is not None:
                total.add(tally)
        process.kill()
        process.join()
        if fault:
            total.faults.append(f"{kind.name} {at}: {fault}")
            at += 1
    return total


def table(found: dict[str, Tally]) -> str:
    """Returns the table in Markdown, with the sums below."""
    lines = ["| kind | files | read | refused | faults | slowest | memory |", "|---|--:|--:|--:|--:|--:|--:|"]
    total = Tally()
    for tally in found.values():
        total.add(tally)
    for name, tally in [*found.items(), ("**all**", total)]:
        lines.append(
            f"| {name} | {tally.files:,} | {tally.read:,} | {tally.refused:,} | {len(tally.faults):,} | "
            f"{tally.slowest:.1f} s | {tally.memory / 2**20:,.0f} MiB |"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kind", default="", help="a part of the kinds' names")
    parser.add_argument("--only", type=int, default=-1, help="the number of one file")
    parser.add_argument("--keep", type=Path, default=Path("build/fuzz"), help="folder for files with faults")
    parser.add_argument("--write", action="store_true", help="put the table into docs/reliability.md")
    given = parser.parse_args()
    found, started = dict[str, Tally](), time.monotonic()
    with tempfile.TemporaryDirectory() as place:
        bench = Bench(Path(place))
        kinds = [kind for kind in KINDS if given.kind in kind.name]
        for kind in kinds:
            bench.whole(kind)
            count = shares(given.files)[kind.name]
            tally = found[kind.name] = Tally()
            if given.only >= 0:
                tally.add(bench.check(kind, given.seed, given.only, given.keep))
            else:
                for first in range(0, count, SLICE):
                    numbers = range(first, min(first + SLICE, count))
                    tally.add(read_slice(bench, kind, given.seed, numbers, given.keep))
            print(
                f"{kind.name}: {tally.files} files, {len(tally.faults)} faults", file=sys.stderr, flush=True
            )
            for fault in tally.faults:
                print(f"  {fault}", file=sys.stderr, flush=True)
    files = sum(tally.files for tally in found.values())
    minutes = (time.monotonic() - started) / 60
    told = f"{files:,} files, seed {given.seed}, on one core of {processor()}, {minutes:,.0f} minutes."
    print(f"{table(found)}\n\n{told}")
    if given.write:
        write_table("files", f"{told}\n\n{table(found)}")
    return 1 if any(tally.faults for tally in found.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
