"""``python -m docs.make``: write every page that is made from the code, and the settings in ``pyproject.toml``."""

from __future__ import annotations

from pathlib import Path

from docs.make import pages, results, settings

ROOT = Path(__file__).resolve().parent.parent.parent


def made() -> dict[Path, str]:
    """Return the text of every made file: the pages, README with its tables, and ``pyproject.toml``."""
    project, readme = ROOT / "pyproject.toml", ROOT / "README.md"
    texts = {ROOT / "docs" / name: page() for name, page in {**pages.PAGES, **results.PAGES}.items()}
    texts[readme] = results.with_results(readme.read_text(encoding="utf-8"))
    return {**texts, project: settings.pyproject(project.read_text(encoding="utf-8"))}


def main() -> None:
    """Write the made files that are out of date, and print their paths."""
    for path, text in made().items():
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
            print(path.relative_to(ROOT))
    if not results.PLOT.exists() or not results.is_current(results.PLOT.read_bytes()):
        results.PLOT.write_bytes(results.plot())
        print(results.PLOT.relative_to(ROOT))


if __name__ == "__main__":
    main()
