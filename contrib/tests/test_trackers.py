"""Runs told to the real trackers, and read back by each one's own reader: ``make test-trackers``."""

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

from fedveil.common.trackers import TRACKERS
from fedveil.experiments.in_process import run_in_process
from fedveil.server.tracking import rounds_of

pytestmark = pytest.mark.trackers
Kept = dict[int, dict[str, float]]
"""Figures by name, by round."""
BLOCK, HEADER = 32_768, 7
"""Bytes of a block of a log, and of what stands before each part of a record: checksum, length, kind."""
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


def records_of(file: Path) -> Iterator[Any]:
    """Yield the records of an offline file, which is a log as LevelDB writes it behind seven bytes of its own.

    The package's own reader is inside the program that ``wandb sync`` starts, and sends what it reads.
    """
    from wandb.proto.wandb_internal_pb2 import Record

    content, place, whole = file.read_bytes(), 7, b""
    while place < len(content):
        if (left := BLOCK - place % BLOCK) < HEADER:
            place += left
            continue
        size, part = int.from_bytes(content[place + 4 : place + 6], "little"), content[place + 6]
        whole += content[place + HEADER : place + HEADER + size]
        place += HEADER + size
        if part in (1, 4):  # whole, or the last part
            record = Record()
            record.ParseFromString(whole)
            whole = b""
            yield record


def by_wandb(folder: Path, run: str) -> Kept:
    found: Kept = {}
    files = sorted((folder / "wandb").glob("offline-run-*/run-*.wandb"))
    for record in (record for file in files for record in records_of(file)):
        if record.WhichOneof("record_type") == "run":
            assert (record.run.project, record.run.display_name) == ("fedveil", run)
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            told = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}
            step = int(told.get("_step", record.history.step.num))
            found[step] = {name: value for name, value in told.items() if name not in OWN}
    sent = subprocess.run(
        [sys.executable, "-m", "wandb", "sync", "--dry-run", *files], capture_output=True, text=True, check=False
    )
    assert f"Would sync {len(files)} run(s)" in sent.stderr + sent.stdout
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
    wanted, found = rounds_of(run), READERS[name](run, run.name.rpartition("-")[2])
    assert set(found) == set(wanted) == {0, 1, 2}
    for number, figures in wanted.items():
        # TensorBoard keeps numbers of four bytes.
        assert found[number] == pytest.approx(figures, rel=1e-6)


TELL = """
import sys
from pathlib import Path
from fedveil.common.trackers import TRACKERS

number = int(sys.argv[3])
tracker = TRACKERS[sys.argv[1]](Path(sys.argv[2]), "7", {"rounds": 2, "strategy": "fedavg-lora"})
tracker.log(number, {"accuracy": 0.5 + number / 8, "epsilon": 1.5 * number})
tracker.close()
"""


@pytest.mark.parametrize("name", TRACKERS)
def test_a_run_that_goes_on_keeps_what_was_told_before(tmp_path: Path, name: str) -> None:
    """Each time by a process of its own, as a server's runs are."""
    for number in ("1", "2"):
        words = [sys.executable, "-c", TELL, name, str(tmp_path), number]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    assert not list(tmp_path.rglob("requirements.txt")), "a tracker keeps a list of this machine's packages"
    found = READERS[name](tmp_path, "7")
    assert found == {1: {"accuracy": 0.625, "epsilon": 1.5}, 2: {"accuracy": 0.75, "epsilon": 3.0}}


def test_trackio_refuses_a_second_folder_in_one_process(tmp_path: Path) -> None:
    """It would go on in the first run's."""
    told = f"{TELL}\ntry:\n    TRACKERS['trackio'](Path(sys.argv[2]) / 'other', '8', {{}})\nexcept OSError as error:\n"
    words = [sys.executable, "-c", f"{told}    print(error)", "trackio", str(tmp_path), "1"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert f"keeps to {tmp_path / 'trackio'} until this process ends" in done.stdout
    assert not (tmp_path / "other").exists()
    assert by_trackio(tmp_path, "7") == {1: {"accuracy": 0.625, "epsilon": 1.5}}
