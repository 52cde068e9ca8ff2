from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest

from clip_base.jobs import cli, plugins
from clip_base.jobs.completion import FILES, SHELLS, next_words
from clip_base.jobs.config import REQUIRED, Plugin, option, plugin


@dataclass
class Inner:
    rate: float = option(0.1, "how fast")
    rounds: int = option(3, "how often")


@dataclass
class ToyConfig:
    photos: list[str] = option([], "pictures", positional=True)
    out: str = option(REQUIRED, "where to")
    own_mode: str = option("fast", "how", choices=("", "fast", "slow"))
    flag: bool = option(False, "whether")
    inner: Inner = option(Inner(), "nested")
    source: Plugin = plugin("clip_base.sources", "none", "where pairs come from")


@dataclass
class PlainConfig:
    note: str = option("a note", "anything")
    count: int = option(7, "how many")


def toy(config: ToyConfig) -> None:
    """Does nothing much."""


def plain(config: PlainConfig) -> None:
    """Does less."""


TOYS = {name: EntryPoint(name, f"{__name__}:{name}", plugins.JOBS) for name in ("plain", "toy")}


def offered(*words: str) -> list[str]:
    return [word for word, _ in next_words(TOYS, words)]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (["t"], ["toy"]),
        ([""], ["plain", "toy", "completion", "--help"]),
        (["completion", ""], ["bash", "zsh", "fish"]),
        (["nothing", ""], []),
        (["toy", "o"], ["out=", "own_mode=", FILES]),
        (["toy", "out=x", "o"], ["own_mode=", FILES]),
        (["toy", "--o"], ["--out=", "--own_mode=", "--outside-images"]),
        (["toy", "--own-m"], ["--own-mode="]),
        (["toy", "--f"], ["--flag"]),
        (["toy", "--own-mode", "s"], ["slow"]),
        (["toy", "--own-mode=s"], ["--own-mode=slow"]),
        (["toy", "own_mode="], ["own_mode=fast", "own_mode=slow"]),
        (["toy", "--flag", "in"], ["inner.", FILES]),
        (["toy", "flag="], ["flag=true", "flag=false"]),
        (["toy", "out="], [FILES]),
        (["toy", "--out", ""], [FILES]),
        (["toy", "inner."], ["inner.rate=", "inner.rounds=", FILES]),
        (["toy", "inner.rate=0"], ["inner.rate=0.1"]),
        (["toy", "inner.rate=5"], []),
        (["toy", "nothing="], []),
        (["toy", "--he"], ["--help", "--help-all"]),
        (["toy", "source."], ["source.name=", FILES]),
        (["toy", "source.name=c"], ["source.name=coco", "source.name=csv"]),
        (["toy", "source.name=folder", "source.f"], ["source.folder=", FILES]),
        (["toy", "photo.j"], [FILES]),
        (["plain", ""], ["note=", "count="]),
        (["plain", "x.ya"], [FILES]),
        (["plain", "count="], ["count=7"]),
        (["plain", "note="], [FILES]),
    ],
)
def test_what_may_stand_next(line: list[str], words: list[str]) -> None:
    assert offered(*line) == words


def test_words_come_with_their_meaning() -> None:
    assert dict(next_words(TOYS, ["toy", ""]))["inner."] == "…"
    assert dict(next_words(TOYS, ["toy", "inner."]))["inner.rounds="] == "how often"
    assert dict(next_words(TOYS, ["toy", "own_mode="]))["own_mode=fast"] == "default"
    assert dict(next_words(TOYS, ["t"])) == {"toy": "Does nothing much."}


def test_a_config_file_may_name_any_part() -> None:
    named = offered("toy", "some.yaml", "source.")
    assert {"source.name=", "source.image_column=", "source.captions="} <= set(named)
    assert "source.captions=" not in offered("toy", "some.yaml", "source.name=csv", "source.")


def test_a_shell_without_a_script_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["completion", "tcsh"]) == 2
    assert 'give one shell: bash, zsh, fish; eval "$(clip-base completion bash)"' in capsys.readouterr().err


