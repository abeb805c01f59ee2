"""Every fault on a real federation of three sites, or four, one table; the exit code is 1 if anything failed.

make faults
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from rich.console import Console

from audits.finding import quiet
from faults.federation import Federation
from faults.impostor_scenarios import impostors
from faults.network import Cable
from faults.road_scenarios import door_killed, proxy_restarts
from faults.scenarios import NETWORK, below_quorum, cut, kills, lies, slow, sound, stutters
from faults.server_scenarios import server_killed, superlink_killed
from faults.site_scenarios import not_named, volume_full
from faults.sum_scenarios import drop_outs, server_lies, sums, survivor_lies
from faults.table import show
from fedveil.common.errors import FedVeilError, RunFailed
from fedveil.common.findings import Finding

SCENARIOS = (
    *("lies", "quorum", "slow", "kills", "cut", "server", "superlink", "proxy", "door", "named", "full", "sums"),
    *("server-lies", "stutters", "drop-outs", "survivor-lies", "impostor"),  # a fourth site stays after drop-outs
)


def main() -> None:
    """Run from a shell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=SCENARIOS, nargs="+", default=SCENARIOS, help="in this order")
    wanted = parser.parse_args().only
    # Where the output is no terminal, seven columns need more than the usual eighty characters.
    console = Console(highlight=False, emoji=False, width=None if sys.stdout.isatty() else 180)
    say = partial(console.print, markup=False, soft_wrap=True)
    began, findings = time.monotonic(), list[Finding]()
    quiet()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # and end, on the way out, what was started
    try:
        with tempfile.TemporaryDirectory(prefix="fedveil-faults-") as name:
            for finding in play(Path(name), wanted):
                findings.append(finding)
                wrong = f": {finding.figures['wrong']}" if "wrong" in finding.figures else ""
                say(f"{'passed' if finding.passed else 'FAILED'}  {finding.audit}: {finding.case}{wrong}")
    finally:  # whoever stops it sees what there is
        show(console, findings, time.monotonic() - began)
    sys.exit(not all(finding.passed for finding in findings))


def play(folder: Path, wanted: tuple[str, ...] | list[str]) -> Iterator[Finding]:
    """Play the scenarios in an empty folder and yield what each found."""
    cable = Cable()
    try:
        laid = _lay(cable)
        with Federation(folder, (cable.address,)) as federation:
            for site in ("clinic", "lab", "ward"):
                away = (cable.address, cable.inside) if site == "ward" and not laid else ()
                federation.add_site(site, *away)
            federation.wait_online(*federation.sites)
            finding, deadline = sound(federation)
            yield finding
            scenarios: dict[str, Callable[[], Iterator[Finding]]] = {
                "cut": lambda: iter([laid]) if laid else cut(federation, cable, deadline),
                "kills": lambda: kills(federation, deadline),
                "lies": lambda: lies(federation, deadline),
                "quorum": lambda: below_quorum(federation, deadline),
                "slow": lambda: slow(federation, deadline),
                "drop-outs": lambda: drop_outs(federation, deadline),
                "sums": lambda: sums(federation, deadline),
                "survivor-lies": lambda: survivor_lies(federation, deadline),
                "server-lies": lambda: server_lies(federation, deadline),
                "stutters": lambda: stutters(federation, deadline),
                "server": lambda: server_killed(federation, deadline),
                "superlink": lambda: superlink_killed(federation, deadline),
                "proxy": lambda: iter([laid]) if laid else proxy_restarts(federation, cable, deadline),
                "door": lambda: door_killed(federation, deadline),
                "named": lambda: not_named(federation, deadline),
                "full": lambda: volume_full(federation, deadline),
                "impostor": lambda: impostors(folder / "impostor"),
            }
            for name in wanted:
                try:
                    yield from scenarios[name]()
                except Exception as error:
                    words = str(error) if isinstance(error, FedVeilError) else f"{type(error).__name__}: {error}"
                    yield Finding(name, "did not come to its end", False, False, {"wrong": words})
    finally:
        cable.remove()


def _lay(cable: Cable) -> Finding | None:
    """Lay the cable; where that cannot be done, return the finding that says so."""
    try:
        cable.lay()
    except RunFailed as error:
        return Finding(NETWORK, "cut and healed", False, False, {"wrong": f"not run: {error}"})
    return None


if __name__ == "__main__":
    main()
