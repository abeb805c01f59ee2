"""A server killed at any point loses at most the round in flight, and going on changes no bit."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from threading import Event, Thread
from typing import Any

import numpy as np
import pytest
import torch
from made_run import MadeRun, spent
from safetensors import safe_open
from safetensors.torch import load_file, save

from audits.tiny_models import PLAIN_STEP
from fedveil.common import files
from fedveil.common.errors import ConfigError, DataError, RunFailed
from fedveil.common.messages.round import Refusal, TrainTask
from fedveil.common.model.score import Score
from fedveil.common.paths import REPLIES
from fedveil.common.run_lines import ConfigFile, PrivacyLine, RoundLine, read_file, read_lines
from fedveil.experiments.in_process import InProcessTransport, run_in_process
from fedveil.privacy.entropy import Source
from fedveil.reports import federation_epsilon, report_of
from fedveil.server.checkpoint import FORMAT, NAME, Checkpoint
from fedveil.server.lock import GLANCE_SECONDS, is_written, only_writer
from fedveil.server.records import RunFolder
from fedveil.server.resume import settings_of_resumed, with_resumed
from fedveil.server.sites import Exchange
from fedveil.strategies import ServerState
from fedveil.strategies.job import configure

pytestmark = [pytest.mark.rough_prices, pytest.mark.one_length]


class Killed(BaseException):
    """What nothing catches: the process is gone."""


@contextmanager
def killed_at(operation: int) -> Iterator[list[str]]:
    """Let this many file operations of the server through, and die at the next; the list names those that were done."""
    done: list[str] = []
    patch = pytest.MonkeyPatch()

    def dying(name: str) -> Any:
        real = getattr(os, name)

        def call(*arguments: Any) -> Any:
            if len(done) >= operation:
                raise Killed(f"before {name} number {operation}")
            done.append(name)
            return real(*arguments)

        return call

    for name in ("replace", "fsync"):
        patch.setattr(files.os, name, dying(name))
    try:
        yield done
    finally:
        patch.undo()


def what_counts(folder: Path) -> tuple[list[RoundLine], list[PrivacyLine]]:
    """Return a run's lines without times and bytes: a server that begins again does not know what its sites have."""
    rounds = [replace(line, seconds=0, bytes_down=0) for line in read_lines(RoundLine, folder)]
    return rounds, read_lines(PrivacyLine, folder)


def same_adapter(left: Path, right: Path) -> bool:
    a, b = (load_file(str(folder / "adapter" / "adapter_model.safetensors")) for folder in (left, right))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def fixed_entropy(replace_entropy: Callable[[Source], None]) -> None:
    """Sampling and noise that are the same at every call, so that two runs can be compared bit by bit."""
    fixed = np.random.default_rng(5).integers(0, 2**64, 200_000, dtype=np.uint64)
    replace_entropy(lambda count: fixed[:count])


@pytest.mark.usefixtures("fixed_entropy")
@pytest.mark.parametrize(
    ("strategy", "changes"),
    [
        ("fedavg-lora", {"server.optimizer": "adam"}),
        ("fed-sb", {"server.optimizer": "adam"}),
        # A base model that the server adds to, and turns of A and B.
        ("fedex-lora", {"server.optimizer": "none"}),
        ("rolora", {"server.optimizer": "adam"}),
        # Of those by columns, one whose masks follow from the round and one whose follow from what was sent.
        ("switchlora", {"server.optimizer": "adam", "switchlora.window": 2}),
        ("increlora", {"server.optimizer": "adam", "increlora.start-columns": 1, **PLAIN_STEP}),
        ("fed-svd", {"server.optimizer": "none"}),
        # The basis turns in no round before the cut: there are moments of B to lose beside FedSVD's own memory.
        ("fed-svd", {"server.optimizer": "adam", "fed-svd.period": 3}),
    ],
)
def test_an_interrupted_run_goes_on_to_the_same_bits(
    toy_settings: dict[str, Any], strategy: str, changes: dict[str, Any]
) -> None:
    budget = {"privacy.noise-multiplier": 1.0, "privacy.epsilon": 50.0}
    settings = {**toy_settings, **budget, **changes, "strategy": strategy, "rounds": 3}
    whole = run_in_process(settings, 2, "whole")
    with (
        pytest.raises(Killed),
        killed_at(15 + 2 + 2 * (5 + 2 * 6) + 2 * 6 + 1),
    ):  # 15 before round 1, 1 a new ledger, 5 a round, 6 a reply that is kept and said, 1 into round 3 after them
        run_in_process(settings, 2, "cut")
    folder = Path(settings["output"]) / f"{strategy}-cut"
    assert not (folder / "result.json").exists()
    assert run_in_process({**settings, "resume": "cut"}, 2, "flower-calls-it-otherwise") == folder
    rounds, privacy = what_counts(folder)
    assert rounds == what_counts(whole)[0], "the resumed run scores otherwise than the one that nobody stopped"
    once = [line for place, line in enumerate(privacy) if line not in privacy[:place]]
    assert once == what_counts(whole)[1], "the round in flight was paid for twice, though its replies were kept"
    assert same_adapter(whole, folder), "the resumed run ends at another adapter"


