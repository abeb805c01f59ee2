"""Run one job with ``flwr run``: a SuperLink of its own on this machine, Ray for the sites.

Flower's command exits 0 whatever happens to the run and shows raw logs, so this module starts the
SuperLink itself, submits with ``flwr run``, watches the run's folder, and ends what it started; where it is killed,
the keeper between them does (``experiments.keeper``).
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from fedveil.client.door import VARIABLE
from fedveil.common.config.flat import Scalar
from fedveil.common.config.text import to_toml
from fedveil.common.data.partition import check_partition, site_part
from fedveil.common.data.sources import train_and_test
from fedveil.common.errors import ConfigError, RunFailed
from fedveil.common.files import FileState, check_room, expanded, whole_lines
from fedveil.common.hub import CLOSED
from fedveil.common.model.device import worker_count
from fedveil.common.paths import run_folder
from fedveil.common.ports import free_ports
from fedveil.common.run_lines import ProgressFile, new_result, read_if_there, result_state
from fedveil.common.threads import CORES, environment, site_cores
from fedveil.common.trackers import check_installed
from fedveil.common.words import counted
from fedveil.deploy.app import app_folder
from fedveil.deploy.road import LOOPBACK
from fedveil.experiments import keeper
from fedveil.experiments.site_count import check_usual_sites, record_sites
from fedveil.experiments.under_way import conducting
from fedveil.server.ledger import with_ledger
from fedveil.server.lock import is_written
from fedveil.server.named import check_named
from fedveil.server.records import LEAST_ROOM
from fedveil.server.submission import CHECKED
from fedveil.strategies.job import Job, configure
from fedveil.strategies.options import for_flower

START_SECONDS = 60.0
QUIET_SECONDS = 45.0
REPORT_SECONDS = 60.0
"""How long a server may take from its result to the end of its reports."""


@dataclass(frozen=True)
class Progress:
    """New lines of the run's log, and the state of the run."""

    lines: list[str]
    state: ProgressFile


def simulate(
    settings: Mapping[str, Scalar],
    sites: int,
    watch: Callable[[Progress], None],
    *,
    workers: int = 0,
    begun: Callable[[Path], None] = lambda _: None,
    ended: Callable[[Path], None] = lambda _: None,
) -> Path:
    """Run one federation of ``sites`` simulated sites to its end and return the run's folder.

    Args:
        settings: overrides of the defaults, flat.
        sites: number of sites that divide the data.
        watch, begun: called about twice a second, and with the run's folder once it exists.
        ended: called with the folder of a run that has ended well, while what was started is being ended.
        workers: processes that train at the same time; 0: as many as pay off on this machine.

    Raises:
        ConfigError, DataError: a setting or the records are wrong; nothing was started.
        RunFailed: the run did not end well; the message says why.
    """
    output = str(expanded(str(settings.get("output", "runs"))).absolute())
    settings = with_ledger({**settings, "output": output})
    job = configure(settings)
    if job.config.resume:
        check_usual_sites(run_folder(job.config, ""))
    check_simulated(job, sites)
    check_named(job, None)
    check_output(Path(output))
    workers = worker_count(sites, workers, keeps=job.config.timeline.computes_ahead)
    with (
        ExitStack() as until_over,
        tempfile.TemporaryDirectory(prefix="fedveil-") as scratch,
        _superlink(Path(scratch), workers) as link,
    ):
        # A resumed run's folder has lines, and perhaps a result, already.
        before = run_folder(job.config, "") if job.config.resume else None
        known, old = (len(whole_lines(before / "run.log")), result_state(before)) if before else (0, None)
        run = _submit(link, settings, sites, workers)
        folder = run_folder(job.config, run)
        record_sites(folder, sites)
        until_over.enter_context(conducting(folder))
        begun(folder)
        try:
            _follow(link, run, folder, watch, known, old=old)
        except KeyboardInterrupt:
            with suppress(OSError):  # of a terminal that is gone
                watch(Progress([], ProgressFile("ending: sites that have paid for a round finish it first")))
            raise
        keeper.let_end(link.process)
        ended(folder)
    return folder


def check_simulated(job: Job, sites: int) -> None:
    """Raise ConfigError or DataError unless a job can run over that number of sites."""
    config = job.config
    if sites < 1:
        raise ConfigError(f"a federation needs at least 1 site, not {sites}")
    check_installed(config.tracker)
    check_partition(config)
    if 0 < config.privacy.cohort < sites:
        raise ConfigError(
            f"{sites} sites are more than privacy.cohort, which is {config.privacy.cohort}: raise it, or take fewer"
        )
    if config.min_sites > sites:
        raise ConfigError(
            f"min-sites is {config.min_sites}, and {counted(sites, 'site')} would be there: no round would count; "
            "lower it, or take more sites"
        )
    # Raises where the records are too few for the sites.
    site_part(train_and_test(config.data, config.model.task)[0], config.data, 0, sites)


def check_output(output: Path) -> None:
    """Raise ConfigError unless folders of runs can be made in ``output``, and RunFailed if there is no room in it."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output):
            pass
    except OSError as error:
        raise ConfigError(f"output: {output} cannot be written ({error.strerror}): name another folder") from error
    check_room(output, LEAST_ROOM)


_ON_LOOPBACK = {
    # Ray's own word for a cluster of one machine, on every system: else its services listen on the machine's address.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    # Ray's dashboard asks every cloud's service of metadata where it runs, also without usage statistics. It and all
    # that heeds proxies meets a port on which nobody listens.
    **dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:1"),
    **dict.fromkeys(("no_proxy", "NO_PROXY"), ",".join(LOOPBACK)),
}
"""Variables by which the processes of a simulation meet on this machine's loopback, and reach nothing else."""


