"""A secure sum of sites that the run names: the roster has them, and the server adds no other."""

from __future__ import annotations

from dataclasses import replace

import pytest

from audits.sum_site import SumSite
from fedveil.client import sums
from fedveil.common.messages.round import Refusal
from fedveil.privacy.secure_sum import Identity, Roster

pytestmark = [pytest.mark.rough_prices, pytest.mark.one_length]


def test_a_sum_of_the_named_sites_is_joined(clinics: SumSite) -> None:
    clinics.site.settings["named-sites"] = "clinic,north,south"
    assert clinics.train().words


def test_named_sites_that_the_roster_lacks_or_too_few_of_them_honest_are_refused_before_a_key_is_made(
    clinics: SumSite,
) -> None:
    clinics.site.settings["named-sites"] = "clinic,north,elsewhere"
    reply = clinics.key()
    assert isinstance(reply, Refusal)
    assert (reply.kind, "names 'elsewhere', and the roster of this site's" in reply.reason) == ("policy", True)
    folder = clinics.site.ledger.parent
    clinics.roster = Roster({**clinics.roster.keys, "east": Identity.new().public})
    (folder / "peers.toml").write_text(clinics.roster.text())
    clinics.rule(honest_sites=2)  # of four; of three named ones one is sure
    clinics.site.settings["named-sites"] = "clinic,north,south"
    reply = clinics.key()
    assert isinstance(reply, Refusal)
    assert "of a sum of 3 sites, of which 2 need not be honest" in reply.reason
    assert not clinics.site.memory


@pytest.mark.parametrize("planted", [False, True], ids=["as it is", "planted: a site that does not look"])
def test_a_server_that_adds_a_site_which_it_did_not_name_gets_no_vector(
    planted: bool, clinics: SumSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The roster has it, so nothing else refuses it."""
    folder = clinics.site.ledger.parent
    clinics.peers["east"] = Identity.new()
    clinics.roster = Roster({**clinics.roster.keys, "east": clinics.peers["east"].public})
    (folder / "peers.toml").write_text(clinics.roster.text())
    clinics.rule(honest_sites=4)
    clinics.site.settings["named-sites"] = "clinic,north,south"
    if planted:
        monkeypatch.setattr(sums, "_check_named", lambda *_: None)
        assert clinics.train().words, "the refusal is another's"
        return
    task = clinics.task()
    clinics.refuse(task, "the sum has the site 'east', which the run does not name")
    named = tuple(offer for offer in task.offers if offer.site != "east")
    assert not isinstance(clinics.site.ask(replace(task, offers=named)), Refusal)
