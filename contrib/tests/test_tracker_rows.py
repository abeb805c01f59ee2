"""Rows of trackers, against doubles that take no argument that the packages do not."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from fedveil.common.trackers import TRACKERS, Tracker


@pytest.fixture
def instead(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Put a module in place of a package."""

    def put(name: str, **content: Any) -> None:
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)

    return put


def told_to(row: type[Tracker], folder: Path) -> None:
    tracker = row(folder, "7", {"rounds": 2})
    tracker.log(1, {"accuracy": 0.7, "epsilon": 1.5})
    tracker.log(2, {"accuracy/a<b": 0.8})
    tracker.close()


def test_tensorboard_gets_scalars(instead: Callable[..., None], tmp_path: Path) -> None:
    kept: list[Any] = []

    class SummaryWriter:
        def __init__(self, log_dir: str) -> None:
            kept.append(log_dir)

        def add_text(self, tag: str, text_string: str) -> None:
            kept.append((tag, "| rounds | 2 |" in text_string))

        def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
            kept.append((tag, scalar_value, global_step))

        def flush(self) -> None:
            kept.append("flush")

        def close(self) -> None:
            kept.append("close")

    instead("torch.utils.tensorboard", SummaryWriter=SummaryWriter)
    told_to(TRACKERS["tensorboard"], tmp_path)
    assert kept[:3] == [str(tmp_path / "tensorboard"), ("settings", True), ("accuracy", 0.7, 1)]
    assert kept[3:] == [("epsilon", 1.5, 1), "flush", ("accuracy/a<b", 0.8, 2), "flush", "close"]


def test_mlflow_keeps_one_run_and_finds_it_again(
    instead: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    kept: list[Any] = []
    runs: dict[str, Any] = {}

    class MlflowClient:
        def __init__(self, tracking_uri: str) -> None:
            kept.append(tracking_uri)

        def get_experiment_by_name(self, name: str) -> Any:
            return SimpleNamespace(experiment_id="1") if runs else None

        def create_experiment(self, name: str) -> str:
            return "1"

        def search_runs(self, experiment_ids: list[str], filter_string: str, max_results: int) -> list[Any]:
            return [run for name, run in runs.items() if filter_string == f"tags.`fedveil.run` = '{name}'"]

        def create_run(self, experiment_id: str, run_name: str, tags: dict[str, str]) -> Any:
            runs[tags["fedveil.run"]] = SimpleNamespace(info=SimpleNamespace(run_id="r"))
            return runs[run_name]

        def log_param(self, run_id: str, key: str, value: object) -> None:
            kept.append((run_id, key, value))

        def log_metric(self, run_id: str, key: str, value: float, step: int) -> None:
            kept.append((run_id, key, value, step))

        def update_run(self, run_id: str, status: str) -> None:
            kept.append((run_id, status))

        def set_terminated(self, run_id: str) -> None:
            kept.append((run_id, "ended"))

    instead("mlflow", MlflowClient=MlflowClient)
    told_to(TRACKERS["mlflow"], tmp_path)
    metrics = [("r", "accuracy", 0.7, 1), ("r", "epsilon", 1.5, 1), ("r", "accuracy/a_b", 0.8, 2)]
    assert kept == [f"sqlite:///{tmp_path}/mlflow.db", ("r", "rounds", 2), *metrics, ("r", "ended")]
    kept.clear()
    told_to(TRACKERS["mlflow"], tmp_path)
    assert kept[1:] == [("r", "RUNNING"), *metrics, ("r", "ended")], "a run that goes on became another"


def test_weights_and_biases_stays_offline(instead: Callable[..., None], tmp_path: Path) -> None:
    kept: list[Any] = []
    run = SimpleNamespace(log=lambda data, step: kept.append((data, step)), finish=lambda: kept.append("finish"))

    def init(*, project: str, name: str, dir: str, mode: str, config: dict[str, Any], settings: Any) -> Any:  # noqa: A002
        kept.append((project, name, dir, mode, config, settings.x_disable_stats))
        return run

    instead("wandb", init=init, Settings=lambda **given: SimpleNamespace(**given))
    told_to(TRACKERS["wandb"], tmp_path)
    assert kept[0] == ("fedveil", "7", str(tmp_path), "offline", {"rounds": 2}, True)
    assert kept[1:] == [({"accuracy": 0.7, "epsilon": 1.5}, 1), ({"accuracy/a<b": 0.8}, 2), "finish"]


def test_trackio_keeps_its_files_in_the_runs_folder(
    instead: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TRACKERS["trackio"], "_taken", "")
    monkeypatch.setenv("TRACKIO_DIR", "before")  # so that what the row sets is taken back
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "before")
    monkeypatch.delenv("TRACKIO_DIR")
    monkeypatch.delenv("GRADIO_ANALYTICS_ENABLED")
    kept: list[Any] = []
    run = SimpleNamespace(log=lambda metrics, step: kept.append((metrics, step)), finish=lambda: kept.append("finish"))

    def init(project: str, name: str, *, config: dict[str, Any], resume: str, embed: bool, **quiet: bool) -> Any:
        kept.append((project, name, config, resume, embed, quiet, os.environ["TRACKIO_DIR"]))
        return run

    instead("trackio", init=init)
    told_to(TRACKERS["trackio"], tmp_path)
    quiet = {"auto_log_gpu": False, "auto_log_cpu": False}
    assert kept[0] == ("fedveil", "7", {"rounds": 2}, "allow", False, quiet, str(tmp_path / "trackio"))
    assert kept[1:] == [({"accuracy": 0.7, "epsilon": 1.5}, 1), ({"accuracy/a<b": 0.8}, 2), "finish"]
