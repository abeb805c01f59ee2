"""Faults of sites and of the network, played one run after another on one federation."""

from __future__ import annotations

import time
from collections.abc import Iterator

from faults.checks import Expected, charges, content_of, examine
from faults.faulty_site import AFTER, BEFORE, LIES, TWICE
from faults.federation import PATIENCE, SIZES, Federation, Run
from faults.network import Cable
from faults.processes import wait_until
from faults.stuttering_node import HALF, NODE
from fedveil.common.findings import Finding
from fedveil.common.run_lines import RoundLine, read_lines

ROOM = 3.0
"""The deadline of a round over the time that a round without a fault took here."""
LEAST_DEADLINE = 20.0
NOTICED = 75.0
"""Seconds until Flower takes a killed node for gone, and lets it in again."""
SHORT_CUT, RECONNECTED = 5.0, 45.0
"""Seconds: of a cut, and within which gRPC tries again after one of the same length."""
LATE = ("late", "failed")
"""``late``: the deadline passed; ``failed``: Flower noticed before that the node is gone."""
NEVER_WHOLE = Expected(["clinic", "ward"], {"lab": (("late",), "no whole answer")})
"""Without the lab, whose answer was announced and did not arrive."""
REFUSED = {
    "NaN": "not finite",
    "wrong shapes": "other layers, factors or shapes",
    "another model's adapter": "other layers, factors or shapes",
    "100 times too many tensors": "no adapter block",
    "an old round": "not this one",
    "another run's reply": "not this one",
    "garbage bytes": "unknown kind",
}
"""What the server says to each lie."""
ALL = Expected(tuple(SIZES))
REPLY, SITE, NETWORK, MESSAGES = "a site's reply", "site", "network", "messages"


def sound(federation: Federation) -> tuple[Finding, float]:
    """Play a round without a fault with all sites; return it and the deadline that rounds get from now on."""
    everyone = sorted(federation.sites)
    federation.plan.write({})
    run = federation.submit(rounds=1, min_sites=len(everyone))
    run.result()
    seconds = read_lines(RoundLine, run.path)[0].seconds or 0.0
    deadline = max(LEAST_DEADLINE, ROOM * seconds)
    more = {"seconds of the round": seconds, "deadline from now on": deadline}
    return examine(federation, run, 1, "no fault", Expected(everyone), "none", more=more), deadline


def lies(federation: Federation, deadline: float, names: tuple[str, ...] = tuple(LIES)) -> Iterator[Finding]:
    """Let the lab lie in every round; the others answer well."""
    federation.plan.write({"lab": dict(enumerate(names, 1))})
    run = federation.submit(rounds=len(names), round_timeout=deadline)
    run.result()
    for number, name in enumerate(names, 1):
        # A reply of an earlier round, whatever its run, is late.
        kinds = ("late",) if name in ("an old round", "another run's reply") else ("reply",)
        expected = Expected(["clinic", "ward"], {"lab": (kinds, REFUSED[name])})
        yield examine(federation, run, number, name, expected, REPLY)


def below_quorum(federation: Federation, deadline: float) -> Iterator[Finding]:
    """Let the lab lie where the round needs all three: the run ends with the reason, and what was spent is spent."""
    federation.plan.write({"lab": {1: "NaN"}})
    run = federation.submit(rounds=1, round_timeout=deadline, min_sites=len(SIZES))
    result = run.result()
    (line,) = read_lines(RoundLine, run.path)
    paid = {site: charges(federation, site, run)[1] for site in federation.sites}
    wrong = [
        words
        for words, holds in (
            ("the run should have failed", result.status == "failed"),
            # No round counted yet, so the server has no name for the node but what the bad reply says.
            (
                "the reason should tell of the lab's reply",
                "(reply): " in result.reason and REFUSED["NaN"] in result.reason,
            ),
            ("the round should not count", not line.complete and not line.participants),
            ("each site should have paid once", set(paid.values()) == {1}),
            ("no adapter should be left", not (run.path / "adapter").exists()),
        )
        if not holds
    ]
    figures: dict[str, int | float | str] = {
        "took part": "nobody",
        "told": result.reason,
        "charged": ", ".join(f"{site} {count}" for site, count in paid.items()),
        "adapter": "none",
    }
    yield Finding(
        REPLY, "a lie where all are needed", False, not wrong, figures | ({"wrong": "; ".join(wrong)} if wrong else {})
    )


