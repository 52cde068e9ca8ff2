"""Kills every job at random moments and starts it again: `python tests/fuzz/kills.py --kills 20`.

What is there in the end must equal what an undisturbed run leaves: the same files, byte for byte but for
times (pickles and databases by their content), and none more. The jobs run in processes forked from this one,
which has imported them once. Two cases beside: two processes with one output folder, and a training in two
ranks of which one is killed. The last lines are the second table of `docs/reliability.md`.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import re
import shutil
import signal
import socket
import sqlite3
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from fuzz_makers import detector, network, tiny_clip
from fuzz_report import processor, write_table

from clip_base.jobs import cli, plugins
from clip_base.storage.files import read_json
from clip_base.storage.lock import is_lock
from clip_base.weights.native import save_clip

PATIENCE = 300.0  # seconds until a run counts as hung
GRACE = 10.0  # seconds in which a rank ends that has lost the other one
TIMES = re.compile(r"seconds|per_second|images_s|_s$|time|speed")  # keys of what differs between equal runs

SIZE = ["resize.short=[64]", "resize.long=64"]
TRAIN = [
    *("train.steps=6", "train.batch_size=4", "train.save_every=0.02", "train.log_every=1", "train.lr=0.001"),
    *("train.warmup_steps=0", "train.schedule=constant", "train.precision=fp32", "train.device=cpu"),
]
TOWER = [
    *("tower.embed_dim=16", "tower.vision.kind=vit", "tower.vision.layers=[1]", "tower.vision.width=32"),
    *(
        "tower.vision.head_width=16",
        "tower.vision.patch=16",
        "tower.vision.resolution=32",
        "tower.text.width=32",
    ),
    *("tower.text.heads=2", "tower.text.layers=1", "tower.text.context_length=12"),
]
TRUTH = ["annotations=world/instances_train.json", "images=world/images"]
PAIRS = ["captions=world/captions_train.json", "images=world/images"]
GRID = ["proposer.name=grid", "proposer.sizes=[0.5,1.0]"]
MINE = [
    *PAIRS,
    *(
        "weights=clip.safetensors",
        "concepts=pool.jsonl",
        *GRID,
        "matcher.name=caption",
        *SIZE,
        "batch_size=2",
    ),
    *("matcher.min_probability=0.0", "shard_images=3", "precision=fp32"),
]
REGIONS = ["max_proposals=20", "rois_per_image=8", "detector.max_proposals=10", "train.optimizer=adamw"]
# Each job with what it needs, but for `out`.
JOBS: dict[str, list[str]] = {
    "scenes": ["images=24", "val_images=4", "size=64", "workers=1"],
    "pretrain": [
        "source.name=coco",
        *(f"source.{one}" for one in PAIRS),
        *TOWER,
        *TRAIN,
        "train.optimizer=adamw",
    ],
    "index": ["world/images", "weights=clip.safetensors", "batch_size=2"],
    "zeroshot": [*TRUTH, "weights=clip.safetensors", "templates=simple", "batch_size=4"],
    "retrieval": [*PAIRS, "weights=clip.safetensors", "batch_size=4"],
    "classify": ["world/images/train", "classes=cup, star", "weights=clip.safetensors", "batch_size=2"],
    "curate": [
        "source.name=coco",
        *(f"source.{one}" for one in PAIRS),
        *("corpus=captions", "min_count=1", "per_query=2"),
    ],
    "region-concepts": ["captions=world/captions_train.json", "min_count=1"],
    "region-train-rpn": [
        *TRUTH,
        "split=world/split.json",
        *SIZE,
        *TRAIN,
        "network.backbone_weights=clip.safetensors",
    ],
    "region-propose": [*TRUTH, *GRID, *SIZE, "batch_size=2"],
    "region-mine": MINE,
    "region-report": ["mined=mined", "images=world/images"],
    "region-export": ["mined=mined", "images=world/images", "format=yolo"],
    "region-pretrain": [
        "mined=mined",
        "images=world/images",
        "weights=clip.safetensors",
        *SIZE,
        *TRAIN,
        "max_regions=4",
    ],
    "region-train-detector": [
        *(*TRUTH, "split=world/split.json", "weights=clip.safetensors", "rpn=rpn/w.safetensors"),
        *(*SIZE, *TRAIN, *REGIONS),
    ],
    "region-detect": [
        "world/images/train",
        "weights=detector/w.safetensors",
        "vocabulary=cup, star",
        "batch_size=2",
    ],
    "region-features": [
        "world/images/train",
        "weights=detector/w.safetensors",
        "batch_size=2",
        "shard_images=3",
    ],
    "region-evaluate": [*TRUTH, "weights=detector/w.safetensors", "boxes=truth"],
}
OUT = {"region-concepts": "out/pool.jsonl"}


@dataclass
class Outcome:
    """What came of a job: kills, of which some came when it had ended, and what differed."""

    kills: int = 0
    late: int = 0
    seconds: float = 0.0
    faults: list[str] = field(default_factory=list)


def forked(run: Callable[[], int], log: Path, environment: dict[str, str] | None = None) -> int:
    """Starts a function in a process forked from this one; returns the process's number."""
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        with log.open("ab") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        os.environ.update(environment or {})
        code = run()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def waited(child: int, patience: float = PATIENCE) -> int:
    """Returns the exit code of a process, -N of one that signal N ended; kills one that hangs: -1000."""
    end = time.monotonic() + patience
    while time.monotonic() < end:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return -1000


