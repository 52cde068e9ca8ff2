"""How many inputs a job may skip before it fails, and with which exit code."""

from __future__ import annotations

from pathlib import Path

import pytest

from clip_base.jobs.cli import main
from clip_base.jobs.skipped import require_present, require_share, require_usable
from clip_base.runtime.errors import InputError, JobError


@pytest.mark.parametrize(
    ("skipped", "total", "max_skipped", "fails"),
    [
        (0, 0, 0.0, False),
        (0, 4, 0.0, False),
        (1, 4, 0.0, True),
        (2, 4, 0.5, False),
        (3, 4, 0.5, True),
        (3, 4, 1.0, False),
        (4, 4, 1.0, True),
    ],
)
def test_more_than_the_share_or_all_of_them_fail_a_job(
    skipped: int, total: int, max_skipped: float, fails: bool
) -> None:
    reasons = [f"reason {number}" for number in range(skipped)]
    if not fails:
        require_usable(reasons, total, max_skipped)
        return
    with pytest.raises(JobError, match=rf"^{skipped} of {total} images .*reason 0.*skipped\.jsonl$"):
        require_usable(reasons, total, max_skipped, Path("skipped.jsonl"))


@pytest.mark.parametrize("value", [-0.1, 1.5, float("nan")])
def test_what_is_no_share_is_refused(value: float) -> None:
    with pytest.raises(InputError, match=r"max_skipped must be in \[0, 1\]"):
        require_share(value)


def test_a_bad_call_ends_with_2_and_a_job_without_usable_images_with_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = tmp_path / "pairs.csv"
    pairs.write_text("image,caption\na.jpg,a cup\nb.jpg,a star\n")
    options = ["source.name=csv", f"source.file={pairs}", "train.steps=1", "train.batch_size=2", "model=RN50"]
    tiny = ["model=", "tower.vision.layers=[1,1,1,1]", "tower.vision.width=8", "tower.vision.resolution=32"]
    assert main(["pretrain", *options, *tiny, "train.max_skipped=2", f"out={tmp_path / 'bad'}"]) == 2
    assert main(["pretrain", *options, *tiny, f"out={tmp_path / 'out'}"]) == 1
    told = capsys.readouterr().err.splitlines()[-1]
    assert "2 of 2 images are missing" in told
    assert "a.jpg" in told or "b.jpg" in told


def test_files_that_are_missing_are_counted_all_when_a_sample_lacks_too_many(tmp_path: Path) -> None:
    for number in range(0, 1000, 2):
        (tmp_path / f"{number}.jpg").touch()
    there = [tmp_path / f"{number}.jpg" for number in range(0, 1000, 2)]
    half = [tmp_path / f"{number}.jpg" for number in range(1000)]
    require_present([], 0.0, "x")
    require_present(there, 0.0, "x")
    require_present(half, 0.5, "x")
    require_present(["https://no.path/1.jpg"], 0.0, "x")
    with pytest.raises(JobError, match=r"^images=d: 500 of 1,000 images are missing, .* 1\.jpg in .* exists"):
        require_present(half, 0.4, "images=d")
    with pytest.raises(JobError, match=r"^images=d: 1 of 1 images .* in .*none, which does not exist"):
        require_present([tmp_path / "none" / "a.jpg"], 1.0, "images=d")
