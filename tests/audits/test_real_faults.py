"""Two of the faults of ``make faults``, on processes over gRPC with TLS and keys; and that its checks can fail."""

from __future__ import annotations

from pathlib import Path

import pytest

from audits.connections import guarded
from faults.checks import Expected, examine
from faults.fault_plan import SERVER
from faults.faulty_server import AGGREGATING
from faults.federation import PATIENCE, SIZES, Federation
from faults.processes import wait_until
from faults.scenarios import REFUSED

pytestmark = pytest.mark.slow

SITES = ("clinic", "lab")


def test_a_lying_site_and_a_server_that_dies_in_a_round(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with guarded(tmp_path) as seen, Federation(tmp_path) as federation:
        for site in SITES:
            federation.add_site(site)
        federation.wait_online(*SITES)
        federation.plan.write({"lab": {1: "NaN"}, SERVER: {2: AGGREGATING}})
        run = federation.submit(rounds=2)
        wait_until(lambda: federation.app_is_dead(run), "the server's death", PATIENCE)
        assert not run.ended()
        federation.plan.write({})
        run = federation.submit(rounds=2, resume=str(run.path))
        assert run.result().status == "completed"
        lied = Expected(["clinic"], {"lab": (("reply",), REFUSED["NaN"])})
        died = Expected(SITES, charges=dict.fromkeys(SITES, 2))
        for number, expected in ((1, lied), (2, died)):
            found = examine(federation, run, number, "", expected, "")
            assert found.passed, found.figures
        for expected, words in (
            (Expected(SITES), "should have taken part"),
            (Expected(["clinic"]), "failures of nobody should be told"),
            (Expected(["clinic"], {"lab": (("late",), "")}), "should be late"),
            (Expected(["clinic"], lied.failures, {"lab": 2}), "lab's ledger should hold 2"),
        ):
            found = examine(federation, run, 1, "", expected, "")
            assert not found.passed
            assert words in str(found.figures["wrong"])
        monkeypatch.setitem(SIZES, "clinic", SIZES["clinic"] + 1)
        found = examine(federation, run, 2, "", died, "")
        assert "not what the survivors' replies imply" in str(found.figures["wrong"]), "weights make no difference"
    assert len({line["pid"] for line in seen}) >= 3, "processes had no guard"
    assert not [line for line in seen if "host" in line], "a server or a site connected to something else"
