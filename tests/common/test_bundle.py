"""A bundle's hash: of paths and contents, the same however it was packed, and within bounds whatever it is."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import stat
import struct
import subprocess
import sys
import tomllib
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

import pytest
from flwr.cli.build import build_fab_from_disk, build_fab_from_files
from forked_python import Run
from product import PRODUCT
from typer.testing import CliRunner

from fedveil.cli.main import app
from fedveil.client.policy import Policy
from fedveil.common import bundle
from fedveil.common.bundle import MANIFEST, SETTINGS, bundle_digest, digest, files_of, own_digest
from fedveil.common.errors import ConfigError, PolicyRefusal, ProtocolError
from fedveil.deploy.app import app_folder

ROOT = Path(__file__).resolve().parents[2]
FILES = {SETTINGS: b'[project]\nname = "x"\n', "a/b.py": b"x = 1\n", "a/c.py": b""}


def packed(files: Mapping[str, bytes], year: int = 2024, method: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, content in files.items():
            archive.writestr(zipfile.ZipInfo(name, (year, 1, 1, 0, 0, 0)), content, method)
    return buffer.getvalue()


def test_what_flower_builds_of_this_version_has_the_installed_version_s_hash(tmp_path: Path) -> None:
    with app_folder() as folder:
        assert bundle_digest(build_fab_from_disk(folder)) == own_digest()
    by_hand = {path.relative_to(ROOT).as_posix(): path for path in ROOT.glob("[a-z]*/**/*.py")}
    recipes = (path.relative_to(ROOT).as_posix() for path in ROOT.glob("strategies/recipes/*.toml"))
    more = {name: ROOT / name for name in (SETTINGS, "README.md", "demo/prose.md", *recipes)}
    content, _ = build_fab_from_files({**more, **by_hand})
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


def test_an_installed_wheel_has_the_same_hash(tmp_path: Path, fresh_python: Run) -> None:
    source, site_packages = tmp_path / "source", tmp_path / "site-packages"
    for package in PRODUCT:
        shutil.copytree(ROOT / package, source / package, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in (SETTINGS, "README.md"):
        shutil.copy(ROOT / name, source)
    code = f"from setuptools.build_meta import build_wheel; print(build_wheel({str(tmp_path)!r}))"
    made = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True, check=True)
    with zipfile.ZipFile(tmp_path / made.stdout.split()[-1]) as wheel:
        wheel.extractall(site_packages)
    assert sorted(path.name for path in site_packages.iterdir()) == ["fedveil", "fedveil-0.1.0.dist-info"]
    assert digest(files_of(site_packages / "fedveil")) == own_digest()
    for folder in ("configs", "formats", "sweeps"):
        carried, own = (place / "experiments" / folder for place in (site_packages / "fedveil", ROOT))
        names = {path.relative_to(own) for path in own.rglob("*.toml")}
        assert names
        assert {path.relative_to(carried) for path in carried.rglob("*.toml")} == names
    # An older FedVeil, or anybody's folders of these names, beside it or on the path before it change nothing.
    for folder in (site_packages, tmp_path / "other"):
        for room in ("common", "server"):
            (folder / room).mkdir(parents=True)
            (folder / room / "__init__.py").write_text("raise ImportError('another package')")
        (folder / SETTINGS).write_bytes((ROOT / SETTINGS).read_bytes())
    code = """
import sys
sys.path[:0] = sys.argv[1:]
import fedveil, fedveil.common.bundle as bundle, fedveil.server.app
from importlib.resources import files
print(len(fedveil.__path__), bundle.own_digest(), files("fedveil").joinpath("py.typed").is_file())
print(files("fedveil.experiments").joinpath("configs/head-only.toml").is_file())
"""
    done = fresh_python(code, str(site_packages), str(tmp_path / "other"), folder=tmp_path / "other")
    assert done.stdout.split() == ["1", own_digest(), "True", "True"]


def test_the_package_s_settings_are_those_of_the_project() -> None:
    assert (ROOT / bundle.OWN_SETTINGS).read_bytes() == (ROOT / SETTINGS).read_bytes()


def test_the_hash_is_of_paths_and_contents_and_not_of_the_zip() -> None:
    wanted = digest(FILES)
    for files in (FILES, dict(reversed(FILES.items())), {**FILES, MANIFEST: b"whatever Flower lists"}):
        assert bundle_digest(packed(files, 2024)) == bundle_digest(packed(files, 2030)) == wanted
    respelled = {**FILES, SETTINGS: b"[project]\n# Flower drops comments\nname='x'"}
    assert digest(respelled) == wanted, "the text of pyproject.toml is Flower's, its values are ours"


def test_the_hash_of_a_code_stays_what_it_is() -> None:
    """Policies name it: SHA-256 over paths and contents; of ``pyproject.toml`` over the values as JSON."""
    assert digest(FILES) == "3189927565e39a124f14f15162a0a228edbda2d82e3d848d2e9940f24a7ecdf6"
    whole = hashlib.sha256()
    for path, content in sorted(files_of(ROOT).items()):
        values = json.dumps(tomllib.loads(content.decode()), sort_keys=True, default=str) if path == SETTINGS else None
        counted = content if values is None else values.encode()
        whole.update(len(path.encode()).to_bytes(4, "big") + path.encode() + hashlib.sha256(counted).digest())
    assert whole.hexdigest() == own_digest()


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


def overlapping(files: int) -> bytes:
    """Return a zip whose files share one content: each head says that the heads after it are its extra bytes."""
    shared, head = b"x" * 1000, 34
    names = [b"%04d" % number for number in range(files)]
    words = struct.pack("<HHHHHLLL", 20, 0, 0, 0, 0x21, zlib.crc32(shared), len(shared), len(shared))
    heads = [
        b"PK\3\4" + words + struct.pack("<HH", 4, (files - 1 - place) * head) + name for place, name in enumerate(names)
    ]
    entries = [
        b"PK\1\2" + struct.pack("<H", 20) + words + struct.pack("<HHHHHLL", 4, 0, 0, 0, 0, 0, place * head) + name
        for place, name in enumerate(names)
    ]
    return b"".join(heads) + shared + listed(entries, files * head + len(shared))


def listed(entries: list[bytes], start: int = 0) -> bytes:
    """Return the end of a zip: its list of files, and where that starts."""
    whole = b"".join(entries)
    return whole + b"PK\5\6" + struct.pack("<HHHHLLH", 0, 0, len(entries), len(entries), len(whole), start, 0)


def entry(extra: bytes) -> bytes:
    """Return one file of a zip's list, with a field of extra words."""
    return b"PK\1\2" + b"\0" * 24 + struct.pack("<HH", 1, len(extra)) + b"\0" * 14 + b"a" + extra


