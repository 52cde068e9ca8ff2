"""Files of the shared folder come through gdown; what it cannot fetch, people are told how to."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from clip_base.jobs.cli import main
from clip_base.runtime.errors import InputError
from clip_base.storage.hashing import file_hash
from clip_base.weights.fetching import download
from clip_base.weights.fetching.published import Published

FILE = Published("rpn/one.pth", page="https://drive.google.com/drive/folders/x")


class Gdown:
    """Stands for the package gdown: a folder of two files."""

    def __init__(self, content: bytes = b"weights") -> None:
        self.content, self.calls = content, list[dict[str, Any]]()

    def download_folder(self, **_: Any) -> list[SimpleNamespace]:
        names = ["regionclip/two.pth", "rpn/one.pth"]
        return [SimpleNamespace(id=name, path=f"RegionCLIP/{name}") for name in names]

    def download(self, **options: Any) -> None:
        self.calls.append(options)
        if self.content == b"quota":
            raise RuntimeError("Too many users have viewed or downloaded this file recently.\nTry later.")
        Path(options["output"]).write_bytes(self.content)
        if self.content:
            options["progress"](len(self.content), 3 << 20)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CLIP_BASE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(download, "files", lambda: {"one": FILE, "absent": Published("rpn/no.pth", page="p")})
    return tmp_path / "cache"


def test_the_named_file_is_fetched_once_and_its_hash_is_kept(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gdown = Gdown()
    monkeypatch.setitem(sys.modules, "gdown", gdown)
    path = download.fetch("one")
    assert path == cache / "rpn" / "one.pth"
    assert "one.pth: 3 MiB\n" in capsys.readouterr().err
    assert path.read_bytes() == b"weights"
    assert gdown.calls[0]["id"] == "rpn/one.pth"
    assert gdown.calls[0]["resume"]
    assert (cache / "rpn" / "one.pth.sha256").read_text().split()[0] == file_hash(path)
    assert download.fetch("one") == path
    assert len(gdown.calls) == 1
    path.write_bytes(b"others!")
    with pytest.raises(InputError, match="is not what was fetched first"):
        download.fetch("one")


@pytest.mark.parametrize(
    ("name", "gdown", "message"),
    [
        ("one", Gdown(b"quota"), "Too many users have viewed or downloaded this file recently"),
        ("one", Gdown(b""), "nothing arrived"),
        ("absent", Gdown(), "it is not among the 2 files that are listed"),
        ("one", None, r"pip install 'regionclip\[hub\]'"),
    ],
)
def test_what_is_not_fetched_is_told_with_what_to_do_by_hand(
    name: str, gdown: Any, message: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gdown", gdown)
    with pytest.raises(InputError, match=message) as told:
        download.fetch(name)
    assert "with a browser and put it at" in str(told.value)
    assert "\n" not in str(told.value)
    assert not list(cache.rglob("*.pth"))


def test_the_job_fetches_and_lists(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "gdown", Gdown())
    assert main(["fetch", "one"]) == 0
    assert capsys.readouterr().out == f"one: {cache / 'rpn' / 'one.pth'}\n"
    assert main(["fetch", "one", "absent"]) == 1
    assert "absent" not in capsys.readouterr().out
    assert main(["fetch", "--list"]) == 0
    listed = capsys.readouterr().out
    assert FILE.page in listed
    assert "hf://laion/CLIP-ViT-B-32-laion2B-s34B-b79K" in listed
    assert main(["fetch"]) == 2