@dataclass(frozen=True)
class _Link:
    home: Path
    environment: dict[str, str]
    process: subprocess.Popen[bytes]

    @property
    def log(self) -> Path:
        return self.home / keeper.LOG


@contextmanager
def _superlink(home: Path, workers: int) -> Iterator[_Link]:
    port, control = free_ports(2)
    binaries = Path(sys.executable).parent
    variables = {
        **environment(),
        **CLOSED,
        CORES: str(site_cores() // workers),
        "FLWR_HOME": str(home),
        VARIABLE: str(home / keeper.DOOR),
        CHECKED: "1",
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1",
        "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(port),
        "FLWR_LOCAL_CONTROL_API_PORT": str(control),
        **_ON_LOOPBACK,
        "RAY_worker_niceness": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "PATH": f"{binaries}{os.pathsep}{os.environ.get('PATH', '')}",
    }
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "fedveil"\n\n[superlink.fedveil]\naddress = "127.0.0.1:{port}"\ninsecure = true\n',
        encoding="utf-8",
    )
    command = [str(binaries / "flower-superlink"), "--insecure", "--simulation", "--isolation", "subprocess"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--control-api-address", f"127.0.0.1:{control}"]
    link = _Link(home, variables, keeper.start(home, command, variables))
    try:
        _wait_for_port(link, port)
        yield link
    finally:
        keeper.end(link.process)


def _wait_for_port(link: _Link, port: int) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if link.process.poll() is not None:
            raise RunFailed(f"flower-superlink ended at once: {_last_words(link)}")
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.2)
    raise RunFailed(f"flower-superlink did not answer within {START_SECONDS:g} s: {_last_words(link)}")


def _submit(link: _Link, settings: Mapping[str, Scalar], sites: int, workers: int) -> str:
    overrides = link.home / "settings.toml"
    overrides.write_text(to_toml(for_flower(settings)), encoding="utf-8")
    with app_folder() as app:
        command = [str(Path(sys.executable).parent / "flwr"), "run", str(app), "fedveil", "--format", "json"]
        command += ["-c", str(overrides), "--federation-config", _resources(sites, workers)]
        done = subprocess.run(command, env=link.environment, capture_output=True, text=True, check=False)
    found = re.search(r'"run-id":\s*"(\d+)"', done.stdout)
    if found is None:
        raise RunFailed(f"flwr run did not start: {(done.stdout + done.stderr).strip()[-600:]}")
    return found.group(1)


def _resources(sites: int, workers: int) -> str:
    """Divide cores and GPUs among worker processes, so that no two share a core."""
    import torch

    cores, gpus = site_cores(), torch.cuda.device_count()
    share = gpus / workers if gpus else 0.0
    return (
        f"num-supernodes={sites} client-resources-num-cpus={cores // workers} "
        f"client-resources-num-gpus={share:.4g} init-args-num-cpus={cores}"
    )


def _follow(
    link: _Link, run: str, folder: Path, watch: Callable[[Progress], None], printed: int, *, old: FileState
) -> None:
    """Call ``watch`` until a run ends; the ``old`` result is that of the attempt before."""
    checked, seen = time.monotonic(), 0.0
    while True:
        ended = new_result(folder, old)
        printed = _show(folder, watch, printed)
        if ended:
            break
        if link.process.poll() is not None:
            raise RunFailed(f"flower-superlink ended during the run: {_last_words(link)}")
        touched = _last_written(folder)
        if touched != seen:
            seen, checked = touched, time.monotonic()
        # Asking Flower costs a second of a core, so only a run that has gone quiet is asked after.
        if time.monotonic() - checked > QUIET_SECONDS:
            checked = time.monotonic()
            status = _status(link, run)
            if status.startswith("finished") and not new_result(folder, old):
                check_room(folder, LEAST_ROOM)
                raise RunFailed(f"the run ended as {status} and left no result: {_last_words(link)}")
        time.sleep(0.4)
    # The reports come after the result; the server is ended, with the SuperLink, as soon as this returns or raises.
    deadline = time.monotonic() + REPORT_SECONDS
    while is_written(folder) and time.monotonic() < deadline:
        printed = _show(folder, watch, printed)
        time.sleep(0.1)
    if ended.status == "failed":
        raise RunFailed(ended.reason)


def _show(folder: Path, watch: Callable[[Progress], None], printed: int) -> int:
    """Call ``watch`` with the lines of a run after the first ``printed``, and return how many there are."""
    lines = whole_lines(folder / "run.log")
    watch(Progress(lines[printed:], read_if_there(ProgressFile, folder) or ProgressFile("starting Flower and Ray")))
    return len(lines)


def _last_written(folder: Path) -> float:
    """Return when a record of the run was last written, in seconds since the epoch; 0.0 without records."""
    latest = 0.0
    for path in folder.glob("*.json*"):
        with suppress(FileNotFoundError):  # a server replaces files, through others that come and go
            latest = max(latest, path.stat().st_mtime)
    return latest


def _status(link: _Link, run: str) -> str:
    command = [str(Path(sys.executable).parent / "flwr"), "list", "fedveil", "--run-id", run, "--format", "json"]
    done = subprocess.run(command, env=link.environment, capture_output=True, text=True, check=False)
    found = re.search(r'"status":\s*"([^"]+)"', done.stdout)
    return found.group(1) if found else "unknown"


def _last_words(link: _Link) -> str:
    """Return the line of the SuperLink's log that says what went wrong."""
    lines = [line.strip() for line in link.log.read_text(encoding="utf-8", errors="replace").splitlines()]
    errors = [line for line in lines if re.match(r"^[\w.]*(Error|Exception|RunFailed|Exhausted)\b", line)]
    return (errors or lines or ["its log is empty"])[-1][-600:]
