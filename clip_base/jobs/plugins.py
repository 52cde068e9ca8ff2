"""Entry points are the registry: jobs and named parts are found where packages declare them.

A package adds a job or a part by declaring an entry point in its own `pyproject.toml`; nothing here changes:

    [project.entry-points."regionclip.proposers"]
    edges = "my_package.edges:EdgeProposer"

A job is a function of one dataclass: `def pretrain(config: PretrainConfig) -> None`.
A part is a class whose first argument is `config`, a dataclass that lists the part's options; what else the
constructor takes is the context that the job hands over (a device, a model).
"""

from __future__ import annotations

import ast
import difflib
import importlib.util
import inspect
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, get_type_hints

from clip_base.runtime.errors import InputError, quote, shortened

JOBS = "clip_base.jobs"


@cache
def found(group: str) -> dict[str, EntryPoint]:
    """Returns the entry points of `group` by name. A name that two packages declare is an error."""
    points: dict[str, EntryPoint] = {}
    for point in entry_points(group=group):
        other = points.get(point.name)
        if other is not None and other.value != point.value:
            both = f"{other.value} and {point.value}"
            raise InputError(f"two packages declare {point.name!r} in {group}: {both}; uninstall one of them")
        points[point.name] = point
    return points


def did_you_mean(name: str, known: list[str]) -> str:
    """Returns a hint: the known name most like `name`, else the list of all of them."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(sorted(known))}"


def load(group: str, name: str) -> Any:
    """Returns the object called `name` in `group`, or at `package.module:attribute`.

    Raises:
        InputError: nothing is declared or importable under that name.
    """
    points = found(group)
    if name not in points and ":" not in name:
        raise InputError(f"{quote(name)} is not among {group}; {did_you_mean(name, list(points))}")
    value = points[name].value if name in points else name
    try:
        return EntryPoint(name, value, group).load()
    except InputError:  # the module itself says what it lacks
        raise
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        where, reason = (
            f"{quote(name)} cannot be imported from {shortened(value)}",
            shortened(str(error), 200),
        )
        raise InputError(f"{group}: {where}: {reason}") from error


def schema_of(target: Any) -> type:
    """Returns the dataclass that the first argument of a job or part is annotated with."""
    function = target.__init__ if inspect.isclass(target) else target
    hints = get_type_hints(function)
    if "config" not in hints:
        raise TypeError(f"{target!r} must take `config`, annotated with a dataclass")
    schema: type = hints["config"]
    return schema


def summary(point: EntryPoint) -> str:
    """Returns the first docstring line of what `point` names, or why it cannot be imported.

    Only its source is read, so that the list of all jobs is there at once: its module is not imported, the
    packages above it are.
    """
    try:
        spec = importlib.util.find_spec(point.module)
        if spec is None or spec.origin is None:
            raise ImportError(f"module {point.module} is missing")
        tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
    except (ImportError, SyntaxError) as error:
        return f"(cannot be imported: {error})"
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == point.attr:
            return (ast.get_docstring(node) or "").partition("\n")[0]
    return ""
