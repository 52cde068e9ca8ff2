"""What to type on clusters: the scripts on the page are shell, and their commands have our options."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest

from clip_base.jobs import cli, plugins
from clip_base.jobs import config as configs

PAGE = Path(__file__).parents[2] / "docs" / "scaling.md"
SCRIPTS = dict(re.findall(r'^```bash title="([^"]+)"\n(.*?)^```$', PAGE.read_text("utf-8"), re.M | re.S))
PROGRAMS = {"regionclip": cli.REGION_PREFIX, "clip-base": ""}
VARIABLES = {"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "8"}


def calls(script: str) -> list[tuple[str, list[str]]]:
    """Returns the calls of our programs in a script: the job's full name, and its arguments."""
    found = []
    for line in script.replace("\\\n", " ").splitlines():
        if line.startswith("#"):
            continue
        words = shlex.split(re.sub(r'"?\$\(which ([\w-]+)\)"?', r"\1", line))
        for place, word in enumerate(words):
            if word in PROGRAMS:
                arguments = [re.sub(r"\$(\w+)", lambda m: VARIABLES[m[1]], one) for one in words[place + 1 :]]
                found.append((PROGRAMS[word] + arguments[0], arguments[1:]))
                break
    return found


def test_the_page_has_a_script_for_each_way() -> None:
    text = "\n".join(SCRIPTS.values())
    for word in ("srun ", "torchrun ", "ray job submit ", "executor=ray", "out=s3://", "shard="):
        assert word in text
    submitted = re.findall(r"^sbatch (\S+)$", PAGE.read_text("utf-8"), re.M)
    assert set(submitted) == {name for name in SCRIPTS if name.endswith(".sbatch")}
    assert "bash pretrain_node.sh" in SCRIPTS["pretrain.sbatch"]


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_is_shell(name: str) -> None:
    ended = subprocess.run(["bash", "-n"], input=SCRIPTS[name], capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert SCRIPTS[name].startswith("#!/bin/bash\n")


@pytest.mark.parametrize("name", [name for name in SCRIPTS if calls(SCRIPTS[name])])
def test_its_commands_have_our_options(name: str) -> None:
    for job, arguments in calls(SCRIPTS[name]):
        schema = plugins.schema_of(plugins.load(plugins.JOBS, job))
        file, overrides = cli.parse(schema, arguments)
        resolved: Any = configs.resolve(schema, file, overrides)
        assert resolved.out


def test_most_scripts_call_us() -> None:
    assert [name for name in SCRIPTS if not calls(SCRIPTS[name])] == ["pretrain.sbatch"]
