"""The pages are searched when they are opened from disk, where browsers start no workers."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

playwright = pytest.importorskip("playwright.sync_api", reason="no playwright to drive a browser with")
pytest.importorskip("material", reason="mkdocs-material is not installed")

ROOT = Path(__file__).parents[2]
PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
BROWSER = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, PROGRAMS)), None)
PATIENCE = 180_000  # milliseconds, for a machine that is busy


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium found: install it, or name it in CHROMIUM")
def test_a_word_is_found_in_pages_opened_from_disk_and_nothing_is_fetched(tmp_path: Path) -> None:
    site = tmp_path / "site"
    build = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(site)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    asked: list[str] = []
    with playwright.sync_playwright() as programs:
        browser = programs.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1300, "height": 800})
        page.set_default_timeout(PATIENCE)
        page.on("request", lambda request: asked.append(request.url))
        page.goto((site / "index.html").as_uri())
        page.keyboard.press("/")
        page.locator("input.md-search__input").wait_for(state="visible")
        page.keyboard.type("open-vocabulary detector")
        found = page.locator(".md-search-result__item", has_text="Glossary")
        found.first.wait_for(state="visible")
        browser.close()
    assert asked
    assert all(url.startswith("file://") for url in asked), asked
