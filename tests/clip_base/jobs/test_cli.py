from __future__ import annotations

import errno
import importlib.util
import os
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest

from clip_base.jobs import cli, plugins
from clip_base.jobs import config as configs
from clip_base.jobs.config import REQUIRED, Plugin, option, plugin
from clip_base.jobs.everyday import everyday_of
from clip_base.jobs.schema import options_of
from clip_base.runtime.errors import InputError


@dataclass
class Inner:
    rate: float = option(0.1, "how fast")
    flag: bool = option(False, "whether")


@dataclass
class ToyConfig:
    out: str = option(REQUIRED, "where to")
    words: list[str] = option([], "what to say", positional=True)
    note: str = option("", "anything")
    fail: str = option("", "how to fail", choices=("", "input", "bug", "stop", "disk", "pipe", "quiet"))
    flag: bool = option(False, "whether")
    inner: Inner = option(Inner(rate=0.7), "nested")
    source: Plugin = plugin("clip_base.sources", "none", "where pairs come from")


@dataclass
class PlainConfig:
    note: str = option("", "anything", positional=True)


received: list[Any] = []


def toy(config: ToyConfig) -> None:
    """Does nothing much.

    It has more to say.

    Raises:
        InputError: when told to.
    """
    received.append(config)
    if config.fail == "input":
        raise InputError("the data are no good")
    if config.fail == "bug":
        raise RuntimeError("first line\nsecond line")
    if config.fail == "stop":
        raise KeyboardInterrupt
    if config.fail == "disk":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "out/model")
    if config.fail == "quiet":
        raise AssertionError
    print("done")


def plain(config: PlainConfig) -> None:
    """Takes one word."""
    received.append(config)


def other(config: PlainConfig) -> None:
    """Is another one's."""


FOUND = plugins.found


def toys(group: str) -> dict[str, EntryPoint]:
    if group != plugins.JOBS:
        return FOUND(group)
    names = {"toy": "toy", "plain": "plain", "region-other": "other"}
    return {name: EntryPoint(name, f"{__name__}:{value}", group) for name, value in names.items()}


@pytest.fixture
def _toys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugins, "found", toys)
    received.clear()


def given(*arguments: str) -> Any:
    assert cli.main(["toy", "out=x", *arguments]) == 0
    return received[-1]


pytestmark = pytest.mark.usefixtures("_toys")


@pytest.mark.parametrize(
    "arguments",
    [["note=a b"], ["--note", "a b"], ["--note=a b"], ["note='a b'"], ['note="a b"'], ["note=x", "note=a b"]],
)
def test_a_value_is_given_in_any_of_the_usual_forms(arguments: list[str]) -> None:
    assert given(*arguments).note == "a b"


@pytest.mark.parametrize(
    "text",
    [
        "a, b",
        "a: b",
        "{a}",
        "[x]",
        "{a: 1, b}",
        "x=y",
        "# no",
        "- a",
        "'",
        '"a", b',
        "it's",
        "null",
        "1e3",
        "007",
        "yes",
        "a\\b",
        "two\nlines",
        "ünï 🐕",
        "*",
        "&a",
        "%",
        "@x",
        "!",
        "|",
        ">",
        "a #b",
        " padded ",
        "?",
        "$x",
        "'a', 'b'",
    ],
)
def test_a_text_stays_what_it_is(text: str) -> None:
    assert given(f"note={text}").note == text
    assert given("--note", text).note == text
    # The type of a part's option is not known yet: what looks like a list or a mapping must be quoted there.
    quoted = f"'{text}'" if text[0] in "[{" else text
    assert given("source.name=csv", f"source.file={quoted}").source["file"] == text


def test_a_flag_needs_no_value_and_takes_one() -> None:
    assert given("--flag").flag is True
    assert given("--flag", "false").flag is False
    assert given("--flag", "word").words == ["word"]
    assert given("flag=true").flag is True
    assert given("--inner.flag").inner.flag is True


def test_dashes_in_a_key_are_underscores() -> None:
    config = given("source.name=csv", "source.file=f", "--source.image-column", "path")
    assert config.source["image_column"] == "path"


def test_numbers_of_nested_options_and_parts_are_read(tmp_path: Path) -> None:
    assert given("--inner.rate", "-2e-3").inner.rate == -0.002
    grid = ["grid", "proposer.sizes=[0.5, 1]", "--proposer.stride", "0.25"]
    file, overrides = cli.parse(ToyConfig, grid[1:])
    assert file is None
    assert overrides == ["proposer.sizes=[0.5, 1]", 'proposer.stride="0.25"']


def test_plain_arguments_make_the_positional_list() -> None:
    assert given("a, b.jpg", "c:d").words == ["a, b.jpg", "c:d"]
    assert given("words=a, b").words == ["a", "b"]
    assert given("words=['a, b', c]").words == ["a, b", "c"]
    assert given().words == []


def test_an_existing_file_with_an_equals_sign_is_a_plain_argument(tmp_path: Path) -> None:
    path = tmp_path / "a=b.jpg"
    path.write_text("")
    assert given(str(path)).words == [str(path)]


