"""The roster of a deployed site: made of every site's own entry, the same for all, and looked over by the doctor."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from cli.main import app
from client.sums import party_of
from common.errors import ConfigError
from common.secure_sum import Identity, Roster
from common.secure_sum.roster import load_roster
from deploy import doctor
from deploy.peers import make_roster
from deploy.policy_file import policy_text
from deploy.site_folder import SiteFolder, make_site, node_settings, policy_of_node

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


def let_in(folder: SiteFolder, honest: int = 3) -> None:
    """Let a site join secure sums."""
    path = folder.path / "policy.toml"
    rules = f'honest-sites = {honest}\nepsilon-alone = 20.0\npeers = "peers.toml"\n'
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
    make_roster(own, others(folders, own))
    let_in(own)
    settings = node_settings(own)
    party = party_of("north", settings, policy_of_node(settings), "run", simulated=False)
    assert (party.site, party.honest, tuple(party.roster.keys)) == ("north", 3, NAMES)


def test_a_folder_of_an_earlier_version_gets_a_signing_key(folders: list[SiteFolder]) -> None:
    own = folders[0]
    for name in ("identity.key", "identity.toml"):
        (own.path / name).unlink()
    assert "identity" not in node_settings(own)
    roster = make_roster(own, others(folders, own))
    assert Identity.from_pem((own.path / "identity.key").read_bytes()).public == roster.keys["north"]
    assert node_settings(own)["identity"] == str(own.path / "identity.key")


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
    let_in(own)
    with pytest.raises(ConfigError, match="cannot be read"):
        list(doctor._peers_of(own))
    roster = make_roster(own, others(folders, own))
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
    assert load_roster(own.path / "peers.toml").digest in done.output
