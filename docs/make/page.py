"""The form of a page that is made from the code."""

from __future__ import annotations

MADE = "<!-- Made from the code by `make docs`; a test compares the two. Change the code, not this page. -->"


def page(title: str, about: str, *parts: tuple[str, str, str]) -> str:
    """Return a page: a title, a paragraph, and sections of a heading, a table and a text before it."""
    sections = (f"## {name}\n\n{text}\n\n{table}" if table else f"## {name}\n\n{text}" for name, table, text in parts)
    return "\n\n".join([f"# {title}", MADE, *([about] if about else []), *sections]) + "\n"
