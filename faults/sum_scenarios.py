"""Rounds whose vectors are summed under masks: a site killed, where none may be lost and where one may, and lies."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import numpy as np

from faults.checks import charges, masked_words
from faults.fault_plan import SERVER
from faults.faulty_server import DROPS, EQUIVOCATES, INVENTS, REPLAYS, SIGNS_TWICE, SPLITS, SWAPS
from faults.faulty_site import AFTER
from faults.federation import SIZES, Federation, Run
from faults.scenarios import LATE, NOTICED
from fedveil.common.config.flat import Scalar
from fedveil.common.config.text import to_toml
from fedveil.common.findings import Finding
from fedveil.common.run_lines import RoundLine, read_lines
from fedveil.deploy.peers import ENTRY, PEERS, make_roster
from fedveil.deploy.pin import pin_roster

SUM, LIES = "a secure sum", "a secure sum of a lying server"
SETTINGS: dict[str, Scalar] = {
    "privacy__mode": "secure-sum",
    "privacy__honest_sites": 2,
    "training__optimizer": "sgd",
    "training__local_steps": 1,
}
LOSING: dict[str, Scalar] = {"privacy__drop_outs": 1, "min_sites": 3}
"""Any three of four sites have their sum without the fourth."""
RULES: dict[str, Scalar] = {"honest-sites": len(SIZES), "epsilon-alone": 1000.0, "peers": PEERS}
SERVER_LIES: dict[str, tuple[str, int, int]] = {
    EQUIVOCATES: ("the sum's length", 2, 6),
    REPLAYS: ("", 1, 3),
    SWAPS: ("is not signed by that site", 2, 5),
    DROPS: ("the attempt has 2 sites", 2, 4),
    INVENTS: ("is not in the roster", 2, 3),
}
"""Of three sites, by the server's lie in the first attempt at a round: what is told of it, how many attempts the round
takes, and how often the three together are charged."""
SURVIVOR_LIES: dict[str, tuple[str, int, int]] = {
    SPLITS: ("2 sites have signed the survivors, and 3 are needed", 2, 8),
    SIGNS_TWICE: ("", 1, 4),
}
"""The same of four sites, one of which may be lost."""
KILLED = "lab"
SMALL = 2.0**28
"""Of uniform words, read as signed numbers, one half is above four times this."""


def sums(federation: Federation, deadline: float) -> Iterator[Finding]:
    """Kill the lab between its charge and its reply; the next attempt has all sites again."""
    _let_in(federation)
    federation.plan.write({KILLED: {1: AFTER}})
    run = federation.submit(rounds=2, round_retries=1, round_timeout=max(deadline, NOTICED), **SETTINGS)
    federation.wait_held(KILLED, 1)
    federation.processes.kill(KILLED)
    federation.plan.write({})
    federation.start_site(KILLED)
    back = federation.wait_online(KILLED, restart=True)
    result = run.result()
    wrong = [] if result.status == "completed" else [f"the run {result.status}: {result.reason}"]
    lines = {line.round_number: line for line in read_lines(RoundLine, run.path)}
    for number, attempts in ((1, 2), (2, 1)):
        line = lines.get(number)
        if line is None or not line.complete or sorted(line.participants) != sorted(SIZES):
            wrong.append(f"round {number} should count with all sites")
        elif line.attempts != attempts:
            wrong.append(f"round {number} should have taken {attempts} attempts, not {line.attempts}")
    told = [(failure.site, failure.kind) for failure in lines[1].failures] if 1 in lines else []
    if not told or any(kind not in LATE for _, kind in told):
        wrong.append("round 1 should tell of the site that was killed")
    paid = {site: charges(federation, site, run) for site in SIZES}
    for site, rows in paid.items():
        if (rows[1], rows[2]) != (2, 1):
            wrong.append(f"{site}'s ledger should hold two charges of round 1 and one of round 2")
    wrong += _wrong_uploads(federation, run)
    figures: dict[str, int | float | str] = {
        "took part": ", ".join(sorted(SIZES)),
        "told": "; ".join(f"{site} ({kind})" for site, kind in told),
        "charged": ", ".join(f"{site} {rows[1]}" for site, rows in paid.items()),
        "adapter": "of whole sums",
        "seconds until let in again": back,
    }
    yield Finding(
        SUM,
        f"the {KILLED} killed between charge and reply",
        False,
        not wrong,
        figures | ({"wrong": "; ".join(wrong)} if wrong else {}),
    )


def drop_outs(federation: Federation, deadline: float) -> Iterator[Finding]:
    """Kill the lab between its charge and its vector, for good.

    The others have their sum in the same attempt, pay once, and the next round without it, of which none may be lost.
    """
    _join(federation)
    others = sorted(site for site in federation.sites if site != KILLED)
    federation.plan.write({KILLED: {1: AFTER}})
    run = federation.submit(rounds=2, round_timeout=max(deadline, NOTICED), **SETTINGS, **LOSING)
    federation.wait_held(KILLED, 1)
    federation.processes.kill(KILLED)
    federation.plan.write({})
    result = run.result()
    wrong = [] if result.status == "completed" else [f"the run {result.status}: {result.reason}"]
    lines = read_lines(RoundLine, run.path)
    told = [(failure.site, failure.kind) for line in lines for failure in line.failures]
    if [(line.complete, line.attempts, sorted(line.participants)) for line in lines] != [(True, 1, others)] * 2:
        wrong.append(f"both rounds should count at once, with {', '.join(others)}")
    if not told or any(kind not in LATE for _, kind in told):
        wrong.append("it should tell of the site that was killed")
    paid = {site: charges(federation, site, run) for site in federation.sites}
    for site, rows in paid.items():
        if (rows[1], rows[2]) != (1, int(site != KILLED)):
            wrong.append(f"{site}'s ledger should hold one charge of round 1, and one of round 2 unless it was gone")
    wrong += _wrong_uploads(federation, run)
    federation.start_site(KILLED)
    figures: dict[str, int | float | str] = {
        "took part": ", ".join(others),
        "told": "; ".join(f"{site} ({kind})" for site, kind in told),
        "charged": ", ".join(f"{site} {rows[1]}" for site, rows in paid.items()),
        "adapter": "of the survivors' sums",
        "seconds until let in again": federation.wait_online(KILLED, restart=True),
    }
    yield Finding(
        SUM,
        f"the {KILLED} lost for good between charge and vector, one may be",
        False,
        not wrong,
        figures | ({"wrong": "; ".join(wrong)} if wrong else {}),
    )


def server_lies(federation: Federation, deadline: float) -> Iterator[Finding]:
    """Let the server lie in the first attempt at each round: it is refused, or the words that it gets are uniform."""
    _let_in(federation)
    names = list(SERVER_LIES)
    # In two runs: of five rounds, most of them with two attempts, one would last longer than a run is waited for.
    yield from _lies(federation, deadline, (names[:3], names[3:]), SERVER_LIES, SETTINGS)


def survivor_lies(federation: Federation, deadline: float) -> Iterator[Finding]:
    """Let the server lie about who has survived: no site tells a share, or signs a second list."""
    _join(federation)
    yield from _lies(federation, deadline, [list(SURVIVOR_LIES)], SURVIVOR_LIES, SETTINGS | LOSING)


def _lies(
    federation: Federation,
    deadline: float,
    parts: Iterable[list[str]],
    told: Mapping[str, tuple[str, int, int]],
    settings: Mapping[str, Scalar],
) -> Iterator[Finding]:
    """Play a run of each part of the lies, one lie a round, and yield what each came to."""
    sites = sorted(federation.sites)
    for part in parts:
        federation.plan.write({SERVER: dict(enumerate(part, 1))})
        run = federation.submit(rounds=len(part), round_retries=1, round_timeout=deadline, **settings)
        result = run.result()
        federation.plan.write({})
        lines = {line.round_number: line for line in read_lines(RoundLine, run.path)}
        uploads = _wrong_uploads(federation, run, range(1, len(part) + 1))
        for number, name in enumerate(part, 1):
            paid = {site: charges(federation, site, run)[number] for site in sites}
            wrong = wrong_after_a_lie(told[name], lines.get(number), sum(paid.values()), len(sites)) + uploads
            wrong += [] if result.status == "completed" else [f"the run {result.status}: {result.reason}"]
            figures: dict[str, int | float | str] = {
                "took part": ", ".join(sites),
                "charged": ", ".join(f"{site} {count}" for site, count in paid.items()),
                "adapter": "of whole sums",
            }
            yield Finding(LIES, name, False, not wrong, figures | ({"wrong": "; ".join(wrong)} if wrong else {}))


def wrong_after_a_lie(
    told: tuple[str, int, int], line: RoundLine | None, paid: int, sites: int = len(SIZES)
) -> list[str]:
    """Return what is wrong with a round in whose first attempt the server lied.

    Args:
        told: what that lie leads to, as in ``SERVER_LIES``.
        line: of the round; None: there is none.
        paid: how often all sites together were charged.
        sites: that are in the run.
    """
    words, attempts, times = told
    if line is None or not line.complete or len(line.participants) != sites:
        return ["the round should count with all sites"]
    wrong = [] if line.attempts == attempts else [f"it should have taken {attempts} attempts, not {line.attempts}"]
    if words and not any(words in failure.reason for failure in line.failures):
        wrong.append(f"it should tell that {words}")
    return wrong + ([] if paid == times else [f"the sites should have paid {times} times, not {paid}"])


def _join(federation: Federation) -> None:
    """Have a fourth site, and let all into sums of them all."""
    if "mill" not in federation.sites:
        federation.add_site("mill")
        federation.wait_online("mill")
    _let_in(federation)


def _let_in(federation: Federation) -> None:
    """Make every site's roster of all sites' entries, and let it join secure sums of them."""
    for name, folder in federation.sites.items():
        entries = [other.path / ENTRY for site, other in federation.sites.items() if site != name]
        roster = make_roster(folder, entries)
        policy = folder.path / "policy.toml"
        text = policy.read_text(encoding="utf-8")
        if "secure-sum" in text:  # from the scenario before this one, which may have had other sites
            pin_roster(policy, roster.digest)
            continue
        text = text.replace('["dp-sgd"]', '["dp-sgd", "secure-sum"]')
        policy.write_text(to_toml({**RULES, "peers-hash": roster.digest}) + text, encoding="utf-8")


def _wrong_uploads(federation: Federation, run: Run, rounds: Iterable[int] = (1, 2)) -> list[str]:
    """Return what is wrong with what left the sites: tensors, or two vectors under one mask."""
    wrong = []
    for site in federation.sites:
        sent = []
        for number in rounds:
            for reply in federation.plan.kept(site, run.name, number, "reply"):
                words = masked_words(reply)
                if words is None:
                    wrong.append(f"{site} sent something else than a masked vector")
                    continue
                sent.append(words)
        apart = [(one - other).view(np.int32) for k, one in enumerate(sent) for other in sent[:k]]
        # Under one mask the difference is that of noise and gradients, far below a word's range; else it is uniform.
        if any(np.median(np.abs(difference.astype(np.float64))) < SMALL for difference in apart):
            wrong.append(f"{site} sent two vectors under one mask")
    return wrong
