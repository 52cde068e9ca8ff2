"""The pages: every link leads somewhere, the menu has them all, and the site is built without a warning."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
FENCE = re.compile(r"^(```+).*?^\1$", re.M | re.S)
WIDEST = 100  # columns of a line of code: what docs/stylesheets/wide.css makes room for


def anchors(text: str) -> set[str]:
    """Returns the addresses of a page's headings, as GitHub and mkdocs make them."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", text), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_to_a_file_leads_to_one(page: Path) -> None:
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    for link in LINK.findall(text):
        if link.startswith(("http://", "https://")):
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), f"{page.name}: {link}"
        if anchor:
            assert anchor in anchors(target.read_text(encoding="utf-8")), f"{page.name}: {link}"


def test_pages_link_to_nothing_outside_their_folder() -> None:
    for page in (ROOT / "docs").rglob("*.md"):
        links = LINK.findall(FENCE.sub("", page.read_text(encoding="utf-8")))
        inside = [link.partition("#")[0] for link in links if not link.startswith("http")]
        assert all((page.parent / link).resolve().is_relative_to(ROOT / "docs") for link in inside), page.name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_code_and_commands_are_wrapped(page: Path) -> None:
    blocks = FENCE.finditer(page.read_text(encoding="utf-8"))
    wide = [line for block in blocks for line in block[0].splitlines() if len(line) > WIDEST]
    assert wide == []


def test_pages_clone_from_the_address_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    address = project.get("urls", {}).get("Repository", "ADDRESS")
    for page in ("README.md", "docs/getting_started.md"):
        cloned = re.findall(r"^git clone (\S+) ", (ROOT / page).read_text(encoding="utf-8"), re.M)
        assert cloned == [address], page


def listed(entry: object) -> list[str]:
    if isinstance(entry, str):
        return [entry]
    values = entry.values() if isinstance(entry, dict) else entry
    return [page for value in values for page in listed(value)]  # type: ignore[attr-defined]


def test_the_menu_has_every_page_once() -> None:
    menu = listed(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"])
    assert sorted(menu) == sorted(
        str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")
    )


@pytest.mark.skipif(
    shutil.which("mkdocs", path=str(Path(sys.executable).parent)) is None, reason="mkdocs is not installed"
)
def test_the_site_is_built_without_a_warning_and_asks_nobody_for_anything(tmp_path: Path) -> None:
    build = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--strict",
        "--quiet",
        "--site-dir",
        str(tmp_path / "site"),
    ]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for page in (tmp_path / "site").glob("*.html"):
        fetched = re.findall(
            r'<(?:script|img|link)[^>]+(?:src|href)="?(https?://[^">\s]+)', page.read_text(encoding="utf-8")
        )
        assert not fetched, f"{page.name} fetches {fetched}"
    assert (tmp_path / "site" / "your_own_data.html").exists()


def test_the_tests_that_their_page_names_exist() -> None:
    page = ROOT / "tests" / "README.md"
    named = re.findall(r"`([\w/]+/test_\w+\.py)`", page.read_text(encoding="utf-8"))
    assert len(named) > 20
    assert [name for name in named if not (page.parent / name).is_file()] == []
