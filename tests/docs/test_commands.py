"""Every command and every Python block of README and pages, typed in the order of the page on drawn images.

A command is run as it stands, with sizes made small behind it (`SMALL`). `PARSED` and `NOT_OURS` list what
is only checked, and why: its options must be the job's, its files must be there, and what it reads must be
what an earlier command writes.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import shlex
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from clip_base.data.coco import read_captions, read_instances
from clip_base.jobs import cli, plugins
from clip_base.jobs import config as configs
from clip_base.storage.limits import split_limits
from regionclip.data.categories import load_split
from regionclip.data.coco import annotation_columns, category_ids_by_name, image_fields

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
FENCE = re.compile(
    r'^(?P<marks>```+)(?P<language>[\w-]*)(?: title="(?P<title>[^"]+)")?[^\n]*\n(?P<text>.*?)^(?P=marks)$',
    re.M | re.S,
)
SHELL = ("", "sh", "bash", "shell", "console")
PROGRAMS: dict[str, tuple[str, Callable[[list[str]], int]]] = {
    "clip-base": ("", cli.main),
    "regionclip": (cli.REGION_PREFIX, cli.main_regionclip),
}
# Pages whose commands others build upon come first.
FIRST = ("docs/your_own_data.md", "README.md")

PARSED = {
    r"^regionclip serve": "waits for a browser",
    r"^regionclip detect (0|rtsp:)": "needs a camera; test_tracks_and_streams.py has one",
    r"^torchrun ": "several processes; tests/regionclip/test_region_distributed.py runs them",
    r"weights=output/": "reads what tools/train_net.py writes",
    r"backend\.name=open_clip": "downloads a model; tests/regionclip/models/test_teachers.py has small ones",
    r"mined=runs/mined_siglip": "reads what that model mines",
    r"proposer\.name=detectron2": "needs a model of detectron2's; tests/regionclip/detectron2 has one",
}
NOT_OURS = {
    r"^make ": "a target of the Makefile",
    r"^docker ": "needs an engine; test_dockerfile.py compares the calls with our options",
    r"^pip install ": "a package, or an extra of ours",
    r"^tools/install_detectron2\.sh ": "installs detectron2",
    r"^(python )?tools/train_net\.py ": "needs detectron2; tests/regionclip/detectron2 runs it",
    r"^python benchmarks/": "takes minutes to hours",
    r"^git clone |^cd ": "fetches the repository; test_pages.py compares the address with pyproject.toml",
    r"^export ": "sets an environment variable",
    r"^source ": "activates the environment",
    r"^sbatch ": "needs a Slurm cluster; test_scaling.py parses the files",
}
NOT_RUN = {r"detectron2|DefaultPredictor": "needs detectron2; tests/regionclip/detectron2 runs it"}

SMALL: dict[str, Any] = {
    "train.steps": 2,
    "train.batch_size": 4,
    "train.workers": 0,
    "train.warmup_steps": 0,
    "train.log_every": 1,
    "train.parallel": "none",
    "lr_reference_batch_size": 0,
    "resize.short": "[64]",
    "resize.long": 64,
    "max_regions": 4,
    "max_proposals": 16,
    "rois_per_image": 8,
    "detector.max_proposals": 16,
    "min_count": 1,
    "shard_images": 12,
    "workers": 1,
    "batch_size": 8,
}
SMALL_JOBS: dict[str, dict[str, Any]] = {
    "scenes": {"images": 6, "val_images": 2, "size": 64, "workers": 1},
    "pretrain": {
        "model": "",
        "tower.embed_dim": 32,
        "tower.vision.kind": "resnet",
        "tower.vision.layers": "[1,1,1,1]",
        "tower.vision.width": 8,
        "tower.vision.resolution": 64,
        "tower.text.width": 64,
        "tower.text.heads": 1,
        "tower.text.layers": 1,
        "tower.text.context_length": 24,
    },
    "region-train-rpn": {"network.channels": 16},
    "benchmark": {"seeds": 1, "shots": "[1,2]"},
}


@dataclass(frozen=True)
class Block:
    """One fenced block of a page."""

    page: str
    line: int
    language: str
    title: str
    text: str


def pages() -> list[str]:
    """Returns README and all pages, those first that others build upon."""
    found = ["README.md", *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md"))]
    return [*FIRST, *(page for page in found if page not in FIRST)]


def blocks(page: str) -> list[Block]:
    """Returns the fenced blocks of a page, and commands that stand there as indented lines."""
    text = (ROOT / page).read_text(encoding="utf-8")
    made = []
    for match in FENCE.finditer(text):
        line = text.count("\n", 0, match.start()) + 1
        made.append(Block(page, line, match["language"], match["title"] or "", match["text"]))
    rest = FENCE.sub("", text)
    indented = re.findall(r"^    ((?:python|clip-base|regionclip) .+)$", rest, re.M)
    return [*made, *(Block(page, 0, "sh", "", line) for line in indented)]


def commands(block: Block) -> list[list[str]]:
    """Returns the commands of a block as words; none of one that is no shell."""
    if block.language not in SHELL or block.title:
        return []
    lines = block.text.replace("\\\n", " ").splitlines()
    words = [shlex.split(line.removeprefix("$ "), comments=True) for line in lines]
    made = [line for line in words if line]
    if not block.language and not any(is_known(line) for line in made):
        return []  # a drawing or a listing
    return made


def is_known(words: list[str]) -> bool:
    return words[0] in PROGRAMS or words[0] == "python" or reason(words, {**PARSED, **NOT_OURS}) != ""


def reason(words: list[str], exceptions: dict[str, str]) -> str:
    """Returns why a command is not run; "" when it is."""
    text = " ".join(words)
    return next((why for pattern, why in exceptions.items() if re.search(pattern, text)), "")


class Shell:
    """Types commands in the current folder; remembers what they wrote."""

    def __init__(self, capsys: pytest.CaptureFixture[str], patch: pytest.MonkeyPatch) -> None:
        self.capsys, self.patch = capsys, patch
        self.written: list[str] = []
        self.names: dict[str, Any] = {"__name__": "pages"}

    def page(self, page: str) -> None:
        """Types everything on a page."""
        for block in blocks(page):
            if block.title:
                self.write(block)
            elif block.language == "python":
                self.python(block)
            else:
                for words in commands(block):
                    try:
                        self.type(words)
                    except AssertionError as error:
                        raise AssertionError(f"{page}, block at line {block.line}: {error}") from None

    def write(self, block: Block) -> None:
        """Writes a block that has a file's name, unless the folder has that file already."""
        path = Path(block.title)
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.text, encoding="utf-8")

    def python(self, block: Block) -> None:
        """Runs a Python block, with the names that earlier ones of the page have made."""
        code = compile(block.text, f"{block.page}:{block.line}", "exec")
        if not reason([block.text], NOT_RUN):
            exec(code, self.names)
        self.capsys.readouterr()

    def type(self, words: list[str]) -> None:
        """Runs or checks one command."""
        shown = shlex.join(words)
        if reason(words, NOT_OURS):
            self.check_other(words)
        elif words[0] == "torchrun":
            start = next(place for place, word in enumerate(words) if word.startswith("$(which"))
            self.check(words[start + 1].removesuffix(")"), words[start + 2 :])
        elif reason(words, PARSED):
            self.check(words[0], words[1:])
        elif words[0] == "python":
            self.script(words[1:])
        else:
            assert words[0] in PROGRAMS, f"{shown}: neither one of our programs nor a listed exception"
            self.run(words[0], words[1:])

    def script(self, words: list[str]) -> None:
        """Runs one of our scripts that are given by path."""
        path = ROOT / words[0]
        assert path.is_file(), f"{words[0]} does not exist"
        self.patch.syspath_prepend(str(path.parent))
        main: Callable[[list[str]], int] = importlib.import_module(path.stem).main
        code = main(words[1:])
        assert code == 0, f"{shlex.join(words)} ended with {code}: {self.capsys.readouterr()}"

    def run(self, program: str, words: list[str]) -> None:
        """Runs a job as it was typed, made small."""
        self.check(program, words)
        prefix, main = PROGRAMS[program]
        self.capsys.readouterr()
        code = main([*words, *small(prefix + words[0], words[1:])])
        out, err = self.capsys.readouterr()
        assert code == 0, f"{program} {shlex.join(words)} ended with {code}:\n{out[-500:]}\n{err[-1000:]}"

    def check(self, program: str, words: list[str]) -> None:
        """Checks a job's options against its schema, and that it reads what an earlier command wrote."""
        assert program in PROGRAMS, f"{program} is none of our programs"
        name = PROGRAMS[program][0] + words[0]
        assert name in plugins.found(plugins.JOBS), f"there is no job {name}"
        schema = plugins.schema_of(plugins.load(plugins.JOBS, name))
        typed, _ = split_limits([os.path.expandvars(os.path.expanduser(word)) for word in words[1:]])
        file, overrides = cli.parse(schema, typed)
        resolved: Any = configs.resolve(schema, file, overrides)
        given = dict(override.split("=", 1) for override in overrides)
        for key, value in given.items():
            value = value.strip("\"'")
            if key != "out" and value.startswith("runs/"):
                known = any(value.startswith(place) for place in self.written) or Path(value).exists()
                assert known, (
                    f"{program} {shlex.join(words)}: nothing on this page or before it writes {value}"
                )
        if "out" in given:
            self.written.append(str(resolved.out))

    def check_other(self, words: list[str]) -> None:
        """Checks what can be checked of a command that is not ours: targets, extras, scripts, packages."""
        if words[0] == "make":
            targets = re.findall(r"^([\w.-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
            assert words[1] in targets, f"the Makefile has no target {words[1]}"
        elif words[:3] == ["pip", "install", "-e"] and (Path(words[3]) / "pyproject.toml").is_file():
            self.install(Path(words[3]))
        elif words[0] == "pip":
            declared = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
            for extras in re.findall(r"\[([\w,-]+)\]", " ".join(words)):
                assert set(extras.split(",")) <= set(declared["optional-dependencies"]), f"no extra {extras}"
        elif words[0] == "export":
            key, _, value = words[1].partition("=")
            self.patch.setenv(key, os.environ.get(key, value))
            if key == "PYTHONPATH":  # which only a new process reads
                self.patch.syspath_prepend(str(Path(value).resolve()))
        for word in words:
            if word.startswith(("tools/", "benchmarks/", "configs/")):
                assert (ROOT / word).is_file(), f"{word} does not exist"

    def install(self, folder: Path) -> None:
        """Puts a package where Python finds it, with what pip would write about its entry points."""
        if folder.resolve() == ROOT or folder == Path("."):
            return
        declared = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        info = folder / f"{declared['name'].replace('-', '_')}-{declared['version']}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Name: {declared['name']}\nVersion: {declared['version']}\n")
        text = ""
        for group, points in declared["entry-points"].items():
            text += f"[{group}]\n" + "".join(f"{name} = {place}\n" for name, place in points.items())
        (info / "entry_points.txt").write_text(text)
        self.patch.syspath_prepend(str(folder.resolve()))
        plugins.found.cache_clear()