def test_a_single_positional_option_takes_one_argument(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plain", "a: b"]) == 0
    assert received[-1].note == "a: b"
    assert cli.main(["plain", "a", "b"]) == 2
    assert "only one note can be given, found a, b" in capsys.readouterr().err


def test_a_file_comes_before_overrides_wherever_it_stands(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("note: from the file\nwords: [x]\ninner: {rate: 3}\n")
    config = given("note=mine", str(file))
    assert (config.note, config.words, config.inner.rate) == ("mine", ["x"], 3.0)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["toy", "out=x"], 0, ""),
        (["toy"], 2, "error: missing: out=…; see --help\n"),
        (["tou"], 2, "error: there is no job 'tou'; did you mean 'toy'?\n"),
        (["toy", "out=x", "nota=3"], 2, "error: there is no option 'nota'; did you mean 'note'?\n"),
        (["toy", "out=x", "nota=a: b: {"], 2, "error: there is no option 'nota'; did you mean 'note'?\n"),
        (["toy", "out"], 2, "error: missing: out=…; see --help\n"),
        (["toy", "--out"], 2, "error: --out needs a value\n"),
        (["toy", "out=x", "fail=input"], 2, "error: the data are no good\n"),
        (["toy", "out=x", "fail=bug"], 1, "error: failed: RuntimeError: first line (--debug shows where)\n"),
        (["toy", "out=x", "fail=quiet"], 1, "error: failed: AssertionError:  (--debug shows where)\n"),
        (["toy", "out=x", "fail=stop"], 130, "stopped; the same command resumes from here\n"),
    ],
)
def test_a_call_ends_with_its_code_and_one_line(
    arguments: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments) == code
    assert capsys.readouterr().err == message


def test_a_full_disk_is_said_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["toy", "out=x", "fail=disk"]) == 1
    message = capsys.readouterr().err
    assert message.startswith("error: the disk is full while writing out/model; make room")
    assert message.count("\n") == 1


@pytest.mark.parametrize("fail", ["input", "bug"])
def test_debug_shows_the_traceback(fail: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--debug", "toy", "out=x", f"fail={fail}"]) in (1, 2)
    assert "Traceback" in capsys.readouterr().err


def test_the_region_command_lists_its_jobs_without_their_prefix(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main_regionclip([]) == 0
    shown = capsys.readouterr().out
    assert "other  Is another one's." in shown
    assert "toy" not in shown
    assert cli.main(["-h"]) == 0
    shown = capsys.readouterr().out
    assert "region-other" in shown
    assert "Does nothing much." in shown


def test_a_jobs_help_shows_nested_defaults_choices_and_parts(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["toy", "source.name=csv", "--help-all"]) == 0
    shown = capsys.readouterr().out
    for line in (
        "usage: clip-base toy out=… [FILE.yaml] [key=value …]",
        "It has more to say.",
        "  out (str, required)\n      where to",
        "  words (list[str], default [])\n      what to say",
        "  inner.rate (float, default 0.7)\n      how fast",
        "  fail (|input|bug|stop|disk|pipe|quiet, default '')",
        "  source.name (plugin, default none; known: coco, csv, folder, jsonl, mix,\n",
        "  source.image_column (str, default '')\n      [csv] column of the image path",
    ):
        assert line in shown
    assert "Raises" not in shown
    assert not received


@pytest.mark.parametrize(("name", "value"), [(p.name, p.value) for p in FOUND(plugins.JOBS).values()])
def test_every_declared_jobs_help_shows_all_options(
    name: str, value: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = value.partition(":")[0]
    try:
        spec = importlib.util.find_spec(module)
    except ModuleNotFoundError:
        spec = None
    if spec is None:
        pytest.skip(f"{module} does not exist")
    monkeypatch.setattr(plugins, "found", FOUND)
    assert cli.main([name, "--help-all"]) == 0
    lines = capsys.readouterr().out
    shown = " ".join(lines.split())
    schema = plugins.schema_of(plugins.load(plugins.JOBS, name))
    unused = everyday_of(schema).unused
    for known in (one for one in options_of(schema) if one.key not in unused):
        assert known.meaning, f"{known.key} does not say what it means"
        assert sum(line.startswith(f"  {known.key} (") for line in lines.splitlines()) == 1
        told = "required" if known.required else f"default {known.default!r}"
        kind = "|".join(known.choices) or known.kind
        assert known.group or " ".join(f" {known.key} ({kind}, {told}) {known.meaning} ".split()) in shown
    assert all(field.metadata.get("meaning") for _, field, _ in configs.fields_of(schema))


def test_the_overview_imports_no_job_and_nothing_heavy() -> None:
    code = """
import sys
from clip_base.jobs.cli import main
main(["--help"])
heavy = {"torch", "torchvision", "numpy", "cv2", "spacy", "pyarrow"} & set(sys.modules)
assert not heavy, heavy
light = ("clip_base.jobs.", "clip_base.runtime.", "clip_base.storage.")
ours = [name for name in sys.modules if name.startswith(("clip_base.", "regionclip."))]
modules = [name for name in ours if not hasattr(sys.modules[name], "__path__")]
assert all(name.startswith(light) for name in modules), modules
"""
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    assert "pretrain" in child.stdout


def test_a_reader_that_goes_away_is_no_error() -> None:
    code = "import sys; from clip_base.jobs.cli import main; sys.exit(main(['--help']))"
    child = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ}
    )
    assert child.stdout is not None
    child.stdout.close()
    assert child.stderr is not None
    assert child.stderr.read() == b""
    assert child.wait() == 0