def test_the_overview_says_how_to_switch_completion_on(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for shell, line in {"/bin/bash": '`eval "$(regionclip completion bash)"`', "fish": "| source`"}.items():
        monkeypatch.setenv("SHELL", shell)
        assert cli.main_regionclip([]) == 0
        assert line in capsys.readouterr().out


HEAVY = {"torch", "torchvision", "numpy", "cv2", "PIL", "pyarrow", "spacy", "matplotlib", "rich", "gradio"}


def answer(words: list[str]) -> subprocess.CompletedProcess[str]:
    code = """
import json, sys
from clip_base.jobs.cli import main_regionclip
main_regionclip(["completion", "--words", *json.loads(sys.argv[1])])
print(*sorted(sys.modules))
"""
    return subprocess.run(
        [sys.executable, "-c", code, json.dumps(words)], capture_output=True, text=True, check=True
    )


@pytest.mark.parametrize("words", [["det"], ["mine", "matcher.name="], ["train-detector", ""]])
def test_a_second_answer_imports_no_job_and_no_large_package(words: list[str]) -> None:
    answer(words)  # the first one imports what it describes
    imported = set(answer(words).stdout.splitlines()[-1].split())
    assert not imported & HEAVY
    ours = {name for name in imported if name.startswith(("clip_base.", "regionclip."))}
    modules = {name for name in ours if name.count(".") > 1}
    light = {"clip_base.jobs", "clip_base.runtime", "clip_base.storage"}
    assert {name.rpartition(".")[0] for name in modules} <= light


def test_debug_is_a_word_like_others(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main_regionclip(["completion", "--words", "doctor", "--debug"]) == 0
    assert capsys.readouterr().out == "--debug\n"


@pytest.fixture
def commands(tmp_path: Path) -> dict[str, str]:
    """Returns an environment that finds both programs, and a folder of files to complete."""
    for name, function in {"regionclip": "main_regionclip", "clip-base": "main"}.items():
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(
            f"#!{sys.executable}\nimport clip_base.jobs.cli\nclip_base.jobs.cli.{function}()\n"
        )
        program.chmod(0o755)
    for name in ("image one.jpg", "images/x.jpg", "conf.yaml"):
        (tmp_path / "files" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "files" / name).touch()
    for job in (
        "mine",
        "detect",
        "train-detector",
    ):  # the shells' answers have a time limit; the first is slow
        answer([job, ""])
    return {**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "SHELL": ""}


def shell(name: str, script: str, env: dict[str, str]) -> list[str]:
    program = shutil.which(name)
    if program is None:
        pytest.skip(f"{name} is not installed")
    plain = {"bash": ["--norc"], "zsh": ["-f"], "fish": ["--no-config"]}[name]
    folder = Path(env["PATH"].partition(":")[0]).parent / "files"
    child = subprocess.run(
        [program, *plain, "-c", script], env=env, cwd=folder, capture_output=True, text=True, timeout=6000
    )
    assert child.returncode == 0, child.stderr
    assert not child.stderr
    return child.stdout.splitlines()


BASH = {
    "regionclip det": ["detect "],
    "clip-base sce": ["scenes "],
    # bash hands `matcher.name=po` over in three words, and puts the reply in the place of the last.
    "regionclip mine matcher.name = po": ["pool "],
    "regionclip mine matcher.name =": ["caption ", "exclusive ", "hybrid ", "pool "],
    "regionclip mine teac": ["teacher=", "teacher_scale="],
    "regionclip mine --precision f": ["fp32 "],
    "regionclip train-detector train.opt": ["train.optimizer="],
    "regionclip detect image": ["images=", "image one.jpg ", "images/"],
    "regionclip detect weights = im": [],  # readline's own completion of files
}


def test_bash_completes(commands: dict[str, str]) -> None:
    calls = "\n".join(f"typed {line}" for line in BASH)
    script = f"""
eval "$(regionclip completion bash)"
compopt() {{ :; }} # works under readline alone
typed() {{
    COMP_WORDS=("$@") COMP_CWORD=$(($# - 1))
    [[ ${{!#}} == = ]] && COMP_WORDS+=("") && COMP_CWORD=$#
    _clip_base_complete "$1" "${{COMP_WORDS[COMP_CWORD]}}"
    local IFS="|"
    echo "${{COMPREPLY[*]}}"
}}
{calls}
complete -p regionclip clip-base
"""
    *answers, first, second = shell("bash", script, commands)
    assert dict(zip(BASH, answers, strict=True)) == {line: "|".join(words) for line, words in BASH.items()}
    assert first == "complete -o bashdefault -o default -o nospace -F _clip_base_complete regionclip"
    assert second == first.replace("regionclip", "clip-base")


def test_zsh_completes(commands: dict[str, str]) -> None:
    # The functions that would show the words on screen print what they are given.
    script = """
compdef() { print "for $@" }
eval "$(regionclip completion zsh)"
_describe() { local name=$4; [[ $1 = -V ]] && name=$3; print -l -- "${(@P)name}" "${@[4,-1]}" }
_files() { print files }
compset() { print -- "compset $@" }
words=(regionclip mine matcher.name=po) CURRENT=3 PREFIX=matcher.name=po; _clip_base_complete
words=(regionclip mine weights=) CURRENT=3 PREFIX=weights=; _clip_base_complete
words=(regionclip mine matc) CURRENT=3 PREFIX=matc; _clip_base_complete
"""
    assert shell("zsh", script, commands) == [
        "for _clip_base_complete clip-base regionclip",
        "matcher.name=pool:Softmax of cosine / temperature over all concepts; captions are not looked at.",
        "compset -P *=",
        "files",
        "matcher.:…",
        "-S",
        "",
    ]


def test_fish_completes(commands: dict[str, str]) -> None:
    lines = [
        "regionclip det",
        "regionclip mine matcher.name=po",
        "regionclip detect weights=im",
        "clip-base sce",
    ]
    script = "regionclip completion fish | source\n" + "\n".join(f"complete -C '{line}'" for line in lines)
    words: list[Any] = [line.partition("\t")[0] for line in shell("fish", script, commands)]
    assert words == ["detect", "matcher.name=pool", "weights=image one.jpg", "weights=images/", "scenes"]


def test_every_shell_has_a_script(capsys: pytest.CaptureFixture[str]) -> None:
    for name in SHELLS:
        assert cli.main(["completion", name]) == 0
        assert f"Completion of clip-base and regionclip in {name}" in capsys.readouterr().out
