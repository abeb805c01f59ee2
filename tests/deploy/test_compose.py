"""docker-compose.yml says what docs/guides/operate.md promises; where there is an engine, it also does it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from deployed import SITES, volumes
from flwr.common.config import parse_config_args

from fedveil.client.party import party_of
from fedveil.client.policy_file import load_policy
from fedveil.client.site import open_site
from fedveil.common.config.text import parse_settings
from fedveil.common.errors import ConfigError, PolicyRefusal
from fedveil.deploy import container
from fedveil.deploy.commands import node_config, superlink_command
from fedveil.deploy.server_folder import CONTROL_PORT, FLEET_PORT, open_server
from fedveil.deploy.site_folder import node_settings, open_site_folder
from fedveil.deploy.start import start_site
from fedveil.deploy.transport import IS_HTTP
from fedveil.privacy.secure_sum.roster import load_roster
from fedveil.server.registered import NODES
from fedveil.strategies.job import configure

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docker-compose.yml").read_text(encoding="utf-8")
COMPOSE: dict[str, Any] = yaml.safe_load(TEXT)
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
ONCE = ["keys", "job"]


def networks_of(service: str) -> set[str]:
    return set(SERVICES[service].get("networks", ()))


@pytest.fixture
def pki(tmp_path: Path) -> Path:
    return volumes(tmp_path)


def volumes_of(service: str) -> dict[str, str]:
    """Return ``target`` and ``target:ro`` by the volume's name."""
    return dict(text.split(":", 1) for text in SERVICES[service]["volumes"] if isinstance(text, str))


@pytest.mark.parametrize("service", sorted(SERVICES))
def test_every_service_is_hardened(service: str) -> None:
    found = SERVICES[service]
    assert found["user"] == "10001:10001", "runs as root"
    assert found["read_only"] is True, "its root file system can be written"
    assert any(line.startswith("/tmp") for line in found["tmpfs"]), "has no place for temporary files"
    assert found["cap_drop"] == ["ALL"]
    assert "no-new-privileges:true" in found["security_opt"]
    assert found["init"] is True, "nobody reaps its processes"
    kind = "SITE" if service in SITES else "SERVER"
    assert found["mem_limit"] == f"${{{kind}_MEMORY:-8g}}", "it may take the machine's memory"
    assert f"{kind}_CPUS" in found["cpus"]
    assert found["image"] == SERVICES["keys"]["image"], "there is one image"
    for key in ("privileged", "cap_add", "devices", "pid", "ipc", "ports", "env_file"):
        assert key not in found, f"{key} is set"
    seconds = int(found["stop_grace_period"].removesuffix("s"))
    assert seconds <= 10, "'down' does not end within seconds"


def test_there_are_the_services_that_the_page_names_and_one_builds() -> None:
    assert set(SERVICES) == {"keys", "superlink", "job", *SITES}
    assert [name for name, service in SERVICES.items() if "build" in service] == ["keys"]
    assert SERVICES["keys"]["environment"]["FEDVEIL_SETTINGS"] == SERVICES["job"]["environment"]["FEDVEIL_SETTINGS"]


def test_what_runs_on_has_a_health_check_and_comes_back() -> None:
    for name in ("superlink", *SITES):
        assert SERVICES[name]["restart"] == "unless-stopped", f"{name} does not survive a restart"
        test = SERVICES[name]["healthcheck"]["test"]
        folder = "/federation" if name == "superlink" else "/site"
        assert test == ["CMD", "fedveil", "doctor", folder, "--health"]
    for name in ONCE:
        assert SERVICES[name]["restart"] == "no", f"{name} would do its work again by itself"


def test_everything_waits_for_what_it_needs() -> None:
    assert SERVICES["superlink"]["depends_on"] == {"keys": {"condition": "service_completed_successfully"}}
    for name in ("job", *SITES):
        assert SERVICES[name]["depends_on"] == {"superlink": {"condition": "service_healthy"}}


