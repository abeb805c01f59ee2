"""A server that is killed once the vectors of a sum are there, and resumed: nothing of theirs is under a mask twice."""

from __future__ import annotations

import hashlib
import sqlite3
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from summed_runs import SUMMED, spent, uneven, words_of

from fedveil.client import sums
from fedveil.client.ledger.sums import Sums
from fedveil.common.errors import RunFailed
from fedveil.common.messages.round import SurvivorTask, Task, TrainTask
from fedveil.common.run_lines import RoundLine, read_lines
from fedveil.experiments.in_process import InProcessTransport, run_in_process
from fedveil.privacy.secure_sum import AttemptName, Identity, SiteAttempt
from fedveil.privacy.secure_sum.masks import Words
from fedveil.server.sites import Exchange

pytestmark = pytest.mark.rough_prices

SITES = {0: 3, 1: 4}
"""By ``privacy.drop-outs``."""


class Killed(BaseException):
    """What nothing catches: the server is gone."""


def killed_after(stage: type[Task], number: int) -> type[InProcessTransport]:
    """Return a transport whose server dies, once, when a round has all answers of a kind; its nodes live on."""

    class Dying(InProcessTransport):
        memories: ClassVar[list[dict[str, bytes]]] = [{} for _ in range(max(SITES.values()))]
        vectors: ClassVar[dict[int, list[Words]]] = defaultdict(list)
        keys: ClassVar[list[set[bytes]]] = []
        dead: ClassVar[list[str]] = []

        def __init__(self, *own: Any) -> None:
            super().__init__(*own)
            self._memories = self.memories

        def exchange(self, tasks: Mapping[int, Task], timeout: float) -> Exchange:
            got, first = super().exchange(tasks, timeout), next(iter(tasks.values()))
            if isinstance(first, TrainTask) and first.round_number == number:
                self.keys.append({offer.public for offer in first.offers})
            if isinstance(first, stage) and first.round_number == number and not self.dead:
                self.dead.append("dead")
                raise Killed
            return got

        def deliver(self, node: int, task: Task, content: Any) -> Any:
            record = super().deliver(node, task, content)
            if isinstance(task, TrainTask) and task.round_number == number and "sum" in record.array_records:
                self.vectors[node].append(words_of(record).astype(np.uint32))
            return record

    return Dying


def settings_of(toy: dict[str, Any], drop_outs: int, rounds: int) -> dict[str, Any]:
    return {**toy, **SUMMED, "privacy.drop-outs": drop_outs, "round-retries": 0, "rounds": rounds}


@pytest.mark.parametrize(("drop_outs", "stage", "number"), [(0, TrainTask, 2), (1, SurvivorTask, 1)])
def test_a_round_that_is_asked_again_after_a_resume_has_new_masks_and_another_charge(
    drop_outs: int, stage: type[Task], number: int, toy_settings: dict[str, Any]
) -> None:
    """All or nothing, with keys that came with the round before; and where sites may be lost, once a list is signed."""
    kind, settings = killed_after(stage, number), settings_of(toy_settings, drop_outs, number)
    sites = SITES[drop_outs]
    with pytest.raises(Killed):
        run_in_process(settings, sites, "cut", kind=kind)
    folder = run_in_process({**settings, "resume": "cut"}, sites, "again", kind=kind)
    assert [line.attempts for line in read_lines(RoundLine, folder)] == [1] * number
    assert {site: [paid for paid, _ in rows] for site, rows in spent(folder).items()} == {
        f"site-{i}": [*range(1, number + 1), number] for i in range(sites)
    }
    first, second = kind.keys  # type: ignore[attr-defined]
    assert len(first | second) == 2 * sites, "a key serves both attempts"
    for path in sorted((folder / "ledgers").glob("*.sqlite")):
        assert len(mask_keys(path)) == number + 1
    for one, other in kind.vectors.values():  # type: ignore[attr-defined]
        assert not uneven(one - other), "the difference of two vectors is no uniform words"


def mask_keys(ledger: Path) -> set[bytes]:
    connection = sqlite3.connect(ledger)
    rows = connection.execute("SELECT key FROM mask_keys").fetchall()
    connection.close()
    return {key for (key,) in rows}


def test_keys_that_follow_from_the_attempts_name_are_found(
    toy_settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The planted fault: a resumed round has the name of the one that was cut off, and so its keys and masks."""

    def fixed(name: AttemptName, site: str, identity: Identity, secret: bytes = b"") -> SiteAttempt:
        return SiteAttempt(name, site, identity, secret or hashlib.sha256(f"{name} {site}".encode()).digest())

    monkeypatch.setattr(sums, "SiteAttempt", fixed)
    kind, settings = killed_after(TrainTask, 1), settings_of(toy_settings, 0, 1)
    with pytest.raises(Killed):
        run_in_process(settings, SITES[0], "cut", kind=kind)
    for memory in kind.memories:  # type: ignore[attr-defined]
        memory.clear()  # else the very same task has the very same answer
    with pytest.raises(RunFailed, match="was charged under this key of its masks before"):
        run_in_process({**settings, "resume": "cut"}, SITES[0], "again", kind=kind)
    monkeypatch.setattr(Sums, "use_key", lambda *own: None)
    run_in_process({**settings, "resume": "cut"}, SITES[0], "again", kind=kind)
    for one, other in kind.vectors.values():  # type: ignore[attr-defined]
        assert uneven(one - other), "the check is blind"