def test_charges_of_the_round_that_was_cut_off_stay_in_the_report(toy_settings: dict[str, Any]) -> None:
    """Both sites pay for round 3, the server dies, and nobody answers it again: what was released stays released."""
    settings = {**toy_settings, "privacy.noise-multiplier": 1.0, "privacy.epsilon": 50.0, "rounds": 3}
    with pytest.raises(Killed), killed_at(15 + 2 + 3 * 17 - 3):  # once the lines of round 3 are there
        run_in_process(settings, 2, "cut")
    folder = Path(settings["output"]) / "ffa-lora-cut"
    told = read_lines(PrivacyLine, folder)
    assert [line.round_number for line in told] == [1, 1, 2, 2, 3, 3]
    with (folder / PrivacyLine.NAME).open("a") as file:
        file.write('{"round": 3, "site": "si')
    settings |= {"resume": "cut", "round-retries": 0}
    with pytest.raises(RunFailed):
        run_in_process(settings, 2, kind=Silent)
    assert read_lines(PrivacyLine, folder) == told
    assert federation_epsilon(folder) == max(spent(line).epsilon_total for line in told)
    assert read_file(ConfigFile, folder).resumed_after == [2]
    shutil.rmtree(folder / REPLIES)
    run_in_process(settings, 2)
    after = read_lines(PrivacyLine, folder)
    assert after[:6] == told
    assert [spent(line).steps_total // settings["training.local-steps"] for line in after[4:]] == [3, 3, 4, 4]
    assert [site.agreement for site in report_of(folder).sites] == ["agrees", "agrees"]


class Silent(InProcessTransport):
    """Whose sites refuse all that is asked."""

    def exchange(self, tasks: Mapping[int, TrainTask], timeout: float) -> Exchange:
        return Exchange(
            {node: Refusal(t.run, t.round_number, f"site-{node}", "policy", "no") for node, t in tasks.items()}, 0, 0
        )


def test_a_server_killed_between_any_two_file_operations_loses_one_round_at_most(
    toy_settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedveil.server.conduct.write_reports", lambda _: None)  # of a run that has its result
    settings = {**toy_settings, "privacy.mode": "none"}
    with killed_at(10**6) as done:
        whole = run_in_process(settings, 1, "whole")
    reached = set()
    for operation in range(12, len(done)):
        run = f"killed-{operation}"
        with pytest.raises(Killed), killed_at(operation):
            run_in_process(settings, 1, run)
        folder = Path(settings["output"]) / f"ffa-lora-{run}"
        if not (folder / NAME).exists():
            assert operation < 15, "a finished round left no checkpoint"
            continue
        if (folder / "result.json").exists():
            assert len(read_lines(RoundLine, folder)) == 2, "a run that is not over has a result"
            continue
        with (folder / "rounds.jsonl").open("a") as file:
            file.write('{"round": 9, "half a li')
        before = len((folder / "rounds.jsonl").read_text().splitlines()) - 1
        run_in_process({**settings, "resume": run}, 1)
        reached.add(before)
        assert what_counts(folder) == what_counts(whole), f"killed before operation {operation}"
        assert same_adapter(whole, folder), f"killed before operation {operation}"
        assert not list(folder.glob(".*.tmp")), "half a file is left behind"
    assert reached >= {0, 1, 2}, "the test did not kill in every round"


def test_what_another_process_writes_into_a_resumed_runs_folder_stays(tmp_path: Path) -> None:
    """A report that is made as a server goes on would find its file gone, or the server the one that it takes away."""
    folder = MadeRun(tmp_path / "run").start().round(1, 0.7).folder
    gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    with subprocess.Popen(["sleep", "30"]) as other:
        left, written = (folder / f".report.md.{owner}.tmp" for owner in (int(gone.stdout), other.pid))
        for path in (left, written):
            path.write_bytes(b"half")
        saved = Checkpoint("1", {}, ServerState(1, {}, ()), {}, Score(0.5, 0.5), None, {})
        RunFolder(folder, configure({}), "1", saved)
        assert (left.exists(), written.exists()) == (False, True)
        other.kill()


def test_a_run_under_way_is_not_resumed_and_nothing_of_it_is_touched(
    toy_settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedveil.server.conduct.DYING_SECONDS", 0.1)
    refused: list[str] = []

    class Impatient(InProcessTransport):
        """Has a second server resume the run while a round of the first is trained."""

        def exchange(self, tasks: Mapping[int, TrainTask], timeout: float) -> Exchange:
            (folder,) = Path(toy_settings["output"]).iterdir()
            before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
            with pytest.raises(RunFailed) as error:
                run_in_process({**toy_settings, "resume": str(folder)}, 1)
            refused.append(str(error.value))
            assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
            return super().exchange(tasks, timeout)

    folder = run_in_process(toy_settings, 1, "1", Impatient)
    assert refused == 2 * [f"the run in {folder} is under way: wait for its end, or end it (`fedveil stop {folder}`)"]
    assert [line.round_number for line in what_counts(folder)[0]] == [1, 2]
    assert not is_written(folder)


def test_a_resumed_run_waits_for_a_server_that_is_dying(toy_settings: dict[str, Any]) -> None:
    with pytest.raises(Killed), killed_at(20):  # the site's reply is kept: it pays for no round twice
        run_in_process(toy_settings, 1, "77")
    (folder,) = Path(toy_settings["output"]).iterdir()
    held, dead = Event(), Event()

    def die() -> None:
        with only_writer(folder):
            held.set()
            dead.wait(GLANCE_SECONDS + 0.5)

    dying = Thread(target=die)
    dying.start()
    held.wait(5)
    run_in_process({**toy_settings, "resume": "77"}, 1)
    dying.join()
    assert [line.round_number for line in what_counts(folder)[0]] == [1, 2]


@pytest.mark.parametrize("strategy", ["fed-sb", "ffa-lora"])  # one with the start that has options, and one without
def test_the_settings_of_a_resumed_run_are_taken_from_its_folder(toy_settings: dict[str, Any], strategy: str) -> None:
    with pytest.raises(Killed), killed_at(17):
        run_in_process({**toy_settings, "strategy": strategy}, 1, "77")
    given = {"output": toy_settings["output"], "resume": "77"}
    settings = with_resumed(given)
    assert settings["strategy"] == strategy
    assert settings["resume"] == str(Path(toy_settings["output"]) / f"{strategy}-77")
    with only_writer(Path(settings["resume"])), pytest.raises(RunFailed, match="is under way"):
        with_resumed(given)
    (Path(settings["resume"]) / NAME).write_bytes(b"rubbish")
    with pytest.raises(DataError, match="is damaged"):
        with_resumed(given)


@pytest.mark.parametrize("name", ["a**b", "7?", "[7]7", "**", "*-77"])
def test_a_runs_name_is_no_pattern(name: str, toy_settings: dict[str, Any]) -> None:
    folder = Path(toy_settings["output"]) / "ffa-lora-77"
    folder.mkdir(parents=True)
    (folder / NAME).touch()
    with pytest.raises(ConfigError, match="names no run with a checkpoint in"):
        settings_of_resumed({"output": toy_settings["output"], "resume": name})


def without(folder: Path, key: str) -> None:
    """Let a stopped run look as if it had been started before there was a setting."""
    file, tensors = folder / NAME, load_file(str(folder / NAME))
    with safe_open(str(file), framework="pt") as opened:
        metadata = opened.metadata()
    about = json.loads(metadata["about"])
    del about["settings"][key]
    file.write_bytes(save(tensors, metadata={**metadata, "about": json.dumps(about)}))
    config = folder / ConfigFile.NAME
    told = json.loads(config.read_text())
    del told["settings"][key]
    config.write_text(json.dumps(told))


def test_a_run_of_other_settings_than_this_fedveil_has_does_not_go_on(toy_settings: dict[str, Any]) -> None:
    with pytest.raises(Killed), killed_at(17):
        run_in_process(toy_settings, 1, "77")
    given = {"output": toy_settings["output"], "resume": "77"}
    without(Path(toy_settings["output"]) / "ffa-lora-77", "server.adam-tau")
    said = r"other settings than this one \(server\.adam-tau\): resume it with the FedVeil that began it"
    with pytest.raises(ConfigError, match=said) as refused:
        with_resumed(given)
    assert "\n" not in str(refused.value)


KEYS = ("run", "settings", "round", "trained", "steps", "tensors", "members", "baseline", "lengths", "renewed")


def test_a_checkpoint_that_lacks_a_key_or_has_another_format_is_refused_in_one_line(
    toy_settings: dict[str, Any],
) -> None:
    with pytest.raises(Killed), killed_at(17):
        run_in_process(toy_settings, 1, "77")
    path = Path(toy_settings["output"]) / "ffa-lora-77" / NAME
    with safe_open(str(path), framework="pt") as file:
        about = json.loads(file.metadata()["about"])
    # Copies: what is loaded lies in the file, which is written over below.
    tensors = {name: tensor.clone() for name, tensor in load_file(str(path)).items()}
    spoilt = [{name: value for name, value in about.items() if name != key} for key in KEYS]
    spoilt += [{**about, key: 0.5} for key in ("settings", "trained", "tensors", "members", "baseline", "lengths")]
    for told in spoilt:
        path.write_bytes(save(tensors, metadata={"format": FORMAT, "about": json.dumps(told)}))
        refused_in_a_line(toy_settings, r"is damaged \(.*\): start a new run$")
    path.write_bytes(save(tensors, metadata={"format": "5", "about": json.dumps(about)}))
    refused_in_a_line(toy_settings, rf"has format 5, not {FORMAT}: use the FedVeil that wrote it$")


def refused_in_a_line(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError, match=words) as refused:
        run_in_process({**settings, "resume": "77"}, 1)
    assert "\n" not in str(refused.value)
