"""The project's configs are found from anywhere and listed; the programs and packages tell their version."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import pytest

import clip_base
import regionclip
from clip_base.jobs.cli import main, main_regionclip
from clip_base.jobs.shipped import find_config, shipped_folder
from clip_base.runtime.errors import InputError

NAME = "configs/region-mine/photos.yaml"


def test_a_config_of_the_project_is_found_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_config(NAME) == shipped_folder() / "region-mine" / "photos.yaml"
    (tmp_path / NAME).parent.mkdir(parents=True)
    (tmp_path / NAME).write_text("batch_size: 3\n")
    assert find_config(NAME) == Path(NAME)  # what lies here comes first


@pytest.mark.parametrize(
    "name", ["configs/region-mine/none.yaml", "configs/../pyproject.toml", "photos.yaml"]
)
def test_other_names_are_those_of_files(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="does not exist"):
        find_config(name)


def test_every_config_is_listed_with_what_it_is_for(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main_regionclip(["configs"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for file in shipped_folder().glob("region-*/*.yaml"):
        meaning = lines[lines.index(f"configs/{file.parent.name}/{file.name}") + 1].strip()
        assert len(meaning.split()) > 2, file
        assert "settings called" not in meaning, file
    assert main(["configs", "pretrain"]) == 0
    assert "configs/pretrain/rn50.yaml" in capsys.readouterr().out
    assert main(["configs", "pretrian"]) == 2
    assert "did you mean 'pretrain'" in capsys.readouterr().err


def test_programs_and_packages_tell_their_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == main_regionclip(["-V"]) == 0
    assert capsys.readouterr().out.split() == [
        "clip-base",
        version("regionclip"),
        "regionclip",
        version("regionclip"),
    ]
    assert clip_base.__version__ == regionclip.__version__ == version("regionclip")


@pytest.mark.parametrize("package", [clip_base, regionclip])
def test_every_public_name_is_there(package: object) -> None:
    for name in package.__all__:  # type: ignore[attr-defined]
        assert getattr(package, name) is not None
