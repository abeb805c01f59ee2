"""A watched run: the page follows its files, on loopback, for whoever names the address, and nothing is written."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from made_run import MadeRun
from report_forms import fedveil

from fedveil.common.run_lines import ProgressFile
from fedveil.reports import report_of, to_json
from fedveil.reports.page import to_html
from fedveil.reports.watch import LOOPBACK, Watched

pytestmark = pytest.mark.rough_prices


@contextmanager
def watched(folder: Path) -> Iterator[Watched]:
    with Watched(folder) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def ask(
    server: Watched, path: str = "/", method: str = "GET", host: str = "", secret: str | None = None
) -> tuple[int, dict[str, str], str]:
    if secret is None:
        secret = urlsplit(server.address).path.rstrip("/")
    path = f"{secret}{path}"
    connection = http.client.HTTPConnection(LOOPBACK, server.server_port, timeout=10)
    try:
        connection.request(method, path, headers={"Host": host} if host else {})
        answer = connection.getresponse()
        return answer.status, dict(answer.getheaders()), answer.read().decode()
    finally:
        connection.close()


@pytest.fixture
def going(tmp_path: Path) -> MadeRun:
    """A run that goes on after its first round."""
    return MadeRun(tmp_path / "run", {"rounds": 2}, sites={"north": 2000}).start().round(1, 0.71)


def test_the_page_follows_the_run_and_stops_refreshing_at_its_end(going: MadeRun) -> None:
    with watched(going.folder) as server:
        status, headers, page = ask(server)
        assert (status, headers["Refresh"]) == (200, "5")
        assert "71.0 %" in page
        assert ">1 of 2<" in page
        going.write(ProgressFile("training", round_number=2, rounds=2, answered=["<b>"], asked=4))
        assert "Right now: round 2 of 2, 1 of 4 sites have answered" in ask(server)[2]
        going.round(2, 0.74)
        assert "74.0 %" in ask(server)[2]
        going.end()
        _, headers, page = ask(server)
        assert "Refresh" not in headers
        assert page == to_html(report_of(going.folder))


def test_every_form_is_served_and_nothing_else_and_nothing_is_written(going: MadeRun) -> None:
    (going.folder / "secret.txt").write_text("secret")
    before = sorted(path.name for path in going.folder.iterdir())
    with watched(going.folder) as server:
        assert json.loads(ask(server, "/report.json")[2]) == json.loads(to_json(report_of(going.folder)))
        assert "# Run 7" in ask(server, "/report.md")[2]
        for path in ("/secret.txt", "/../run/secret.txt", "/config.json", "/%2e%2e/", "/?x"):
            status, _, text = ask(server, path)
            assert (status, "secret" in text) == (404, False), path
        assert ask(server, method="POST")[0] == 501
        status, headers, text = ask(server, method="HEAD")
        assert (status, text) == (200, "")
        assert int(headers["Content-Length"]) > 1000
    assert sorted(path.name for path in going.folder.iterdir()) == before


def test_only_who_names_the_address_is_answered(going: MadeRun) -> None:
    """A page from elsewhere that has its name point here (DNS rebinding) still names itself."""
    with watched(going.folder) as server:
        assert server.server_address[0] == LOOPBACK
        for host in ("evil.example", f"evil.example:{server.server_port}", LOOPBACK, f"{LOOPBACK}:1"):
            status, _, text = ask(server, host=host)
            assert (status, "71.0" in text) == (403, False), host
        assert ask(server, host=f"localhost:{server.server_port}")[0] == 200
        headers = ask(server)[1]
        assert (headers["Cache-Control"], headers["X-Frame-Options"]) == ("no-store", "DENY")


def test_another_user_of_the_machine_who_knows_the_port_gets_nothing(going: MadeRun) -> None:
    with watched(going.folder) as server, watched(going.folder) as other:
        own = urlsplit(server.address).path.rstrip("/")
        assert len(own) > 30
        for secret in ("", own[:-1], f"{own[:-1]}~", f"{own}x", own.upper(), urlsplit(other.address).path.rstrip("/")):
            for path in ("/", "/report.json"):
                status, _, text = ask(server, path, secret=secret)
                assert (status, "71.0" in text) in ((403, False), (404, False)), secret
        assert ask(server)[0] == 200


def test_a_folder_that_goes_away_is_said_in_a_line(going: MadeRun) -> None:
    with watched(going.folder) as server:
        (going.folder / "config.json").write_text("{")
        status, _, text = ask(server)
        assert (status, text.count("\n")) == (503, 1)
        assert "is not the folder of a run" in text


def test_what_cannot_be_watched_is_an_error_in_a_line(going: MadeRun, tmp_path: Path) -> None:
    code, said = fedveil("watch", tmp_path)
    assert (code, "is not the folder of a run" in said) == (1, True)
    with watched(going.folder) as server:
        code, said = fedveil("watch", going.folder, "--port", server.server_port)
    assert (code, "give another with --port" in said) == (1, True)
    assert fedveil("watch", going.folder, "--port", 70_000)[0] == 1


def test_the_command_serves_until_it_is_interrupted(going: MadeRun) -> None:
    words = [sys.executable, "-c", "from fedveil.cli.main import app; app()", "watch", str(going.folder)]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    # A shell's background jobs ignore interrupts, and so would what they start.
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    started = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment, preexec_fn=heard)
    try:
        assert started.stdout is not None
        found = re.search(rf"http://{LOOPBACK}:(\d+)(/\S{{30,}}/) ", started.stdout.readline())
        assert found is not None
        connection = http.client.HTTPConnection(LOOPBACK, int(found[1]), timeout=30)
        connection.request("GET", found[2])
        assert connection.getresponse().status == 200
        connection.close()
        started.send_signal(signal.SIGINT)
        assert started.wait(30) == 0
    finally:
        started.kill()
        started.communicate()
