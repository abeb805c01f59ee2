"""Faults at one site: a run that is for others, and a volume that is full."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

from faults.checks import Expected, charges, examine
from faults.faulty_site import BEFORE
from faults.federation import SIZES, Federation
from fedveil.common.findings import Finding

GROUP, MEBIBYTES = "site", 8


def not_named(federation: Federation, deadline: float) -> Iterator[Finding]:
    """Let a run name two of the three sites: the third gets no task."""
    federation.plan.write({})
    run = federation.submit(rounds=1, round_timeout=deadline, min_sites=2, named_sites="clinic,lab")
    run.result()
    yield examine(
        federation, run, 1, "a run that is for others", Expected(["clinic", "lab"], charges={"ward": 0}), GROUP
    )


def volume_full(federation: Federation, deadline: float) -> Iterator[Finding]:
    """Fill the volume with a site's ledger before a charge, and make room again; needs root, for a volume."""
    case = "the ledger's volume full"
    if os.geteuid():
        yield Finding(GROUP, case, False, False, {"wrong": "not run: needs root"})
        return
    everyone, ledger = [*SIZES, "dock"], federation.folder / "dock" / "ledger"
    ledger.mkdir(parents=True)
    _run("mount", "-t", "tmpfs", "-o", f"size={MEBIBYTES}m,mode=700", "tmpfs", str(ledger))
    try:
        federation.add_site("dock")
        federation.wait_online("dock")
        federation.plan.write({"dock": {2: BEFORE}})
        run = federation.submit(rounds=3, round_timeout=deadline, min_sites=len(SIZES))
        federation.wait_held("dock", 2)
        filler = ledger / "filler"
        _fill(filler)
        federation.plan.free("dock", 2)
        federation.plan.write({"clinic": {3: BEFORE}})
        federation.wait_held("clinic", 3)
        filler.unlink()
        federation.plan.free("clinic", 3)
        run.result()
        paid = charges(federation, "dock", run)
        full = {"dock": (("failed",), "database or disk is full")}
        yield examine(federation, run, 2, case, Expected(tuple(SIZES), full, {"dock": 0}), GROUP)
        more = {"charges of the site, by round": ", ".join(f"{n}: {paid[n]}" for n in (1, 2, 3))}
        yield examine(federation, run, 3, "room again", Expected(everyone), GROUP, more=more)
    finally:
        federation.leave("dock")
        _run("umount", "-l", str(ledger))


def _fill(file: Path) -> None:
    """Write until the volume has no room."""
    with file.open("wb", buffering=0) as volume:
        try:
            while True:
                volume.write(b"\0" * 4096)
        except OSError:
            return


def _run(*words: str) -> None:
    subprocess.run(words, check=True, capture_output=True)
