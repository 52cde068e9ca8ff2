"""The job `doctor`: installed and missing packages, device and precision."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from rich.console import Console
from rich.table import Table

from clip_base.jobs import plugins
from clip_base.jobs.config import option
from clip_base.runtime.errors import InputError
from clip_base.storage.files import write_json

PACKAGE = "regionclip"
FOR_DEVELOPERS = ("dev", "all")
GIB = 2**30
FILE_WIDTH = 110  # of the report where there is no terminal that says how wide it is


@dataclass
class DoctorConfig:
    """Options of the check."""

    out: str = option("", "JSON file for the findings; empty: none")


@dataclass(frozen=True)
class CheckResult:
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
    """Shows versions, device, precision and optional parts; fails if a required one is missing."""
    sections = {
        "needed packages": list(packages()),
        "this machine": list(machine()),
        "language": list(language()),
        "jobs and parts": list(parts()),
        "optional": list(optional()),
    }
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for title, findings in sections.items():
        table.add_row(title, style="bold")
        for finding in findings:
            style = "bold red" if finding.needed and finding.remedy else "yellow" if finding.remedy else ""
            found = f"{finding.found}\n-> {finding.remedy}" if finding.remedy else finding.found
            table.add_row(f"  {finding.topic}", found, style=style)
    console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else FILE_WIDTH)
    console.print(table)
    everything = [finding for findings in sections.values() for finding in findings]
    if config.out:
        write_json(config.out, [vars(finding) for finding in everything], indent=1)
    missing = [finding for finding in everything if finding.needed and finding.remedy]
    if missing:
        topics = ", ".join(finding.topic for finding in missing)
        raise InputError(f"{len(missing)} required part(s) are missing: {topics}; {missing[0].remedy}")
    print("everything required is installed")


def machine() -> Iterator[CheckResult]:
    """Yields what the machine computes with."""
    yield CheckResult("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    try:
        import torch  # noqa: PLC0415 (what is broken here is what the doctor is asked about)

        from clip_base.runtime.precision import computes_in_bf16, pick_device  # noqa: PLC0415
        from clip_base.storage.remote_cache import cache_folder  # noqa: PLC0415
    except (ImportError, OSError) as error:
        reason = (str(error).splitlines() or [""])[0]
        yield CheckResult("device", f"unknown: {reason}", "reinstall PyTorch (see pytorch.org)", True)
        return

    device, remedy = pick_device("auto"), ""
    if device.type == "cuda":
        name, memory = torch.cuda.get_device_name(), torch.cuda.get_device_properties(0).total_memory / GIB
        found = f"cuda: {torch.cuda.device_count()} × {name}, {memory:.0f} GiB"
    else:
        found = f"cpu: {os.cpu_count()} cores, {torch.get_num_threads()} threads"
        if shutil.which("nvidia-smi"):
            build = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
            remedy = (
                f"an NVIDIA driver is installed, but PyTorch (built {build}) sees no GPU: see pytorch.org"
            )
    yield CheckResult("device", found, remedy)
    bf16 = computes_in_bf16(device)
    yield CheckResult("precision=auto", "bf16" if bf16 else "fp32 (this processor has no bf16 arithmetic)")
    folder = cache_folder()
    held = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if folder.exists() else 0
    free = shutil.disk_usage(_first_existing(folder)).free
    yield CheckResult("published weights", f"{folder}: {held / GIB:.1f} GiB kept, {free / GIB:.0f} GiB free")


def _first_existing(path: Path) -> Path:
    return next(place for place in (path, *path.parents) if place.exists())


def packages() -> Iterator[CheckResult]:
    """Yields the versions of the project itself and of what it depends on."""
    yield CheckResult(PACKAGE, f"{metadata.version(PACKAGE)} in {Path(__file__).parent}")
    for requirement in _requirements(""):
        version, fits = _installed(requirement)
        remedy = "" if fits else f"pip install '{requirement.name}{requirement.specifier}'"
        yield CheckResult(requirement.name, version, remedy, needed=True)


def _installed(requirement: Requirement) -> tuple[str, bool]:
    """Returns the version that is installed, in words, and whether it is one that is asked for."""
    try:
        version = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        return "not installed", False
    fits = requirement.specifier.contains(version, prereleases=True)
    return version if fits else f"{version}, but {requirement.specifier} is needed", fits


def _requirements(extra: str) -> list[Requirement]:
    """Returns what the project requires on this machine; with an extra's name, what that one adds."""
    found = []
    for line in metadata.requires(PACKAGE) or []:
        requirement = Requirement(line)
        marker = requirement.marker
        always = marker is None or marker.evaluate({"extra": ""})
        named = marker is not None and not always and marker.evaluate({"extra": extra})
        if named if extra else always:
            found.append(requirement)
    return found


def language() -> Iterator[CheckResult]:
    """Yields the spaCy model that reads captions when none is named."""
    from regionclip.concepts.spacy_models import model_name  # noqa: PLC0415

    try:
        yield CheckResult("spaCy model", model_name(""), needed=True)
    except InputError as error:
        yield CheckResult("spaCy model", "none", str(error), needed=True)


def parts() -> Iterator[CheckResult]:
    """Yields the jobs and named parts that entry points declare, and those that cannot be loaded."""
    for group in sorted(group for group in metadata.entry_points().groups if _is_ours(group)):
        broken = {}
        for name in plugins.found(group):
            try:
                plugins.load(group, name)
            except Exception as error:  # whatever another package's module does when it is imported
                broken[name] = (str(error).splitlines() or [type(error).__name__])[0]
        names = ", ".join(sorted(plugins.found(group)))
        if group == plugins.JOBS:
            counts = Counter(point.module.partition(".")[0] for point in plugins.found(group).values())
            names = ", ".join(f"{count} of {package}" for package, count in sorted(counts.items()))
        remedy = "; ".join(f"{name}: {reason}" for name, reason in broken.items())
        yield CheckResult(group, names, remedy)


def _is_ours(group: str) -> bool:
    return group.split(".")[0] in ("clip_base", PACKAGE)


def optional() -> Iterator[CheckResult]:
    """Yields the packages of each extra, and how to get them."""
    extras = metadata.metadata(PACKAGE).get_all("Provides-Extra") or []
    for extra in sorted(set(extras) - set(FOR_DEVELOPERS)):
        found = {requirement.name: _installed(requirement) for requirement in _requirements(extra)}
        shown = ", ".join(f"{name} {version}" for name, (version, _) in found.items())
        whole = all(fits for _, fits in found.values())
        yield CheckResult(extra, shown, "" if whole else f"pip install '{PACKAGE}[{extra}]'")
    # The package's name does not depend on its distribution.
    (distribution, *_) = metadata.packages_distributions().get("detectron2", ["detectron2"])
    version, fits = _installed(Requirement(distribution))
    yield CheckResult(
        "detectron2's plugin", version, "" if fits else "see docs/detectron2.md, or `make detectron2`"
    )
