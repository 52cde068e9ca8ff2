"""`--help` reads a kept description the second time, and never one of code that has changed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from clip_base.jobs import schema

JOB = '''
"""A job."""
import sys
from dataclasses import dataclass
from pathlib import Path
from clip_base.jobs.config import REQUIRED, Plugin, option, plugin
from numbers_of_ours import LARGEST

sys.path.append(str(Path(__file__).parent / "vendored"))  # as setuptools does

@dataclass
class Inner:
    rate: float = option(0.1, "how fast")

@dataclass
class GreetConfig:
    whom: str = option(REQUIRED, "whom to greet", positional=True)
    size: int = option(LARGEST, "how large")
    place: Path = option(Path("a/b"), "where")
    inner: Inner = option(Inner(rate=0.7), "nested")
    voice: Plugin = plugin("greeter.voices", "loud", "how it sounds")

def greet(config: GreetConfig) -> None:
    """Greets.

    And more.
    """
'''
VOICE = '''
from dataclasses import dataclass
from clip_base.jobs.config import Plugin, option, plugin

@dataclass
class VoiceConfig:
    volume: int = option(11, "how loud")
    under: Plugin = plugin("greeter.voices", "none", "another voice below it")

class Loud:
    """Shouts."""
    def __init__(self, config: VoiceConfig) -> None: ...
'''
ASK = """
import sys
from clip_base.jobs.cli import main
code = main(sys.argv[1:])
print(*sorted({"greeter.jobs", "torch", "numpy"} & set(sys.modules)), file=sys.stderr)
sys.exit(code)
"""

Ask = Callable[..., tuple[str, str]]


def install(site: Path, name: str, points: str, version: str = "1.0") -> None:
    info = site / f"{name}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (info / "entry_points.txt").write_text(points)


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder with an installed package of one job and one plugin, which uses a library beside it."""
    site = tmp_path / "site"
    (site / "greeter" / "vendored" / "other-1.0.dist-info").mkdir(parents=True)
    (site / "greeter" / "__init__.py").write_text("")
    (site / "greeter" / "jobs.py").write_text(JOB)
    (site / "greeter" / "voice.py").write_text(VOICE)
    (site / "numbers_of_ours.py").write_text("LARGEST = 21\n")
    points = "[clip_base.jobs]\ngreet = greeter.jobs:greet\n[greeter.voices]\nloud = greeter.voice:Loud\n"
    install(site, "greeter", points)
    return site


@pytest.fixture
def ask(site: Path, tmp_path: Path) -> Ask:
    """Gives a command to a new process; returns what it printed, and what heavy it had imported."""

    def run(*arguments: str, code: str = ASK, **changed: str) -> tuple[str, str]:
        environment = {
            **os.environ,
            "PYTHONPATH": str(site),
            "PYTHONDONTWRITEBYTECODE": "1",
            "REGIONCLIP_CACHE": str(tmp_path / "cache"),
            **changed,
        }
        child = subprocess.run(
            [sys.executable, "-c", code, *(arguments or ("greet", "--help"))],
            env=environment,
            capture_output=True,
            text=True,
        )
        assert child.returncode == 0, child.stderr
        return child.stdout, child.stderr.strip()

    return run


def test_the_second_help_is_the_first_and_imports_nothing(ask: Ask) -> None:
    first, imported = ask()
    assert imported == "greeter.jobs"
    for line in (
        "And more.",
        "  whom (str, required)\n      whom to greet",
        "  size (int, default 21)",
        "  place (Path, default 'a/b')",
        "  inner.rate (float, default 0.7)",
        "  voice.name (plugin, default loud; known: loud)\n      how it sounds",
        "  voice.volume (int, default 11)\n      [loud] how loud",
        "  voice.under.name (plugin, default none; known: loud)\n      [loud] another voice below it",
    ):
        assert line in first
    assert ask() == (first, "")
    assert ask("completion", "--words", "greet", "voice.name=") == ("voice.name=loud\tShouts.\n", "")


def edit(path: str, old: str, new: str) -> Callable[[Path], None]:
    def change(site: Path) -> None:
        text = (site / path).read_text()
        assert old in text
        (site / path).write_text(text.replace(old, new))

    return change


def add_a_plugin(site: Path) -> None:
    (site / "whisper.py").write_text(VOICE.replace("Shouts", "Whispers"))
    install(site, "whisper", "[greeter.voices]\nlow = whisper:Loud\n")


def declare_another_plugin(site: Path) -> None:
    with (site / "greeter-1.0.dist-info" / "entry_points.txt").open("a") as file:
        file.write("other = greeter.voice:Loud\n")