def command(job: str) -> Callable[[], int]:
    words = [job, *JOBS[job], f"out={OUT.get(job, 'out')}"]
    return lambda: cli.main(words)


def without_times(value: Any) -> Any:
    """Returns a value of JSON without what tells how long things took."""
    if isinstance(value, dict):
        return {key: without_times(one) for key, one in value.items() if not TIMES.search(key)}
    return [without_times(one) for one in value] if isinstance(value, list) else value


def digest(value: Any) -> Any:
    """Returns tensors in a tree as hashes of their numbers, so that trees can be compared."""
    if isinstance(value, torch.Tensor):
        plain = value.detach().contiguous().reshape(-1).view(torch.uint8)
        return (str(value.dtype), tuple(value.shape), hashlib.sha256(plain.numpy().tobytes()).hexdigest())
    if isinstance(value, dict):
        return {key: digest(one) for key, one in value.items()}
    return [digest(one) for one in value] if isinstance(value, list | tuple) else value


def content(folder: Path) -> dict[str, Any]:
    """Returns what a run left, by file."""
    found: dict[str, Any] = {}
    # Which steps are saved before the last one is a matter of time.
    steps = sorted(path.name for path in (folder / "checkpoints").glob("*"))
    for path in sorted(folder.rglob("*")):
        if path.is_dir() or is_lock(path) or (path.parent.name in steps[:-1] and path.parent.name.isdigit()):
            continue
        name = str(path.relative_to(folder))
        if path.suffix == ".json":
            found[name] = without_times(read_json(path))
        elif path.suffix == ".jsonl":
            found[name] = [without_times(json.loads(line)) for line in path.read_text().splitlines()]
        elif path.suffix == ".pt":
            found[name] = digest(torch.load(path, weights_only=True))
        elif path.suffix == ".db":
            with contextlib.closing(sqlite3.connect(path)) as base:
                found[name] = sorted(base.iterdump())
        else:
            found[name] = path.read_bytes()
    return found


def differences(there: dict[str, Any], here: dict[str, Any]) -> list[str]:
    """Returns the names of files that differ, are missing or too many."""
    lost = [f"{name} is missing" for name in there if name not in here]
    left = [f"{name} is left" for name in here if name not in there]
    # As text, in which NaN equals itself.
    both = [name for name in there if name in here]
    return lost + left + [f"{name} differs" for name in both if repr(there[name]) != repr(here[name])]


def last_lines(log: Path) -> str:
    return (
        " | ".join(log.read_text(errors="replace").strip().splitlines()[-3:])[-300:] if log.exists() else ""
    )


