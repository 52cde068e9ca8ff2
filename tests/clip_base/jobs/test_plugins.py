from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from typing import Any

import pytest

from clip_base.jobs import plugins
from clip_base.jobs.config import build_plugin, option
from clip_base.runtime.errors import InputError


@dataclass
class BellConfig:
    tone: str = option("c", "which")
    times: int = option(1, "how often")


class Bell:
    """Rings.

    More about it.
    """

    def __init__(self, config: BellConfig, device: str = "cpu") -> None:
        self.config, self.device = config, device


def no_config(x: int) -> None:
    """Takes no config."""


def declare(monkeypatch: pytest.MonkeyPatch, *points: EntryPoint) -> None:
    monkeypatch.setattr(plugins, "entry_points", lambda group: [p for p in points if p.group == group])
    plugins.found.cache_clear()


@pytest.fixture(autouse=True)
def _forget() -> Any:
    yield
    plugins.found.cache_clear()


BELL = EntryPoint("bell", f"{__name__}:Bell", "bells")


def test_a_declared_part_is_built_with_options_and_context(monkeypatch: pytest.MonkeyPatch) -> None:
    declare(monkeypatch, BELL)
    bell = build_plugin("bells", {"name": "bell", "times": 3}, device="gpu")
    assert (bell.config, bell.device) == (BellConfig(times=3), "gpu")


def test_a_part_is_built_by_its_address_without_being_declared(monkeypatch: pytest.MonkeyPatch) -> None:
    declare(monkeypatch)
    assert build_plugin("bells", {"name": BELL.value}).config == BellConfig()


def test_a_parts_unknown_option_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    declare(monkeypatch, BELL)
    with pytest.raises(InputError, match="bells bell: there is no option 'tone_'; did you mean 'tone'"):
        build_plugin("bells", {"name": "bell", "tone_": "d"})


@pytest.mark.parametrize("name", ["no.such.module:Thing", "clip_base.runtime.errors:NoSuchThing"])
def test_an_address_that_cannot_be_imported_is_refused(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    declare(monkeypatch)
    with pytest.raises(InputError, match="cannot be imported"):
        plugins.load("bells", name)


def test_a_declaration_that_cannot_be_imported_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    declare(monkeypatch, EntryPoint("gong", "no.such.module:Gong", "bells"))
    with pytest.raises(InputError, match=r"bells: 'gong' cannot be imported from no\.such\.module:Gong"):
        plugins.load("bells", "gong")


def test_an_unknown_name_lists_what_is_known_when_nothing_is_near(monkeypatch: pytest.MonkeyPatch) -> None:
    declare(monkeypatch, BELL)
    with pytest.raises(InputError, match="did you mean 'bell'"):
        plugins.load("bells", "belt")
    with pytest.raises(InputError, match="known: bell"):
        plugins.load("bells", "trumpet")


def test_a_name_that_two_packages_declare_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    declare(monkeypatch, BELL, EntryPoint("bell", "other:Bell", "bells"))
    with pytest.raises(InputError, match="two packages declare 'bell'"):
        plugins.found("bells")


def test_the_same_declaration_twice_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    declare(monkeypatch, BELL, BELL)
    assert list(plugins.found("bells")) == ["bell"]


def test_what_takes_no_config_is_a_mistake_of_its_author() -> None:
    with pytest.raises(TypeError, match="must take `config`"):
        plugins.schema_of(no_config)


def test_a_summary_is_the_docstrings_first_line() -> None:
    assert plugins.summary(BELL) == "Rings."
    assert "missing" in plugins.summary(EntryPoint("x", "clip_base.no_such:x", "bells"))
    assert "cannot be imported" in plugins.summary(EntryPoint("x", "no_such.module:x", "bells"))


def test_the_base_package_never_imports_the_region_package() -> None:
    code = """
import importlib, pkgutil, sys
import clip_base
for module in pkgutil.walk_packages(clip_base.__path__, "clip_base."):
    importlib.import_module(module.name)
found = sorted(name for name in sys.modules if name.partition(".")[0] == "regionclip")
sys.exit(f"imported: {found}" if found else 0)
"""
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
