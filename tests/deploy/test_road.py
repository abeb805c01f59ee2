"""The road to a server through a proxy: one for our own question and for the node, and no password in a message."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable, Mapping
from pathlib import Path

import grpc
import pytest
from deployed import examine_site_quickly, site_for

from faults.connect_proxy import connect_proxy, ending_tls
from fedveil.common.errors import ConfigError
from fedveil.deploy.certificates import new_authority, new_server_certificate
from fedveil.deploy.commands import environment
from fedveil.deploy.refusal import why_refused, why_unreachable
from fedveil.deploy.road import LOOPBACK, Road, past_proxies, road_to
from fedveil.deploy.server_folder import ServerFolder, make_server
from fedveil.deploy.site_folder import SiteFolder, open_site_folder

HOST, LOGIN = "fl.example.org", "ward:s3cret"
Serve = Callable[[ServerFolder], int]


@pytest.fixture(autouse=True)
def no_proxy_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)


@pytest.fixture
def server(tmp_path: Path) -> ServerFolder:
    return make_server(tmp_path / "server", [HOST])


@pytest.fixture
def site(tmp_path: Path, server: ServerFolder) -> SiteFolder:
    return site_for(tmp_path, 9092, server.path, host=HOST)


def through(site: SiteFolder, port: int, login: str = "") -> SiteFolder:
    """Name a proxy of this machine in the site's file."""
    file = site.path / "site.toml"
    named = f'https-proxy = "http://{login and login + "@"}127.0.0.1:{port}"'
    file.write_text(re.sub(r'(?m)^"?https-proxy"? = .*$', named, file.read_text(encoding="utf-8")), encoding="utf-8")
    return open_site_folder(site.path)


@pytest.mark.usefixtures("rough_prices")
def test_a_site_asks_its_server_through_the_proxy_and_tls_ends_there(
    site: SiteFolder, server: ServerFolder, tls_server: Serve
) -> None:
    with connect_proxy({f"{HOST}:9092": tls_server(server)}) as proxy:
        site = through(site, proxy.port, LOGIN)
        assert why_unreachable(site) == ""
        assert proxy.heads[0].splitlines()[0] == "CONNECT fl.example.org:9092 HTTP/1.1", "no name is resolved here"
        assert "Proxy-Authorization: Basic d2FyZDpzM2NyZXQ=" in proxy.heads[0]
        asked = len(proxy.heads)
        assert "UNAVAILABLE" not in why_refused(site)
        assert {head.splitlines()[0] for head in proxy.heads[asked:]} == {"CONNECT fl.example.org:9092 HTTP/1.1"}
        assert len(proxy.heads) >= asked + 2, "gRPC took another road than the check"
        found = {finding.what: finding.found for finding in examine_site_quickly(site)}
    assert f"through the proxy 127.0.0.1:{proxy.port} (https-proxy in " in found["server"]
    assert found["server"].endswith("TLS ends at the server")
    assert not any("s3cret" in line for line in (*found.values(), repr(site), repr(site.road), str(site.road)))


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ("HTTP/1.1 407 Sign in", "wants user and password (407 Proxy Authentication Required): write http://USER:PASS"),
        ("HTTP/1.0 403 No\x1b[2J", "does not let this site out to fl.example.org:9092 (403 Forbidden): have it allow"),
        ("HTTP/1.1 502 Bad", "cannot reach fl.example.org:9092 (502 Bad Gateway): is it running"),
        ("HTTP/1.1 999 Odd", "cannot reach fl.example.org:9092 (999)"),
        ("SSH-2.0-OpenSSH", "does not answer as an HTTP proxy: compare https-proxy in"),
    ],
)
def test_what_a_proxy_refuses_is_said_in_a_line(answer: str, words: str, site: SiteFolder) -> None:
    with connect_proxy({}, answer=answer.encode()) as proxy:
        reason = why_unreachable(through(site, proxy.port))
    assert words in reason
    assert reason.isprintable()
    assert "does not answer (Connection refused): compare https-proxy" in why_unreachable(through(site, proxy.port))


def test_a_login_that_is_refused_is_told_apart(site: SiteFolder) -> None:
    with connect_proxy({}, answer=b"HTTP/1.1 407 No") as proxy:
        reason = why_unreachable(through(site, proxy.port, LOGIN))
    assert "refuses user and password" in reason
    assert "s3cret" not in reason


def test_a_proxy_that_opens_tls_is_named_and_another_authority_is_not_taken_for_one(
    site: SiteFolder, server: ServerFolder, tls_server: Serve, tmp_path: Path
) -> None:
    corporate = new_server_certificate([HOST], new_authority("Ward Web Gateway"))
    (tmp_path / "server.pem").write_bytes(corporate.certificate)
    (tmp_path / "server.key").write_bytes(corporate.key)
    with connect_proxy({}, inspects=ending_tls(tmp_path)) as proxy:
        reason = why_unreachable(through(site, proxy.port))
    assert f"the proxy 127.0.0.1:{proxy.port} opens TLS: it shows a certificate of 'CN=Ward Web Gateway'" in reason
    assert "have it pass fl.example.org:9092 on unopened" in reason
    # Of the same name, as a coordinator's second attempt at an authority has: then ca.crt is the old one.
    (tmp_path / "again").mkdir()
    again = make_server(tmp_path / "again" / "server", [HOST])
    with connect_proxy({f"{HOST}:9092": tls_server(again)}) as proxy:
        assert "is not of the authority in ca.crt" in why_unreachable(through(site, proxy.port))


