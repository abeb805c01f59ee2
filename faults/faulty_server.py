"""The server's ServerApp, which sends itself SIGKILL or lies to sites where the plan says so.

Its number is written down, so that the suite can kill it.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from faults.fault_plan import SERVER, FaultPlan, open_plan
from fedveil.common.errors import RunFailed
from fedveil.common.messages.round import Refusal, SurvivorTask, Task, TrainTask
from fedveil.common.messages.tensors import apply
from fedveil.privacy.secure_sum import AttemptName, Identity, SiteAttempt
from fedveil.server import app as real
from fedveil.server import records
from fedveil.server.checkpoint import NAME, Checkpoint, save_checkpoint
from fedveil.server.collect.plain import PlainCollector
from fedveil.server.sites import Exchange
from fedveil.strategies import STRATEGIES
from fedveil.strategies.job import configure

BEFORE, TRAINING, AGGREGATING = "before sending", "while sites train", "while aggregating"
RENAME, CHECKPOINT = "between the checkpoint's write and its rename", "after the checkpoint"
EQUIVOCATES, REPLAYS, SWAPS = "tells one site another model", "asks for a second vector", "swaps two sites' keys"
DROPS, INVENTS = "leaves a site out to the others", "invents a site"
SPLITS, SIGNS_TWICE = "tells two sites that another is lost", "asks for a second list of survivors"
app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Conduct the run, and die in it if the plan says so."""
    plan = open_plan()
    (plan.folder / f"{context.run_id}.pid").write_text(str(os.getpid()))
    _mine(plan, type(configure(dict(context.run_config)).strategy).name)
    exchange = real.FlowerTransport.exchange
    real.FlowerTransport.exchange = lying(exchange, lambda number: plan.fault(SERVER, number))  # type: ignore[method-assign]
    real.main(grid, context)


def lying(exchange: Callable[..., Exchange], lie_of: Callable[[int], str]) -> Callable[..., Exchange]:
    """Return a transport's ``exchange`` that lies in a round's first attempt, if it lies there.

    With the vectors' tasks, or with the lists of who has survived.

    Args:
        exchange: the honest one.
        lie_of: returns what it does wrong in a round.
    """

    def lied(transport: Any, tasks: Mapping[int, Task], timeout: float) -> Exchange:
        first = next(iter(tasks.values()))
        lie = lie_of(first.round_number)
        if isinstance(first, SurvivorTask) and not first.attempt and lie in (SPLITS, SIGNS_TWICE):
            return _survived(lie, partial(exchange, transport, timeout=timeout), tasks)
        if not isinstance(first, TrainTask) or first.attempt or lie not in (*LIES, REPLAYS):
            return exchange(transport, tasks, timeout)
        if lie != REPLAYS:
            return exchange(transport, LIES[lie](tasks), timeout)
        honest = exchange(transport, tasks, timeout)
        exchange(transport, {node: _moved(task) for node, task in tasks.items()}, timeout)
        return honest

    return lied


def _survived(lie: str, exchange: Callable[..., Exchange], tasks: Mapping[int, Any]) -> Exchange:
    """Tell sites lists of survivors of which the shorter one lacks the last site: two lists, or one after the other.

    Raises:
        RunFailed: a site has signed a second list.
    """
    fewer = {node: replace(task, survivors=task.survivors[:-1]) for node, task in tasks.items()}
    if lie == SPLITS:
        # Tasks and survivors are both in the order of the sites' names.
        return exchange({**tasks, **{node: fewer[node] for node in list(tasks)[:2]}})
    honest = exchange(tasks)
    again = exchange(fewer)
    if signed := [reply.site for reply in again.replies.values() if not isinstance(reply, Refusal)]:
        raise RunFailed(f"{', '.join(signed)} signed a second list of survivors")
    return honest


def _moved(task: Any) -> Any:
    return replace(task, state=apply(lambda tensor: tensor + 1.0, task.state))


def _equivocate(tasks: Mapping[int, Any]) -> dict[int, Any]:
    one = min(tasks)
    return {**tasks, one: _moved(tasks[one])}


def _swap(tasks: Mapping[int, Any]) -> dict[int, Any]:
    one = min(tasks)
    first, second, *others = tasks[one].offers
    swapped = (replace(first, public=second.public), replace(second, public=first.public), *others)
    return {**tasks, one: replace(tasks[one], offers=swapped)}


def _drop(tasks: Mapping[int, Any]) -> dict[int, Any]:
    # Tasks and keys are both in the order of the sites' names.
    dropped = next(iter(tasks))
    fewer = {node: replace(task, offers=task.offers[1:]) for node, task in tasks.items()}
    return {**fewer, dropped: tasks[dropped]}


def _invent(tasks: Mapping[int, Any]) -> dict[int, Any]:
    task = next(iter(tasks.values()))
    name = AttemptName(task.run, task.round_number, task.attempt, "")
    offer = SiteAttempt(name, "zoo", Identity.new()).offer
    return {node: replace(task, offers=(*task.offers, offer)) for node, task in tasks.items()}


LIES: dict[str, Callable[[Mapping[int, Any]], dict[int, Any]]] = {
    EQUIVOCATES: _equivocate,
    SWAPS: _swap,
    DROPS: _drop,
    INVENTS: _invent,
}
"""What a lying server makes of honest tasks of a secure sum, by node."""


def _mine(plan: FaultPlan, strategy: str) -> None:
    """Put death where the plan can name it; TRAINING is left to the suite, which kills from outside."""

    def dies(round_number: int, where: str) -> bool:
        return plan.fault(SERVER, round_number) == where

    def before(method: Callable[..., Any], round_of: Callable[..., int], where: str) -> Callable[..., Any]:
        def dying(*arguments: Any) -> Any:
            if dies(round_of(*arguments), where):
                _die()
            return method(*arguments)

        return dying

    collect = PlainCollector.collect
    PlainCollector.collect = before(collect, lambda _, number, state: number, BEFORE)  # type: ignore[method-assign]
    kind = STRATEGIES[strategy]
    kind.combine = before(  # type: ignore[method-assign]
        kind.combine, lambda _, state, *got: state.round_number + 1, AGGREGATING
    )
    save, rename = save_checkpoint, os.replace

    def save_and_die(folder: Path, checkpoint: Checkpoint) -> None:
        number = checkpoint.state.round_number
        if dies(number, RENAME):
            os.replace = before(rename, lambda _, to: number if Path(to).name == NAME else -1, RENAME)
        save(folder, checkpoint)
        if dies(number, CHECKPOINT):
            _die()

    records.save_checkpoint = save_and_die  # type: ignore[attr-defined]


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
