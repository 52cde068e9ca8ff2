from __future__ import annotations

import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch

from clip_base.runtime.errors import InputError
from clip_base.storage.files import read_json
from regionclip import doctor


def test_a_whole_installation_is_reported_as_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    doctor.doctor(doctor.DoctorConfig(str(tmp_path / "doctor.json")))
    told = capsys.readouterr().out
    found = {entry["topic"]: entry for entry in read_json(tmp_path / "doctor.json")}
    assert found["regionclip"]["found"].startswith(metadata.version("regionclip"))
    assert found["torch"]["found"] == metadata.version("torch")
    assert "en_core_web_sm" in found["spaCy model"]["found"]
    assert " of regionclip" in found["clip_base.jobs"]["found"]
    assert found["serve"]["found"] == f"gradio {metadata.version('gradio')}"
    assert {"onnx", "supervision", "ray", "tensorboard"} <= set(found)
    assert not any(entry["needed"] and entry["remedy"] for entry in found.values())
    assert all(f"  {topic} " in told for topic in found)
    # Remedies are to be copied: none is cut off.
    assert all(entry["remedy"] in told for entry in found.values() if len(entry["remedy"]) < 60)
    assert told.endswith("everything required is installed\n")


def versions(monkeypatch: pytest.MonkeyPatch, **given: str) -> None:
    """Pretends these versions; "" is a package that is not installed."""
    real = metadata.version

    def version(name: str) -> str:
        if given.get(name) == "":
            raise metadata.PackageNotFoundError(name)
        return given.get(name) or real(name)

    monkeypatch.setattr(metadata, "version", version)


def test_a_missing_package_fails_and_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    versions(monkeypatch, pycocotools="")
    with pytest.raises(
        InputError, match=r"1 required part\(s\) are missing: pycocotools; pip install 'pycoco"
    ):
        doctor.doctor(doctor.DoctorConfig())


def test_a_version_that_is_not_asked_for_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    versions(monkeypatch, omegaconf="1.4", torch="2.13.0")
    found = {finding.topic: finding for finding in doctor.packages()}
    assert found["omegaconf"].found == "1.4, but >=2.3 is needed"
    assert found["omegaconf"].remedy == "pip install 'omegaconf>=2.3'"
    assert "!=2.13.0" in found["torch"].remedy
    assert not found["numpy"].remedy


def test_an_extra_that_is_not_installed_is_named_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    versions(monkeypatch, tensorboard="", onnxruntime="", gradio="4.0", detectron2="")
    monkeypatch.setattr(metadata, "packages_distributions", dict)
    found = {finding.topic: finding for finding in doctor.optional()}
    assert found["tensorboard"].found == "tensorboard not installed"
    assert found["tensorboard"].remedy == "pip install 'regionclip[tensorboard]'"
    assert "onnxruntime not installed" in found["onnx"].found
    assert found["onnx"].remedy == "pip install 'regionclip[onnx]'"
    assert found["serve"].found.startswith("gradio 4.0, but >=")
    assert not found["supervision"].remedy
    assert "make detectron2" in found["detectron2's plugin"].remedy
    assert not any(finding.needed for finding in found.values())


def test_without_pytorch_the_rest_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    python, device = doctor.machine()
    assert python.topic == "python"
    assert device.needed
    assert device.found.startswith("unknown: ")


def test_a_gpu_that_pytorch_does_not_see_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/usr/bin/{name}")
    found = {finding.topic: finding for finding in doctor.machine()}
    assert "sees no GPU" in found["device"].remedy
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    found = {finding.topic: finding for finding in doctor.machine()}
    assert found["device"].remedy == ""


def test_a_plugin_that_does_not_load_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(group: str, name: str) -> object:
        if name == "grid":
            raise ImportError("no module named missing")
        return object()

    monkeypatch.setattr(doctor.plugins, "load", load)
    found = {finding.topic: finding for finding in doctor.parts()}
    assert found["regionclip.proposers"].remedy == "grid: no module named missing"
    assert found["regionclip.matchers"].remedy == ""