def test_a_site_reaches_the_superlink_and_nothing_else() -> None:
    assert all(network == {"internal": True} for network in COMPOSE["networks"].values()), "a network has a way out"
    for site in SITES:
        assert networks_of(site) == {site}
        neighbours = {name for name in SERVICES if networks_of(name) & networks_of(site)} - {site}
        assert neighbours == {"superlink"}, f"{site} reaches {neighbours}"


def test_the_control_port_listens_for_the_job_alone() -> None:
    assert {name for name in SERVICES if "control" in networks_of(name)} == {"superlink", "job"}
    assert networks_of("job") == {"control"}
    aliases = SERVICES["superlink"]["networks"]
    assert aliases["control"] == {"aliases": [container.CONTROL]}
    assert all(not aliases[site] for site in SITES), "a site's network knows the control address"
    assert (container.FLEET_PORT, container.CONTROL_PORT) == (FLEET_PORT, CONTROL_PORT)


def test_the_superlink_binds_its_control_port_to_that_network(pki: Path) -> None:
    container.make_keys(0, 8.0, 1e-5, pki)
    server = open_server(pki / "server")
    words = superlink_command(server)
    for option, name in (("ca-certfile", "ca.crt"), ("certfile", "server.pem"), ("keyfile", "server.key")):
        assert words[words.index(f"--ssl-{option}") + 1] == str(server.path / name)
    assert "--disable-runtime-dependency-installation" in words
    assert words[words.index("--host") + 1] == container.CONTROL
    assert server.fleet.endswith(f":{FLEET_PORT}")
    assert ("--fleet-api-address" in words) != IS_HTTP, "with HTTP the front door listens there"
    assert "--enable-supernode-auth" in words
    assert "--insecure" not in words


def test_the_data_are_divided_once_whatever_number_of_sites_comes_later(
    pki: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for sites in (3, 2, 4):
        container.make_keys(sites, 8.0, 1e-5, pki)
    parts = [node_settings(open_site_folder(pki / name)) for name in SITES[:4]]
    assert [(part.get("partition-id"), part.get("num-partitions")) for part in parts] == [
        *((number, 3) for number in range(3)),
        (None, None),
    ]
    assert "site-4 has no part of the job's data, which are divided among 3 sites" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="this site has no records"):
        start_site(open_site_folder(pki / "site-4"), pytest.fail)


TRUSTED = "privacy.mode='client-level' privacy.unit='site' privacy.cohort=4 privacy.delta=0.01"
SUM = "privacy.mode='secure-sum' privacy.honest-sites=3"
PERSONS = "privacy.unit='person' data.person='author' data.labels='bad,good' data.name='x.csv'"


