"""A path means the image whose path it ends in, or that ends in it; what is ambiguous is refused."""

from __future__ import annotations

import pytest

from clip_base.runtime.errors import InputError
from regionclip.data.file_names import FileNames

NAMES = {1: "val/10.jpg", 2: "val/2.jpg", 3: "other/2.jpg", 4: "7.jpg", 5: "deep/7.jpg"}


@pytest.mark.parametrize(
    ("name", "image_id"),
    [
        ("val/10.jpg", 1),
        ("10.jpg", 1),
        ("/data/coco/val/10.jpg", 1),
        ("./val/10.jpg", 1),
        ("C:\\photos\\val\\10.jpg", 1),
        ("photos/val/2.jpg", 2),
        ("other/2.jpg", 3),
        ("7.jpg", 4),
        ("photos/7.jpg", 4),
        ("photos/deep/7.jpg", 5),
        ("train/10.jpg", None),
        ("10.png", None),
        ("0.jpg", None),
    ],
)
def test_a_path_means_the_image_that_shares_its_end(name: str, image_id: int | None) -> None:
    assert FileNames(NAMES, "val.json").find(name) == image_id


def test_a_name_that_several_images_have_is_refused() -> None:
    with pytest.raises(InputError, match=r"'2.jpg' means several images of val.json: .*val/2.jpg \(id 2\)"):
        FileNames(NAMES, "val.json").find("2.jpg")
    with pytest.raises(InputError, match="several images"):
        FileNames({1: "a.jpg", 2: "a.jpg"}, "val.json").find("a.jpg")
