"""The documents as a site: it builds without a warning, and every link within it leads to a place that is there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from html import unescape
from pathlib import Path
from urllib.parse import unquote

import pytest

ROOT = Path(__file__).resolve().parents[2]
LOCAL = re.compile(r'\b(?:href|src)="(?![a-z]+:)([^"]+)"')


def build(config: Path, site: Path) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--strict",
        "--config-file",
        str(config),
        "--site-dir",
        str(site),
    ]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)


def broken(site: Path) -> list[str]:
    """Return the links of a site that lead nowhere, and what is fetched from elsewhere."""
    pages = {path: path.read_text(encoding="utf-8") for path in site.rglob("*.html") if path.name != "404.html"}
    places = {path: set(re.findall(r'\bid="([^"]+)"', text)) for path, text in pages.items()}
    found = []
    for path, text in pages.items():
        for link in LOCAL.findall(text):
            file, _, anchor = unquote(unescape(link)).partition("#")
            there = (path.parent / file).resolve() if file else path
            if not there.is_file() or (anchor and there in places and anchor not in places[there]):
                found.append(f"{path.relative_to(site)}: {link}")
        found += [
            f"{path.relative_to(site)}: {link}"
            for link in re.findall(r'<(?:script|img|link)[^>]*="(https?:[^"]+)', text)
        ]
    return found


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    built = build(ROOT / "mkdocs.yml", folder)
    assert built.returncode == 0, built.stderr[-2000:]
    assert "WARNING" not in built.stderr
    return folder


def test_every_link_leads_somewhere_and_nothing_is_fetched(site: Path) -> None:
    assert broken(site) == []


def test_every_page_is_there_and_the_first_one_leads_to_each(site: Path) -> None:
    front = (site / "index.html").read_text(encoding="utf-8")
    for page in (ROOT / "docs").rglob("*.md"):
        name = page.relative_to(ROOT / "docs").with_suffix(".html").as_posix().replace("README", "index")
        assert (site / name).is_file()
        assert f'href="{name}"' in front
    assert (site / "repository" / "experiments" / "log" / "index.html").is_file(), "a page outside docs is missing"
    assert not list(site.rglob("*.py")), "code is no page"


def test_a_link_that_leads_nowhere_is_found(site: Path, tmp_path: Path) -> None:
    (tmp_path / "index.html").write_text('<a href="no.html"></a><a href="#no"></a><a href="index.html"></a>')
    assert broken(tmp_path) == ["index.html: no.html", "index.html: #no"]
