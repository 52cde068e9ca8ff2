"""Descriptions of jobs and plugins: docstrings and options, read from the dataclasses and cached.

Reading them imports the module that holds it, and with it PyTorch and the like. So they are kept in a file of
the user's cache folder, and `--help` and the shell's completion import nothing the second time. The file
holds as long as what it was read from: all source files that were imported, by size and time, and the names
and versions of the installed distributions. Anything else than a whole and fresh file is as good as none.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import json
import os
import sys
import sysconfig
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass
from functools import cache
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any, cast, get_type_hints

from clip_base.jobs import plugins
from clip_base.jobs.config import REQUIRED, default_of, ordered_fields
from clip_base.jobs.everyday import everyday_of
from clip_base.runtime.lazy import LOADED_AT
from clip_base.storage.files import write_json

CACHE = "REGIONCLIP_CACHE"  # the environment variable that names another folder
PATIENCE = 1.5  # seconds without a word
CLOCK_TICK = 10_000_000  # nanoseconds; a file's time may lag behind the clock by about half of it


@dataclass(frozen=True)
class Option:
    """One option of a job or a plugin.

    Attributes:
        key: dotted, as on the command line; a plugin's is `matcher.name`.
        kind: its type, as it is written.
        default: a plugin's is its name; `REQUIRED` when there is none.
        meaning: one line.
        choices: the values it may take; empty: any.
        group: the entry points that a plugin's name is one of, else empty.
        positional: whether the command line's plain arguments go to it.
    """

    key: str
    kind: str
    default: Any
    meaning: str
    choices: list[str]
    group: str
    positional: bool

    @property
    def required(self) -> bool:
        """Whether the user must give it."""
        return bool(self.default == REQUIRED)


@dataclass(frozen=True)
class Description:
    """A job or a plugin.

    Attributes:
        text: its docstring.
        options: those of nested dataclasses included.
        fault: why it cannot be imported; empty when it can be.
        example: a command, see `everyday`.
        sections: keys of everyday options by section, see `everyday`.
    """

    text: str
    options: list[Option]
    fault: str = ""
    example: str = ""
    sections: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @property
    def summary(self) -> str:
        """The docstring's first line, or the fault."""
        return self.fault or self.text.partition("\n")[0]


def options_of(schema: type, instance: Any = None, prefix: str = "") -> Iterator[Option]:
    """Yields the options of a config dataclass, nested ones in the place of what holds them.

    Args:
        schema: the dataclass.
        instance: whose values are the defaults, where a nested dataclass was declared with one.
        prefix: stands before every key.
    """
    hints = get_type_hints(schema)
    for declared in ordered_fields(schema):
        key, hint, told = f"{prefix}{declared.name}", hints[declared.name], declared.metadata
        default = default_of(declared) if instance is None else getattr(instance, declared.name)
        if is_dataclass(hint):
            nested = None if isinstance(default, str) else default  # it may be REQUIRED as a whole
            yield from options_of(cast(type, hint), nested, f"{key}.")
            continue
        group = told.get("group", "")
        yield Option(
            key=f"{key}.name" if group else key,
            kind=hint.__name__ if isinstance(hint, type) else str(hint),
            default=default["name"] if group else default,
            meaning=told.get("meaning", ""),
            choices=list(told.get("choices", ())),
            group=group,
            positional=told.get("positional", False),
        )


def describe(point: EntryPoint) -> Description:
    """Describes a job or a plugin; imports it, and the plugins it may have, unless they are known already.

    Raises:
        Exception: whatever importing its module raises.
    """
    files, points = _known()
    if _name(point) not in points:
        message = f"importing {point.module} to read its options, which are kept for the next time …"
        notice = threading.Timer(PATIENCE, print, [message], {"file": sys.stderr, "flush": True})
        notice.daemon = True
        notice.start()
        try:
            _learn(point, points)
        finally:
            notice.cancel()
        _save([*files, *_sources({name.partition(" = ")[2] for name in points})], points)
    return points[_name(point)]


