"""What is installed, what this machine computes with, and what is missing: `regionclip doctor`."""

from __future__ import annotations

import os
import platform
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from rich.console import Console
from rich.table import Table

from clip_base import plugins
from clip_base.config import option
from clip_base.errors import InputError
from clip_base.files import write_json

PACKAGE = "regionclip"
EXTRA = re.compile(r"extra\s*==\s*['\"]([\w-]+)['\"]")
NAME = re.compile(r"[\w.-]+")
FOR_DEVELOPERS = ("dev", "all")
GIB = 2**30


@dataclass
class DoctorConfig:
    """Options of the check."""

    out: str = option("", "JSON file that takes the findings too; empty: none")


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        topic: what was looked at.
        found: what is there.
        remedy: what to do about it; "" when all is well.
        needed: whether the project does not work without it.
    """

    topic: str
    found: str
    remedy: str = ""
    needed: bool = False


def doctor(config: DoctorConfig) -> None:
    """Shows versions, device, precision and optional parts; fails when a needed one is missing."""
    findings = [*machine(), *packages(), *language(), *parts(), *optional()]
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column()
    for finding in findings:
        style = "bold red" if finding.needed and finding.remedy else "yellow" if finding.remedy else ""
        found = f"{finding.found}\n  {finding.remedy}" if finding.remedy else finding.found
        table.add_row(finding.topic, found, style=style)
    Console(highlight=False, markup=False).print(table)
    if config.out:
        write_json(config.out, [vars(finding) for finding in findings], indent=1)
    missing = [finding for finding in findings if finding.needed and finding.remedy]
    if missing:
        topics = ", ".join(finding.topic for finding in missing)
        raise InputError(f"{len(missing)} needed part(s) are missing: {topics}; {missing[0].remedy}")


def machine() -> Iterator[Finding]:
    """Yields what the machine computes with."""
    import torch

    from clip_base.precision import computes_in_bf16, pick_device
    from clip_base.weights.published import cache_folder

    device = pick_device("auto")
    yield Finding("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    if device.type == "cuda":
        name, memory = torch.cuda.get_device_name(), torch.cuda.get_device_properties(0).total_memory / GIB
        yield Finding("device", f"cuda: {torch.cuda.device_count()} × {name}, {memory:.0f} GiB")
    else:
        yield Finding("device", f"cpu: {os.cpu_count()} cores, {torch.get_num_threads()} threads")
    bf16 = computes_in_bf16(device)
    yield Finding("precision=auto", "bf16" if bf16 else "fp32 (this processor has no bf16 arithmetic)")
    folder = cache_folder()
    held = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if folder.exists() else 0
    free = shutil.disk_usage(_first_existing(folder)).free
    yield Finding("published weights", f"{folder}: {held / GIB:.1f} GiB kept, {free / GIB:.0f} GiB free")


def _first_existing(path: Path) -> Path:
    return next(place for place in (path, *path.parents) if place.exists())


def packages() -> Iterator[Finding]:
    """Yields the versions of what the project depends on."""
    for requirement in _requirements(None):
        yield _package(requirement, f"pip install '{requirement}'", needed=True)


def _package(requirement: str, remedy: str, needed: bool) -> Finding:
    name = NAME.match(requirement)
    assert name is not None
    try:
        return Finding(name[0], metadata.version(name[0]), needed=needed)
    except metadata.PackageNotFoundError:
        return Finding(name[0], "not installed", remedy, needed)


def _requirements(extra: str | None) -> list[str]:
    """Returns what the project requires, without an extra or for one."""
    chosen = []
    for line in metadata.requires(PACKAGE) or []:
        requirement, _, marker = line.partition(";")
        named = EXTRA.search(marker)
        if (named[1] if named else None) == extra:
            chosen.append(requirement.strip())
    return chosen


def language() -> Iterator[Finding]:
    """Yields the spaCy model that reads captions when none is named."""
    from regionclip.language import model_name

    try:
        yield Finding("spaCy model", model_name(""), needed=True)
    except InputError as error:
        yield Finding("spaCy model", "none", str(error), needed=True)


def parts() -> Iterator[Finding]:
    """Yields the jobs and named parts that entry points declare, and those that cannot be loaded."""
    for group in sorted(group for group in metadata.entry_points().groups if _is_ours(group)):
        broken = {}
        for name in plugins.found(group):
            try:
                plugins.load(group, name)
            except (InputError, ImportError, AttributeError) as error:
                broken[name] = str(error).splitlines()[0]
        names = ", ".join(sorted(plugins.found(group)))
        remedy = "; ".join(f"{name}: {reason}" for name, reason in broken.items())
        yield Finding(group, names, remedy)


def _is_ours(group: str) -> bool:
    return group.split(".")[0] in ("clip_base", PACKAGE)


def optional() -> Iterator[Finding]:
    """Yields the packages of each extra, and how to get them."""
    extras = metadata.metadata(PACKAGE).get_all("Provides-Extra") or []
    for extra in sorted(set(extras) - set(FOR_DEVELOPERS)):
        for requirement in _requirements(extra):
            found = _package(requirement, f"pip install '{PACKAGE}[{extra}]'", needed=False)
            yield Finding(f"{found.topic} (for {extra})", found.found, found.remedy)
    # The package has its name whoever distributes it.
    (distribution, *_) = metadata.packages_distributions().get("detectron2", ["detectron2"])
    detectron2 = _package(distribution, "see docs/detectron2.md, or `make detectron2`", needed=False)
    yield Finding("detectron2 (its plugin)", detectron2.found, detectron2.remedy)
