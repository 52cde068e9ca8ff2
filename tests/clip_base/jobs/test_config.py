from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from clip_base.jobs import config as configs
from clip_base.jobs.config import REQUIRED, Plugin, fields_of, option, plugin, resolve, to_yaml
from clip_base.jobs.schema import options_of
from clip_base.runtime.errors import InputError


@dataclass
class Loop:
    steps: int = option(10, "steps")
    learning_rate: float = option(0.5, "peak")
    schedule: str = option("cosine", "course", choices=("cosine", "step"))
    milestones: list[float] = option([], "shares")

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise InputError(f"steps must not be negative, found {self.steps}")


@dataclass
class Schema:
    out: str = option(REQUIRED, "folder")
    source: Plugin = plugin("clip_base.sources", "coco", "where pairs come from")
    extra: Plugin = plugin("clip_base.sources", "none", "more pairs; none: no more")
    cache: bool = option(False, "keep")
    names: list[str] = option([], "names")
    loop: Loop = option(Loop(steps=32), "the loop")


GIVEN = ["out=here", "source.captions=c.json", "source.images=pictures"]


def refusal(*overrides: str, file: Path | None = None, given: list[str] = GIVEN) -> str:
    with pytest.raises(InputError) as caught:
        resolve(Schema, file, [*given, *overrides])
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("override", "nearest"),
    [
        ("ouT=x", "out"),
        ("cach=true", "cache"),
        ("loop.learning_rat=1", "loop.learning_rate"),
        ("loop.step=1", "loop.steps"),
        ("source.caption=x", "captions"),
    ],
)
def test_an_unknown_key_names_the_nearest(override: str, nearest: str) -> None:
    message = refusal(override)
    assert repr(override.partition("=")[0].removeprefix("source.")) in message
    assert f"did you mean {nearest!r}" in message