def small(job: str, words: list[str]) -> list[str]:
    """Returns overrides that make a job small, of the options that it has."""
    schema = plugins.schema_of(plugins.load(plugins.JOBS, job))
    known = {key for key, _, _ in configs.fields_of(schema)}
    wanted = {**SMALL, **SMALL_JOBS.get(job, {})}
    made = [f"{key}={value}" for key, value in wanted.items() if key in known]
    if "proposer" in known and not any("proposer.name=" in word for word in words):
        made += ["proposer.limit=8"] if any("proposer.weights=" in word for word in words) else []
    if any("matcher.min_objectness=" in word for word in words):
        made.append("matcher.min_objectness=0")  # a network of two steps is sure of nothing
    return made


@pytest.fixture(scope="module")
def begun() -> set[str]:
    return set()


@pytest.fixture
def shell(
    walk: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, begun: set[str]
) -> Iterator[Callable[[str], None]]:
    """Types a page, and before it those that it builds upon."""

    def type_(page: str) -> None:
        for one in dict.fromkeys([FIRST[0], page]):
            if one not in begun:
                begun.add(one)
                Shell(capsys, monkeypatch).page(one)

    yield type_
    plugins.found.cache_clear()


@pytest.mark.parametrize("page", pages())
def test_what_stands_on_a_page_works(page: str, shell: Callable[[str], None]) -> None:
    shell(page)


