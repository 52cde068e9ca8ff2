from __future__ import annotations

from importlib import metadata
from pathlib import Path

import pytest

from clip_base.errors import InputError
from clip_base.files import read_json
from regionclip import doctor


def test_a_whole_installation_is_reported_as_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    doctor.doctor(doctor.DoctorConfig(str(tmp_path / "doctor.json")))
    told = capsys.readouterr().out
    found = {entry["topic"]: entry for entry in read_json(tmp_path / "doctor.json")}
    assert found["torch"]["found"] == metadata.version("torch")
    assert "en_core_web_sm" in found["spaCy model"]["found"]
    assert "region-mine" in found["clip_base.jobs"]["found"]
    assert not any(entry["needed"] and entry["remedy"] for entry in found.values())
    assert all(topic in told for topic in found)


def test_a_missing_package_fails_and_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name == "pycocotools":
            raise metadata.PackageNotFoundError(name)
        return "1.0"

    monkeypatch.setattr(metadata, "version", version)
    with pytest.raises(InputError, match=r"1 needed part\(s\) are missing: pycocotools; pip install 'pycoco"):
        doctor.doctor(doctor.DoctorConfig())


def test_an_extra_that_is_not_installed_is_named_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", version)
    found = {finding.topic: finding for finding in doctor.optional()}
    assert found["tensorboard (for tensorboard)"].remedy == "pip install 'regionclip[tensorboard]'"
    assert "make detectron2" in found["detectron2 (its plugin)"].remedy
    assert not any(finding.needed for finding in found.values())


def test_a_plugin_that_does_not_load_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(group: str, name: str) -> object:
        if name == "grid":
            raise ImportError("no module named missing")
        return object()

    monkeypatch.setattr(doctor.plugins, "load", load)
    found = {finding.topic: finding for finding in doctor.parts()}
    assert found["regionclip.proposers"].remedy == "grid: no module named missing"
    assert found["regionclip.matchers"].remedy == ""
