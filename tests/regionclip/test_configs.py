"""Every shipped config fits its job, and every job says in one line what is wrong with what it was given."""

from __future__ import annotations

import re
import shutil
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from clip_base.jobs import config as configs
from clip_base.jobs import plugins
from clip_base.jobs.cli import main_regionclip
from clip_base.jobs.schema import options_of
from clip_base.runtime.errors import InputError
from clip_base.storage.files import read_json
from regionclip.quickstart.stages import shipped

Command = Callable[..., tuple[int, str]]

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "configs").glob("*/*.yaml"))
JOBS = sorted(plugins.found(plugins.JOBS))
STAGES = {path.parent.name for path in FILES if path.stem == "quickstart"}


def required(schema: type, prefix: str = "") -> list[str]:
    """Returns an override with a placeholder for every option that has no default."""
    given = []
    for option in options_of(schema):
        if option.required:
            value = "[placeholder]" if option.kind.startswith("list") else "placeholder"
            given.append(f"{prefix}{option.key}={value}")
    return given


def parts_of(file: Path, schema: type) -> list[str]:
    """Returns placeholders for what the parts that a file names require."""
    values: dict[str, Any] = typing.cast(Any, configs.OmegaConf.to_container(configs.OmegaConf.load(file)))
    given = []
    for key, field, _ in configs.fields_of(schema):
        group = field.metadata.get("group")
        if group:
            default = configs.default_of(field)["name"]
            name = values.get(key, {}).get("name", default)
            if name != "none":
                held = values.get(key, {})
                part = plugins.schema_of(plugins.load(group, name))
                given += [
                    one for one in required(part, f"{key}.") if one.split(".")[1].split("=")[0] not in held
                ]
    return given


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_every_shipped_config_fits_its_job(file: Path) -> None:
    schema = plugins.schema_of(plugins.load(plugins.JOBS, file.parent.name))
    held = configs.OmegaConf.load(file)
    placeholders = [one for one in required(schema) if one.partition("=")[0] not in held]
    if file.parent.name == "region-evaluate":  # it takes either results or weights with images
        placeholders += ["weights=placeholder", "images=placeholder"]
    if file.parent.name == "region-features":  # it takes either images or annotations
        placeholders.append("images=[placeholder]")
    if file.parent.name == "region-concepts":  # it takes either captions or a source
        placeholders.append("captions=placeholder")
    if file.parent.name == "region-detect" and "vocabulary" not in held:  # it takes names or a query
        placeholders.append("vocabulary=placeholder")
    if file.parent.name == "region-pretrain":  # it takes either mined pairs or images alone
        placeholders += ["mined=placeholder", "images=placeholder"]
    resolved: Any = configs.resolve(schema, file, [*placeholders, *parts_of(file, schema)])
    assert isinstance(resolved, schema)


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_every_shipped_config_begins_with_its_command(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    command = file.parent.name.replace("region-", "regionclip ", 1)
    command = command if command.startswith("regionclip ") else f"clip-base {command}"
    assert re.search(rf"^# {command} configs/{file.parent.name}/{file.stem}\.yaml", text, re.MULTILINE)


def test_every_preset_has_a_config_for_every_stage() -> None:
    for preset in ("quickstart", "smoke"):
        missing = [job for job in STAGES - {"region-quickstart"} if not shipped(job, preset).exists()]
        assert not missing
    with pytest.raises(InputError, match=r"configs/region-mine/nothing\.yaml; known: .*quickstart.*smoke"):
        shipped("region-mine", "nothing")


@pytest.mark.parametrize("job", [job for job in JOBS if job.startswith("region-")])
def test_every_job_lists_its_options(job: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main_regionclip([job.removeprefix("region-"), "--help-all"]) == 0
    text = capsys.readouterr().out
    schema = plugins.schema_of(plugins.load(plugins.JOBS, job))
    for key, field, hint in configs.fields_of(schema):
        if not hasattr(hint, "__dataclass_fields__"):
            assert re.search(rf"^  {re.escape(key)}(\.name)? \(", text, re.MULTILINE), key
            assert field.metadata.get("meaning"), key


REGION_JOBS = [job.removeprefix("region-") for job in JOBS if job.startswith("region-")]


def one_line(told: str) -> bool:
    return told.startswith("error: ") and told.count("\n") == 1 and "Traceback" not in told


@pytest.mark.parametrize("job", [job for job in REGION_JOBS if job != "serve"])  # leaves nothing in an `out`
def test_an_unknown_option_is_named_with_the_nearest(job: str, regionclip: Command) -> None:
    code, told = regionclip(job, "outt=somewhere")
    assert code == 2
    assert one_line(told)
    assert "there is no option 'outt'; did you mean 'out'?" in told


@pytest.mark.parametrize("job", [job for job in REGION_JOBS if job not in ("quickstart", "doctor", "serve")])
def test_what_must_be_given_is_named(job: str, regionclip: Command, tmp_path: Path) -> None:
    code, told = regionclip(job, f"out={tmp_path / 'out'}")
    assert code == 2
    assert one_line(told)
    assert "missing: " in told
    assert not (tmp_path / "out").exists()


WRONG_TYPES = {
    "mine": "batch_size=many",
    "export": "labels=many",
    "convert-data": "score_threshold=half",
    "export-detector": "suppress=often",
    "report": "examples=some",
    "pretrain": "max_regions=[1,2]",
    "train-detector": "rois_per_image=half",
    "train-rpn": "train.lr=fast",
    "propose": "batch_size=x",
    "evaluate": "max_detections=all",
    "detect": "score_threshold=high",
    "features": "max_regions=many",
    "concepts": "min_count=few",
    "quickstart": "seed=lucky",
    "interpolate": "alpha=[half]",
    "embed": "backend=clip",
    "serve": "port=high",
}


@pytest.mark.parametrize("job", [job for job in REGION_JOBS if job != "doctor"])
def test_a_value_of_the_wrong_type_is_named(job: str, regionclip: Command) -> None:
    code, told = regionclip(job, WRONG_TYPES[job])
    assert code == 2
    assert one_line(told)
    assert WRONG_TYPES[job].partition("=")[0] in told


def good(job: str, world: Path, files: dict[str, Path]) -> dict[str, object]:
    """Returns options with which a job would run."""
    images, small = world / "images", {"resize.short": "[64]", "resize.long": 64}
    train = {"annotations": world / "instances_train.json", "images": images, "split": world / "split.json"}
    val = {
        "annotations": world / "instances_val.json",
        "images": images,
        "split": world / "split.json",
        **small,
    }
    once = {"train.steps": 1, "train.batch_size": 2, **small}
    captions = world / "captions_train.json"
    clip = {"weights": files["clip"]}
    looking = {"images": f"[{images / 'val'}]", "vocabulary": "cup"}
    mining = {"captions": captions, "concepts": files["concepts"], "proposer.name": "grid"}
    options: dict[str, dict[str, object]] = {
        "concepts": {"captions": captions, "min_count": 1},
        "mine": {"images": images, **mining, **clip, **small},
        "report": {"mined": files["mined"], "annotations": world / "instances_train.json"},
        "export": {"mined": files["mined"]},
        "pretrain": {"mined": files["mined"], **clip, **once},
        "train-rpn": {**train, "network.backbone_weights": files["clip"], "network.channels": 16, **once},
        "train-detector": {
            **train,
            "rpn": files["rpn"],
            "max_proposals": 20,
            "rois_per_image": 8,
            **clip,
            **once,
        },
        "propose": {**val, "proposer.name": "rpn", "proposer.weights": files["rpn"]},
        "evaluate": {**val, "weights": files["detector"]},
        "detect": {**looking, "weights": files["detector"], **small},
        "features": {**looking, "weights": files["detector"], "max_regions": 5, **small},
    }
    return options[job]


@pytest.fixture
def files(
    clip_file: Path, rpn_file: Path, detector_file: Path, concepts_file: Path, mined: Path
) -> dict[str, Path]:
    return {
        "clip": clip_file,
        "rpn": rpn_file,
        "detector": detector_file,
        "concepts": concepts_file,
        "mined": mined,
    }


PATHS = [
    ("concepts", "captions"),
    ("mine", "images"),
    ("mine", "captions"),
    ("mine", "weights"),
    ("mine", "concepts"),
    ("export", "mined"),
    ("report", "mined"),
    ("report", "annotations"),
    ("report", "images"),
    ("report", "pool"),
    ("pretrain", "mined"),
    ("pretrain", "weights"),
    ("pretrain", "captions"),
    ("pretrain", "images"),
    ("train-rpn", "annotations"),
    ("train-rpn", "images"),
    ("train-rpn", "split"),
    ("train-rpn", "network.backbone_weights"),
    ("train-detector", "annotations"),
    ("train-detector", "images"),
    ("train-detector", "weights"),
    ("train-detector", "rpn"),
    ("train-detector", "embeddings"),
    ("train-detector", "pseudo_labels"),
    ("propose", "annotations"),
    ("propose", "images"),
    ("propose", "proposer.weights"),
    ("evaluate", "annotations"),
    ("evaluate", "images"),
    ("evaluate", "split"),
    ("evaluate", "weights"),
    ("detect", "images"),
    ("detect", "weights"),
    ("features", "images"),
    ("features", "weights"),
    ("features", "regions_from"),
]
FOLDERS = ("images", "mined")


def call(regionclip: Command, job: str, options: dict[str, object], out: Path) -> tuple[int, str]:
    return regionclip(job, *(f"{key}={value}" for key, value in options.items()), f"out={out}")


@pytest.mark.parametrize(("job", "key"), PATHS)
def test_a_path_that_does_not_exist_is_named(
    job: str, key: str, world: Path, files: dict[str, Path], regionclip: Command, tmp_path: Path
) -> None:
    missing = tmp_path / "nowhere.json"
    is_list = key == "images" and job in ("detect", "features")
    given = f"[{missing}]" if is_list else missing
    code, told = call(regionclip, job, {**good(job, world, files), key: given}, tmp_path / "out")
    assert code == 2, told
    assert one_line(told)
    assert "nowhere.json" in told
    assert "does not exist" in told or "there is no" in told


CONTENTS = {"empty": b"", "cut": b'{"images": [', "another": b'{"a": 1}', "binary": b"\x00\xff\xfe\x80" * 50}


@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize(("job", "key"), [(job, key) for job, key in PATHS if key not in FOLDERS])
def test_a_file_that_holds_something_else_is_named(
    job: str, key: str, content: str, world: Path, files: dict[str, Path], regionclip: Command, tmp_path: Path
) -> None:
    file = tmp_path / "damaged.json"
    file.write_bytes(CONTENTS[content])
    out = tmp_path / "out"
    code, told = call(regionclip, job, {**good(job, world, files), key: file}, out)
    assert code == 2, told
    assert one_line(told)
    assert "damaged.json" in told
    assert not (out / "metrics.json").exists()
    assert not (out / "model.safetensors").exists()


@pytest.mark.parametrize("job", ["mine", "pretrain"])
def test_captions_for_an_image_that_is_not_listed_are_refused(
    job: str, world: Path, files: dict[str, Path], regionclip: Command, tmp_path: Path
) -> None:
    text = (world / "captions_train.json").read_text().replace('"image_id": 1,', '"image_id": 999,')
    (tmp_path / "captions.json").write_text(text)
    options = {**good(job, world, files), "captions": tmp_path / "captions.json"}
    code, told = call(regionclip, job, options, tmp_path / "out")
    assert code == 2
    assert one_line(told)
    assert "999" in told


@pytest.mark.parametrize("job", ["train-rpn", "train-detector", "pretrain"])
def test_pictures_that_do_not_decode_stop_training_with_their_name(
    job: str, world: Path, files: dict[str, Path], regionclip: Command, tmp_path: Path
) -> None:
    images = shutil.copytree(world / "images", tmp_path / "images")
    for path in images.glob("train/*.jpg"):
        path.write_bytes(b"no picture")
    code, told = call(regionclip, job, {**good(job, world, files), "images": images}, tmp_path / "out")
    assert code == 1
    assert one_line(told)
    assert "does not decode" in told


@pytest.mark.parametrize("job", ["train-rpn", "train-detector", "pretrain"])
def test_one_broken_picture_does_not_stop_training(
    job: str, world: Path, files: dict[str, Path], regionclip: Command, tmp_path: Path
) -> None:
    images = shutil.copytree(world / "images", tmp_path / "images")
    base = set(read_json(world / "split.json")["base"])
    content = read_json(world / "instances_train.json")
    ids = {entry["id"] for entry in content["categories"] if entry["name"] in base}
    image = next(entry["image_id"] for entry in content["annotations"] if entry["category_id"] in ids)
    broken = images / next(entry["file_name"] for entry in content["images"] if entry["id"] == image)
    broken.write_bytes(b"no picture")
    options = {**good(job, world, files), "images": images, "train.steps": 6}
    assert call(regionclip, job, options, tmp_path / "out")[0] == 0
    assert broken.name in (tmp_path / "out" / "skipped.jsonl").read_text()


@pytest.mark.parametrize("job", ["mine", "pretrain", "train-rpn", "train-detector", "propose", "evaluate"])
def test_bad_input_takes_nothing_away_from_a_finished_run(
    job: str, world: Path, files: dict[str, Path], regionclip: Command, tmp_path: Path
) -> None:
    out, options = tmp_path / "out", good(job, world, files)
    assert call(regionclip, job, options, out)[0] == 0
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    key = next(key for one, key in PATHS if one == job)
    assert call(regionclip, job, {**options, key: tmp_path / "nowhere"}, out)[0] == 2
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    assert call(regionclip, job, options, out)[0] == 0


@pytest.mark.parametrize(
    ("job", "writer"),
    [
        ("concepts", "regionclip.concepts.build.write_text"),
        ("mine", "regionclip.mining.mine.write_json"),
        ("export", "regionclip.export.label_writers.replacing"),
        ("pretrain", "regionclip.training.pretrain.save_clip"),
        ("train-rpn", "regionclip.training.train_rpn.save_network"),
        ("train-detector", "regionclip.training.train_detector.save_detector"),
        ("propose", "regionclip.proposals.propose.writing"),
        ("evaluate", "regionclip.evaluation.evaluate.write_json"),
        ("detect", "regionclip.inference.detection_files.replacing"),
        ("features", "regionclip.inference.feature_files.replacing"),
    ],
)
def test_a_full_disk_ends_a_job_with_one_line_and_it_goes_on_later(
    job: str,
    writer: str,
    world: Path,
    files: dict[str, Path],
    regionclip: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device", "somewhere")

    out, options = tmp_path / "out", good(job, world, files)
    monkeypatch.setattr(writer, full)
    code, told = call(regionclip, job, options, out)
    assert code == 1, told
    last = told.splitlines()[-1]
    assert last.startswith("error: the disk is full while writing somewhere; make room")
    monkeypatch.undo()
    assert call(regionclip, job, options, out)[0] == 0