def plugins_of(group: str) -> dict[str, Description]:
    """Describes all plugins of a group; one that cannot be imported says so and has no options."""
    described = {}
    for name, point in sorted(plugins.found(group).items()):
        try:
            described[name] = describe(point)
        except Exception as error:
            described[name] = Description("", [], f"cannot be imported from {point.value}: {error}")
    return described


def _name(point: EntryPoint) -> str:
    return f"{point.group}: {point.name} = {point.value}"


def _learn(point: EntryPoint, points: dict[str, Description]) -> None:
    target = point.load()
    schema = plugins.schema_of(target)
    shown = everyday_of(schema)
    options = [asdict(option) for option in options_of(schema) if option.key not in shown.unused]
    value: dict[str, Any] = {"text": inspect.getdoc(target) or "", "options": options}
    value |= {"example": shown.example, "sections": shown.sections}
    # As the file will give it back: the first answer is then the same as the later ones.
    points[_name(point)] = _description(json.loads(json.dumps(value, default=str)))
    for option in points[_name(point)].options:
        for other in plugins.found(option.group).values() if option.group else ():
            if _name(other) not in points:
                with contextlib.suppress(Exception):  # told where it is shown
                    _learn(other, points)


def _description(value: Any) -> Description:
    options = [Option(**option) for option in value["options"]]
    return Description(value["text"], options, "", value["example"], value["sections"])


@cache
def _known() -> tuple[list[str], dict[str, Description]]:
    """Returns the descriptions by entry point, and the files that an earlier process read them from."""
    installed = _installed()
    try:
        kept = json.loads(_path().read_text(encoding="utf-8"))
        if kept["installed"] == installed and kept["files"] == _stamps(kept["files"]):
            points = {name: _description(value) for name, value in kept["points"].items()}
            return list(kept["files"]), points
    except (OSError, RuntimeError, ValueError, TypeError, LookupError, AttributeError):
        pass  # none, not readable, cut off, of another shape: treated as missing, and written again
    return [], {}


def _save(files: Iterable[str], points: dict[str, Description]) -> None:
    """Keeps what is known for later processes, where there is a place for it."""
    with contextlib.suppress(OSError, RuntimeError, ValueError):
        stamps = _stamps(files)
        # What was changed while this process ran may have been imported before the change.
        if all(changed < LOADED_AT - CLOCK_TICK for changed, _ in stamps.values()):
            told = {name: asdict(description) for name, description in points.items()}
            write_json(_path(), {"installed": _installed(), "files": stamps, "points": told})


def _path() -> Path:
    """Returns the file of this environment; each has its own, so that two of them do not take turns."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(os.environ.get(CACHE) or Path(home) / "regionclip").expanduser()
    place = [sys.prefix, sys.version, __file__, os.environ.get("PYTHONPATH", ""), str(sys.flags.optimize)]
    return folder / f"options-{hashlib.sha256(json.dumps(place).encode()).hexdigest()[:16]}.json"


@cache  # before anything is described: what is imported then (setuptools) may lengthen sys.path
def _installed() -> list[str]:
    """Returns the installed distributions, with versions, as their folders of metadata are called."""
    found: set[str] = set()
    for folder in sys.path:
        with contextlib.suppress(OSError):
            found.update(name for name in os.listdir(folder or ".") if name.endswith(("-info", ".egg-link")))
    return sorted(found)


def _sources(places: set[str]) -> Iterator[str]:
    """Yields the files of all imported modules but those that `_installed` vouches for.

    That is: the packages that provide jobs or plugins wherever they are, and what is not in a folder of
    installed packages or of Python itself.
    """
    providers = {place.partition(":")[0].partition(".")[0] for place in places}
    libraries = tuple(f"{sysconfig.get_path(name)}/" for name in ("stdlib", "platstdlib"))
    for name, module in list(sys.modules.items()):
        file = str(getattr(module, "__file__", None) or "")
        versioned = file.startswith(libraries) or "/site-packages/" in file or "/dist-packages/" in file
        if os.path.isabs(file) and (name.partition(".")[0] in providers or not versioned):
            yield file


def _stamps(files: Iterable[str]) -> dict[str, list[int]]:
    return {file: [(stat := os.stat(file)).st_mtime_ns, stat.st_size] for file in files}
