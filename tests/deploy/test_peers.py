"""The roster of a deployed site: made of every site's own entry, the same for all, and looked over by the doctor."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedveil.cli.main import app
from fedveil.client import party as party_module
from fedveil.client.party import party_of
from fedveil.common.errors import ConfigError
from fedveil.deploy import doctor
from fedveil.deploy.peers import make_roster
from fedveil.deploy.pin import pin_roster
from fedveil.deploy.policy_file import policy_text
from fedveil.deploy.site_folder import SiteFolder, make_site, node_settings, policy_of_node
from fedveil.privacy.secure_sum import Identity, Roster
from fedveil.privacy.secure_sum.roster import load_roster

NAMES = ("north", "south", "west")


@pytest.fixture
def folders(tmp_path: Path) -> list[SiteFolder]:
    """Return the folders of three sites."""
    return [
        make_site(
            tmp_path / name,
            name,
            "localhost",
            policy=policy_text(name, 0, 8.0, 1e-5),
            node="partition-id=0 num-partitions=3",
        )
        for name in NAMES
    ]


def others(folders: list[SiteFolder], own: SiteFolder) -> list[Path]:
    return [folder.path / "identity.toml" for folder in folders if folder is not own]


def let_in(folder: SiteFolder, digest: str, honest: int = 3) -> None:
    """Let a site join secure sums of the roster with this hash."""
    path = folder.path / "policy.toml"
    rules = f'honest-sites = {honest}\nepsilon-alone = 20.0\npeers = "peers.toml"\npeers-hash = "{digest}"\n'
    text = path.read_text(encoding="utf-8").replace('"dp-sgd"', '"dp-sgd", "secure-sum"')
    path.write_text(rules + text, encoding="utf-8")


def test_every_site_makes_the_same_roster_of_the_same_entries(folders: list[SiteFolder]) -> None:
    rosters = [make_roster(folder, others(folders, folder)) for folder in folders]
    assert len({roster.digest for roster in rosters}) == 1
    assert tuple(rosters[0].keys) == NAMES
    for folder, roster in zip(folders, rosters, strict=True):
        assert load_roster(folder.path / "peers.toml").digest == roster.digest
        for name in ("identity.key", "peers.toml"):
            assert (folder.path / name).stat().st_mode & 0o777 == 0o600
        secret = (folder.path / "identity.key").read_bytes()
        assert Identity.from_pem(secret).public == roster.keys[folder.site]
        assert secret not in (folder.path / "identity.toml").read_bytes()


def test_the_site_that_the_folder_describes_finds_itself_in_it(folders: list[SiteFolder]) -> None:
    own = folders[0]
    let_in(own, make_roster(own, others(folders, own)).digest)
    settings = node_settings(own)
    party = party_of("north", settings, policy_of_node(settings), "run", simulated=False)
    assert (party.site, party.honest, tuple(party.roster.keys)) == ("north", 3, NAMES)


def test_a_roster_that_is_not_the_pinned_one_is_refused(
    folders: list[SiteFolder], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One key of another site replaced: who put the file there knows that site's noise."""
    own = folders[0]
    roster = make_roster(own, others(folders, own))
    let_in(own, roster.digest)
    settings = node_settings(own)

    def party(name: str = "run", *, simulated: bool = False) -> Roster:
        return party_of("north", settings, policy_of_node(settings), name, simulated=simulated).roster

    file = own.path / "peers.toml"
    file.write_text("# ward\n" + "\n".join(reversed(file.read_text().split("\n\n"))), encoding="utf-8")
    assert party().digest == roster.digest, "order and comments make no other roster"
    replaced = Roster({**roster.keys, "west": Identity.new().public})
    file.write_text(replaced.text(), encoding="utf-8")
    for simulated in (False, True):
        with pytest.raises(ConfigError, match=r"the roster <peers> has the hash .*peers-hash is .*put back the roster"):
            party(simulated=simulated)
    with pytest.raises(ConfigError, match="peers-hash"):
        list(doctor._peers_of(own))
    pin_roster(own.path / "policy.toml", replaced.digest)
    assert party().digest == replaced.digest
    # The planted fault: a site that reads whatever stands in the file.
    pin_roster(own.path / "policy.toml", roster.digest)
    monkeypatch.setattr(party_module, "_roster", lambda path, pinned: load_roster(path))
    assert party().digest == replaced.digest