def stutters(federation: Federation, deadline: float) -> Iterator[Finding]:
    """Deliver a task twice; let a node send every reply twice and the earlier ones again, and announce one only."""
    federation.processes.kill("lab")
    federation.start_site("lab", stutters=True)
    federation.wait_online("lab", restart=True)
    federation.plan.write({"clinic": {1: TWICE}})
    run = federation.submit(rounds=2, round_timeout=deadline)
    run.result()
    same = {"replies": _same(federation, run)}
    yield examine(federation, run, 1, "a task delivered twice", _counted_once(run, 1), MESSAGES, more=same)
    pushes = (federation.plan.folder / "pushes.txt").read_text().splitlines()
    more = {f"{what} of a reply": _became(pushes, what) for what in ("a duplicate", "a replay")}
    yield examine(federation, run, 2, "replies sent twice and replayed", _counted_once(run, 2), MESSAGES, more=more)
    federation.plan.write({NODE: {1: HALF}})
    run = federation.submit(rounds=1, round_timeout=deadline)
    run.result()
    yield examine(federation, run, 1, "a reply announced and never sent", NEVER_WHOLE, MESSAGES)
    # An ordinary node again: of a sum's many messages a stuttered one is often late, and the next scenarios need it.
    federation.processes.kill("lab")
    federation.start_site("lab")
    federation.wait_online("lab", restart=True)


def _counted_once(run: Run, number: int) -> Expected:
    """Return what may come of the lab's repeats: its reply counts once, or not at all, and the others' as ever.

    Flower ties an upload to the announcement it belongs to; one that is announced anew before it is
    uploaded can stay without its objects, and the node that stuttered is late, or Flower 1.42 misses its message.
    """
    took_part = read_lines(RoundLine, run.path)[number - 1].participants
    return ALL if "lab" in took_part else Expected(["clinic", "ward"], {"lab": (LATE, "")})


def _same(federation: Federation, run: Run) -> str:
    first, second = federation.plan.kept("clinic", run.name, 1, "reply")
    return "the same numbers twice" if content_of(first) == content_of(second) else "TWO DIFFERENT"


def _became(pushes: list[str], what: str) -> str:
    return ", ".join(sorted({line.partition(": ")[2] for line in pushes if line.startswith(what)})) or "never sent"


def slow(federation: Federation, deadline: float) -> Iterator[Finding]:
    """Let the lab answer when the deadline has passed; it takes part in the next round."""
    federation.plan.write({"lab": {1: AFTER}})
    run = federation.submit(rounds=2, round_timeout=deadline)
    wait_until(lambda: _round_done(run, 1), "the deadline", PATIENCE)
    federation.plan.free("lab", 1)
    run.result()
    late = Expected(["clinic", "ward"], {"lab": (("late",), "no answer in")})
    yield examine(federation, run, 1, "slow past the deadline", late, SITE)
    yield examine(federation, run, 2, "the round after it", ALL, SITE)


def kills(federation: Federation, deadline: float) -> Iterator[Finding]:
    """Kill two sites in one round, one before its charge and one after, and start them again at once."""
    # The clinic keeps round 2 open until both are back.
    federation.plan.write({"lab": {1: AFTER}, "ward": {1: BEFORE}, "clinic": {2: AFTER}})
    run = federation.submit(rounds=3, round_timeout=max(deadline, NOTICED))
    for site in ("lab", "ward"):
        federation.wait_held(site, 1)
        federation.processes.kill(site)
    for site in ("lab", "ward"):
        federation.start_site(site)
    back = federation.wait_online("lab", "ward", restart=True)
    federation.wait_held("clinic", 2)
    federation.plan.free("clinic", 2)
    run.result()
    gone = dict.fromkeys(("lab", "ward"), (LATE, ""))
    expected = Expected(["clinic"], gone, {"ward": 0, "lab": 1})
    case = "the ward killed before the charge, the lab between charge and reply"
    yield examine(federation, run, 1, case, expected, SITE)
    yield examine(federation, run, 3, "both are back", ALL, SITE, more={"seconds until let in again": back})


def cut(federation: Federation, cable: Cable, deadline: float) -> Iterator[Finding]:
    """Cut the ward off for a moment, then until the round is over without it, and heal the network."""
    # The clinic keeps round 3 open until the ward is back.
    federation.plan.write({"ward": {1: AFTER, 2: AFTER}, "clinic": {3: AFTER}})
    run = federation.submit(rounds=4, round_timeout=max(deadline, RECONNECTED))
    federation.wait_held("ward", 1)
    cable.cut()
    federation.plan.free("ward", 1)
    time.sleep(SHORT_CUT)
    cable.heal()
    federation.wait_held("ward", 2)
    cable.cut()
    federation.plan.free("ward", 2)
    wait_until(lambda: _round_done(run, 2), "the round without the ward", PATIENCE)
    cable.heal()
    federation.wait_held("clinic", 3)
    with federation.control() as control:
        back = wait_until(lambda: len(control.online()) == len(SIZES), "the ward to come back", PATIENCE)
    federation.plan.free("clinic", 3)
    run.result()
    yield examine(federation, run, 1, f"cut for {SHORT_CUT:g} seconds", ALL, NETWORK)
    away = Expected(["clinic", "lab"], {"ward": (LATE, "")})
    yield examine(federation, run, 2, "cut until the round was over", away, NETWORK)
    yield examine(federation, run, 4, "healed", ALL, NETWORK, more={"seconds until it was back": back})


def _round_done(run: Run, number: int) -> bool:
    return any(line.round_number >= number for line in read_lines(RoundLine, run.path))
