"""Submit a job to a server with ``flwr run`` and follow it to its end, whatever becomes of the SuperLink meanwhile."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from fedveil.common.config.flat import Scalar
from fedveil.common.config.run import RunConfig
from fedveil.common.data.named import DATASETS
from fedveil.common.errors import ConfigError, DataError, RunFailed
from fedveil.common.files import FileState, whole_lines
from fedveil.common.paths import run_folder
from fedveil.common.run_lines import ResultFile, new_result, read_json, result_state
from fedveil.common.strict_json import from_json, to_json
from fedveil.common.tasks import TASKS
from fedveil.common.trackers import check_installed
from fedveil.common.words import counted
from fedveil.deploy.check_results import in_silence
from fedveil.deploy.control import Control, control_of
from fedveil.deploy.registry import check_named, online_words, with_groups
from fedveil.deploy.server_folder import ServerFolder
from fedveil.server.checkpoint import NAME as CHECKPOINT
from fedveil.server.conduct import DYING_SECONDS
from fedveil.server.ledger import with_ledger
from fedveil.server.lock import is_written
from fedveil.server.records import write_json
from fedveil.server.registered import names_in
from fedveil.server.resume import settings_of_resumed, with_resumed
from fedveil.strategies.job import Job, configure, with_recipe

POLL_SECONDS = 1.0
FAR_MORE = 10_000_000
"""Records with which a recipe that goes by their number is another than with one."""
ASK_SECONDS = 20.0
"""Asking Flower costs a second of a core."""
SILENCE_SECONDS = 300.0
"""How long the SuperLink may be silent, while the run's folder is not written, before a job is given up."""


@dataclass(frozen=True)
class LastJob:
    """The job that was submitted last from a server's folder."""

    run: str
    folder: str
    """Of the run."""
    settings: dict[str, Scalar]


def submit(
    folder: ServerFolder,
    settings: Mapping[str, Scalar],
    say: Callable[[str], None],
    *,
    sites: int = 1,
    patience: float = 300.0,
    once: bool = False,
    ahead: Callable[[Job], Iterable[str]] = lambda _: (),
    step: Callable[[str], None] = in_silence,
) -> Path:
    """Run one job on a server's sites and return the run's folder.

    Args:
        folder: the server's, on its machine; its ``runs`` must be the SuperLink's.
        settings: overrides of the defaults, flat.
        say: prints one line.
        sites, patience: sites that must be online first, and seconds to wait for them.
        once: continue the last job if its settings are the same: report, follow or resume it.
        ahead: returns what its plan warns of in a new job, before anything is sent.
        step: hears what is done next.

    Raises:
        ConfigError: a setting is wrong, or the plan refuses the job; nothing was submitted.
        RunFailed: too few sites, the server is silent, or the run did not end well.
    """
    given = settings = with_groups(folder, settings)
    settings, note = with_recipe(settings_of_resumed({**settings, "output": str(folder.runs)}), divided=False)
    if note:
        say(note)
    settings = with_ledger(settings, folder.runs)
    job = configure(settings)
    if not given.get("resume"):
        check_complete(job.config, given)
    check_installed(job.config.tracker)
    last = _last_job(folder, settings) if once else None
    if not (last or given.get("resume")):  # one that goes on may name sites that have left since
        check_named(folder, job.config.site_names)
        step("asking the plan")
        for warning in ahead(job):
            say(f"WARNING: {warning}")
    step("asking the server")
    with control_of(folder) as control:
        path = Path(last.folder if last else "")
        if last and _is_followed(control, folder, last, say):
            return path
        resumed = {**settings, "resume": str(path)} if last and (path / CHECKPOINT).is_file() else settings
        if resumed.get("resume") and is_written(Path(str(resumed["resume"]))):
            say(f"{resumed['resume']} is still written: waiting up to {DYING_SECONDS:g} s for its server's end")
        resumed = with_resumed(resumed, DYING_SECONDS)
        step("looking which sites are online")
        _wait_for_sites(control, folder, job.config, sites, patience, say)
        old = result_state(Path(str(resumed["resume"]))) if resumed.get("resume") else None
        step("sending the job")
        run = control.submit(resumed)
        path = run_folder(configure(resumed).config, run)
        write_json(_job_file(folder), to_json(LastJob(run, str(path), dict(settings))))
        say(f"run {run} submitted" + f", it goes on in {path}" * bool(resumed.get("resume")))
        step("waiting for the run's first line")
        _follow_until_stopped(control, folder, run, path, say, old=old)
    return path


def _is_followed(control: Control, folder: ServerFolder, last: LastJob, say: Callable[[str], None]) -> bool:
    """Return whether the last job has ended well, or was under way and is followed to its end."""
    path = Path(last.folder)
    if _ended_well(path):
        say(f"run {last.run} with these settings has ended: nothing to do")
        return True
    if is_written(path) or not _is_over(control.status(last.run)):
        say(f"run {last.run} with these settings is under way")
        _follow_until_stopped(control, folder, last.run, path, say, old=None)
        return True
    return False


