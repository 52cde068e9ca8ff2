"""What an evaluation and a report need is checked before anything is detected or parsed."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from regionclip.evaluation import evaluate
from regionclip.mining import mine, report

Command = Callable[..., tuple[int, str]]


def no_work(*_: object, **__: object) -> None:
    raise AssertionError("work began before everything was checked")


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["evaluator=fast"], "evaluator=fast needs faster-coco-eval"),
        (["protocol=lvis"], "which LVIS's protocol needs"),
    ],
)
def test_an_evaluator_that_cannot_be_used_is_told_before_anything_is_detected(
    given: list[str],
    told: str,
    options: list[str],
    clip_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    regionclip: Command,
) -> None:
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    monkeypatch.setattr(evaluate, "_detect", no_work)
    call = [f"weights={clip_file}", "proposer.name=grid", *given, f"out={tmp_path / 'out'}"]
    code, message = regionclip("evaluate", *options, *call)
    assert (code, told in message) == (2, True), message


def test_a_folder_that_a_report_cannot_write_to_is_told_before_captions_are_parsed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, regionclip: Command
) -> None:
    monkeypatch.setattr(report, "read_data", no_work)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("something of mine")
    code, message = regionclip("report", f"mined={tmp_path}", f"out={tmp_path / 'out'}")
    assert (code, "is not empty and has no run of region-report" in message) == (2, True), message


def test_a_proposer_that_cannot_be_made_is_told_before_names_are_embedded_and_locks_nothing(
    world: Path,
    clip_file: Path,
    concepts_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    regionclip: Command,
) -> None:
    call = [f"images={world / 'images'}", f"captions={world / 'captions_train.json'}"]
    call += [f"weights={clip_file}", f"concepts={concepts_file}", f"out={tmp_path / 'out'}"]
    monkeypatch.setattr(mine, "_embed", no_work)
    code, message = regionclip("mine", *call, "proposer.name=rpn", "proposer.weights=absent.safetensors")
    assert (code, "absent.safetensors" in message) == (2, True), message
    assert not (tmp_path / "out" / "vocabulary.safetensors").exists()
