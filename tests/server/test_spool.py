"""Replies on the disk while a round lasts: the same numbers, in any order of arrival, and nothing left behind."""

from __future__ import annotations

import ctypes
import errno
import gc
import os
import random
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fedveil.common.messages.round import Task, TrainResult, TrainTask
from fedveil.common.messages.state import AdapterState
from fedveil.common.messages.tensors import apply
from fedveil.common.run_lines import RoundLine, read_lines
from fedveil.experiments.in_process import InProcessTransport, run_in_process
from fedveil.server import spool
from fedveil.server.collect import plain
from fedveil.server.sites import Exchange
from fedveil.server.spool import on_disk
from fedveil.strategies.base import mean
from fedveil.strategies.state import Contribution

pytestmark = pytest.mark.rough_prices


def reply(seed: int, numbers: int = 1 << 15) -> AdapterState:
    draw = torch.Generator().manual_seed(seed)
    return {
        "b": {"B": torch.randn(numbers // 8, 4, generator=draw), "A": torch.randn(0, 3, generator=draw)},
        "a": {"A": torch.randn(4, numbers // 8, generator=draw)},
    }


def test_tensors_on_the_disk_are_the_same_and_their_file_has_no_name(tmp_path: Path) -> None:
    sent = reply(1)
    kept = on_disk(sent, tmp_path)
    assert kept is not sent
    assert list(tmp_path.iterdir()) == [], "a killed server would leave what a site sent"
    assert kept.keys() == sent.keys()
    assert all(torch.equal(kept[layer][n], sent[layer][n]) for layer in sent for n in sent[layer])
    kept["a"]["A"].zero_()  # in this process's pages alone
    assert torch.equal(on_disk(sent, tmp_path)["a"]["A"], sent["a"]["A"])
    small = {"a": {"A": torch.ones(2, 3)}}
    assert on_disk(small, tmp_path) is small
    double = {"a": {"A": torch.ones(1 << 15, dtype=torch.float64)}}
    assert on_disk(double, tmp_path) is double


def test_a_full_disk_keeps_a_reply_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(**_: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    sent = reply(1)
    assert on_disk(sent, tmp_path) is sent
    assert on_disk(sent, tmp_path / "missing") is sent


def anonymous() -> int:
    """Return the bytes of memory that the system cannot drop, without what earlier tests freed and malloc kept."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))


@pytest.mark.skipif(
    not Path("/proc/self/status").exists() and not os.environ.get("FEDVEIL_CI"), reason="the system has no /proc"
)
def test_a_mean_of_many_replies_takes_the_memory_of_a_few(tmp_path: Path) -> None:
    size, sites = 1 << 21, 32  # bytes of a reply
    grown = []
    for folder in (tmp_path, None):
        before, parts = anonymous(), []
        for number in range(sites):
            sent = reply(number, size // 4)
            parts.append(Contribution(f"site-{number}", 1.0, on_disk(sent, folder) if folder else sent))
        mean(parts)
        grown.append(anonymous() - before)
        del parts, sent
    assert grown[0] < 10 * size
    assert grown[1] > 0.7 * sites * size, "replies in memory are not noticed"


class Longer(InProcessTransport):
    """Whose second site sends nine times the change that it found, in the second round."""

    def exchange(self, tasks: Mapping[int, Task], timeout: float) -> Exchange:
        exchange = super().exchange(tasks, timeout)
        task, sent = tasks[1], exchange.replies[1]
        if isinstance(task, TrainTask) and task.round_number == 2 and isinstance(sent, TrainResult):
            held = {layer: {name: task.state[layer][name] for name in own} for layer, own in sent.contribution.items()}
            sent.contribution.update(apply(lambda new, old: old + 9.0 * (new - old), sent.contribution, held))
        return exchange


class Shuffled(Longer):
    """The same sites, whose answers come in another order each time."""

    draw = random.Random(7)

    def exchange(self, tasks: Mapping[int, Task], timeout: float) -> Exchange:
        nodes = list(tasks)
        self.draw.shuffle(nodes)
        return super().exchange({node: tasks[node] for node in nodes}, timeout)


def test_an_average_has_the_same_bits_from_disk_and_memory_in_any_order(
    toy_settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One update is far longer than the others, so that it is made shorter and kept as well."""
    mapped, ends = list[bool](), []

    def spy(state: AdapterState, folder: Path) -> AdapterState:
        kept = on_disk(state, folder)
        mapped.append(kept is not state)
        return kept

    monkeypatch.setattr(spool, "on_disk", spy)
    monkeypatch.setattr(plain, "on_disk", spy)
    for name, least, kind in (("memory", 1 << 40, Longer), ("disk", 1, Longer), ("shuffled", 1, Shuffled)):
        monkeypatch.setattr(spool, "LEAST", least)
        mapped.clear()
        folder = run_in_process({**toy_settings, "privacy.mode": "none", "rounds": 2, "recipe": "plain"}, 3, name, kind)
        assert mapped == [least == 1] * 7, "six replies, and one that was made shorter"
        lines = [(line.participants, line.shortened, line.loss) for line in read_lines(RoundLine, folder)]
        ends.append((lines, load_file(folder / "adapter" / "adapter_model.safetensors")))
    assert [one.site for one in ends[0][0][1][1]] == ["site-1"]
    for lines, tensors in ends[1:]:
        assert lines == ends[0][0]
        assert all(torch.equal(tensors[name], tensor) for name, tensor in ends[0][1].items())


class Counting(InProcessTransport):
    """Counts the replies of earlier rounds that are in memory while sites answer."""

    earlier: list[int]

    def exchange(self, tasks: Mapping[int, Task], timeout: float) -> Exchange:
        number = next(iter(tasks.values())).round_number
        gc.collect()
        results = [each for each in gc.get_objects() if type(each) is TrainResult and each.run == "one"]
        Counting.earlier.append(sum(each.round_number < number for each in results))
        return super().exchange(tasks, timeout)


def test_no_reply_of_a_round_is_in_memory_in_the_next(toy_settings: dict[str, Any]) -> None:
    Counting.earlier = []
    run_in_process({**toy_settings, "rounds": 3}, 2, "one", Counting)
    assert Counting.earlier == [0, 0, 0]
