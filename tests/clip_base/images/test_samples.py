"""The sample photographs ship with the package and are taken wherever an image's path is."""

from __future__ import annotations

from pathlib import Path

import pytest

from clip_base.images.inputs import image_files, read_image
from clip_base.images.samples import NAMES, located
from clip_base.runtime.errors import InputError


@pytest.mark.parametrize(
    ("name", "size"), [("astronaut", (512, 512)), ("cat", (300, 451)), ("coffee", (400, 600))]
)
def test_a_sample_is_an_image(name: str, size: tuple[int, int]) -> None:
    pixels, found = read_image(f"sample:{name}")
    assert found == size == pixels.shape[:2]
    (path,) = image_files([f"sample:{name}"])
    assert path == located(f"sample:{name}")
    assert path.name == f"{name}.jpg"  # what the image with boxes will be called


def test_every_sample_has_its_source_written_down() -> None:
    notes = (located("sample:cat").parents[1] / "README.md").read_text()
    for name in NAMES:
        assert f"`{name}.jpg`" in notes
    assert sorted(path.stem for path in located("sample:cat").parent.iterdir()) == sorted(NAMES)


def test_an_unknown_sample_is_refused_and_a_file_of_that_name_is_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(
        InputError, match=r"no sample image 'dog'; the samples are sample:astronaut, sample:cat"
    ):
        image_files(["sample:dog"])
    monkeypatch.chdir(tmp_path)
    Path("sample:dog").write_bytes(b"?")
    assert image_files(["sample:dog"]) == [Path("sample:dog")]
