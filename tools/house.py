"""Count the size of the code base, and fail where a figure is above its limit: ``make house``, or with ``--json``.

Every figure is read from the tracked files by their syntax trees. Nothing is imported or run.
"""

from __future__ import annotations

import ast
import json
import re
import statistics
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path

OUTSIDE = {"tests", "audits", "faults", "benchmarks", "contrib", "examples", "tools", "docs", "demo"}
"""Top-level folders that are not product code."""
EVIDENCE = {"audits", "faults", "benchmarks"}
PRIVATE_WORDS = re.compile(
    r"\b(told|stands|whoever|nobody|anew|as of|is none|rests|asked|alike|so many|goes by)\b", re.IGNORECASE
)
"""Marker words of the project's former private language."""
KIND_QUESTION = re.compile(r"\bmechanism\.(\w+)|\.(central|summed|pooled|charged|claims|conceals)\b")
"""An expression that asks which kind of privacy a run has."""
INTERFACES = {"Strategy": "strategies/base.py", "Adapter": "common/adapters/base.py", "Task": "common/tasks/base.py"}
MADE = "Made from the code"
LONG_FILE, LONG_FUNCTION, MANY_PARAMETERS = 300, 40, 7
BLOCKS = (ast.For, ast.While, ast.If, ast.With, ast.Try, ast.AsyncFor, ast.AsyncWith)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
Figure = int | float | list[float] | None
LIMITS: dict[str, float] = {
    "product files": 455,
    "product lines": 59086,
    "contrib lines, rows": 11500,
    "contrib lines, tests": 11800,
    "audits, faults, benchmarks lines": 10780,
    "tools, examples, demo lines": 2570,
    "docs/make lines": 1645,
    "tests lines": 62805,
    "longest test file": 600,
    "product files above 300 lines": 15,
    "functions above 40 lines": 18,
    "deepest nesting": 4,
    "functions with 7 or more parameters": 28,
    "largest circle of files": 41,
    "settings": 104,
    "policy keys": 33,
    "commands": 47,
    "members of Strategy": 12,
    "members of Adapter": 20,
    "members of Task": 28,
    "server/rounds imports": 5,
    "server/rounds reaches": 187,
    "server/conduct reaches": 261,
    "client/local_training reaches": 211,
    "questions of kind": 59,
    "private words per 1,000 of docstrings": 0.55,
    "README lines": 120,
    "lines of documents, written": 3447,
    "lines of documents, made": 2805,
}
"""The most that a figure may be. A limit goes down or stays: what a change adds, it takes away elsewhere."""