CHANGES = {
    "the job": (edit("greeter/jobs.py", "0.7", "0.9"), "inner.rate (float, default 0.9)"),
    "the job's text": (edit("greeter/jobs.py", "And more", "No less"), "No less."),
    "the plugin": (edit("greeter/voice.py", "11", "99"), "voice.volume (int, default 99)"),
    "a library": (edit("numbers_of_ours.py", "21", "42"), "size (int, default 42)"),
    "another package": (add_a_plugin, "known: loud, low)"),
    "a declaration": (declare_another_plugin, "known: loud, other)"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_nothing_stale_is_shown(change: str, ask: Ask, site: Path) -> None:
    make, expected = CHANGES[change]
    assert expected not in ask()[0]
    make(site)
    shown, _ = ask()
    assert expected in shown
    assert ask() == (shown, "")


def test_another_version_is_read_anew(ask: Ask, site: Path) -> None:
    shown = ask()[0]
    (site / "greeter-1.0.dist-info").rename(site / "greeter-1.1.dist-info")
    assert ask() == (shown, "greeter.jobs")
    assert ask() == (shown, "")


def test_a_module_that_was_imported_before_it_changed_is_not_kept(ask: Ask, site: Path) -> None:
    late = f"""
import sys
from pathlib import Path
import greeter.jobs
path = Path({str(site / "greeter" / "jobs.py")!r})
path.write_text(path.read_text().replace("0.7", "0.9"))
from clip_base.jobs.cli import main
main(sys.argv[1:])
"""
    assert "inner.rate (float, default 0.7)" in ask(code=late)[0]
    assert "inner.rate (float, default 0.9)" in ask()[0]


def break_it(text: str, how: str) -> str:
    whole = json.loads(text)
    point = next(iter(whole["points"].values()))
    match how:
        case "cut off":
            return text[: len(text) // 2]
        case "an option without a key":
            del point["options"][0]["key"]
        case "options of another kind":
            point["options"] = 3
        case "descriptions of another kind":
            whole["points"] = [point]
        case "without files":
            del whole["files"]
        case "files of another kind":
            whole["files"] = [1]
        case _:
            return how
    return json.dumps(whole)


@pytest.mark.parametrize(
    "how",
    [
        "",
        "[]",
        "null",
        "\0\1",
        "cut off",
        "an option without a key",
        "options of another kind",
        "descriptions of another kind",
        "without files",
        "files of another kind",
    ],
)
def test_a_broken_file_is_ignored_and_written_anew(how: str, ask: Ask, tmp_path: Path) -> None:
    shown = ask()[0]
    (file,) = (tmp_path / "cache").iterdir()
    file.write_text(break_it(file.read_text(), how))
    assert ask() == (shown, "greeter.jobs")
    assert ask() == (shown, "")
    assert list((tmp_path / "cache").iterdir()) == [file]


def test_without_a_place_for_the_file_help_is_as_ever(ask: Ask, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    shown = ask()[0]
    for _ in range(2):
        assert ask(REGIONCLIP_CACHE=str(tmp_path / "file" / "below")) == (shown, "greeter.jobs")


@pytest.mark.parametrize("variable", ["XDG_CACHE_HOME", "HOME"])
def test_the_folder_is_the_users_cache_folder(variable: str, ask: Ask, tmp_path: Path) -> None:
    ask(**{"REGIONCLIP_CACHE": "", "XDG_CACHE_HOME": "", "HOME": "/", variable: str(tmp_path)})
    folder = tmp_path / ".cache" if variable == "HOME" else tmp_path
    assert len(list((folder / "regionclip").glob("options-*.json"))) == 1


def test_a_plugin_that_cannot_be_imported_is_told_beside_the_others(ask: Ask, site: Path) -> None:
    install(site, "broken", "[greeter.voices]\ncracked = no_such_module:Voice\n")
    for _ in range(2):
        shown, _ = ask()
        assert "known: cracked, loud)" in shown
        told = "[cracked] cannot be imported from no_such_module:Voice: No module named 'no_such_module'"
        assert f"voice.name=cracked {told}" in " ".join(shown.split())
        assert "voice.volume (int, default 11)" in shown
    shutil.copy(site / "greeter" / "voice.py", site / "no_such_module.py")
    edit("no_such_module.py", "class Loud", "class Voice")(site)
    assert "cannot be imported" not in ask()[0]


def test_a_slow_import_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wait = "import threading\n[t.join() for t in threading.enumerate() if isinstance(t, threading.Timer)]\n"
    (tmp_path / "slow_voice.py").write_text(wait + VOICE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(schema, "PATIENCE", 0)
    schema.describe(EntryPoint("slow", "slow_voice:Loud", "nobody's"))
    told = "importing slow_voice to read its options, which are kept for the next time …\n"
    assert capsys.readouterr().err == told
    schema.describe(EntryPoint("slow", "slow_voice:Loud", "nobody's"))
    assert capsys.readouterr().err == ""
