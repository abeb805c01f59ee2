"""The server's ServerApp, which sends itself SIGKILL where the plan says so, or says its number to be killed."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from faults.fault_plan import SERVER, FaultPlan, open_plan
from server import app as real
from server import records
from server.checkpoint import NAME, Checkpoint, save_checkpoint
from server.sites import Sites
from strategies import STRATEGIES
from strategies.job import configure

BEFORE, TRAINING, AGGREGATING = "before sending", "while sites train", "while aggregating"
RENAME, CHECKPOINT = "between the checkpoint's write and its rename", "after the checkpoint"
app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Conduct the run, and die in it if the plan says so."""
    plan = open_plan()
    (plan.folder / f"{context.run_id}.pid").write_text(str(os.getpid()))
    _mine(plan, type(configure(dict(context.run_config)).strategy).name)
    real.main(grid, context)


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

    Sites.gather = before(Sites.gather, lambda _, number, state: number, BEFORE)  # type: ignore[method-assign]
    kind = STRATEGIES[strategy]
    kind.server_update = before(  # type: ignore[method-assign]
        kind.server_update, lambda _, state, *got: state.round_number + 1, AGGREGATING
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
