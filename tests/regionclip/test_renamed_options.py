from __future__ import annotations

from importlib.metadata import entry_points

import pytest

from clip_base.jobs import config as configs
from clip_base.jobs import plugins
from clip_base.runtime.errors import InputError


def renamed() -> list[tuple[str, str, str]]:
    """Job, former name and new name of every option that was renamed."""
    found = []
    for point in entry_points(group=plugins.JOBS):
        for name, field, _ in configs.fields_of(plugins.schema_of(point.load())):
            former = field.metadata.get("renamed_from")
            if former:
                found.append((point.name, name.removesuffix(field.name) + former, name))
    return sorted(found)


@pytest.mark.parametrize(
    "expected",
    [
        ("convert", "text", "text_weights"),
        ("region-detect", "photos", "images"),
        ("region-detect", "detector.suppression", "detector.nms_type"),
        ("region-features", "boxes", "regions_from"),
        ("region-train-detector", "boxes", "box_head"),
        ("region-train-detector", "network.positive_share", "network.positive_fraction"),
        ("region-mine", "share", "shard"),
    ],
)
def test_jobs_know_former_names(expected: tuple[str, str, str]) -> None:
    assert expected in renamed()


def test_every_former_name_is_an_error_that_names_the_new_one() -> None:
    jobs = {point.name: plugins.schema_of(point.load()) for point in entry_points(group=plugins.JOBS)}
    for job, former, name in renamed():
        with pytest.raises(InputError, match=f"there is no option '{former}'; it is called {name} now"):
            configs.resolve(jobs[job], overrides=[f"{former}=1"])
