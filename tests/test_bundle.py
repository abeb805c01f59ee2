"""A bundle's hash: of paths and contents, the same however it was packed, and within bounds whatever it is."""

from __future__ import annotations

import io
import shutil
import stat
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest
from flwr.cli.build import build_fab_from_disk, build_fab_from_files
from typer.testing import CliRunner

from cli.main import app
from client.policy import Policy
from common import bundle
from common.bundle import MANIFEST, SETTINGS, bundle_digest, digest, files_of, own_digest
from common.errors import ConfigError, PolicyRefusal, ProtocolError
from deploy.app import app_folder

ROOT = Path(__file__).resolve().parent.parent
FILES = {SETTINGS: b'[project]\nname = "x"\n', "a/b.py": b"x = 1\n", "a/c.py": b""}


def packed(files: Mapping[str, bytes], year: int = 2024, method: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, content in files.items():
            archive.writestr(zipfile.ZipInfo(name, (year, 1, 1, 0, 0, 0)), content, method)
    return buffer.getvalue()


def test_what_flower_builds_of_this_version_has_the_installed_version_s_hash(tmp_path: Path) -> None:
    with app_folder() as folder:
        assert bundle_digest(build_fab_from_disk(folder)) == own_digest()
    by_hand = {path.relative_to(ROOT).as_posix(): path for path in ROOT.glob("[a-z]*/**/*.py")}
    content, _ = build_fab_from_files({SETTINGS: ROOT / SETTINGS, "README.md": ROOT / "README.md", **by_hand})
    assert bundle_digest(content) == own_digest(), "'flwr run .' sends another bundle than 'fedveil server submit'"
    (tmp_path / "built.fab").write_bytes(content)
    for words in (["bundle"], ["bundle", str(tmp_path / "built.fab")]):
        assert CliRunner().invoke(app, words).stdout.split() == [own_digest()]


def test_a_bundle_that_was_unpacked_knows_its_own_hash(tmp_path: Path) -> None:
    """The server's code runs from there, and an adapter's model card names the code that made it."""
    with app_folder() as folder, zipfile.ZipFile(io.BytesIO(build_fab_from_disk(folder))) as built:
        built.extractall(tmp_path)
    assert not (tmp_path / bundle.OWN_SETTINGS).exists()
    assert digest(files_of(tmp_path)) == own_digest()


def test_an_installed_wheel_has_the_same_hash(tmp_path: Path) -> None:
    source, site_packages = tmp_path / "source", tmp_path / "site-packages"
    for package in ("common", "strategies", "client", "server", "reports", "deploy", "experiments", "cli"):
        shutil.copytree(ROOT / package, source / package, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in (SETTINGS, "README.md"):
        shutil.copy(ROOT / name, source)
    code = f"from setuptools.build_meta import build_wheel; print(build_wheel({str(tmp_path)!r}))"
    made = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True, check=True)
    with zipfile.ZipFile(tmp_path / made.stdout.split()[-1]) as wheel:
        wheel.extractall(site_packages)
    assert digest(files_of(site_packages)) == own_digest()


def test_the_package_s_settings_are_those_of_the_project() -> None:
    assert (ROOT / bundle.OWN_SETTINGS).read_bytes() == (ROOT / SETTINGS).read_bytes()


def test_the_hash_is_of_paths_and_contents_and_not_of_the_zip() -> None:
    wanted = digest(FILES)
    for files in (FILES, dict(reversed(FILES.items())), {**FILES, MANIFEST: b"whatever Flower lists"}):
        for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            assert bundle_digest(packed(files, 2024, method)) == bundle_digest(packed(files, 2030, method)) == wanted
    respelled = {**FILES, SETTINGS: b"[project]\n# Flower drops comments\nname='x'"}
    assert digest(respelled) == wanted, "the text of pyproject.toml is Flower's, its values are ours"


@pytest.mark.parametrize(
    "changed",
    [
        {**FILES, "a/b.py": b"x = 2\n"},
        {**FILES, "a/d.py": b""},
        {name: content for name, content in FILES.items() if name != "a/c.py"},
        {**{name: content for name, content in FILES.items() if name != "a/c.py"}, "a/C.py": b""},
        {**FILES, SETTINGS: b'[project]\nname = "y"\n'},
        {**FILES, SETTINGS: b'[project]\nname = "x"\nversion = "2"\n'},
        {SETTINGS: FILES[SETTINGS], "a/b.pyx = 1\n": b"", "a/c.py": b""},
        {**FILES, ".info/CONTENT.py": b""},
    ],
)
def test_any_other_file_name_or_value_is_another_hash(changed: dict[str, bytes]) -> None:
    assert bundle_digest(packed(changed)) != digest(FILES)


def member(name: str, **attributes: int) -> bytes:
    """Return a zip with one member whose head says what a plain file's does not."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        info = zipfile.ZipInfo(name)
        for attribute, value in attributes.items():
            setattr(info, attribute, value)
        archive.writestr(info, b"x")
    return buffer.getvalue()


def twice() -> bytes:
    """Return a zip in which two readers may find two files."""
    return packed({"a.py": b"read by one", "b.py": b"read by another"}).replace(b"b.py", b"a.py")


def understated() -> bytes:
    """Return a zip whose directory states one byte where there are a million."""
    content = packed({"a.py": b"\0" * 1_000_000})
    return content.replace((1_000_000).to_bytes(4, "little"), (1).to_bytes(4, "little"))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "not a plain zip"),
        (b"PK\x05\x06" + b"\xff" * 18, "not a plain zip"),
        (packed(FILES)[:-30], "not a plain zip"),
        (b"\0" * (bundle.MOST_BYTES + 1), "more than"),
        (packed({"a.py": b"\0" * (bundle.MOST_CONTENT + 1)}), "more than"),
        (packed({f"{i}.py": b"" for i in range(bundle.MOST_FILES + 1)}), "more than"),
        (understated(), "not a plain zip"),
        (member("a.py", external_attr=(stat.S_IFLNK | 0o777) << 16), "no plain file"),
        (packed({"a/": b""}), "no plain file"),
        (packed({"../a.py": b""}), "no plain file"),
        (packed({"/a.py": b""}), "no plain file"),
        (packed({"a.py": b"x"}, method=zipfile.ZIP_LZMA), "no plain file"),
        (packed({SETTINGS: b"= not TOML"}), "not TOML"),
        (packed({SETTINGS: b"x = " + b"[" * 100_000}), "not TOML"),
        (packed({SETTINGS: b"\xff"}), "not TOML"),
    ],
)
def test_what_is_no_plain_bundle_is_refused_within_bounds(content: bytes, words: str) -> None:
    with pytest.raises(ProtocolError, match=words):
        bundle_digest(content)


def test_a_name_that_comes_twice_is_refused() -> None:
    with pytest.raises(ProtocolError, match="twice"):
        bundle_digest(twice())


def test_a_policy_names_whole_hashes_and_by_default_the_own_one() -> None:
    own, other = "a" * 64, "b" * 64
    Policy().check_bundle(own, own)
    Policy(bundles=f"{own},{other}").check_bundle(other, own)
    for policy, asked in ((Policy(), other), (Policy(bundles=other), own)):
        with pytest.raises(PolicyRefusal, match=f"bundles = .*; the run asks for the bundle {asked[:12]}$"):
            policy.check_bundle(asked, own)
    for wrong in ("a" * 12, "A" * 64, "g" * 64):
        with pytest.raises(ConfigError, match="give all 64 digits"):
            Policy(bundles=wrong)