LONG_LIST = listed([entry(b"")] * 4000)
EXTRA_WORDS = listed([entry(b"\x99\x99\0\0" * 16_000)] * 3)
BEYOND = "more than 32768 bytes, or a line of more than 20 dots"
MANY_DOTS = b"x" + b".x" * (bundle.MOST_DOTS + 1) + b" = 1"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "not a plain zip"),
        (b"PK\x05\x06" + b"\xff" * 18, "not a plain zip"),
        (packed(FILES)[:-30], "not a plain zip"),
        (b"\0" * (bundle.MOST_BYTES + 1), "more than"),
        (packed({f"{i}.py": b"" for i in range(bundle.MOST_FILES + 1)}), "more than"),
        (packed({f"{i:0500}.py": b"" for i in range(bundle.MOST_DIRECTORY // 500)}), "more than"),
        (LONG_LIST, "more than"),
        (EXTRA_WORDS, "more than"),
        (LONG_LIST[:-22] + b"PK\x06\x07" + b"\0" * 16 + listed([]), "not a plain zip"),
        (packed(FILES) + b"a comment", "not a plain zip"),
        (overlapping(2), "overlap"),
        (member("a.py", external_attr=(stat.S_IFLNK | 0o777) << 16), "no plain file"),
        (packed({"a/": b""}), "no plain file"),
        (packed({"../a.py": b""}), "no plain file"),
        (packed({"/a.py": b""}), "no plain file"),
        (packed({"a.py": b"\0" * 10_000_000}, method=zipfile.ZIP_DEFLATED), "more than"),
        (packed({"a.py": b"x" * 9}, method=zipfile.ZIP_DEFLATED), "compressed"),
        (packed({"a.py": b"x"}, method=zipfile.ZIP_LZMA), "compressed"),
        (packed({SETTINGS: b"= not TOML"}), "not TOML"),
        (packed({SETTINGS: b"x = " + b"[" * 30_000}), "not TOML"),
        (
            packed({SETTINGS: b"#" * (bundle.MOST_SETTINGS + 1)}),
            BEYOND,
        ),
        (packed({SETTINGS: b"x = 1\n" + MANY_DOTS}), BEYOND),
        (packed({SETTINGS: b"\xff"}), "not TOML"),
    ],
)
def test_what_is_no_plain_bundle_is_refused_within_bounds(content: bytes, words: str) -> None:
    with pytest.raises(ProtocolError, match=words):
        bundle_digest(content)


def test_files_that_share_nothing_are_taken_from_a_zip_made_as_the_ones_that_are_refused() -> None:
    assert bundle_digest(overlapping(1)) == digest({"0000": b"x" * 1000})


def test_settings_are_parsed_only_beside_the_installed_files_or_where_the_hash_is_wanted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    own, parsed = files_of(ROOT), list[str]()
    honest = tomllib.loads
    assert bundle_digest(packed(own), own_alone=True) == own_digest()
    monkeypatch.setattr(bundle.tomllib, "loads", lambda text: parsed.append(text) or honest(text))
    foreign = packed(own | {"client/app.py": b"", SETTINGS: b"x = 1"})
    assert bundle_digest(foreign, own_alone=True) == ""
    assert not parsed
    assert len(bundle_digest(foreign)) == 64
    assert parsed == ["x = 1"]
    assert len(bundle_digest(packed(own | {SETTINGS: b"x = 2"}), own_alone=True)) == 64
    assert parsed[-1] == "x = 2"


def test_a_name_that_comes_twice_is_refused() -> None:
    with pytest.raises(ProtocolError, match="twice"):
        bundle_digest(twice())


def test_a_policy_names_whole_hashes_and_by_default_the_own_one() -> None:
    own, other = "a" * 64, "b" * 64
    Policy().check_bundle(own, own)
    Policy(bundles=f"{own},{other}").check_bundle(other, own)
    for policy, asked in ((Policy(), other), (Policy(bundles=other), own)):
        with pytest.raises(
            PolicyRefusal, match=f"bundles = .*; the run asks for the bundle {asked[:12]}: run the same version"
        ):
            policy.check_bundle(asked, own)
    with pytest.raises(PolicyRefusal, match=f"bundles = {own[:12]}; the run asks for one of other files: run the same"):
        Policy().check_bundle("", own)
    for wrong in ("a" * 12, "A" * 64, "g" * 64):
        with pytest.raises(ConfigError, match="give all 64 digits"):
            Policy(bundles=wrong)