class World:
    """A folder with all that the jobs read; the jobs run in it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.log = folder, folder / "log.txt"
        os.chdir(folder)
        made = waited(forked(self._make, self.log))
        if made:
            raise RuntimeError(f"the world could not be made: {last_lines(self.log)}")

    def _make(self) -> int:
        scenes = [
            "images=12",
            "val_images=4",
            "size=64",
            "object_min=0.3",
            "workers=1",
            "seed=5",
            "out=world",
        ]
        code = cli.main(["scenes", *scenes])
        save_clip(tiny_clip("resnet"), "clip.safetensors")
        for name, make in (("rpn", network), ("detector", detector)):
            Path(name).mkdir()
            make(Path(name))
        names = [entry["name"] for entry in read_json("world/instances_train.json")["categories"]]
        entries = [{"concept": name, "count": 3, "examples": [], "kind": "given"} for name in names]
        Path("pool.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
        return code or cli.main(["region-mine", *MINE, "out=mined"])

    def clear(self) -> None:
        shutil.rmtree("out", ignore_errors=True)
        self.log.unlink(missing_ok=True)
        if any(word.startswith("out/") for word in OUT.values()):
            Path("out").mkdir()

    def whole(self, run: Callable[[], int]) -> tuple[dict[str, Any], float]:
        """Returns what an undisturbed run leaves, and how long it took."""
        self.clear()
        started = time.monotonic()
        code = waited(forked(run, self.log))
        if code:
            raise RuntimeError(f"an undisturbed run ended with {code}: {last_lines(self.log)}")
        return content(Path("out")), time.monotonic() - started

    def killed(self, job: str, kills: int, rng: random.Random) -> Outcome:
        """Kills a job up to four times in a row, lets it end, compares, and so on."""
        outcome, started = Outcome(), time.monotonic()
        run = command(job)
        reference, seconds = self.whole(run)
        while outcome.kills < kills:
            self.clear()
            moments = []
            for _ in range(min(rng.choice((1, 2, 3, 4)), kills - outcome.kills)):
                moment = rng.uniform(0, 1.05 * seconds)
                moments.append(f"{moment:.2f}")
                outcome.kills += 1
                child = forked(run, self.log)
                try:
                    code = waited_until(child, moment)
                except TimeoutError:
                    os.kill(child, signal.SIGKILL)
                    os.waitpid(child, 0)
                    continue
                outcome.late += 1
                if code:
                    outcome.faults.append(f"{job}: again, it ended with {code}: {last_lines(self.log)}")
            code = waited(forked(run, self.log))
            where = f"{job} (killed after {', '.join(moments)} s)"
            if code:
                outcome.faults.append(f"{where}: ended with {code}: {last_lines(self.log)}")
            else:
                outcome.faults += [f"{where}: {one}" for one in differences(reference, content(Path("out")))]
        outcome.seconds = time.monotonic() - started
        return outcome

    def at_once(self, job: str) -> Outcome:
        """Two processes with one folder: one does the work, the other is refused or finds it done."""
        outcome, run = Outcome(), command(job)
        reference, _ = self.whole(run)
        self.clear()
        logs = [self.folder / f"log{number}.txt" for number in range(2)]
        codes = [waited(child) for child in [forked(run, log) for log in logs]]
        told = [last_lines(log) for log in logs]
        for log in logs:
            log.unlink()
        refused = [words for code, words in zip(codes, told, strict=True) if code]
        if 0 not in codes or any("is in use by" not in words for words in refused):
            outcome.faults.append(f"{job} twice at once: {codes}, {told}")
        outcome.faults += [f"{job} at once: {one}" for one in differences(reference, content(Path("out")))]
        return outcome

    def ranks(self, kills: int, rng: random.Random) -> Outcome:
        """A training in two ranks, of which one is killed: the other says so, and the next start goes on."""
        outcome, run = Outcome(), command("pretrain")

        def start() -> list[int]:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = str(free.getsockname()[1])
            group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            return [
                forked(run, self.log, {**group, "RANK": str(rank), "LOCAL_RANK": str(rank)})
                for rank in (0, 1)
            ]

        self.clear()
        started = time.monotonic()
        codes = [waited(child) for child in start()]
        seconds, reference = time.monotonic() - started, content(Path("out"))
        if any(codes):
            raise RuntimeError(f"two ranks ended with {codes}: {last_lines(self.log)}")
        for _ in range(kills):
            self.clear()
            children, moment, victim = start(), rng.uniform(0, seconds), rng.choice((0, 1))
            time.sleep(moment)
            with contextlib.suppress(ProcessLookupError):
                os.kill(children[victim], signal.SIGKILL)
            waited(children[victim])
            where = f"rank {victim} of 2 (killed after {moment:.2f} s)"
            outcome.kills += 1
            try:
                waited_until(children[1 - victim], GRACE)
            except TimeoutError:
                # Before they have met, it waits for the other one to come, until torchrun ends it.
                if Path("out/log.jsonl").exists():
                    outcome.faults.append(f"{where}: the other one hung")
                waited(children[1 - victim], 0)
            codes = [waited(child) for child in start()]
            if any(codes):
                outcome.faults.append(f"{where}: again, they ended with {codes}: {last_lines(self.log)}")
            else:
                outcome.faults += [f"{where}: {one}" for one in differences(reference, content(Path("out")))]
        return outcome


def waited_until(child: int, seconds: float) -> int:
    """Returns the exit code of a process that ends within some time; TimeoutError: it runs still."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    raise TimeoutError


