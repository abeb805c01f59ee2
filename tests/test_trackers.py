"""The real trackers keep what they are told, read back by each one's own reader: ``make test-trackers``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from common.trackers import TRACKERS
from experiments.in_process import run_in_process
from server.tracking import rounds_of

pytestmark = pytest.mark.trackers
Kept = dict[int, dict[str, float]]
"""Figures by name, by round."""
OWN = {"_step", "_timestamp", "_runtime", "_wandb", "step", "timestamp"}
"""What trackers add themselves."""


def by_tensorboard(folder: Path, _: str) -> Kept:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events, found = EventAccumulator(str(folder / "tensorboard")), defaultdict[int, dict[str, float]](dict)
    events.Reload()
    for name in events.Tags()["scalars"]:
        for scalar in events.Scalars(name):
            found[scalar.step][name] = scalar.value
    assert events.Tags()["tensors"] == ["settings/text_summary"]
    return dict(found)


def by_mlflow(folder: Path, run: str) -> Kept:
    from mlflow import MlflowClient

    client, found = MlflowClient(tracking_uri=f"sqlite:///{folder}/mlflow.db"), defaultdict[int, dict[str, float]](dict)
    experiment = client.get_experiment_by_name("fedveil")
    assert experiment is not None
    (kept,) = client.search_runs([experiment.experiment_id])
    assert (kept.info.run_name, kept.info.status) == (run, "FINISHED")
    assert kept.data.params["rounds"] == "2"
    for name in kept.data.metrics:
        for metric in client.get_metric_history(kept.info.run_id, name):
            found[metric.step][name] = metric.value
    return dict(found)


def by_wandb(folder: Path, run: str) -> Kept:
    """Read the records of the offline files, which ``wandb sync`` would send."""
    from wandb.proto.wandb_internal_pb2 import Record
    from wandb.sdk.internal.datastore import DataStore

    found: Kept = {}
    for file in sorted((folder / "wandb").glob("offline-run-*/run-*.wandb")):
        store = DataStore()
        store.open_for_scan(str(file))
        while (data := store.scan_data()) is not None:
            record = Record()
            record.ParseFromString(data)
            if record.WhichOneof("record_type") == "run":
                assert (record.run.project, record.run.display_name) == ("fedveil", run)
            if record.WhichOneof("record_type") == "history":
                told = {
                    item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item
                }
                step = int(told.get("_step", record.history.step.num))
                found[step] = {name: value for name, value in told.items() if name not in OWN}
    return found


def by_trackio(folder: Path, run: str) -> Kept:
    """Read by its command line, in a process of its own: the folder is taken once, when the package is imported."""
    told = {**os.environ, "TRACKIO_DIR": str(folder / "trackio"), "GRADIO_ANALYTICS_ENABLED": "False"}

    def asked(*words: str) -> Any:
        line = [sys.executable, "-m", "trackio.cli", *words, "--json"]
        done = subprocess.run(line, env=told, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    of_run, found = ("--project", "fedveil", "--run", run), defaultdict[int, dict[str, float]](dict)
    for name in asked("list", "metrics", *of_run)["metrics"]:
        for value in asked("get", "metric", *of_run, "--metric", name)["values"]:
            found[int(value["step"])][name] = value["value"]
    return dict(found)


READERS: dict[str, Callable[[Path, str], Kept]] = {
    "tensorboard": by_tensorboard,
    "mlflow": by_mlflow,
    "wandb": by_wandb,
    "trackio": by_trackio,
}


@pytest.fixture(autouse=True)
def places() -> Iterator[None]:
    """Take back where trackers were told to write."""
    before = dict(os.environ)
    for name in ("TRACKIO_DIR", "TRACKIO_SPACE_ID", "MLFLOW_TRACKING_URI", "WANDB_MODE", "WANDB_DIR"):
        os.environ.pop(name, None)
    yield
    os.environ.clear()
    os.environ.update(before)


def test_every_tracker_has_a_reader() -> None:
    assert set(READERS) == set(TRACKERS)


@pytest.mark.parametrize("name", TRACKERS)
def test_what_a_run_tells_is_read_back(toy_settings: dict[str, Any], name: str) -> None:
    run = run_in_process({**toy_settings, "tracker": name}, 2)
    assert "the run goes on without it" not in (run / "run.log").read_text()
    assert (run / TRACKERS[name].where).exists(), "it was written elsewhere"
    wanted, found = rounds_of(run), READERS[name](run, "1")
    assert set(found) == set(wanted) == {0, 1, 2}
    for number, figures in wanted.items():
        # TensorBoard keeps numbers of four bytes.
        assert found[number] == pytest.approx(figures, rel=1e-6)


@pytest.mark.parametrize("name", TRACKERS)
def test_a_run_that_goes_on_is_one_with_what_was_told_before(tmp_path: Path, name: str) -> None:
    settings, row = {"rounds": 2, "strategy": "fedavg-lora"}, TRACKERS[name]
    for number in (1, 2):
        tracker = row(tmp_path, "7", settings)
        tracker.log(number, {"accuracy": 0.5 + number / 8, "epsilon": 1.5 * number})
        tracker.close()
    found = READERS[name](tmp_path, "7")
    assert found == {1: {"accuracy": 0.625, "epsilon": 1.5}, 2: {"accuracy": 0.75, "epsilon": 3.0}}
