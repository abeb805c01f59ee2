"""Faults of the server: its process killed in each phase of a round, and the SuperLink killed and started again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial

from faults.checks import Expected, charges, examine
from faults.fault_plan import SERVER
from faults.faulty_server import AGGREGATING, BEFORE, CHECKPOINT, RENAME, TRAINING
from faults.faulty_site import AFTER
from faults.federation import PATIENCE, SIZES, Federation, Run
from faults.processes import wait_until
from fedveil.common.errors import RunFailed
from fedveil.common.findings import Finding
from fedveil.deploy.control import Control

PHASES = {BEFORE: 0, TRAINING: 1, AGGREGATING: 1, RENAME: 1, CHECKPOINT: 1}
"""Where the server's process is killed in round 2, and how often a site has paid for that round in this attempt."""
SITES = tuple(SIZES)
GROUP = "the server killed"


@dataclass(frozen=True)
class _Death:
    """What was there when the server's process was dead."""

    phase: str
    paid: int
    """Charges of round 2 that each site should have in its ledger."""
    charges: Mapping[str, int]


def server_killed(federation: Federation, deadline: float) -> Iterator[Finding]:
    """Kill the server's process in each phase of round 2 in turn; each time the run goes on from its checkpoint."""
    deaths: list[_Death] = []
    phases = list(PHASES)
    run = _start(federation, deadline, _plan(phases[0]))
    for number, phase in enumerate(phases):
        if phase == TRAINING:
            for site in SITES:
                federation.wait_held(site, 2)
            federation.kill_app(run)
        wait_until(partial(federation.app_is_dead, run), f"the server's death {phase}", PATIENCE)
        if run.ended():
            reason = str(run.result().reason)
            yield Finding(GROUP, phase, False, False, {"wrong": f"the run ended before it was killed: {reason}"})
            return
        deaths.append(
            _Death(
                phase,
                sum(list(PHASES.values())[: number + 1]),
                {site: charges(federation, site, run)[2] for site in SITES},
            )
        )
        run = _resume(federation, run, deadline, _plan(phases[number + 1]) if number + 1 < len(phases) else {})
    run.result()
    total = sum(PHASES.values())
    for death in deaths:
        expected = Expected(SITES, charges=dict.fromkeys(SITES, total))
        found = {"charged at its death": ", ".join(f"{site} {count}" for site, count in death.charges.items())}
        wrong = [f"{s} should have paid {death.paid} times" for s, n in death.charges.items() if n != death.paid]
        yield examine(federation, run, 2, death.phase, expected, GROUP, wrong, found)
    yield examine(federation, run, 3, "the round after all these", Expected(SITES), GROUP)


def _plan(phase: str) -> dict[str, dict[int, str]]:
    # What is killed from outside, while sites train, needs sites that wait for it.
    sites = {site: {2: AFTER} for site in SITES} if phase == TRAINING else {}
    return {SERVER: {2: phase}, **sites}


def superlink_killed(federation: Federation, deadline: float) -> Iterator[Finding]:
    """Kill the SuperLink, and the server's process with it, while the sites train; start it, and resume."""
    run = _start(federation, deadline, {site: {2: AFTER} for site in SITES})
    for site in SITES:
        federation.wait_held(site, 2)
    federation.processes.kill("superlink")
    for site in SITES:
        federation.plan.free(site, 2)
    federation.start_server()
    with federation.control() as control:
        seconds = wait_until(lambda: _online(control) >= len(SITES), "the sites to come back", PATIENCE)
        status = control.status(run.flower_id)
    run = _resume(federation, run, deadline, {})
    run.result()
    expected = Expected(SITES, charges=dict.fromkeys(SITES, 2))
    more: dict[str, float | str] = {
        "what Flower says of the run": status,
        "seconds until the sites were back": round(seconds, 1),
    }
    yield examine(federation, run, 2, "SuperLink killed and started again", expected, GROUP, more=more)
    yield examine(federation, run, 3, "the round after it", Expected(SITES), GROUP)


def _online(control: Control) -> int:
    try:
        return len(control.online())
    except RunFailed:  # the SuperLink is starting
        return 0


def _start(federation: Federation, deadline: float, faults: dict[str, dict[int, str]]) -> Run:
    federation.plan.write(faults)
    return federation.submit(rounds=3, round_timeout=deadline, min_sites=len(SITES))


def _resume(federation: Federation, run: Run, deadline: float, faults: dict[str, dict[int, str]]) -> Run:
    federation.plan.write(faults)
    return federation.submit(rounds=3, round_timeout=deadline, min_sites=len(SITES), resume=str(run.path))
