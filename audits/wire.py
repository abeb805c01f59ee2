"""A federation in containers, listened to: how many bytes pass, and whether anything passes in clear text.

    sudo .venv/bin/python -m audits.wire FOLDER          # as long as the job takes, and a quiet minute

Brings the services of docker-compose.yml up from where their volumes are, with tcpdump on every
site's network from before its first frame, waits for the job and a while longer, and leaves in
FOLDER a capture of each site's network, the run's folder and ``wire.json``. SITES, FEDVEIL_SETTINGS and the other
variables of docker-compose.yml hold. It looks for

* a frame that is neither TLS 1.3 to the Fleet port nor the network's own talk about addresses;
* a passage of any training text, or a run of the base model's weights, in any stream;
* the bytes that the network's own counters saw, against rounds.jsonl.

Needs root, tcpdump, a Docker engine and the image (docker compose build). The exit code is 1 if
anything passed in clear text, 2 if it could not listen.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path

from audits.finding import audit_file, quiet
from fedveil.common.errors import FedVeilError
from fedveil.common.findings import Finding

QUIET_SECONDS = 60.0
"""How long to listen after the job: what nodes send while nothing goes on."""
START_SECONDS = 30.0
ETHERNET_HEADER = 14
PROJECT = Path(__file__).resolve().parent.parent


class CannotListen(FedVeilError):
    """This machine lacks what the audit needs, or a command failed; the message says which."""


def main() -> None:
    """Run from a shell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the captures and the run's folder go; made here")
    try:
        findings = listen(parser.parse_args().folder.absolute())
    except FedVeilError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    for finding in findings:
        print(f"{'passed' if finding.passed else 'FAILED'}: {finding.audit} ({finding.case})")
        for name, value in finding.figures.items():
            shown = value if isinstance(value, str) else f"{value:,.3f}" if isinstance(value, float) else f"{value:,}"
            print(f"    {name}: {shown}")
    sys.exit(not all(finding.passed for finding in findings))


def listen(folder: Path) -> list[Finding]:
    """Bring a federation up, listen until its job has ended and a minute more, and return what was found.

    Raises:
        CannotListen: not root, a program is missing, the folder is there, or a command or the job failed.
    """
    check_means()
    if folder.exists():
        raise CannotListen(f"{folder} is there already: name a folder that is not")
    folder.mkdir(parents=True)
    call("docker", "compose", "up", "--no-start", "--no-build")
    bridges = bridges_of(json.loads(call("docker", "compose", "config", "--format", "json"))["name"])
    with ExitStack() as stack:
        for site, bridge in bridges.items():
            stack.enter_context(captured(bridge, folder / f"{site}.pcap"))
        counts = [_counts(bridges)]
        began, when = time.monotonic(), datetime.now(UTC)
        call("docker", "compose", "up", "--detach", "--no-build")
        container = call("docker", "compose", "ps", "--all", "--quiet", "job").strip()
        code = call("docker", "wait", container).strip()
        seconds = time.monotonic() - began
        counts.append(_counts(bridges))
        time.sleep(QUIET_SECONDS)
        counts.append(_counts(bridges))
    from audits.wire_findings import Heard, findings_of  # these import torch, which listening does not need
    from fedveil.common.run_lines import ConfigFile, read_file, read_json
    from fedveil.common.strict_json import to_json
    from fedveil.server.records import package_versions, write_json

    if code != "0":
        raise CannotListen(f"the job ended with exit code {code}: see 'docker compose logs job'")
    call("docker", "compose", "cp", "job:/federation/last-job.json", str(folder / "job.json"))
    run = read_json(folder / "job.json")["folder"]
    call("docker", "compose", "cp", f"superlink:{run}", str(folder / "run"))
    started = datetime.fromisoformat(read_file(ConfigFile, folder / "run").started)
    if started < when.replace(microsecond=0):
        raise CannotListen(
            "the job began before this audit, so its rounds were not heard: give FEDVEIL_SETTINGS that have not been "
            "run yet, or start over with 'docker compose down --volumes'"
        )
    build = "flwr build --app /app >/dev/null && cat *.fab | wc -c"
    bundle = int(call("docker", "compose", "exec", "--no-TTY", "--workdir", "/tmp", "superlink", "sh", "-c", build))
    quiet()
    heard = [
        Heard(site, folder / f"{site}.pcap", counts[1][site] - counts[0][site], counts[2][site] - counts[1][site])
        for site in bridges
    ]
    findings = findings_of(heard, folder / "run", bundle, seconds, QUIET_SECONDS)
    content = audit_file(findings, when.isoformat(timespec="seconds"), package_versions())
    write_json(folder / "wire.json", to_json(content))
    return findings


def check_means() -> None:
    """Raise CannotListen unless this process may listen, and with what it needs."""
    if os.geteuid() != 0:
        raise CannotListen("only root may listen to networks: run this with sudo")
    for program in ("tcpdump", "docker"):
        if not shutil.which(program):
            raise CannotListen(f"there is no {program} on the PATH: install it")


def bridges_of(project: str) -> dict[str, str]:
    """Return the bridge of each site's network, by the network's name in docker-compose.yml."""
    label = "com.docker.compose"
    ids = call("docker", "network", "ls", "--quiet", "--filter", f"label={label}.project={project}").split()
    found: dict[str, str] = {}
    for network in json.loads(call("docker", "network", "inspect", *ids)) if ids else []:
        name = network["Labels"][f"{label}.network"]
        if name.startswith("site-"):
            found[name] = f"br-{network['Id'][:12]}"
    if not found:
        raise CannotListen(f"the project {project} has no network of a site")
    return dict(sorted(found.items()))


@contextmanager
def captured(interface: str, file: Path) -> Iterator[None]:
    """Write every frame on an interface to a file, from before the body to after it.

    Raises:
        CannotListen: tcpdump did not start, or lost frames.
    """
    command = ["tcpdump", "-i", interface, "-w", str(file), "-B", "65536", "-U", "-n", "-Z", "root"]
    said = file.with_suffix(".log")
    with said.open("wb") as log:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=log)
        try:
            deadline = time.monotonic() + START_SECONDS
            while b"listening on" not in said.read_bytes():
                if process.poll() is not None or time.monotonic() > deadline:
                    raise CannotListen(f"tcpdump does not listen on {interface}: {said.read_text().strip()}")
                time.sleep(0.1)
            yield
        finally:
            process.terminate()
            process.wait()
    if "\n0 packets dropped by kernel" not in said.read_text():
        raise CannotListen(f"tcpdump lost frames of {interface}: see {said}")


def counted(table: str, interface: str) -> int:
    """Return the bytes that passed through a bridge, Ethernet headers included, from the text of /proc/net/dev.

    A bridge that listens to everything counts forwarded frames as received, without their header.
    """
    for line in table.splitlines():
        name, _, figures = line.strip().partition(":")
        if name == interface:
            numbers = [int(figure) for figure in figures.split()]
            received, frames, sent = numbers[0], numbers[1], numbers[8]
            return received + ETHERNET_HEADER * frames + sent
    raise CannotListen(f"there is no interface {interface} any more")


def _counts(bridges: Mapping[str, str]) -> dict[str, int]:
    table = Path("/proc/self/net/dev").read_text(encoding="ascii")
    return {site: counted(table, bridge) for site, bridge in bridges.items()}


def call(*command: str) -> str:
    """Return what a command prints; raise CannotListen with its last line if it fails."""
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines() or ["no word"]
        raise CannotListen(f"{' '.join(command[:4])} failed: {lines[-1]}")
    return done.stdout


if __name__ == "__main__":
    main()