def test_an_unknown_key_of_a_file_names_the_file(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("loop: {stepps: 3}\n")
    message = refusal(file=file)
    assert str(file) in message
    assert "did you mean 'loop.steps'" in message


@pytest.mark.parametrize(
    "override",
    [
        "loop.steps=many",
        "loop.learning_rate=high",
        "cache=perhaps",
        "loop=3",
        "loop.milestones=[a]",
        "loop.steps=1.5",
    ],
)
def test_a_value_of_the_wrong_type_is_refused_by_the_keys_name(override: str) -> None:
    assert override.partition("=")[0] in refusal(override)


def test_all_missing_values_are_named() -> None:
    assert "missing: out=…" in refusal(given=[])
    message = refusal(given=["out=here"])
    assert "source (coco)" in message
    assert "captions=…" in message
    assert "images=…" in message


def test_a_choice_is_checked_and_the_nearest_named() -> None:
    message = refusal("loop.schedule=cosin")
    assert "loop.schedule" in message
    assert "did you mean 'cosine'" in message


def test_a_dataclass_own_check_is_reported_as_it_is() -> None:
    assert refusal("loop.steps=-1") == "steps must not be negative, found -1"


def test_a_part_is_filled_in_with_its_own_defaults() -> None:
    config = resolve(Schema, None, ["out=here", "source.name=csv", "source.file=t.csv"])
    expected = {"name": "csv", "file": "t.csv", "images": "", "image_column": ""}
    assert ({**expected, "caption_column": ""}).items() <= config.source.items()


@pytest.mark.parametrize("reverse", [False, True])
def test_a_parts_name_and_options_come_in_any_order(reverse: bool) -> None:
    overrides = ["source.name=csv", "source.file=t.csv", "out=here"]
    config = resolve(Schema, None, overrides[::-1] if reverse else overrides)
    assert config.source["file"] == "t.csv"


def test_another_parts_options_do_not_leak(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("out: here\nsource: {name: coco, captions: c.json, images: images}\n")
    config = resolve(Schema, file, ["source.name=csv", "source.file=t.csv"])
    assert "captions" not in config.source
    assert config.source["images"] == ""


def test_an_unknown_part_names_the_nearest() -> None:
    assert "did you mean 'jsonl'" in refusal("source.name=jsonline")


def test_a_part_may_be_absent_where_its_default_is_none() -> None:
    assert resolve(Schema, None, GIVEN).extra == {"name": "none"}
    assert "'none' is not among clip_base.sources" in refusal("source.name=none")


def test_overrides_win_over_the_file_and_the_file_over_defaults(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("out: from file\nnames: [a, b]\nloop: {learning_rate: 3, steps: 4}\n")
    config = resolve(Schema, file, ["loop.steps=5", "loop.steps=6", *GIVEN[1:]])
    assert (config.out, config.names) == ("from file", ["a", "b"])
    assert (config.loop.steps, config.loop.learning_rate, config.loop.schedule) == (6, 3.0, "cosine")


def test_a_nested_instances_own_values_are_the_defaults() -> None:
    assert resolve(Schema, None, GIVEN).loop.steps == 32
    options = {option.key: option for option in options_of(Schema)}
    assert options["loop.steps"].default == 32
    assert options["out"].required
    assert [key for key, option in options.items() if option.required] == ["out"]


def test_a_default_list_is_not_shared() -> None:
    first, second = resolve(Schema, None, GIVEN), resolve(Schema, None, GIVEN)
    first.names.append("x")
    assert second.names == []
    assert resolve(Schema, None, GIVEN).names == []


def test_the_resolved_config_is_a_config_file(tmp_path: Path) -> None:
    config = resolve(Schema, None, [*GIVEN, "names=[a, 'b, c']", "loop.milestones=[0.5]"])
    file = tmp_path / "config.yaml"
    file.write_text(configs.to_yaml(config))
    assert resolve(Schema, file) == config


@pytest.mark.parametrize(
    ("content", "reason"),
    [("a: [", "not valid YAML"), ("- a\n- b\n", "must hold keys"), ("a: b: c", "not valid YAML")],
)
def test_a_file_that_holds_no_config_is_refused(tmp_path: Path, content: str, reason: str) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(content)
    message = refusal(file=file)
    assert reason in message
    assert str(file) in message


def test_an_empty_file_changes_nothing(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("# nothing yet\n")
    assert resolve(Schema, file, GIVEN) == resolve(Schema, None, GIVEN)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    assert "does not exist" in refusal(file=tmp_path / "no.yaml")


@pytest.mark.parametrize("override", ["out", "=x"])
def test_an_override_without_a_key_is_refused(override: str) -> None:
    assert "key=value" in refusal(override)


def test_checked_plain_values_name_where_they_come_from() -> None:
    with pytest.raises(InputError, match=r"^sizes in file: there is no option 'step'; did you mean 'steps'"):
        configs.check(Loop, {"step": 3}, "sizes in file")
    with pytest.raises(InputError, match=r"^sizes in file: option 'schedule'"):
        configs.check(Loop, {"schedule": "none"}, "sizes in file")
    assert configs.check(Loop, {"steps": 3}, "sizes in file") == Loop(steps=3)


@dataclass
class Inner:
    step_size: float = option(0.1, "step", renamed_from="eta")


@dataclass
class Outer:
    file_name: str = option("", "file", renamed_from="path")
    inner: Inner = option(Inner(), "the inner part")


@pytest.mark.parametrize(
    ("override", "line", "now"),
    [
        ("path=a", "path: a", "'path'; it is called file_name now"),
        ("inner.eta=1", "inner: {eta: 1}", "'inner.eta'; it is called inner.step_size now"),
    ],
)
def test_a_renamed_option_is_an_error_that_names_the_new_one(
    override: str, line: str, now: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=now):
        resolve(Outer, overrides=[override])
    file = tmp_path / "old.yaml"
    file.write_text(line + "\n")
    with pytest.raises(InputError, match=now):
        resolve(Outer, file)


@dataclass(kw_only=True)
class SharedOptions:
    device: str = option("auto", "where")
    rows: int = option(8, "at once")


@dataclass(kw_only=True)
class JobConfig(SharedOptions):
    file: str = option(REQUIRED, "which")
    rows: int = option(16, "at once, more than elsewhere")
    out: str = option("out", "where to")


def test_a_jobs_own_options_come_before_those_of_the_groups_it_shares(tmp_path: Path) -> None:
    assert [key for key, _, _ in fields_of(JobConfig)] == ["file", "rows", "out", "device"]
    made = resolve(JobConfig, None, ["file=a", "device=cpu"])
    assert made == JobConfig(file="a", rows=16, device="cpu")
    assert to_yaml(made).splitlines() == ["file: a", "rows: 16", "out: out", "device: cpu"]