@pytest.mark.parametrize(
    ("settings", "variables", "let_in"),
    [
        (TRUSTED, {}, "mechanisms"),
        (TRUSTED, {"mechanisms": "client-level"}, ""),
        (SUM, {}, "honest-sites"),
        (SUM, {"honest": 2, "alone": 9.0}, "honest-sites"),
        (SUM, {"honest": 4, "alone": 9.0}, ""),
        (PERSONS, {}, ""),
    ],
    ids=str,
)
def test_policies_let_in_what_the_variables_say_and_no_trusted_server_by_themselves(
    settings: str, variables: dict[str, Any], let_in: str, pki: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    container.make_keys(4, 8.0, 1e-5, pki, settings=settings, **variables)
    assert ("site-4 will refuse this job" in capsys.readouterr().out) == bool(let_in)
    job, rosters = configure(parse_settings([settings])), set()
    for name in SITES[:4]:
        folder = open_site_folder(pki / name)
        policy, node = load_policy(folder.path / "policy.toml"), node_settings(folder)
        if let_in:
            with pytest.raises(PolicyRefusal, match=let_in):
                policy.check_job(job, private=False)
            continue
        policy.check_job(job, private=False)
        if job.mechanism.summed:
            party = party_of(name, node, policy, "1", simulated=False)
            party.check_size(4, job.config.privacy.honest_sites)
            rosters.add(party.roster.digest)
    assert len(rosters) == (1 if job.mechanism.summed and not let_in else 0), "sites have other rosters"


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("SITE_HONEST_SITES", "three", "SITE_HONEST_SITES is 'three': write a number"),
        ("SITE_HONEST_SITES", "2.5", "write a whole number"),
        ("SITES", "inf", "write a whole number"),
        ("SITES", "0", "SITES is '0': write a whole number of at least 1"),
        ("SITES", "-2", "SITES is '-2': write a whole number of at least 1"),
        ("SITE_HONEST_SITES", "-1", "SITE_HONEST_SITES is '-1': write a whole number of at least 0"),
        ("SITE_EPSILON", "", "SITE_EPSILON is '': write a number"),
        ("SITE_EPSILON_ALONE", "9", "SITE_EPSILON_ALONE needs SITE_HONEST_SITES"),
    ],
)
def test_a_variable_that_says_nothing_is_an_error_of_one_line(
    name: str, value: str, words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(name, value)
    assert container.main("keys") == 1
    said = capsys.readouterr().err
    assert words in said
    assert said.count("\n") == 1


def test_every_variable_of_the_keys_is_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is not would leave a steward with another budget than the one that was set."""
    made: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    monkeypatch.setattr(container, "make_keys", lambda *figures, **more: made.append((figures, more)))
    wanted = {
        "SITES": "3",
        "SITE_EPSILON": "2.5",
        "SITE_DELTA": "1e-4",
        "FEDVEIL_SETTINGS": "rounds=2",
        "MODEL_FINGERPRINT": "0123",
        "SITE_MECHANISMS": "client-level",
        "SITE_HONEST_SITES": "2",
        "SITE_EPSILON_ALONE": "9",
    }
    assert SERVICES["keys"]["environment"].keys() == wanted.keys()
    for name in wanted:
        monkeypatch.delenv(name, raising=False)
    assert container.main("keys") == 0
    for name, value in wanted.items():
        monkeypatch.setenv(name, value)
    assert container.main("keys") == 0
    usual = {"settings": "", "fingerprint": "", "mechanisms": "", "honest": 0, "alone": 0.0}
    said = {"settings": "rounds=2", "fingerprint": "0123", "mechanisms": "client-level", "honest": 2, "alone": 9.0}
    assert made == [((4, 8.0, 1e-5), usual), ((3, 2.5, 1e-4), said)]


def test_a_disk_that_refuses_is_one_line_and_an_unknown_part_is_no_success(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device", "/pki/site-1")

    monkeypatch.setattr(container, "make_keys", full)
    assert container.main("keys") == 1
    assert capsys.readouterr().err == "fedveil: [Errno 28] No space left on device: '/pki/site-1'\n"
    assert container.main("key") == 2


def test_a_site_s_folder_is_of_the_job_s_model(pki: Path) -> None:
    asked = "model.name='/data/model' model.task='causal-lm'"
    digits = "+".join(["0123456789abcdef" * 4] * 2)
    container.make_keys(1, 8.0, 1e-5, pki, settings=asked, fingerprint=digits)
    folder = open_site_folder(pki / "site-1")
    assert (folder.model, folder.task, folder.fingerprint) == ("/data/model", "causal-lm", digits)
    assert load_policy(folder.path / "policy.toml").models == f"/data/model={digits}"
    assert (pki / "coordinator" / "nodes").is_dir(), "the SuperLink cannot read who is registered"


def test_a_coordinator_s_links_lead_into_no_site_s_folder(pki: Path) -> None:
    """The keys' container alone reaches all volumes; what the coordinator's one holds is the coordinator's word."""
    container.make_keys(2, 8.0, 1e-5, pki)
    before = {path: path.read_bytes() for path in pki.rglob("*") if path.is_file()}
    aims = {
        "ca.crt": pki / "site-1" / "policy.toml",
        "server.toml": pki / "site-1" / "site.toml",
        "keys/site-1.pub": pki / "authority" / "ca.key",
        "keys/site-2.pub": pki / "site-1" / "identity.key",
    }
    for name, aim in aims.items():
        assert aim.is_file()
        (pki / "coordinator" / name).unlink()
        (pki / "coordinator" / name).symlink_to(aim)
    container.make_keys(2, 8.0, 1e-5, pki)
    assert {path: path.read_bytes() for path in pki.rglob("*") if path.is_file()} == before


def test_a_policy_that_joins_no_sum_stays_as_it_is(pki: Path) -> None:
    container.make_keys(3, 8.0, 1e-5, pki, settings=SUM)
    before = [(pki / name / "policy.toml").read_bytes() for name in SITES[:3]]
    container.make_keys(4, 8.0, 1e-5, pki, settings=SUM, honest=3, alone=9.0)
    assert [(pki / name / "policy.toml").read_bytes() for name in SITES[:3]] == before


def test_a_site_that_comes_later_is_in_the_roster_of_all(pki: Path) -> None:
    for sites in (3, 4):
        container.make_keys(sites, 8.0, 1e-5, pki, settings=SUM, honest=3, alone=9.0)
    folders = [open_site_folder(pki / name) for name in SITES[:4]]
    rosters = [load_roster(folder.path / "peers.toml") for folder in folders]
    assert [set(roster.keys) for roster in rosters] == [set(SITES[:4])] * 4
    pinned = [load_policy(folder.path / "policy.toml").peers_hash for folder in folders]
    assert pinned == [roster.digest for roster in rosters]


@pytest.mark.parametrize("broken", [b"epsilon = \n", b"\xff\xfe", b"honest-sites = 'three'\n"])
def test_a_policy_that_is_none_is_said_and_the_others_get_the_roster(
    broken: bytes, pki: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    container.make_keys(3, 8.0, 1e-5, pki, settings=SUM, honest=3, alone=9.0)
    (pki / "site-1" / "policy.toml").write_bytes(broken)
    capsys.readouterr()
    container.make_keys(4, 8.0, 1e-5, pki, settings=SUM, honest=3, alone=9.0)
    assert "site-1 will refuse this job: the policy " in capsys.readouterr().out
    assert (pki / "site-1" / "policy.toml").read_bytes() == broken
    for name in ("site-2", "site-3", "site-4"):
        policy = load_policy(pki / name / "policy.toml")
        assert policy.peers_hash == load_roster(pki / name / "peers.toml").digest


def check_that_parts_are_handed_out_once(pki: Path) -> None:
    """Play M4: make keys for a job, then ask site 1 with settings that would give it records of others."""
    container.make_keys(4, 8.0, 1e-5, volumes(pki), settings="rounds=2 data.seed=46 data.partition='iid'")
    shutil.rmtree(pki / "site-4")
    (pki / "site-4").mkdir()
    container.make_keys(4, 8.0, 1e-5, pki, settings="data.seed=47")  # the rest of what was begun with other settings
    nodes = [node_settings(open_site_folder(pki / name)) for name in SITES[:4]]
    assert len({node["division"] for node in nodes}) == 1, "sites have parts of several divisions"
    node = nodes[0]
    assert parse_config_args([node_config(node)]) == node, "Flower reads the node's settings otherwise"
    handed_out = {"data.seed": 46, "data.partition": "iid"}
    first = open_site(node, configure(handed_out).config, "1", simulated=False).data
    others = [{"data.seed": 45}, {"data.partition": "dirichlet"}, {"data.test-size": 900}, {"data.name": "imdb"}]
    for other in (*others, {"data.test": "imdb"}):
        (key,) = other
        with pytest.raises(PolicyRefusal, match=f"was handed out with {key} = .*the run asks for") as refusal:
            open_site(node, configure({**handed_out, **other}).config, "1", simulated=False)
        assert "\n" not in str(refusal.value)
    same = {**handed_out, "rounds": 3, "strategy": "fed-sb", "model.max-length": 40}
    assert open_site(node, configure(same).config, "1", simulated=False).data == first


def test_a_job_that_divides_the_data_otherwise_than_when_they_were_handed_out_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_that_parts_are_handed_out_once(tmp_path / "fixed")
    # Planted: the job's settings divide again.
    monkeypatch.setattr("fedveil.client.site.check_division", lambda *_: None)
    with pytest.raises(pytest.fail.Exception):
        check_that_parts_are_handed_out_once(tmp_path / "anew")


def test_the_job_becomes_its_submission_and_says_what_stops_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked, begun = list[tuple[int, str]](), list[list[str]]()
    monkeypatch.setattr(container, "job_command", lambda *words: asked.append(words) or ["/bin/true", "3"])
    monkeypatch.setattr(os, "execv", lambda path, words: begun.append([path, *words]))
    job = SERVICES["job"]
    assert (job["entrypoint"], "command" in job) == (["python", "-m", "fedveil.deploy.container", "job"], False)
    for name in job["environment"]:
        monkeypatch.setenv(name, {"SITES": "3", "FEDVEIL_SETTINGS": "rounds=2"}[name])
    assert container.main("job") == 0
    assert (asked, begun) == ([(3, "rounds=2")], [["/bin/true", "/bin/true", "3"]])
    monkeypatch.setenv("SITES", "all")
    assert container.main("job") == 1
    assert capsys.readouterr().err == "fedveil: SITES is 'all': write a number, or leave it out\n"
    monkeypatch.setenv("SITES", "0")
    assert container.main("job") == 1
    assert "SITES is '0': write a whole number of at least 1" in capsys.readouterr().err, "no site was shut out"


def test_keys_stay_on_their_volumes() -> None:
    assert SERVICES["keys"]["network_mode"] == "none"
    holders = {volume: [name for name in SERVICES if volume in volumes_of(name)] for volume in COMPOSE["volumes"]}
    assert holders["authority"] == ["keys"]
    assert holders["server-keys"] == ["keys", "superlink"]
    assert volumes_of("superlink")["server-keys"].endswith(":ro")
    assert volumes_of("superlink")["coordinator"] == "/coordinator:ro", "a run cannot see who was registered"
    assert volumes_of("job")["coordinator"] == "/federation", "the job registers elsewhere"
    assert SERVICES["superlink"]["environment"] == {NODES: "/coordinator/nodes"}
    for site in SITES:
        assert holders[f"{site}-keys"] == ["keys", site]
        assert volumes_of(site)[f"{site}-keys"] == "/site:ro"
        assert holders[f"{site}-ledger"] == [site], "a ledger is its site's alone"
        assert volumes_of(site)[f"{site}-ledger"] == "/site/ledger"
    assert volumes_of("job")["runs"].endswith(":ro")


def test_every_variable_has_a_default_and_nothing_in_the_file_is_secret() -> None:
    body = "\n".join(line for line in TEXT.splitlines() if not line.lstrip().startswith("#")).replace("$$", "")
    found = re.findall(r"\$\{?(\w+)(:?[-+])?", body)
    assert found
    assert [name for name, default in found if not default] == []
    assert not re.search(r"(?i)password|passwd|token|secret|BEGIN [A-Z ]*KEY", body)
    assert "COMPOSE_PROFILES=sites-${SITES:-4}" in (ROOT / ".env").read_text(encoding="utf-8")


@pytest.mark.parametrize("number", range(1, 9))
def test_sites_are_switched_on_by_number_and_read_their_own_records(number: int) -> None:
    site = SERVICES[f"site-{number}"]
    assert site["profiles"] == [f"sites-{count}" for count in range(number, 9)]
    assert "partition" not in site["command"][-1], "SITES divides the data anew on ledgers that have counted"
    sources = [volume["source"] for volume in site["volumes"] if isinstance(volume, dict)]
    assert sources == [f"${{SITE_{number}_DATA:-./deploy/no-data}}"]


def test_the_gpu_file_adds_gpus_to_services_that_exist() -> None:
    override = yaml.safe_load((ROOT / "docker-compose.gpu.yml").read_text(encoding="utf-8"))
    assert set(override["services"]) == {"superlink", *SITES}
    for service in override["services"].values():
        (device,) = service["deploy"]["resources"]["reservations"]["devices"]
        assert device["driver"] == "nvidia"
        assert device["capabilities"] == ["gpu"]


def test_the_image_runs_as_nobody_in_particular_and_holds_no_history() -> None:
    lines = (ROOT / "Dockerfile").read_text(encoding="utf-8").splitlines()
    stages = re.split(r"(?m)^FROM .*$", "\n".join(lines))[2:]
    for stage in stages:
        users = re.findall(r"(?m)^USER (.*)$", stage)
        assert users[-1:] in ([], ["10001:10001"]), "ends as root, or as a name that Kubernetes cannot tell from root's"
    assert "\nUSER 10001:10001\n" in stages[0], "the images of server and site are of root"
    made = "\n".join(lines)
    assert "--uid 10001" in made
    for mounted in {target.split(":")[0] for name in SERVICES for target in volumes_of(name).values()}:
        assert Path(mounted).name in made, f"the image has no {mounted}, so its volume would belong to root"
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert "*" in ignored, ".dockerignore must name what goes in, not what stays out"
    kept = {line[1:] for line in ignored if line.startswith("!")}
    rooms = "common privacy strategies contrib client server reports demo deploy experiments cli"
    files = {"pyproject.toml", "README.md", "LICENSE", "requirements", "tools/versions.py"}
    assert kept == files | {"fedveil", *rooms.split()}


def engine() -> bool:
    found = shutil.which("docker")
    return bool(found) and not subprocess.run([found, "version"], capture_output=True, check=False).returncode


def compose(*words: str) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "SITES": "2",
        "COMPOSE_PROJECT_NAME": "fedveil-test",
        "FEDVEIL_SETTINGS": "rounds=1 training.local-steps=1 training.sample-rate=0.01",
    }
    return subprocess.run(
        ["docker", "compose", *words], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


@pytest.fixture
def federation() -> Iterator[None]:
    started = compose("up", "--build", "--detach")
    assert started.returncode == 0, started.stderr
    yield
    compose("down", "--volumes")


@pytest.mark.slow
@pytest.mark.skipif(not engine(), reason="there is no Docker engine here")
def test_a_federation_in_containers_runs_to_its_end_and_keeps_its_walls(federation: None) -> None:
    dial = "import socket; socket.create_connection(({!r}, {}), 5)"
    control = compose("exec", "superlink", "python", "-c", "import socket; print(socket.gethostbyname('control'))")
    for host, port in (("control", CONTROL_PORT), (control.stdout.strip(), CONTROL_PORT), ("superlink", CONTROL_PORT)):
        reached = compose("exec", "site-1", "python", "-c", dial.format(host, port))
        assert reached.returncode != 0, f"a site reaches {host}:{port}"
    assert compose("exec", "site-1", "python", "-c", dial.format("superlink", FLEET_PORT)).returncode == 0
    assert compose("exec", "site-1", "python", "-c", dial.format("site-2", FLEET_PORT)).returncode != 0
    assert compose("exec", "site-1", "touch", "/app/x").returncode != 0
    ended = compose("wait", "job")
    assert ended.stdout.split()[-1] == "0", compose("logs", "job", "superlink").stdout
    ledgers = compose("exec", "site-1", "ls", "/site/ledger").stdout.split()
    assert ledgers == ["ledger.sqlite"]
    began = time.monotonic()
    assert compose("down").returncode == 0
    assert time.monotonic() - began < 30