def test_a_hash_is_put_into_a_policy_and_nothing_else_of_it_changes(folders: list[SiteFolder]) -> None:
    own = folders[0]
    let_in(own, "0" * 64)
    path = own.path / "policy.toml"
    before = path.read_text(encoding="utf-8")
    pin_roster(path, "1" * 64)
    assert path.read_text(encoding="utf-8") == before.replace("0" * 64, "1" * 64)
    pin_roster(path, "1" * 64)
    assert path.read_text(encoding="utf-8") == before.replace("0" * 64, "1" * 64)
    with pytest.raises(ConfigError, match="give all 64 digits"):
        pin_roster(path, "2")


def test_a_signing_key_and_a_roster_are_the_sites_own_to_read(folders: list[SiteFolder]) -> None:
    own = folders[0]
    roster = make_roster(own, others(folders, own))
    assert Identity.from_pem((own.path / "identity.key").read_bytes()).public == roster.keys["north"]
    assert node_settings(own)["identity"] == str(own.path / "identity.key")
    for name in ("identity.key", "peers.toml"):
        assert (own.path / name).stat().st_mode & 0o777 == 0o600, f"others can read {name}"


def test_entries_that_make_no_roster_are_refused_and_leave_the_old_one(
    folders: list[SiteFolder], tmp_path: Path
) -> None:
    own = folders[0]
    before = make_roster(own, others(folders, own)).digest
    forged = tmp_path / "forged.toml"
    forged.write_text(Roster({name: Identity.new().public for name in NAMES}).text(), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"forged.toml: '\w+' has another key than in the files before it"):
        make_roster(own, [*others(folders, own), forged])
    with pytest.raises(ConfigError, match="3 to 1000 sites, not 1"):
        make_roster(own, [])
    (tmp_path / "broken.toml").write_text("[[site", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"broken.toml"):
        make_roster(own, [tmp_path / "broken.toml"])
    assert load_roster(own.path / "peers.toml").digest == before


def test_the_doctor_shows_the_roster_and_misses_none(folders: list[SiteFolder]) -> None:
    own = folders[0]
    (finding,) = doctor._peers_of(own)
    assert (finding.ok, finding.found) == (True, "the policy lets this site join none")
    roster = make_roster(own, others(folders, own))
    let_in(own, roster.digest)
    (own.path / "peers.toml").unlink()
    with pytest.raises(ConfigError, match="cannot be read"):
        list(doctor._peers_of(own))
    make_roster(own, others(folders, own))
    findings = list(doctor._peers_of(own))
    assert all(finding.ok for finding in findings)
    assert f"3 of the 3 sites {', '.join(NAMES)} count as honest" in findings[-1].found
    assert roster.digest in findings[-1].found
    (own.path / "identity.key").chmod(0o644)
    assert not next(iter(doctor._peers_of(own))).ok


def test_the_command_prints_the_hash_that_stewards_compare(folders: list[SiteFolder]) -> None:
    own = folders[0]
    done = CliRunner().invoke(app, ["site", "peers", str(own.path), *map(str, others(folders, own))])
    assert done.exit_code == 0, done.output
    digest = load_roster(own.path / "peers.toml").digest
    assert f"every steward must see: {digest}\n" in done.output
    # What it prints makes a policy that lets the site in.
    rules = done.output.partition("by the policy:\n")[2].replace("honest-sites = ...", "honest-sites = 3")
    path = own.path / "policy.toml"
    text = path.read_text(encoding="utf-8").replace('"dp-sgd"', '"dp-sgd", "secure-sum"')
    path.write_text(rules.replace("epsilon-alone = ...", "epsilon-alone = 20.0") + text, encoding="utf-8")
    settings = node_settings(own)
    assert party_of("north", settings, policy_of_node(settings), "run", simulated=False).roster.digest == digest
