"""Hubs: closed to every process, whatever its environment says, but for what its own command named."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets.config
import huggingface_hub.constants
import pytest

from fedveil.common import hub
from fedveil.common.errors import ConfigError, DataError, ModelNotLoaded
from fedveil.common.hub import CLOSED, opened
from fedveil.common.model.files import files_of
from fedveil.experiments.api.prepared import Division, prepared
from fedveil.experiments.hub_sources import fetched

ROOT = Path(__file__).resolve().parents[2]
ASK = "import huggingface_hub.constants as h, datasets.config as d, os; "
TELL = f"print(h.HF_HUB_OFFLINE, d.HF_HUB_OFFLINE, {{n: os.environ.get(n) for n in {tuple(CLOSED)}}} == {CLOSED})"


def is_open() -> bool:
    return not (huggingface_hub.constants.is_offline_mode() or datasets.config.HF_HUB_OFFLINE)


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, bool, bool]]:
    """Return what libraries are asked for from now on, whether only the cache is, and whether the hub is open."""
    asked: list[tuple[str, bool, bool]] = []

    def snapshot(name: str, *, local_files_only: bool, **_: Any) -> str:
        asked.append((name, local_files_only, is_open()))
        raise OSError("it has no such model")

    def load(name: str, **_: Any) -> datasets.Dataset:
        asked.append((name, not is_open(), is_open()))
        return datasets.Dataset.from_dict({"text": ["a", "b"], "label": ["x", "y"]})

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    monkeypatch.setattr("datasets.load_dataset", load)
    monkeypatch.setattr(hub, "_named", set())
    monkeypatch.setattr(hub, "_forbidden", False)
    return asked


@pytest.mark.parametrize("code", [f"import fedveil.common; {ASK}{TELL}", f"{ASK}import fedveil.common; {TELL}"])
def test_hubs_are_closed_whatever_the_environment_says_and_was_imported_before(code: str) -> None:
    variables = {**os.environ, **{name: str(1 - int(value)) for name, value in CLOSED.items()}}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=variables, capture_output=True, check=True)
    assert done.stdout == b"True True True\n"


def test_what_a_command_names_is_fetched_and_the_hub_is_closed_again(online: list[tuple[str, bool, bool]]) -> None:
    settings = {"model.name": "all-MiniLM-L6-v2", "data.name": "hub:owner/set", "data.test": "hub:owner/set:test"}
    assert fetched(settings) == settings
    with pytest.raises(ModelNotLoaded, match=r"cannot fetch the base model 'owner/model'.*no such model"):
        fetched({"model.name": "hub:owner/model"})
    assert online == [("owner/set", False, True), ("owner/set", False, True), ("owner/model", False, True)]
    assert not is_open()


def test_a_model_that_no_command_names_comes_from_the_cache_alone(online: list[tuple[str, bool, bool]]) -> None:
    for name in ("owner/model", "hub:owner/model"):
        with pytest.raises(ModelNotLoaded, match="hub:NAME to fetch it"):
            files_of(name)
    assert online == [("owner/model", True, False), ("hub:owner/model", True, False)]


def test_a_source_that_was_not_named_and_one_that_the_environment_forbids_are_not_asked_for(
    online: list[tuple[str, bool, bool]], monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened("hub:owner/set"):
        assert not is_open()
    monkeypatch.setattr(hub, "_forbidden", True)
    fetched({"data.name": "hub:owner/set"})
    assert online == [("owner/set", True, False)]


def test_a_run_that_is_resumed_fetches_nothing_that_its_folder_names(
    online: list[tuple[str, bool, bool]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The folder may be a stranger's; what the command itself names beside it is fetched."""
    told = {"resume": str(tmp_path), "data.name": "hub:their/set", "model.name": "their/model"}
    monkeypatch.setattr("fedveil.experiments.api.prepared.settings_of_resumed", lambda _: told)
    with pytest.raises((ConfigError, DataError)), prepared({"resume": str(tmp_path)}, Division()):
        pass
    assert not [one for one in online if not one[1]]
    with pytest.raises((ConfigError, DataError)), prepared({**told, "data.name": "hub:own/set"}, Division()):
        pass
    assert online[0] == ("own/set", False, True)
