"""Passes on other cores: what they add up to is this process's own to the last bit, whoever made them or died."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from audits.persons import by_person, owned
from audits.tiny_models import save_tiny_model
from audits.tiny_site import clinic
from audits.worlds import World, fresh_world
from fedveil.client import app
from fedveil.client import cores as cores_module
from fedveil.client import process as process_module
from fedveil.client.cores import Cores
from fedveil.client.linearised import _vectors
from fedveil.common.model.device import denormals_flushed
from fedveil.common.model.shapes import FixedBatch
from fedveil.common.model.sharing import Share, Unshared, in_order, unshared
from fedveil.common.threads import environment
from fedveil.privacy.dpsgd import PrivateSteps
from fedveil.privacy.plan import PrivacyPlan, gaussian_plan

PLAN = gaussian_plan(0.5, 1.0, 0.5, 4.0, 1e-3, 100.0)
SCRIPT = """
import os, sys, time
from fedveil.client.cores import Cores
cores = Cores(2)
assert cores._start()
print(*[worker.process.pid for worker in cores.workers], flush=True)
time.sleep(600)
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    made = fresh_world(save_tiny_model("bert", tmp_path_factory.mktemp("bert")), "bert", "lora", "trained")
    return World(made.model, made.records * 4)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """As a process that shares: its workers have one thread each."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with denormals_flushed():
        yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def cores(one_thread: None) -> Iterator[Cores]:
    made = Cores(2)
    yield made
    made.close()


def summed(world: World, opened: AbstractContextManager[Share] | None = None, plan: PrivacyPlan = PLAN) -> Tensor:
    """Return a step's sum before the noise, of passes that are shared, or of this process's own."""
    sums: list[Tensor] = []
    with (
        opened or nullcontext(unshared) as share,
        PrivateSteps(world.model.module, torch.optim.SGD(world.trained, lr=0.0), plan) as steps,
    ):
        steps.share = share
        add_noise = steps._mechanism.add_noise

        def look() -> None:
            sums.extend(parameter.summed_grad.flatten() for parameter in steps._mechanism.params)
            add_noise()

        steps._mechanism.add_noise = look  # type: ignore[method-assign]
        steps.step(plan.parts(world.model, world.records), world.model.losses)
    return torch.cat(sums)


def killing(share: Share, cores: Cores) -> Share:
    """Kill a worker once it has a pass, stop the other, and go on."""

    def shared(batches: Any, before_pass: Callable[[], None]) -> Iterator[Any]:
        victim, other = cores.workers
        asked = iter(range(1000))

        def kill() -> None:
            if next(asked) == 1:  # the first has its pass
                os.kill(other.process.pid, signal.SIGSTOP)
                os.kill(victim.process.pid, signal.SIGKILL)
                victim.process.wait()

        return share(batches, kill)

    return shared


class _Killing(nullcontext[Share]):
    """The context of ``Cores.opened``, in which one worker is killed and one stopped in the first step."""

    def __init__(self, cores: Cores, world: World) -> None:
        self.inner, self.cores = cores.opened(world.model, "sums", PLAN), cores

    def __enter__(self) -> Share:
        return killing(self.inner.__enter__(), self.cores)

    def __exit__(self, *words: object) -> None:
        self.inner.__exit__(*words)


def test_workers_compute_what_one_process_computes_to_the_last_bit(world: World, cores: Cores) -> None:
    alone = summed(world)
    assert torch.equal(summed(world, cores.opened(world.model, "sums", PLAN)), alone)
    assert len(cores.workers) == 2
    assert not cores.given_up
    # What is trained moves from step to step.
    with torch.no_grad():
        world.trained[0].add_(0.25)
    moved = summed(world)
    assert not torch.equal(moved, alone)
    assert torch.equal(summed(world, cores.opened(world.model, "sums", PLAN)), moved)


def test_units_of_several_rows_have_the_same_bits_on_workers(world: World, cores: Cores) -> None:
    owners = [position % 5 for position in range(len(world.records))]
    persons, plan = World(world.model, owned(world, owners)), by_person(0.05)
    alone = summed(persons, plan=plan)
    assert torch.equal(summed(persons, cores.opened(persons.model, "sums", plan), plan), alone)
    with cores.opened(persons.model, "sums", plan) as share:
        for batch, found in share(persons.model.fixed_batches(persons.records), lambda: None):
            assert [len(gradients) for gradients in found] == [batch.records] * len(persons.trained)


def test_answers_are_taken_in_the_order_of_their_batches() -> None:
    batches = [FixedBatch({"x": torch.zeros(1)}, 1) for _ in range(5)]

    def last_first(batches: Any, before_pass: Callable[[], None]) -> Iterator[Any]:
        yield from ((batch, id(batch)) for batch in reversed(list(batches)))

    taken = list(in_order(last_first, zip(batches, "abcde", strict=True), lambda: None))
    assert [note for _, note, _ in taken] == list("abcde")
    assert all(found == id(batch) for batch, _, found in taken)


def test_features_and_jacobians_are_the_same_to_the_last_bit(world: World, cores: Cores) -> None:
    alone = _vectors(world.model, world.records, lambda: None)
    world.model.sharing = cores
    try:
        shared = _vectors(world.model, world.records, lambda: None)
    finally:
        world.model.sharing = Unshared()
    for one, other in zip(alone, shared, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(torch.as_tensor(one[key]), torch.as_tensor(other[key])) for key in one)


def test_a_pass_whose_worker_is_killed_or_stopped_is_made_again(
    world: World, cores: Cores, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone, share = summed(world), Cores._share
    for number in range(2):
        assert torch.equal(summed(world, cores.opened(world.model, "sums", PLAN)), alone)  # and they are started
        with monkeypatch.context() as hurried:
            hurried.setattr(cores_module, "STARTING", 1.0)
            hurried.setattr(cores_module, "SLOWER", 0.0)
            if number:  # the planted fault: what they had falls away
                hurried.setattr(Cores, "_share", lambda *words: (one for one in share(*words) if one[1] is not None))
            assert torch.equal(summed(world, _Killing(cores, world)), alone) == (not number)
        assert cores.workers == []


def shared_files() -> set[str]:
    """Return the names of files in shared memory, without the semaphores that other processes make at any time."""
    return {name for name in os.listdir("/dev/shm") if not name.startswith("sem.")}


def test_workers_have_no_file_and_no_dump(world: World, cores: Cores) -> None:
    before = shared_files()
    with cores.opened(world.model, "sums", PLAN):
        assert len(cores.workers) == 2
        for worker in cores.workers:
            folder = Path(f"/proc/{worker.process.pid}")
            opened = {str(each.readlink()) for each in (folder / "fd").iterdir()}
            allowed = ("socket:", "pipe:", "anon_inode:", "/dev/null", "/dev/pts", "/memfd:")
            own = {str(each.readlink()) for each in Path("/proc/self/fd").iterdir() if each.exists()}
            assert all(name.startswith(allowed) or name in own for name in opened), opened
            assert resource.prlimit(worker.process.pid, resource.RLIMIT_CORE)[0] == 0
            mapped = (folder / "maps").read_text(encoding="utf-8")
            assert "/memfd: (deleted)" in mapped
            assert "/dev/shm" not in mapped
        assert shared_files() <= before
    with cores.opened(world.model, "sums", PLAN):
        pass
    assert all("/memfd" not in Path(f"/proc/{w.process.pid}/maps").read_text(encoding="utf-8") for w in cores.workers)


def test_where_workers_differ_or_cannot_have_the_model_one_process_computes(
    world: World, cores: Cores, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    alone = summed(world)
    with monkeypatch.context() as patch:
        patch.setattr(cores_module.Passes, "digest", lambda self, batch: "another")
        unlike = Cores(2, workers=cores.workers)
        cores.workers = []
        assert torch.equal(summed(world, unlike.opened(world.model, "sums", PLAN)), alone)
        assert unlike.given_up
        assert not unlike.workers
    closed = Cores(2)
    world.model.statistic = lambda batch: batch["input_ids"]  # no other program can be given this
    try:
        for _ in range(2):
            with closed.opened(world.model, "sums", PLAN) as share:
                assert share is unshared
    finally:
        world.model.statistic = None
    assert caplog.text.count("one process computes all passes") == 2  # once each


def test_a_long_run_is_shared_once_it_is_paid_and_a_run_of_few_records_or_with_a_time_is_not(
    toy_settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cores: Cores
) -> None:
    process, charged, share = app.process, list[int](), Cores._share
    before = torch.get_num_threads()

    def spied(self: Cores, *words: Any) -> Iterator[Any]:
        charged.append(len(site.charges()))
        return share(self, *words)

    site = clinic({**toy_settings, "training.local-steps": 2}, tmp_path)
    monkeypatch.setattr(process_module, "site_cores", lambda: 2)
    monkeypatch.setattr(Cores, "_share", spied)
    monkeypatch.setattr(process, "cores", cores)
    try:
        site.train(1)
        assert not charged, "a run of a few records starts no worker"
        monkeypatch.setattr(cores_module, "LEAST_WORK", 0.0)
        site.train(2)
        assert charged == [2, 2], "records go to a worker before they are paid for"
        assert len(cores.workers) == 2
        site.rule(reply_after=60.0)
        site.train(3)
        assert len(charged) == 2, "the time of an answer counts on one process"
        process.forget()
        assert not cores.workers
    finally:
        torch.set_num_threads(before)


def test_workers_end_with_their_parent_however_it_ends() -> None:
    with subprocess.Popen([sys.executable, "-c", SCRIPT], stdout=subprocess.PIPE, env=environment()) as parent:
        assert parent.stdout is not None
        pids = [int(word) for word in parent.stdout.readline().split()]
        assert len(pids) == 2
        parent.kill()
    ends = time.monotonic() + 20
    while any(_runs(pid) for pid in pids):
        assert time.monotonic() < ends, "a worker has outlived its parent"
        time.sleep(0.05)


def _runs(pid: int) -> bool:
    try:
        return " Z " not in Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except OSError:
        return False
