"""Options read from source are those of the module once it is imported."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

import pytest

from clip_base.jobs import config as configs
from clip_base.jobs import plugins
from clip_base.jobs.outline import describe

GROUPS = sorted(
    group
    for group in entry_points().groups
    if group.startswith(("clip_base.", "regionclip.")) and "." in group
)


def described(points: list[EntryPoint]) -> list[str]:
    lines = []
    for point in points:
        description = describe(point)
        defaults = configs.defaults_of(description.schema)
        lines.append(f"{point.group} {point.name}: {description.text}")
        for key, field, hint in configs.fields_of(description.schema):
            shown = getattr(hint, "__name__", "") if isinstance(hint, type) else str(hint)
            lines.append(f"{key} {shown} {defaults.get(key)!r} {dict(field.metadata)}")
    return lines


def takes_config(point: EntryPoint) -> bool:
    try:
        plugins.schema_of(point.load())
    except (TypeError, AttributeError):
        return False
    return True


def test_all_jobs_and_parts_are_read_without_their_modules() -> None:
    points = [point for group in GROUPS for point in plugins.found(group).values() if takes_config(point)]
    assert len(points) > 30
    code = f"""
import json, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from importlib.metadata import EntryPoint
from test_outline import described
print(json.dumps(described([EntryPoint(*given) for given in json.loads(sys.argv[1])])))
assert not {{point for point in json.loads(sys.argv[1]) if EntryPoint(*point).module in sys.modules}}
assert "torch" not in sys.modules
""".replace("{point for point", "{tuple(point) for point")
    given = json.dumps([(point.name, point.value, point.group) for point in points])
    child = subprocess.run([sys.executable, "-c", code, given], capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    assert json.loads(child.stdout) == described(points)


SOURCE = '''
from __future__ import annotations
import no_such_module
from dataclasses import dataclass
from no_such_module import Thing
from clip_base.jobs.config import option
from {package}.sizes import LARGEST, Sizes as Renamed

class Base:
    def __init__(self, config: Config, thing: Thing) -> None:
        self.thing = thing

@dataclass(frozen=True)
class Config:
    """Options."""
    size: int = option(2 * LARGEST, "how large")
    inner: Renamed = option(Renamed(width=3), "sizes")
    def __post_init__(self) -> None:
        no_such_module.check(self)

class Part(Base, no_such_module.Other):
    """A part."""

def job(config: Config) -> None:
    """A job.

    And more.
    """
'''


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = f"outlined_{tmp_path.name.replace('-', '_')}"
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").write_text("")
    (tmp_path / name / "heavy.py").write_text(SOURCE.format(package=name))
    (tmp_path / name / "sizes.py").write_text(
        "import no_such_module\nfrom dataclasses import dataclass\nLARGEST = 21\n"
        "@dataclass\nclass Sizes:\n    width: int = LARGEST\n"
    )
    (tmp_path / name / "again.py").write_text(f"from {name}.heavy import job as other\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    return name


@pytest.mark.parametrize(
    ("place", "text"),
    [("heavy:job", "A job.\n\nAnd more."), ("heavy:Part", "A part."), ("again:other", "A job.\n\nAnd more.")],
)
def test_nothing_but_the_options_is_run(place: str, text: str, package: str) -> None:
    description = describe(EntryPoint("toy", f"{package}.{place}", "toys"))
    assert description.text == text
    assert configs.defaults_of(description.schema) == {"size": 42, "inner.width": 3}
    assert next(hint for _, _, hint in configs.fields_of(description.schema)) is int


def test_what_is_not_plain_is_imported(package: str, tmp_path: Path) -> None:
    (tmp_path / package / "odd.py").write_text(
        "from dataclasses import dataclass\nif True:\n    WIDTH = 5\n@dataclass\nclass Config:\n"
        "    width: int = WIDTH\ndef job(config: Config) -> None:\n    'Is odd.'\n"
    )
    description = describe(EntryPoint("odd", f"{package}.odd:job", "toys"))
    assert description.text == "Is odd."
    assert dataclasses.fields(description.schema)[0].default == 5
    assert f"{package}.odd" in sys.modules


def test_a_constant_that_is_changed_later_is_not_read_half_way(package: str, tmp_path: Path) -> None:
    (tmp_path / package / "changed.py").write_text(
        "from dataclasses import dataclass\nNAMES = ('a',)\nNAMES += ('b',)\n@dataclass\nclass Config:\n"
        "    names: tuple = NAMES\ndef job(config: Config) -> None:\n    'Is changed.'\n"
    )
    schema = describe(EntryPoint("changed", f"{package}.changed:job", "toys")).schema
    assert dataclasses.fields(schema)[0].default == ("a", "b")