def check_complete(config: RunConfig, given: Mapping[str, Scalar]) -> None:
    """Raise ConfigError if a job for sites with records of their own leaves open what only its author knows.

    Args:
        config: of the job.
        given: the settings that are written out.
    """
    if config.data.name in DATASETS:
        return
    labelled = TASKS[config.model.task].labelled and not config.data.labels
    budget = config.privacy.mechanism.claims and not {"privacy.epsilon", "privacy.noise-multiplier"} & set(given)
    sizes = () if "data.records" in given else (1, FAR_MORE)
    recipes = {with_recipe({**given, "data.records": size}, divided=False)[0]["recipe"] for size in sizes}
    open_ones = {
        'data.labels=["bad", "good"] (all labels, in one order for every site)': labelled,
        "privacy.epsilon=3 (the budget that sites are asked for)": budget,
        "data.records=5000 (about how many records all sites have)": len(recipes) > 1,
    }
    if missing := [words for words, is_open in open_ones.items() if is_open]:
        raise ConfigError(
            f"sites have records of their own, so the job must also say {', '.join(missing)}: add it by -c"
        )


def stop_job(folder: ServerFolder) -> str:
    """End the run of the last job that was submitted from a folder, and return what to tell people.

    Raises:
        ConfigError: none was.
        RunFailed: the server refused or did not answer.
    """
    if not _job_file(folder).is_file():
        raise ConfigError(f"no job was submitted from {folder.path}: there is no run to stop")
    job = _read_job(folder)
    run, path = job.run, Path(job.folder)
    with control_of(folder) as control:
        if _is_over(control.status(run)):
            return f"run {run} has ended before: there is nothing to stop"
        control.stop(run)
    again = f"; it goes on with resume={str(path)!r}" if (path / CHECKPOINT).is_file() else ""
    return f"run {run} is stopped, and what sites have paid stays paid{again}"


def _follow_until_stopped(
    control: Control, folder: ServerFolder, run: str, path: Path, say: Callable[[str], None], *, old: FileState
) -> None:
    """Follow a run; Ctrl-C ends that alone, and says so: the SuperLink goes on with the run, and its sites pay."""
    try:
        _follow(control, run, path, say, old=old)
    except KeyboardInterrupt as stop:
        raise KeyboardInterrupt(
            f"run {run} goes on at the server, and its sites go on paying: 'fedveil stop {folder.path}' ends "
            "it, and the same command with --once follows it again"
        ) from stop


def _job_file(folder: ServerFolder) -> Path:
    return folder.path / "last-job.json"


def _read_job(folder: ServerFolder) -> LastJob:
    return from_json(LastJob, read_json(_job_file(folder)), str(_job_file(folder)))


def _last_job(folder: ServerFolder, settings: Mapping[str, Scalar]) -> LastJob | None:
    """Return the last job if it had these settings; else None."""
    if not _job_file(folder).is_file():
        return None
    job = _read_job(folder)
    return job if job.settings == dict(settings) else None


def _ended_well(path: Path) -> bool:
    result = _result(path)
    return result is not None and result.status != "failed"


def _is_over(status: str) -> bool:
    return status.startswith(("finished", "unknown"))


def _wait_for_sites(
    control: Control, folder: ServerFolder, config: RunConfig, sites: int, patience: float, say: Callable[[str], None]
) -> None:
    """Wait until ``sites`` sites are online, of those that the job names if it names some."""
    if 0 < len(config.site_names) < sites:
        raise ConfigError(
            f"--sites is {sites}, and named-sites names {len(config.site_names)}: wait for fewer, or name more"
        )
    if math.isnan(patience):
        raise ConfigError("--patience is nan: give the seconds to wait for sites")
    deadline, said, pause = time.monotonic() + patience, "", POLL_SECONDS
    while True:
        names, online = names_in(folder.nodes), control.online()
        if config.site_names:
            names = {node: site for node, site in names.items() if site in config.site_names}
            online &= set(names)
        if len(online) >= sites:
            return
        words = f"{counted(sites, 'site')} wanted, {online_words(online, names)}"
        if words != said:
            said = words
            say(f"{words}: waiting up to {patience:g} s")
        if time.monotonic() >= deadline:
            raise RunFailed(f"{words} after {patience:g} s: look at the logs of those that are not")
        time.sleep(min(pause, max(0.0, deadline - time.monotonic())))
        pause = min(2 * pause, ASK_SECONDS)


def _follow(control: Control, run: str, path: Path, say: Callable[[str], None], *, old: FileState) -> None:
    """Print a run's lines until it ends; the ``old`` result is that of the attempt before."""
    printed, asked = 0, time.monotonic()
    heard = asked
    while True:
        ended = _result(path, old)
        lines = whole_lines(path / "run.log")
        for line in lines[printed:]:
            say(line)
        printed = len(lines)
        if ended and ended.status == "failed":
            raise RunFailed(ended.reason)
        if ended:
            return
        if time.monotonic() - asked > ASK_SECONDS:
            try:
                status, silence = control.status(run), ""
            except RunFailed as error:
                status, silence = "", str(error)
            asked = time.monotonic()  # after the answer: on a machine that takes longer than ASK_SECONDS it never rests
            # The lock before the result: who held it may have written one meanwhile.
            if _is_over(status) and not is_written(path) and not _result(path, old):
                raise RunFailed(
                    f"run {run} ended as {status} and left no result, as when the SuperLink is restarted: submit it "
                    f"again with resume={str(path)!r} if that folder has a {CHECKPOINT}"
                )
            if not silence or is_written(path):
                heard = asked
            elif asked - heard > SILENCE_SECONDS:
                raise RunFailed(f"run {run} is given up after {asked - heard:.0f} s without a sign of life: {silence}")
        time.sleep(POLL_SECONDS)


def _result(path: Path, old: FileState = None) -> ResultFile | None:
    try:
        return new_result(path, old)
    except DataError:
        return None
