"""Names that a stranger types."""

from __future__ import annotations

from pathlib import Path

import pytest

from clip_base.runtime.errors import InputError
from regionclip.data.categories import parse_typed_names


def test_typed_names_are_separated_by_commas_and_lines() -> None:
    assert parse_typed_names(" red cup,star\n tree ,, ", 3) == ["red cup", "star", "tree"]
    assert len(parse_typed_names("coco", 3)) == 80


def test_a_typed_path_is_a_name_and_no_file_is_read(tmp_path: Path) -> None:
    file = tmp_path / "secret.txt"
    file.write_text("password\n")
    assert parse_typed_names(str(file), 3, 500) == [str(file)]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "at least one name"),
        (" , \n", "at least one name"),
        ("cup, star, cup", "'cup'"),
        ("a, b, c, d", "4 names are too many; give up to 3"),
        ("a" * 101, "101 letters; separate names by commas"),
    ],
)
def test_unusable_typed_names_are_refused(text: str, told: str) -> None:
    with pytest.raises(InputError, match=told):
        parse_typed_names(text, 3)
