"""The files of a base model: one hash of all, compared before transformers opens any; nothing else passes for one."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from spoilt_files import nothing_opened, spoil
from transformers import AutoModel
from typer.testing import CliRunner

from audits.tiny_site import tiny_site
from fedveil.cli.main import app
from fedveil.common.errors import ModelNotLoaded
from fedveil.common.messages.round import Refusal, TrainResult
from fedveil.common.model import files
from fedveil.common.model.base import load_base_model
from fedveil.common.model.files import files_digest, files_of
from fedveil.common.paths import local_name
from fedveil.demo.models import MINILM
from fedveil.demo.packaged import packaged_folder
from fedveil.experiments.in_process import run_in_process


def written(folder: Path, contents: dict[str, str]) -> Path:
    for name, text in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def test_the_hash_is_of_every_name_and_every_byte(tmp_path: Path) -> None:
    own = {"config.json": "{}", "1_Pooling/config.json": "{}", "empty": ""}
    others = [
        {**own, "config.json": "{ }"},
        {**own, "more": ""},
        {**own, ".hidden": ""},
        {**own, "1_Pooling/more": ""},
        {"config.json": "{}", "1_Pooling/config.json": "{}"},
        {"config.jso": "n{}", "1_Pooling/config.json": "{}", "empty": ""},
        {"config.json": "{}", "1_Poolingconfig.json": "{}", "empty": ""},
        {"config.json": "", "1_Pooling/config.json": "{}", "empty": "{}"},
    ]
    digest = files_digest(written(tmp_path / "own", own))
    assert files_digest(written(tmp_path / "same", dict(reversed(own.items())))) == digest
    found = {files_digest(written(tmp_path / str(i), other)) for i, other in enumerate(others)}
    assert len(found | {digest}) == 1 + len(others)
    with packaged_folder(MINILM) as folder:
        assert files_digest(folder) == files_of("all-MiniLM-L6-v2")


def test_a_link_counts_as_its_file_and_what_no_hash_covers_is_refused(tmp_path: Path) -> None:
    plain = written(tmp_path / "plain", {"config.json": "{}", "deep/x": "x"})
    linked = tmp_path / "linked"
    (linked / "deep").mkdir(parents=True)
    (linked / "config.json").symlink_to("../plain/config.json")
    (linked / "deep" / "x").symlink_to(plain / "deep" / "x")
    assert files_digest(linked) == files_digest(plain)
    (plain / "deep" / "x").write_text("y")
    assert files_digest(linked) == files_digest(plain), "a file that a link leads to was not read anew"
    kinds: dict[str, Callable[[Path], None]] = {
        "folder": lambda path: path.symlink_to(plain / "deep"),
        "nothing": lambda path: path.symlink_to("not-there"),
        "itself": lambda path: path.symlink_to(path),
        "pipe": os.mkfifo,
        "device": lambda path: path.symlink_to("/dev/zero"),
    }
    for kind, make in kinds.items():
        folder = written(tmp_path / f"with-{kind}", {"config.json": "{}"})
        make(folder / "odd")
        with pytest.raises(ModelNotLoaded, match="odd"):
            files_digest(folder)


def test_a_file_that_looks_as_old_as_it_was_is_read_anew(tmp_path: Path) -> None:
    folder = written(tmp_path / "model", {"config.json": "{1}"})
    before, status = files_digest(folder), (folder / "config.json").stat()
    (folder / "config.json").write_text("{2}")
    os.utime(folder / "config.json", ns=(status.st_atime_ns, status.st_mtime_ns))
    assert files_digest(folder) != before


def test_a_model_of_the_hub_is_hashed_where_it_lies_and_opened_there(
    model_folder: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, cache = Path(model_folder("bert")), tmp_path / "models--clinic--tiny"
    snapshot = cache / "snapshots" / ("ab" * 20)
    for folder in (cache / "blobs", cache / "refs", snapshot):
        folder.mkdir(parents=True)
    (cache / "refs" / "main").write_text("ab" * 20)
    for i, file in enumerate(sorted(own.iterdir())):
        shutil.copy(file, cache / "blobs" / str(i))
        (snapshot / file.name).symlink_to(f"../../blobs/{i}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(files, "_repositories", {})
    loaded, plain = load_base_model("clinic/tiny", "classification"), load_base_model(str(own), "classification")
    assert loaded.pin == plain.pin == f"{plain.fingerprint}+{files_of(str(own))}"
    assert (loaded.name, loaded.module.config.name_or_path, loaded.processor.name_or_path) == ("clinic/tiny",) * 3
    (snapshot / "note").write_text("")
    with nothing_opened(), pytest.raises(ModelNotLoaded, match="has other files"):
        load_base_model("clinic/tiny", "classification", files=loaded.files)


def test_a_site_hears_of_other_files_in_its_own_log_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    site = tiny_site(tmp_path)
    task, folder = site.task(), Path(str(site.settings["model.name"]))
    spoil(folder)
    with nothing_opened():
        reply = site.ask(task)
    assert isinstance(reply, Refusal)
    assert (reply.kind, files_of(str(folder)) in caplog.text) == ("failed", True)
    assert reply.reason == "this site cannot load the base model that the run names; its own log says why"
    assert site.charges() == []


def test_a_folder_that_changes_while_a_site_goes_on_is_not_opened_either(tmp_path: Path) -> None:
    site = tiny_site(tmp_path)
    first, second, folder = site.task(1), site.task(2), Path(str(site.settings["model.name"]))
    assert isinstance(site.ask(first), TrainResult)
    spoil(folder)
    charges = site.charges()
    with nothing_opened():
        assert isinstance(site.ask(second), Refusal)
    assert site.charges() == charges


@pytest.mark.parametrize("words", [("ask", "a film"), ("merge", "TARGET"), ("evaluate",)])
def test_a_runs_base_model_is_compared_before_a_command_opens_it(
    toy_settings: dict[str, Any], tmp_path: Path, words: tuple[str, ...]
) -> None:
    own = shutil.copytree(toy_settings["model.name"], tmp_path / "model")
    run = run_in_process({**toy_settings, "rounds": 1, "model.name": str(own)}, 2)
    spoil(own)
    more = [str(tmp_path / "merged") if word == "TARGET" else word for word in words[1:]]
    with nothing_opened():
        done = CliRunner().invoke(app, [words[0], str(run), *more])
    assert done.exit_code == 1, done.output
    said = " ".join(done.output.split())
    assert f"the model '{own}' here has other files" in said
    assert "put the same folder there" in said
    assert not (tmp_path / "merged").exists()


def test_no_command_fetches_a_model_that_somebodys_run_names(
    toy_settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_in_process({**toy_settings, "rounds": 1}, 2)
    about, own = run / "adapter" / "fedveil.json", local_name(toy_settings["model.name"])
    about.write_text(about.read_text(encoding="utf-8").replace(own, "their/model"))
    asked = []

    def snapshot(name: str, *, local_files_only: bool, **_: Any) -> str:
        asked.append((name, local_files_only))
        raise OSError("not in the cache")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    done = CliRunner().invoke(app, ["evaluate", str(run)])
    assert (done.exit_code, asked) == (1, [("their/model", True)])
    assert "the hub's cache on this machine does not hold it" in " ".join(done.output.split())


@pytest.mark.parametrize(
    ("file", "text", "says"),
    [
        ("model.safetensors.index.json", '{"weight_map": {"a": "../other.safetensors"}}', "no file beside it"),
        ("model.safetensors.index.json", '{"weight_map": {"a": "/etc/other.safetensors"}}', "no file beside it"),
        ("model.safetensors.index.json", '{"weight_map": {"a": "missing.safetensors"}}', "no file beside it"),
        ("pytorch_model.bin.index.json", '{"weight_map": {"a": ["x"]}}', "no index"),
        ("pytorch_model.bin.index.json", "[" * 100_000, "no index"),
        ("adapter_config.json", '{"base_model_name_or_path": "/elsewhere"}', "names a base model elsewhere"),
    ],
)
def test_a_file_that_leads_out_of_the_folder_is_refused_unopened(
    file: str, text: str, says: str, model_folder: Callable[[str], str], tmp_path: Path
) -> None:
    folder = shutil.copytree(model_folder("bert"), tmp_path / "model")
    (folder / file).write_text(text, encoding="utf-8")
    with nothing_opened(), pytest.raises(ModelNotLoaded, match=says):
        load_base_model(str(folder), "classification")


def test_a_model_in_shards_beside_its_index_is_loaded(model_folder: Callable[[str], str], tmp_path: Path) -> None:
    whole = AutoModel.from_pretrained(model_folder("bert"))
    folder = shutil.copytree(model_folder("bert"), tmp_path / "model")
    (folder / "model.safetensors").unlink()
    whole.save_pretrained(folder, max_shard_size="20kB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    stock = load_base_model(model_folder("bert"), "classification")
    assert load_base_model(str(folder), "classification").fingerprint == stock.fingerprint
