"""The Dockerfile is well formed, copies what is there, and every `docker run` of the pages is a call of ours.

No engine is needed: what a build would only show after minutes is compared with the repository.
"""

from __future__ import annotations

import json
import re
import shlex
import tomllib
from pathlib import Path

import pytest

from clip_base.jobs import cli, plugins
from clip_base.jobs import config as configs

ROOT = Path(__file__).parents[2]
INSTRUCTIONS = {"FROM", "RUN", "ENV", "WORKDIR", "COPY", "EXPOSE", "ENTRYPOINT", "CMD"}
PROGRAMS = {"regionclip": cli.REGION_PREFIX, "clip-base": ""}


def instructions() -> list[tuple[str, str]]:
    text = re.sub(r"^\s*#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.M).replace("\\\n", " ")
    found = [line.strip().partition(" ") for line in text.splitlines() if line.strip()]
    return [(word, rest.strip()) for word, _, rest in found]


def stages() -> dict[str, list[tuple[str, str]]]:
    found: dict[str, list[tuple[str, str]]] = {}
    bases: dict[str, str] = {}
    name = ""
    for word, rest in instructions():
        if word == "FROM":
            base, as_, name = rest.split()
            assert as_ == "AS"
            bases[name], found[name] = base, []
        found[name].append((word, rest))
    for name, base in bases.items():
        if base in found:
            found[name] = found[base] + found[name]
    return found


def runs() -> list[list[str]]:
    """Returns the words of each `docker run` in the Dockerfile's head and on the pages."""
    texts = [(ROOT / "Dockerfile").read_text(), *(file.read_text() for file in (ROOT / "docs").glob("*.md"))]
    calls = [call for text in texts for call in re.findall(r"docker run [^`\n#]*", text) if "…" not in call]
    return [shlex.split(call) for call in calls]


def test_every_instruction_is_known_and_both_targets_end_with_a_program() -> None:
    assert {word for word, _ in instructions()} <= INSTRUCTIONS
    assert {"cpu", "cuda"} <= stages().keys()
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    for name in ("cpu", "cuda"):
        (entry,) = [json.loads(rest) for word, rest in stages()[name] if word == "ENTRYPOINT"]
        (command,) = [json.loads(rest) for word, rest in stages()[name] if word == "CMD"]
        assert entry[0] in scripts
        assert cli.main_regionclip(command) == 0


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_what_is_copied_is_there_and_not_ignored_and_what_is_built_is_copied(target: str) -> None:
    ignored = (ROOT / ".dockerignore").read_text().split()
    copied = [rest.split()[:-1] for word, rest in stages()[target] if word == "COPY"]
    sources = {source for part in copied for source in part}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    for source in sources:
        assert (ROOT / source).exists()
        assert f"!{source}" in ignored
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    needed = {*wheel["packages"], *wheel["force-include"], "pyproject.toml"}
    needed |= {project["project"]["readme"], *project["project"]["license-files"]}
    assert needed <= sources


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_the_extras_and_versions_are_the_projects(target: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    text = "\n".join(rest for word, rest in stages()[target] if word == "RUN")
    (extras,) = re.findall(r'pip install "\.\[([^\]]+)\]"', text)
    assert set(extras.split(",")) <= project["optional-dependencies"].keys()
    for package in ("torch", "torchvision"):
        (least,) = re.findall(rf'"{package}(>=[\d.]+)"', text)
        assert any(one.startswith(f"{package}{least}") for one in project["dependencies"])


def test_the_commands_that_are_shown_are_calls_of_ours(tmp_path: Path) -> None:
    assert len(runs()) >= 4
    for words in runs():
        image = next(place for place, word in enumerate(words) if re.fullmatch(r"regionclip(:\w+)?", word))
        program = words[words.index("--entrypoint") + 1] if "--entrypoint" in words else "regionclip"
        job, *arguments = words[image + 1 :]
        function = plugins.load(plugins.JOBS, PROGRAMS[program] + job)
        schema = plugins.schema_of(function)
        file, overrides = cli.parse(schema, arguments)
        configs.resolve(schema, file, overrides)