class House:
    """The tracked files of a checkout and their syntax trees."""

    def __init__(self, root: Path) -> None:
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=root, capture_output=True, check=True).stdout.decode()
        self.root = root
        self.files = [Path(name) for name in listed.split("\0") if name and (root / name).is_file()]
        python = [path for path in self.files if path.suffix == ".py"]
        self.text = {path: (root / path).read_text(encoding="utf-8") for path in python}
        self.trees = {path: ast.parse(text) for path, text in self.text.items()}
        self.product = [path for path in python if len(path.parts) > 1 and path.parts[0] not in OUTSIDE]

    def lines(self, path: Path) -> int:
        """Return how many lines a tracked file has."""
        return (self.root / path).read_text(encoding="utf-8").count("\n")

    def lines_in(self, folders: set[str], suffix: str = ".py") -> int:
        """Return the lines of all files with a suffix in top-level folders."""
        return sum(self.lines(path) for path in self.files if path.suffix == suffix and path.parts[0] in folders)

    @cached_property
    def functions(self) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
        """Every function of the product."""
        return [node for path in self.product for node in ast.walk(self.trees[path]) if isinstance(node, FUNCTIONS)]

    @cached_property
    def modules(self) -> dict[str, Path]:
        """The product's files by the name under which they are imported."""
        names = {path: path.with_suffix("").parts for path in self.product}
        return {".".join(name[:-1] if name[-1] == "__init__" else name): path for path, name in names.items()}

    def imports(self, path: Path) -> set[Path]:
        """Return the product's files that a file imports by itself."""
        found = set()
        for node in ast.walk(self.trees[path]):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
            else:
                continue
            found |= {self.modules[own] for name in names if (own := name.removeprefix("fedveil.")) in self.modules}
        return found - {path}

    @cached_property
    def written(self) -> dict[Path, set[Path]]:
        """By file, the product's files that it imports itself, for types alone and late ones too."""
        return {path: self.imports(path) for path in self.product}

    @cached_property
    def run(self) -> dict[Path, set[Path]]:
        """The same with the ``__init__`` files of packages, which Python runs on the way to a file."""
        return {
            path: found | {p for file in found for p in self.packages(file)} for path, found in self.written.items()
        }

    def packages(self, path: Path) -> list[Path]:
        """Return the product's ``__init__`` files that Python runs before a file."""
        return [package for folder in path.parents if (package := folder / "__init__.py") in self.trees]

    def reach(self, name: str) -> int | None:
        """Return how many files Python runs to import one, itself not counted; None where it is gone."""
        path = Path(name)
        return len(reached(path, self.run) - {path}) if path in self.trees else None

    def largest_circle(self) -> int:
        """Return how many files the largest set has in which each imports each other, by itself or through others."""
        after = {path: reached(path, self.written) for path in self.product}
        return max(sum(path in after[other] for other in after[path]) for path in self.product)

    def docstring_words(self) -> str:
        """Return all docstrings of the product as one text."""
        kinds = (ast.Module, ast.ClassDef, *FUNCTIONS)
        nodes = (node for path in self.product for node in ast.walk(self.trees[path]))
        return " ".join(ast.get_docstring(node) or "" for node in nodes if isinstance(node, kinds))

    def members(self, name: str) -> int | None:
        """Return how many public methods and class attributes an interface has; None where its file is gone."""
        tree = self.trees.get(Path(INTERFACES[name]))
        for node in ast.walk(tree) if tree else ():
            if isinstance(node, ast.ClassDef) and node.name == name:
                return len({member for member in _names_in(node) if not member.startswith("_")})
        return None

    def pages(self, *, made: bool) -> int:
        """Return the lines of all pages of ``docs`` that are made from the code, or of the others."""
        pages = [path for path in self.files if path.suffix == ".md" and path.parts[0] == "docs"]
        texts = [(self.root / path).read_text(encoding="utf-8") for path in pages]
        return sum(text.count("\n") for text in texts if (MADE in text[:1000]) == made)

    def fields(self, path: str, name: str) -> int:
        """Return how many annotated fields a class of a file has."""
        tree = self.trees.get(Path(path), ast.parse(""))
        classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and node.name == name]
        return sum(isinstance(node, ast.AnnAssign) for found in classes for node in found.body)


def _names_in(node: ast.ClassDef) -> Iterator[str]:
    for statement in node.body:
        if isinstance(statement, FUNCTIONS):
            yield statement.name
        elif isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            yield statement.target.id
        elif isinstance(statement, ast.Assign):
            yield from (target.id for target in statement.targets if isinstance(target, ast.Name))


def reached(path: Path, imports: Mapping[Path, set[Path]]) -> set[Path]:
    """Return a file and all that it imports, by itself or through others."""
    seen, todo = {path}, [path]
    while todo:
        new = imports[todo.pop()] - seen
        seen |= new
        todo += new
    return seen


