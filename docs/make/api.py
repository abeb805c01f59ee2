"""The page of the API in Python, made from its docstrings."""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Iterator
from types import FunctionType

import fedveil
from docs.make.page import page

FIRST = ("run", "plan", "load", "Run")
PARTS = {"Args:": "Arguments:", "Returns:": "Returns:", "Raises:": "Errors:"}
ITEM = re.compile(r"^(?P<names>[\w, ]+): (?P<text>.*)$")


def api_page() -> str:
    """Return the page of what ``import fedveil`` offers: every name with its docstring."""
    names = [*FIRST, *(name for name in sorted(fedveil.__all__, key=str.swapcase) if name not in FIRST)]
    parts = [part for name in names for part in _sections(name, getattr(fedveil, name))]
    return page(
        "Python",
        "What `import fedveil` offers. Simulated sites run in the process that calls it, without Flower. "
        "[Your own table](../guides/first.md#from-python) has a first example. Every setting is on the [page of "
        "settings](settings.md).",
        *parts,
    )


def _sections(name: str, value: object) -> Iterator[tuple[str, str, str]]:
    """Yield the section of a function or a class, and one for each public member of a class."""
    if isinstance(value, FunctionType):
        yield _section(f"fedveil.{name}", value, _signature(value))
        return
    yield _section(f"fedveil.{name}", value, "")
    for member, at in vars(value).items():
        if not member.startswith("_") and isinstance(at, property | FunctionType):
            yield _section(f"{name}.{member}", at, _signature(at) if isinstance(at, FunctionType) else "")


def _section(title: str, value: object, signature: str) -> tuple[str, str, str]:
    return f"`{title}{signature}`", "", markdown_of(inspect.getdoc(value) or "")


def _signature(function: FunctionType) -> str:
    """Return a function's parameters by name; what may be left out has its default or stands behind ``...``."""
    named = [one for one in inspect.signature(function).parameters.values() if one.name != "self"]
    needed = [one.name for one in named if one.default is one.empty and one.kind is not one.VAR_KEYWORD]
    return f"({', '.join([*needed, *(['...'] if len(needed) < len(named) else [])])})"


def markdown_of(doc: str) -> str:
    """Return a docstring as Markdown.

    >>> print(markdown_of("Say ``a``.\\n\\nArgs:\\n    a, b: first,\\n        and last.\\n    c: one."))
    Say `a`.
    <BLANKLINE>
    Arguments:
    <BLANKLINE>
    * `a`, `b`: first, and last.
    * `c`: one.
    """
    blocks = []
    for block in re.split(r"\n\n(?=\S)", doc.replace("\n\n::\n\n", "\n\n::\n")):
        first, _, rest = block.partition("\n")
        if first in PARTS:
            blocks += [PARTS[first], _items(textwrap.dedent(rest))]
        elif first == "::":
            blocks.append(f"```python\n{textwrap.dedent(rest).strip()}\n```")
        elif first.startswith(">>> "):
            blocks.append(f"```pycon\n{block}\n```")
        else:
            blocks.append(_marked(" ".join(block.split())))
    return "\n\n".join(blocks)


def _items(text: str) -> str:
    lines = _marked(re.sub(r"\n\s+", " ", text)).splitlines()
    found = [(match["names"], match["text"]) if (match := ITEM.match(line)) else ("", line) for line in lines]
    return "\n".join(f"* {_names(names)}: {about}" if names else about for names, about in found)


def _marked(text: str) -> str:
    return text.replace("``", "`")


def _names(names: str) -> str:
    return ", ".join(f"`{name.strip()}`" for name in names.split(","))
