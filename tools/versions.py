"""Make the files of exact versions, and compare an environment with them.

    python tools/versions.py write [--upgrade]       requirements/tested.txt and pip.txt, by uv
    python tools/versions.py constraints [NAME ...]  print tested.txt without these packages
    python tools/versions.py plain                   the same without hashes
    python tools/versions.py compare                 list how this Python's environment differs, in seconds

``MOVED`` in the environment, such as ``MOVED="tqdm==4.70.0"``, takes another version of a package in all of these, and
``compare`` prints it. Any other difference is an exit status of 1.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Iterator
from importlib.metadata import Distribution, distributions
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "requirements"
TESTED = FOLDER / "tested.txt"
OTHER_FLOWER = "http"
"""The extra that excludes ``grpc``: its environment takes every other package from the file."""
INSTALLERS = ("pip", "setuptools", "uv")
HEADER = """\
# Versions that this project was tested and measured with, of every extra but http, for Python 3.11 to 3.14.
# Made by 'make versions'. torch has no hashes: whoever has a GPU takes a build of their own.
"""
NAME = re.compile(r"([A-Za-z0-9._-]+)==([^\s;\\]+)(?:\s*;\s*([^\\\n]+))?")


def write(options: Iterable[str]) -> None:
    """Resolve every extra at once and write ``tested.txt``, and ``pip.txt`` with what installs it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = [f"--extra={name}" for name in project["optional-dependencies"] if name != OTHER_FLOWER]
    command = ["uv", "pip", "compile", "--quiet", "--universal", "--python-version=3.11", "--generate-hashes"]
    command += ["--no-header", "--no-annotate", "--override=requirements/override.txt", *extras, *options]
    command += ["pyproject.toml", "requirements/tested.in", f"--output-file={TESTED.relative_to(ROOT)}"]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    blocks = re.split(r"\n(?=[a-z])", TESTED.read_text(encoding="utf-8").rstrip())
    own = [block.split(" \\")[0] if block.startswith("torch==") else block for block in blocks]
    TESTED.write_text("\n".join([HEADER.rstrip(), *own, ""]), encoding="utf-8")
    installers = [block for block in own if block.split("==")[0] in INSTALLERS]
    about = "# What installs everything else, of tested.txt. Made by 'make versions'."
    (FOLDER / "pip.txt").write_text("\n".join([about, *installers, ""]), encoding="utf-8")


def constraints(without: Iterable[str]) -> list[str]:
    """Return the blocks of ``tested.txt``: a version with its hashes each, of ``MOVED`` without."""
    left_out = {_normal(name) for name in without} | set(moved())
    blocks = re.split(r"\n(?=[a-z])", TESTED.read_text(encoding="utf-8").rstrip())[1:]
    return [block for block in blocks if _normal(block.split("==")[0]) not in left_out] + [
        f"{name}=={version}" for name, version in moved().items()
    ]


def moved() -> dict[str, str]:
    """Return the versions that ``MOVED`` asks for, by normalised name."""
    return {_normal(match[1]): match[2] for match in NAME.finditer(os.environ.get("MOVED", ""))}


def compare(environment: Iterable[Distribution]) -> tuple[list[str], list[str]]:
    """Return what ``MOVED`` moved, and what else is not as the files say, a line each.

    Args:
        environment: installed packages.
    """
    from packaging.requirements import Requirement

    tested, known = versions(TESTED), _carried()
    overridden = {_normal(Requirement(line).name) for line in _lines(FOLDER / "override.txt")}
    installed = {_normal(one.name): one for one in environment}
    asked, wrong = [], []
    for name, one in sorted(installed.items()):
        version = one.version.split("+")[0]  # what a build adds to it, such as +cpu, is the machine's
        if name == "fedveil" or known.get(name) == version:
            continue
        if moved().get(name) == version:
            asked.append(f"{name} {version}, moved from {tested.get(name, 'nothing')}")
        elif tested.get(name) != version:
            wrong.append(f"{name} {version}, tested: {tested.get(name, 'not at all')}")
    for name, one in sorted(installed.items()):
        for requirement in map(Requirement, one.requires or () if name not in known else ()):
            other = installed.get(_normal(requirement.name))
            if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
                continue
            if other is None:
                wrong.append(f"{name} needs {requirement}, which is not installed")
            elif not requirement.specifier.contains(other.version, prereleases=True) and (
                _normal(requirement.name) not in overridden
            ):
                wrong.append(f"{name} needs {requirement}, installed: {other.version}")
    return asked, wrong


def versions(file: Path) -> dict[str, str]:
    """Return the versions of a file that hold for this Python and system, by normalised name."""
    from packaging.markers import Marker

    found = NAME.finditer(file.read_text(encoding="utf-8"))
    return {_normal(match[1]): match[2] for match in found if not match[3] or Marker(match[3].strip()).evaluate()}


def _carried() -> dict[str, str]:
    """Return the packages that carry models and data, whose own requirements nobody installs."""
    files = [file for file in FOLDER.glob("*.txt") if file.name not in ("tested.txt", "pip.txt", "override.txt")]
    return {name: version for file in files for name, version in versions(file).items()}


def _lines(file: Path) -> Iterator[str]:
    return (line for line in file.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#"))


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def main(words: list[str]) -> int:
    """Do what the command line says and return the exit status."""
    match words:
        case ["write", *options]:
            write(options)
        case ["constraints", *without]:
            print("\n".join(constraints(without)))
        case ["plain"]:
            print("\n".join(block.split(" \\")[0] for block in constraints(())))
        case ["compare"]:
            asked, wrong = compare(distributions())
            for line in asked:
                print(f"moved: {line}")
            for line in wrong:
                print(f"not as requirements/tested.txt says: {line}")
            if wrong:
                print("Install as the Makefile does, name a version in MOVED, or make the file anew: make versions")
            return int(bool(wrong))
        case _:
            print(__doc__)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
