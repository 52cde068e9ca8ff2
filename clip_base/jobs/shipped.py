"""The config files that come with the project: found from wherever one stands, and listed."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path

from clip_base.runtime.errors import InputError
from clip_base.storage.files import existing

FOLDER = "configs"
_PROGRAMS = ("regionclip ", "clip-base ", "python ", "torchrun ")
_PRESETS = {
    "quickstart": "Settings of `regionclip quickstart`",
    "results": "Settings of the tables in docs/results.md",
    "coco_mini": "Settings for some hundred COCO images",
}


def shipped_folder() -> Path:
    """Returns the folder of the configs: in the installed package, or beside it in a checkout.

    Raises:
        InputError: there is none, so that the installation is not whole.
    """
    package = Path(__file__).parents[1]
    installed = package / FOLDER
    return installed if installed.is_dir() else existing(package.parent / FOLDER, "folder of configs")


def find_config(name: str | Path) -> Path:
    """Returns the config file that is meant: one that exists from here, or one that comes with the project.

    Args:
        name: a path; what begins with `configs/` may be one of the project's.

    Raises:
        InputError: there is no such file.
    """
    path = Path(name)
    shipped_name = path.parts[:1] == (FOLDER,) and ".." not in path.parts
    if shipped_name and not path.exists():
        shipped = shipped_folder().joinpath(*path.parts[1:])
        if shipped.is_file():
            return shipped
    try:
        return existing(path, "config file")
    except InputError as error:
        hint = "; `configs` in the place of a job lists those of the project" if shipped_name else ""
        raise InputError(f"{error}{hint}") from None


def listed(prefix: str, jobs: Collection[str]) -> Iterator[tuple[str, str]]:
    """Yields the name of each config of some jobs, and what it is for.

    Args:
        prefix: of the program's jobs among all.
        jobs: the jobs, without it.
    """
    for file in sorted(shipped_folder().glob("*/*.yaml")):
        job = file.parent.name
        if job.startswith(prefix) and job.removeprefix(prefix) in jobs:
            yield f"{FOLDER}/{job}/{file.name}", _meaning(file)


def _meaning(file: Path) -> str:
    """Returns the first sentence of the comment at a config's top, or what its name says."""
    words: list[str] = []
    in_command = False
    for line in file.read_text(encoding="utf-8").splitlines():
        text = line.removeprefix("#").strip()
        if not line.startswith("#"):
            break
        in_command |= text.startswith(_PROGRAMS)
        if not in_command:
            words += text.split()
        in_command &= text.endswith("\\")
    told = " ".join(words).split(". ")[0].rstrip(".")
    return told or _PRESETS.get(file.stem, f"settings called {file.stem}")
