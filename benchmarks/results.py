"""Does it work? The paper's tables on generated datasets: rows of several seeds, with their statistics.

    python benchmarks/results.py --world fair --seeds 0 1 2 3 4 --jobs 2 --out results
    python benchmarks/results.py --tables --write docs/results.md --write-differences docs/results_appendix.md

The first command makes every row that `benchmarks/results/` lacks and leaves a small JSON file there for each
row and seed, so that a stopped run resumes, also on another machine: a finished row is not made again unless
its options changed. What rows of a seed share (dataset, CLIP, proposal network, proposals) is made once, in
`--out`. Without `--rows` the main rows are made, with `--ablations` all. The second command reads the files
alone. The options of the jobs are in configs/*/results.yaml, what differs in `results_steps.py`.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from results_rows import Row, chosen, row_key, steps_of
from results_steps import WORLDS, all_steps
from results_tables import report
from rounds import machine, put, versions

from clip_base.storage.files import read_json, write_json
from regionclip.quickstart.stages import run_stages

FINISHED = Path(__file__).parent / "results"
PRESET = "results"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--world", choices=sorted(WORLDS), default="fair", help="which dataset")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument(
        "--rows", nargs="+", default=[], help="keys of the rows to make (default: the main ones)"
    )
    parser.add_argument("--ablations", action="store_true", help="make all rows")
    parser.add_argument("--jobs", type=int, default=1, help="seeds at a time, one thread each")
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder for datasets and weights")
    parser.add_argument("--finished", type=Path, default=FINISHED, help="folder of the finished rows")
    parser.add_argument("--preset", default=PRESET, help="which of configs/*/PRESET.yaml the jobs use")
    parser.add_argument("--tables", action="store_true", help="make nothing, print what is finished")
    parser.add_argument("--write", type=Path, help="Markdown page whose results section takes the tables")
    parser.add_argument(
        "--write-differences",
        type=Path,
        help="Markdown page whose differences section takes the paired differences",
    )
    return parser.parse_args()


def main() -> None:
    options = arguments()
    rows = chosen(options.rows, options.ablations)
    if not options.tables and options.jobs > 1 and len(options.seeds) > 1:
        run_side_by_side(options)
    elif not options.tables:
        for seed in options.seeds:
            run_seed(options, rows, seed)
    tables, differences = report(options.finished, options.preset)
    print(f"{tables}\n\n{differences}")
    if options.write:
        put(options.write, "results", tables)
    if options.write_differences:
        put(options.write_differences, "differences", differences)


def run_side_by_side(options: argparse.Namespace) -> None:
    """Runs every seed as a process of its own with one thread, `--jobs` of them at a time.

    Raises:
        SystemExit: seeds failed; the others were run.
    """
    command = [sys.executable, __file__, "--world", options.world, "--jobs", "1", "--preset", options.preset]
    command += ["--out", str(options.out), "--finished", str(options.finished)]
    command += ["--ablations"] if options.ablations else []
    command += ["--rows", *options.rows] if options.rows else []
    environment = os.environ | {"OMP_NUM_THREADS": "1"}

    def start(seed: int) -> int:
        return subprocess.run([*command, "--seeds", str(seed)], env=environment, check=False).returncode

    with ThreadPoolExecutor(options.jobs) as pool:
        codes = dict(zip(options.seeds, pool.map(start, options.seeds), strict=True))
    failed = [seed for seed, code in codes.items() if code]
    if failed:
        raise SystemExit(f"seeds {failed} failed; the same command resumes them")


def run_seed(options: argparse.Namespace, rows: list[Row], seed: int) -> None:
    """Makes the rows of a seed that are not finished, one after another."""
    folder = options.out / options.world / f"seed-{seed}"
    steps, done = all_steps(folder, options.world, seed), set[str]()
    for row in rows:
        file = options.finished / options.world / f"seed-{seed}" / f"{row.key}.json"
        key = row_key(row, options.world, seed, options.preset)
        if file.exists() and read_json(file, "finished row")["options"] == key:
            continue
        print(f"{options.world}, seed {seed}: {row.title}", flush=True)
        needed = steps_of(row, steps)
        for step in needed:
            if step.name not in done and step.work:
                step.work(folder, seed)
            elif step.name not in done and step.stage:
                run_stages([step.stage], options.preset, folder / "timings.json")
            done.add(step.name)
        write_json(file, finished(row, folder, key, [step.name for step in needed]), indent=2)


def finished(row: Row, folder: Path, key: str, steps: list[str]) -> dict[str, Any]:
    """Returns what is kept of a row: its metrics, and how long each step took."""
    timings = read_json(folder / "timings.json", "timings")
    metrics: dict[str, float] = {}
    for step, names in row.measures.items():
        found = read_json(folder / step / "metrics.json", "metrics")
        metrics |= {name: round(float(found[name]), 5) for name in names}
    return {
        "options": key,
        "metrics": metrics,
        "seconds": {step: timings[step] for step in steps if step in timings},
        "machine": machine(torch.get_num_threads()),
        "versions": versions("torch"),
    }


if __name__ == "__main__":
    main()
