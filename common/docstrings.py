"""The texts below the fields of dataclasses, for pages and commands that print them."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
from itertools import pairwise
from typing import Any


def said_of(of: type[Any]) -> str:
    """Return the first sentence about a class, without its dot.

    >>> from fedveil.common.messages.round import NoisedCount
    >>> said_of(NoisedCount)
    'How many of its own records the received model classifies correctly, noised and paid for'
    """
    return inspect.cleandoc(of.__doc__ or "").split("\n\n")[0].replace("\n", " ").rstrip(".")


def fields_said(of: type[Any]) -> dict[str, str]:
    """Return the text below each field of a dataclass, its parents' too, in the fields' order; empty where none is.

    >>> from fedveil.common.messages.round import NoisedCount
    >>> fields_said(NoisedCount)["noise_std"]
    'Standard deviation of the Gaussian noise, in records.'
    """
    texts: dict[str, str] = {}
    for parent in reversed(of.__mro__):
        if dataclasses.is_dataclass(parent):
            texts.update(_texts(parent))
    return {item.name: texts.get(item.name, "") for item in dataclasses.fields(of)}


def _texts(of: type[Any]) -> dict[str, str]:
    tree = ast.parse(textwrap.dedent(inspect.getsource(of)))
    (lines,) = (node.body for node in tree.body if isinstance(node, ast.ClassDef))
    texts = {}
    for field, below in pairwise(lines):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(below, ast.Expr):
            text = getattr(below.value, "value", None)
            if isinstance(text, str):
                texts[field.target.id] = " ".join(text.split())
    return texts