@pytest.mark.parametrize(
    "text",
    [
        "proxy:3128",
        "https://proxy:3128",
        "http://proxy",
        "http://:3128",
        "http://proxy:99999",
        "http://p:1/x",
        "http://[",
    ],
)
@pytest.mark.parametrize("login", ["", "ward:s3cret@"])
def test_an_address_that_grpc_would_pass_by_is_refused_and_never_shown(text: str, login: str, site: SiteFolder) -> None:
    text = text.replace("//", f"//{login}") if "//" in text else login + text
    with pytest.raises(ConfigError, match="is no proxy's address: write http://HOST:PORT") as refused:
        road_to(HOST, site.path / "site.toml", text, "", {})
    assert "s3cret" not in "".join(map(str, (refused.value, refused.value.__cause__)))
    with pytest.raises(ConfigError, match="the variable https_proxy is no proxy's address"):
        road_to(HOST, site.path / "site.toml", "", "", {"https_proxy": text})


@pytest.mark.parametrize("login", ["us%40er:x", "ward:p\u00e4ss", "a@b:c"])
def test_a_login_that_grpc_reads_otherwise_is_refused(login: str, site: SiteFolder) -> None:
    with pytest.raises(ConfigError, match="user and password may hold no '@' and nothing but ASCII"):
        road_to(HOST, site.path / "site.toml", f"http://{login}@proxy:3128", "", {})


def test_a_password_that_others_can_read_stops_the_site(site: SiteFolder) -> None:
    file = site.path / "site.toml"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    named = through(site, 3128, LOGIN)
    assert str(named.road.proxy) == "127.0.0.1:3128"
    file.chmod(0o640)
    with pytest.raises(ConfigError, match=r"holds the proxy's password and others can read it: chmod 600"):
        _ = named.road
    assert through(site, 3128).road.proxy, "an address alone is no secret"


@pytest.mark.parametrize(
    ("host", "proxy", "exceptions", "given", "dialled"),
    [
        (HOST, "", "", {}, ""),
        (HOST, "http://a:1", "", {"https_proxy": "http://b:2"}, "a:1"),
        (HOST, "", "", {"https_proxy": "http://b:2", "http_proxy": "http://c:3"}, "b:2"),
        (HOST, "", "", {"grpc_proxy": "http://d:4", "https_proxy": "http://b:2"}, "d:4"),
        (HOST, "http://a:1", "other.org, .example.org", {}, ""),
        (HOST, "http://a:1", "other.org", {"no_proxy": "fl.example.org"}, ""),
        (HOST, "http://a:1", "l.example.org", {"no_proxy": "ample.org"}, "a:1"),
        ("10.1.2.3", "http://a:1", "", {"no_proxy": "10.0.0.0/8"}, ""),
        ("10.1.2.3", "http://a:1", "1.2.3", {"no_proxy": "192.168.0.0/16"}, "a:1"),
        ("fd00::1", "http://[fd00::9]:1", "", {}, "[fd00::9]:1"),
        ("127.0.0.1", "http://a:1", "", {"https_proxy": "nonsense"}, ""),
        ("localhost", "http://a:1", "", {}, ""),
    ],
)
def test_the_road_follows_from_the_file_then_the_environment(
    host: str, proxy: str, exceptions: str, given: Mapping[str, str], dialled: str, site: SiteFolder
) -> None:
    road = road_to(host, site.path / "site.toml", proxy, exceptions, given)
    assert str(road.proxy or "") == dialled
    named = road.environment({**given, "HTTPS_PROXY": "http://e:5", "all_proxy": "http://f:6", "HOME": "/h"})
    left = {name: value for name, value in named.items() if "proxy" in name.lower()}
    assert left.pop("no_proxy").endswith(",".join(LOOPBACK)), "node and worker meet past every proxy"
    assert left == ({"https_proxy": road.proxy.url} if road.proxy else {}), "one address, and one that was checked"
    assert named["HOME"] == "/h"


@pytest.mark.parametrize("given", [{}, {"https_proxy": "http://127.0.0.1:9"}, {"no_proxy": "example.com"}])
def test_grpc_takes_the_chosen_road_whatever_the_environment_says(
    given: Mapping[str, str], site: SiteFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the SuperNode's channel does, by its environment, and as ours, by the channel's options."""
    with connect_proxy({}, answer=b"HTTP/1.1 403 No") as proxy:
        road = through(site, proxy.port, LOGIN).road
        for environ, options in ((dict(given), road.channel_options), (road.environment(given), ())):
            for name in ("https_proxy", "no_proxy"):
                monkeypatch.delenv(name, raising=False)
            for name, value in environ.items():
                monkeypatch.setenv(name, value)
            proxy.heads.clear()
            own = (*options, ("grpc.use_local_subchannel_pool", 1))
            with (
                grpc.secure_channel(f"{HOST}:9092", grpc.ssl_channel_credentials(), own) as channel,
                pytest.raises(grpc.RpcError, match="response code 403"),
            ):
                channel.unary_unary("/x/y")(b"", timeout=10)
            assert "Proxy-Authorization: Basic d2FyZDpzM2NyZXQ=" in proxy.heads[0]


def test_a_server_keeps_its_proxy_for_others_and_meets_its_own_programs_past_it(tmp_path: Path) -> None:
    given = {"https_proxy": "http://a:1", "no_proxy": "x.org"}
    assert past_proxies(given) == {"https_proxy": "http://a:1", "no_proxy": "x.org,127.0.0.1,localhost,::1"}
    assert environment(tmp_path)["no_proxy"] == "127.0.0.1,localhost,::1"
    assert Road().channel_options == (("grpc.enable_http_proxy", 0),)
