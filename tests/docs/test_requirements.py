"""What is installed: the very wheels that are known, and no package with an advisory that a newer one mends."""

from __future__ import annotations

import re
import tomllib
from importlib.metadata import PackageNotFoundError, distribution, requires
from pathlib import Path
from types import SimpleNamespace

import pytest
from packaging.requirements import Requirement
from packaging.version import Version
from product import PRODUCT

from fedveil.common.data.named import DATASETS
from fedveil.demo.dinov2 import DINOV2_SMALL
from fedveil.demo.models import MINILM
from fedveil.demo.packaged import PackagedFile, PackagedTree
from fedveil.demo.smollm2 import SMOLLM2
from fedveil.demo.whisper import WHISPER_TINY_EN
from fedveil.deploy import shared_checks
from fedveil.deploy.advisories import safe_versions

ROOT = Path(__file__).resolve().parents[2]


def test_the_harness_is_an_extra_that_make_and_the_page_name() -> None:
    """It is in no environment of the tests, so that nothing but this holds its range to what was tried."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    (harness,) = map(Requirement, extras["harness"])
    assert harness.name == "lm-eval"
    assert [version for version in ("0.4.12", "0.4.13", "0.5.0") if harness.specifier.contains(version)] == ["0.4.13"]
    for name, words in (
        ("Makefile", "$(call EXTRAS,harness)"),
        ("docs/guides/serve.md", "'.[harness]'"),
    ):
        text = (ROOT / name).read_text(encoding="utf-8")
        assert words in text
        assert not re.search(r"install[^\n]*lm.eval", text), f"{name} names another range than the extra"


def test_a_user_gets_no_tool_of_developers_and_a_developer_gets_those_of_the_pages() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    users = {Requirement(text).name for text in [*project["dependencies"], *extras["demo"]]}
    assert not users & {Requirement(text).name for text in [*extras["dev"], *extras["docs"]]}
    (installed,) = re.findall(r"-e '\.\[([^]]*dev[^]]*)\]'", (ROOT / "Makefile").read_text(encoding="utf-8"))
    assert {"demo", "docs", "dev"} <= set(installed.split(","))
    assert f"[{installed}]" in (ROOT / "tools" / "pythons.py").read_text(encoding="utf-8")


def lines_of(name: str) -> list[str]:
    text = (ROOT / "requirements" / name).read_text(encoding="utf-8")
    return [line for line in text.splitlines() if line and not line.startswith("#")]


def test_the_wheels_are_pinned_by_version_and_hash() -> None:
    names = ("demo.txt", "generative.txt", "vision.txt", "texts.txt", "speech.txt")
    pinned = {words[0]: words[1:] for name in names for words in map(str.split, lines_of(name))}
    items = (
        SMOLLM2,
        MINILM,
        DINOV2_SMALL,
        WHISPER_TINY_EN,
        *(dataset.file for dataset in DATASETS.values() if isinstance(dataset.file, PackagedFile | PackagedTree)),
    )
    assert len(items) == 4 + sum(dataset.public for dataset in DATASETS.values())
    carried = {f"{item.distribution}=={item.version}" for item in items}
    assert carried <= set(pinned)
    for requirement, hashes in pinned.items():
        assert [re.fullmatch("--hash=sha256:[0-9a-f]{64}", word) for word in hashes].count(None) == 0, requirement
        assert len(hashes) == 1, f"{requirement}: another file of the same version would do"


@pytest.mark.parametrize("name", ["Makefile", "Dockerfile"])
def test_they_are_installed_by_their_hashes_and_no_setup_runs(name: str) -> None:
    (exact,) = re.findall(r"EXACT *:= *(.*)", (ROOT / "Makefile").read_text(encoding="utf-8"))
    text = (ROOT / name).read_text(encoding="utf-8").replace("$(EXACT)", exact)
    exactly = re.compile(r"-r \S*requirements/(demo|generative|vision|texts|speech)\.txt")
    steps = [line for line in text.splitlines() if exactly.search(line)]
    assert steps
    for step in steps:
        assert {"--require-hashes", "--no-deps", "--only-binary"} <= set(step.split()), step


def test_the_override_is_allowed_by_our_range_and_flowers_pin_is_too() -> None:
    (override,) = map(Requirement, lines_of("override.txt"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (own,) = (r for r in map(Requirement, project["dependencies"]) if r.name == "cryptography")
    (flowers,) = (r for r in map(Requirement, requires("flwr") or ()) if r.name == "cryptography" and not r.marker)
    assert override.specifier.contains("50.0.2")
    assert not override.specifier.contains("49.0.0")
    assert own.specifier.contains("50.0.2")
    assert [version for version in ("46.0.3", "46.0.7") if own.specifier.contains(version)] == ["46.0.3", "46.0.7"]
    assert flowers.specifier.contains("46.0.7")
    assert not flowers.specifier.contains("50.0.2"), "Flower takes 50 itself: the override can go"
    assert override.specifier.contains(str(safe_versions()["cryptography"]), prereleases=True)


def test_the_lower_bounds_leave_out_what_has_known_advisories() -> None:
    """Every bound, of extras, of what builds and of what installs; a row of the table that no bound keeps is found."""
    told = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    texts = [*told["build-system"]["requires"], *lines_of("override.txt")]
    texts += [text for text in lines_of("tested.in") if text.startswith("pip")]
    # The range's own takes what Flower's pin asks for; the override comes in its place.
    texts += [text for text in told["project"]["dependencies"] if not text.startswith("cryptography")]
    texts += [text for extra in told["project"]["optional-dependencies"].values() for text in extra]
    bounds = {requirement.name: requirement.specifier for requirement in map(Requirement, texts)}
    assert not [name for name in ("torch", "transformers", "peft") if "==" in str(bounds[name])]
    for package, mended in safe_versions().items():
        (least,) = (Version(part.version) for part in bounds[package] if part.operator == ">=")
        assert least >= mended, f"{package}{bounds[package]} takes a version that has known advisories"


INSTALLS = {"Makefile": 2, "Dockerfile": 1, "README.md": 1, "docs/guides/steward.md": 1, "docs/guides/first.md": 1}
"""Where FedVeil is installed, and how many environments are made there."""


@pytest.mark.parametrize("name", INSTALLS)
def test_what_installs_is_new_and_known_before_it_installs_the_tested_versions(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    for variable in ("EXACT", "INSTALL", "UV"):
        for value in re.findall(rf"^{variable} *:= *(.*)", text, flags=re.M):
            text = text.replace(f"$({variable})", value)
    steps = [line for line in text.splitlines() if re.search(r"(?<![:=] )(\bpip|\$\(PIP\)) .*(-r|-e|-c|'\.\[)", line)]
    first = [number for number, step in enumerate(steps) if re.search(r"-r /?requirements/pip\.txt", step)]
    assert len(first) == INSTALLS[name], steps
    assert first[0] == 0 or "(1)" in steps[first[0]], "something is installed before"
    for number in first:
        assert {"--upgrade", "--require-hashes", "--no-deps"} <= set(steps[number].split())
    whole = [step for step in steps if re.search(r"\[(demo,)?grpc|-r /requirements\.txt", step)]
    assert whole
    for step in whole:
        assert re.search(r"uv pip install .*--override /?requirements/override\.txt -c \S+/tested\.txt", step), step


def test_the_doctor_fails_on_whatever_has_known_advisories(monkeypatch: pytest.MonkeyPatch) -> None:
    held: dict[str, str] = {}

    def version(name: str) -> str:
        if name not in held:
            raise PackageNotFoundError(name)
        return held[name]

    monkeypatch.setattr(shared_checks, "version", version)
    held |= {"torch": "2.13.0+cpu", "cryptography": "50.0.2"}
    (line,) = shared_checks.advisories()
    assert line.ok
    assert "torch 2.13.0" in line.found
    assert "onnx" not in line.found, "what is not installed is called safe"
    for package, mended in safe_versions().items():
        for found, ok in (
            (str(mended), True),
            (f"{mended.major}.{mended.minor}.{mended.micro}rc1", False),
            ("0.1", False),
        ):
            held |= {package: found}
            failed = [finding for finding in shared_checks.advisories() if not finding.ok]
            assert [finding.what for finding in failed] == [package] * (not ok), found
            assert all(f"--no-deps --only-binary :all: '{package}>={mended}'" in finding.found for finding in failed)
        held |= {package: str(mended)}


def test_the_doctor_fails_on_a_package_that_is_missing_or_out_of_range_and_on_an_old_python(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    held = {**dict.fromkeys(shared_checks.WATCHED, "1.0"), "flwr": "1.38.0"}
    del held["peft"]

    def version(name: str) -> str:
        if name not in held:
            raise PackageNotFoundError(name)
        return held[name]

    monkeypatch.setattr(shared_checks, "version", version)
    monkeypatch.setattr(shared_checks, "requires", lambda _: ["flwr==1.39.0", "torch>=1.0"])
    monkeypatch.setattr(shared_checks, "sys", SimpleNamespace(version_info=(3, 10, 14)))
    failed = {finding.what: finding.found for finding in shared_checks.versions() if not finding.ok}
    assert set(failed) == {"python", "flwr", "peft"}
    assert "pip install 'flwr==1.39.0'" in failed["flwr"]
    assert "not installed" in failed["peft"]
    monkeypatch.setattr(shared_checks, "sys", SimpleNamespace(version_info=(3, 11, 0)))
    assert next(iter(shared_checks.versions())).ok


def test_the_doctor_fails_on_another_base_model_and_on_a_disk_that_is_full_or_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = []

    def load(name: str, task: str, *, files: str) -> SimpleNamespace:
        opened.append(files)
        return SimpleNamespace(pin=f"{'ab' * 32}+{files}")

    monkeypatch.setattr("fedveil.common.model.base.load_base_model", load)
    monkeypatch.setattr("fedveil.common.model.files.files_of", lambda _: "ef" * 32)
    right, other = f"{'ab' * 32}+{'ef' * 32}", f"{'cd' * 32}+{'ef' * 32}"
    for expected, ok in ((right, True), ("", True), (other, False)):
        (finding,) = shared_checks.base_model("mini", "classification", expected)
        assert (finding.ok, right in finding.found) == (ok, True)
        assert ("(the coordinator's)" in finding.found) == (expected == right), "nobody compared it"
    assert len(opened) == 3
    for expected in (f"{'ab' * 32}+{'cd' * 32}", "ab" * 32):
        (finding,) = shared_checks.base_model("mini", "classification", expected)
        assert (finding.ok, "none was opened" in finding.found) == (False, True)
    assert len(opened) == 3, "other files than the coordinator's were opened"
    for free, ok in ((shared_checks.LOW_DISK_BYTES, True), (shared_checks.LOW_DISK_BYTES - 1, False)):
        monkeypatch.setattr("shutil.disk_usage", lambda _, free=free: SimpleNamespace(free=free))
        (finding,) = shared_checks.disk(tmp_path / "not" / "there", "disk")
        assert (finding.ok, "make room" in finding.found) == (ok, not ok)
    monkeypatch.setattr("os.access", lambda *_: False)
    (finding,) = shared_checks.disk(tmp_path, "disk")
    assert (finding.ok, "may not be written" in finding.found) == (False, True)


def test_nobody_uses_the_parts_of_cryptography_that_docs_security_calls_unreached() -> None:
    unreached = re.compile(r"pkcs7|x509\.verification|x509 import .*verification|\brsa\b")
    own = [path for name in PRODUCT for path in (ROOT / name).rglob("*.py")]
    flower = list(Path(str(distribution("flwr").locate_file("flwr"))).rglob("*.py"))
    assert len(flower) > 100
    imports = re.compile(r"^\s*(?:from|import) cryptography[^\n(]*(?:\([^)]*\))?", re.M)
    for path in (*own, *flower):
        for statement in imports.findall(path.read_text(encoding="utf-8")):
            assert not unreached.search(statement), f"{path}: {statement}"