def parameters(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Return how many parameters a function has, ``self`` and ``cls`` not counted."""
    return sum(each.arg not in ("self", "cls") for each in (*node.args.args, *node.args.kwonlyargs))


def nesting(node: ast.AST) -> int:
    """Return how many blocks lie within each other below a node; functions within it start again."""
    inner = [nesting(c) for c in ast.iter_child_nodes(node) if not isinstance(c, (ast.FunctionDef, ast.ClassDef))]
    return max(inner, default=0) + isinstance(node, BLOCKS)


def _leaves(table: dict[str, object]) -> int:
    return sum(_leaves(value) if isinstance(value, dict) else 1 for value in table.values())


def figures(root: Path) -> dict[str, Figure]:
    """Return every figure of the checkout at ``root`` by its name."""
    house = House(root)
    sizes = [house.lines(path) for path in house.product]
    tests = [house.lines(path) for path in house.trees if path.parts[0] == "tests"]
    rows_tests = [house.lines(path) for path in house.trees if path.parts[:2] == ("contrib", "tests")]
    spans = [(node.end_lineno or node.lineno) - node.lineno + 1 for node in house.functions]
    words = house.docstring_words()
    outside = [p for p in house.product if p.parts[0] != "privacy" and "collect" not in p.as_posix()]
    settings = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["flwr"]["app"]["config"]
    commands = root / "docs" / "reference" / "commands.md"
    return {
        "product files": len(house.product),
        "product lines": sum(sizes),
        "contrib lines, rows": house.lines_in({"contrib"}) - sum(rows_tests),
        "contrib lines, tests": sum(rows_tests),
        "audits, faults, benchmarks lines": house.lines_in(EVIDENCE),
        "tools, examples, demo lines": house.lines_in({"tools", "examples", "demo"}),
        "docs/make lines": sum(house.lines(p) for p in house.trees if p.parts[:2] == ("docs", "make")),
        "tests lines": sum(tests),
        "longest test file": max([*tests, *rows_tests], default=0),
        "median, longest product file": [statistics.median(sizes), max(sizes)],
        f"product files above {LONG_FILE} lines": sum(size > LONG_FILE for size in sizes),
        "median, longest function": [statistics.median(spans), max(spans)],
        f"functions above {LONG_FUNCTION} lines": sum(span > LONG_FUNCTION for span in spans),
        "deepest nesting": max(map(nesting, house.functions)),
        f"functions with {MANY_PARAMETERS} or more parameters": sum(
            parameters(node) >= MANY_PARAMETERS for node in house.functions
        ),
        "largest circle of files": house.largest_circle(),
        "settings": _leaves(settings),
        "policy keys": house.fields("client/policy.py", "Policy"),
        "commands": len(re.findall(r"(?m)^## ", commands.read_text(encoding="utf-8"))) if commands.is_file() else None,
        **{f"members of {name}": house.members(name) for name in INTERFACES},
        "server/rounds imports": len(house.written.get(Path("server/rounds.py"), ())),
        "server/rounds reaches": house.reach("server/rounds.py"),
        "server/conduct reaches": house.reach("server/conduct.py"),
        "client/local_training reaches": house.reach("client/local_training.py"),
        "questions of kind": sum(len(KIND_QUESTION.findall(house.text[path])) for path in outside),
        "private words per 1,000 of docstrings": round(
            1000 * len(PRIVATE_WORDS.findall(words)) / max(1, len(words.split())), 2
        ),
        "README lines": house.lines(Path("README.md")),
        "lines of documents, written": house.pages(made=False),
        "lines of documents, made": house.pages(made=True),
    }


def main() -> None:
    """Print the figures of the checkout that this file lies in; exit with 1 where one is above its limit or missing."""
    found = figures(Path(__file__).resolve().parent.parent)
    if "--json" in sys.argv:
        print(json.dumps(found))
        return
    for name, figure in found.items():
        print(f"{name:48} {figure}" + (f"  (at most {LIMITS[name]})" if name in LIMITS else ""))
    above = [name for name, most in LIMITS.items() if not (figure := found.get(name)) or figure > most]  # type: ignore[operator]
    if above:
        sys.exit(
            f"above the limit, or counted as nothing: {', '.join(above)}. Take away as much elsewhere in this change"
        )


if __name__ == "__main__":
    main()