def table(found: dict[str, Outcome]) -> str:
    """Returns the table in Markdown."""
    lines = ["| job | kills | of these after its end | faults |", "|---|--:|--:|--:|"]
    lines += [f"| {job} | {one.kills} | {one.late} | {len(one.faults)} |" for job, one in found.items()]
    total = [sum(getattr(one, key) for one in found.values()) for key in ("kills", "late")]
    faults = sum(len(one.faults) for one in found.values())
    return "\n".join([*lines, f"| **all** | {total[0]} | {total[1]} | {faults} |"])


def preload(jobs: Sequence[str]) -> None:
    """Imports the jobs once, for all processes that are forked from this one; starts no thread."""
    torch.set_num_threads(1)
    for job in jobs:
        plugins.found(plugins.JOBS)
        plugins.load(plugins.JOBS, job)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20, help="of each job")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--job", default="", help="a part of the jobs' names")
    parser.add_argument("--write", action="store_true", help="put the table into docs/reliability.md")
    given = parser.parse_args()
    found: dict[str, Outcome] = {}
    jobs = [job for job in JOBS if given.job in job]
    preload([*jobs, "scenes", "region-mine"])
    with tempfile.TemporaryDirectory() as place:
        world = World(Path(place))
        cases: dict[str, Callable[[], Outcome]] = {}
        for job in jobs:
            rng = random.Random(f"{given.seed} {job}")
            cases[job] = lambda job=job, rng=rng: world.killed(job, given.kills, rng)
        for job in ("pretrain", "region-mine", "region-detect"):
            cases[f"{job}, two at once"] = lambda job=job: world.at_once(job)
        cases["pretrain, one of two ranks"] = lambda: world.ranks(given.kills, random.Random(given.seed))
        for name, case in cases.items():
            if given.job in name:
                try:
                    found[name] = outcome = case()
                except RuntimeError as error:
                    found[name] = outcome = Outcome(faults=[f"{name}: {error}"])
                print(f"{name}: {outcome.kills} kills, {outcome.seconds:.0f} s", file=sys.stderr, flush=True)
                for fault in outcome.faults:
                    print(f"  {fault}", file=sys.stderr, flush=True)
        os.chdir("/")
    told = f"{given.kills} kills of each job, seed {given.seed}, on {processor()}."
    print(f"{table(found)}\n\n{told}")
    if given.write:
        write_table("kills", f"{told}\n\n{table(found)}")
    return 1 if any(one.faults for one in found.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
