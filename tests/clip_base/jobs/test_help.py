"""`--help` shows the options that most calls need, `--help-all` the rest, and guesses are answered."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from clip_base.jobs import cli, plugins
from clip_base.jobs import config as configs
from clip_base.jobs.familiar import HERE
from clip_base.jobs.schema import describe
from clip_base.runtime.errors import InputError

JOBS = sorted(
    name
    for name, point in plugins.found(plugins.JOBS).items()
    if point.value.startswith(("clip_base", "regionclip"))
)
MOST = 14  # options that are everyday ones


def shown(name: str, *words: str) -> list[str]:
    """Returns the program and the words that ask for a job's help."""
    return [name.removeprefix("region-"), *words]


def run(name: str, *words: str) -> int:
    call = cli.main_regionclip if name.startswith("region-") else cli.main
    return call(shown(name, *words))


@pytest.mark.parametrize("name", JOBS)
def test_a_jobs_help_is_short_has_what_is_needed_and_fits_a_terminal(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(name, "--help") == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    job = describe(plugins.found(plugins.JOBS)[name])
    listed = re.findall(r"^  ([a-z][\w.]*)=", text, re.MULTILINE)
    assert len(listed) == len(set(listed)) <= MOST
    assert set(listed) <= {option.key for option in job.options}
    assert {option.key for option in job.options if option.required} <= set(listed)
    assert run(name, "--help-all") == 0
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80


@pytest.mark.parametrize("name", [name for name in JOBS if name != "region-doctor"])
def test_the_example_is_a_call_of_the_job(name: str) -> None:
    job = describe(plugins.found(plugins.JOBS)[name])
    called, *words = shlex.split(job.example)
    assert called == name.removeprefix("region-")
    schema = plugins.schema_of(plugins.load(plugins.JOBS, name))
    file, overrides = cli.parse(schema, words)
    configs.resolve(schema, file, overrides)  # raises where an option does not exist or is missing


def test_help_shows_the_options_of_the_part_that_is_named_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main_regionclip(["detect", "--help"]) == 0
    assert "proposer.sizes" not in capsys.readouterr().out
    file = tmp_path / "grid.yaml"
    file.write_text("proposer: {name: grid}\n")
    for word in ("proposer.name=grid", str(file)):
        for flag in ("--help", "--help-all"):
            assert cli.main_regionclip(["detect", word, flag]) == 0
            text = capsys.readouterr().out
            assert "  proposer.sizes" in text
            assert "proposer.min_size" not in text  # selective search's
    assert cli.main_regionclip(["mine", "--help-all"]) == 0  # of the default proposer
    text = capsys.readouterr().out
    assert "  proposer.clip (" in text
    assert "proposer.stride" not in text


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("detect a.jpg --conf 0.25", "'conf'; it is called score_threshold here: score_threshold=0.25"),
        ("detect --source a.jpg", "'source'; it is called images here: images=a.jpg"),
        ("detect a.jpg --classes 'cat, dog'", 'it is called vocabulary here: vocabulary="cat, dog"'),
        ("detect a.jpg --imgsz 640", "it is called resize.short here: resize.short=640 resize.long=640"),
        ("detect a.jpg --model x.pt", "it is called weights here: weights=x.pt"),
        ("detect a.jpg --half", "it is called precision here: precision=bf16"),
        ("detect a.jpg --save-txt", "it is called format here: format=yolo"),
        ("train-detector --epochs 12", "it is called train.epochs here: train.epochs=12"),
        ("train-detector --resume", "the same command resumes a stopped run by itself"),
        ("detect a.jpg --scoer-threshold 0.2", "did you mean 'score_threshold'?"),
    ],
)
def test_a_familiar_spelling_is_answered_with_what_to_type(
    words: str, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main_regionclip(shlex.split(words)) == 2
    error = capsys.readouterr().err
    assert "there is no option" in error
    assert told in error
    assert error.count("\n") == 1


def test_what_is_told_to_type_is_understood() -> None:
    schema = plugins.schema_of(plugins.load(plugins.JOBS, "region-detect"))
    needed = ["images=[a.jpg]", "vocabulary=cat"]
    for spelling in ("imgsz", "half", "save_txt", "nosave", "max_det", "iou", "batch", "conf", "vid_stride"):
        value = 320 if spelling == "imgsz" else 1
        with pytest.raises(InputError, match="it is called") as error:
            configs.resolve(schema, None, [*needed, f"{spelling}={value}"])
        _, _, told = str(error.value).partition(" here: ")
        configs.resolve(schema, None, [*needed, *cli.parse(schema, shlex.split(told))[1]])


def test_lists_of_numbers_need_no_brackets() -> None:
    schema = plugins.schema_of(plugins.load(plugins.JOBS, "region-detect"))
    _, overrides = cli.parse(schema, ["a.jpg", "vocabulary=cat", "resize.short=320,480"])
    assert configs.resolve(schema, None, overrides).resize.short == [320, 480]


def test_every_answer_names_an_option_of_some_job() -> None:
    known = {
        key
        for name in JOBS
        for key, _, _ in configs.fields_of(plugins.schema_of(plugins.load(plugins.JOBS, name)))
    }
    for answers in HERE.values():
        for answer in answers:
            assert {part.partition("=")[0] for part in answer.split("&")} <= known


@pytest.mark.parametrize("key", ["detector.nms=0.4", "detector.max_proposals=9"])
def test_an_option_that_would_do_nothing_is_refused_and_not_shown(
    key: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main_regionclip(["features", "a.jpg", "weights=x.safetensors", key]) == 2
    assert f"{key.partition('=')[0]!r} does nothing in this job" in capsys.readouterr().err
    assert cli.main_regionclip(["features", "--help-all"]) == 0
    assert key.partition("=")[0] + " (" not in capsys.readouterr().out


@pytest.mark.parametrize("words", [["configs"], ["fetch", "--list"]])
def test_lists_fit_a_terminal(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(words) == 0
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80