def all_blocks() -> list[Block]:
    return [block for page in pages() for block in blocks(page)]


def test_no_exception_is_left_without_a_command() -> None:
    lines = [" ".join(words) for block in all_blocks() for words in commands(block)]
    python = [block.text for block in all_blocks() if block.language == "python"]
    for pattern in (*PARSED, *NOT_OURS):
        assert any(re.search(pattern, line) for line in lines), pattern
    for pattern in NOT_RUN:
        assert any(re.search(pattern, text) for text in python), pattern


def test_every_example_of_a_file_is_of_its_form() -> None:
    readers: dict[str, Callable[[str], Any]] = {
        "json": json.loads,
        "yaml": yaml.safe_load,
        "toml": tomllib.loads,
    }
    for block in all_blocks():
        if block.language in readers:
            assert readers[block.language](block.text), f"{block.page}:{block.line}"


def test_the_examples_of_own_data_are_read(tmp_path: Path) -> None:
    for block in blocks("docs/your_own_data.md"):
        if block.title:
            (tmp_path / block.title).write_text(block.text, encoding="utf-8")
    captions, names = read_captions(tmp_path / "captions.json")
    assert {len(texts) for texts in captions.values()} == {2}
    content = read_instances(tmp_path / "instances.json")
    assert [image_fields(entry, tmp_path, 0)[1] for entry in content["images"]] == list(names.values())
    categories = category_ids_by_name(content["categories"], tmp_path)
    assert load_split(tmp_path / "split.json", list(categories)).novel == ("umbrella",)
    assert len(annotation_columns(content["annotations"], tmp_path).boxes) == 1


def test_a_wrong_option_and_a_missing_input_are_found(
    walk: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shell = Shell(capsys, monkeypatch)
    with pytest.raises(Exception, match="did you mean 'out'"):
        shell.check("regionclip", ["concepts", "captions=captions.json", "outt=runs/x"])
    with pytest.raises(AssertionError, match="nothing on this page or before it writes runs/nowhere"):
        shell.check("regionclip", ["report", "mined=runs/nowhere", "out=runs/x"])
    with pytest.raises(AssertionError, match="neither one of our programs"):
        shell.type(["curl", "example.org"])
