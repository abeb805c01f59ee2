"""Hooks of MkDocs: the order of the site's pages, and the files outside ``docs`` that they link to.

Such a file is a page of the site below ``repository/``, or is copied there as it is. Links are rewritten, so that the
same files serve a reader of the repository.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
OUTSIDE = "repository"
LINK = re.compile(r"(?<=\]\()(?!\w+://|#|mailto:)([^)#\s]+)")
FENCED = re.compile(r"(^```.*?^```$)", re.M | re.S)


def on_config(config: Any) -> Any:
    """Set the navigation: the sections and links of ``docs/README.md``, in their order."""
    index = (DOCS / "README.md").read_text(encoding="utf-8")
    parts = re.split(r"^## (.+)$", index, flags=re.M)[1:]
    sections = [
        {title: [uri_of((DOCS / link).resolve()) for link in LINK.findall(text) if link.endswith(".md")]}
        for title, text in zip(parts[::2], parts[1::2], strict=True)
    ]
    config["nav"] = [{"FedVeil": "README.md"}, *sections]
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the files outside ``docs`` that pages link to, and those that these link to in turn."""
    from mkdocs.structure.files import File, InclusionLevel

    todo, seen = sorted(DOCS.rglob("*.md")), set()
    while todo:
        page = todo.pop()
        for link in LINK.findall(prose(page.read_text(encoding="utf-8"))):
            target = (page.parent / link).resolve()
            if target in seen or target.is_relative_to(DOCS) or not target.is_file():
                continue
            seen.add(target)
            listed = InclusionLevel.NOT_IN_NAV if target.suffix == ".md" else InclusionLevel.INCLUDED
            files.append(File.generated(config, uri_of(target), abs_src_path=str(target), inclusion=listed))
            todo += [target] if target.suffix == ".md" else []
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Return a page's text with each link as the site has it."""
    uri = page.file.src_uri
    source = ROOT / uri.removeprefix(f"{OUTSIDE}/") if uri.startswith(f"{OUTSIDE}/") else DOCS / uri

    def there(match: re.Match[str]) -> str:
        target = (source.parent / match[0]).resolve()
        return os.path.relpath(uri_of(target), Path(uri).parent) if target.exists() else match[0]

    return "".join(part if FENCED.match(part) else LINK.sub(there, part) for part in FENCED.split(markdown))


def uri_of(path: Path) -> str:
    """Return where the site has a file of the repository."""
    if path.is_relative_to(DOCS):
        return path.relative_to(DOCS).as_posix()
    return f"{OUTSIDE}/{path.relative_to(ROOT).as_posix()}"


def prose(markdown: str) -> str:
    """Return a page without its blocks of code, in which nothing is a link."""
    return FENCED.sub("", markdown)
