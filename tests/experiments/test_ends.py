"""Ends of a simulated run: by a signal, with its terminal or its starter, or by ``fedveil stop``."""

from __future__ import annotations

import fcntl
import io
import json
import os
import pty
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import get_context
from multiprocessing.context import ForkProcess
from pathlib import Path

import pytest
from made_run import MadeRun
from typer.testing import CliRunner

from fedveil.cli.main import app
from fedveil.common.config.text import parse_settings
from fedveil.common.ends import end_as_by_ctrl_c
from fedveil.common.errors import ConfigError, RunFailed
from fedveil.experiments import detached, keeper
from fedveil.experiments.under_way import ProcessFile, _here, conducting, stop, ways_on
from fedveil.server.lock import is_locked, only_writer

PATIENCE = 60.0
BINARIES = Path(sys.executable).parent
SLEEPER = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); {before}; time.sleep(1000)"


def until(true: Callable[[], object], seconds: float = PATIENCE) -> bool:
    deadline = time.monotonic() + seconds
    while not true():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def is_alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def numbers(folder: Path) -> list[int]:
    return [int(path.read_text()) for path in folder.glob("*.pid")]


@contextmanager
def a_tree(folder: Path) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """Yield whoever starts a keeper, and its folder, once all processes below have written their numbers beside it.

    They are as Flower's and Ray's: a child that ignores SIGTERM, one in a session of its own, and one of which, in
    another session, the parent has ended.
    """
    own = folder / "own"
    own.mkdir()

    def sleeper(name: str) -> str:
        return SLEEPER.format(before=f"open({str(folder / name)!r}, 'w').write(str(__import__('os').getpid()))")

    orphan = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {sleeper('c.pid')!r}], process_group=0)"
    command = (
        "import subprocess, sys\n"
        f"subprocess.Popen([sys.executable, '-c', {sleeper('b.pid')!r}], start_new_session=True)\n"
        f"subprocess.run([sys.executable, '-c', {orphan!r}], start_new_session=True)\n" + sleeper("a.pid")
    )
    starter = (
        "import os, sys, time\nfrom pathlib import Path\nfrom fedveil.experiments import keeper\n"
        f"kept = keeper.start(Path({str(own)!r}), [sys.executable, '-c', {command!r}], os.environ)\n"
        f"Path({str(folder / 'd.pid')!r}).write_text(str(kept.pid))\ntime.sleep(1000)\n"
    )

    with subprocess.Popen([sys.executable, "-P", "-c", starter]) as process:
        try:
            assert until(lambda: len([path for path in folder.glob("*.pid") if path.read_text()]) == 4)
            assert all(map(is_alive, numbers(folder)))
            yield process, own
        finally:
            process.kill()
            for number in numbers(folder):
                with suppress(ProcessLookupError):
                    os.kill(number, signal.SIGKILL)


def test_where_a_starter_is_killed_nothing_of_what_it_started_is_left(tmp_path: Path) -> None:
    """The operating system tells the keeper, by a pipe, so every other end is told in the same way."""
    with a_tree(tmp_path) as (starter, own):
        starter.kill()
        assert until(lambda: not any(map(is_alive, numbers(tmp_path))))
        assert until(lambda: not own.exists()), "the messages of the run stay on the disk"


def test_a_keeper_that_is_told_to_end_takes_what_is_below_it_along(tmp_path: Path) -> None:
    with a_tree(tmp_path):
        os.kill(int((tmp_path / "d.pid").read_text()), signal.SIGTERM)
        assert until(lambda: not any(map(is_alive, numbers(tmp_path))))


def test_the_end_waits_for_a_site_at_work_and_lets_no_other_begin(tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.mkdir()
    at_work = (
        "import os, sys, threading, time\nfrom pathlib import Path\nfrom fedveil.client import door\n"
        "door.LAST_SECONDS = 1000.0\n"
        f"folder = Path({str(tmp_path)!r})\n"
        "with door.at_work():\n"
        "    (folder / 'begun').touch()\n"
        "    while (folder / 'own' / 'door').exists(): time.sleep(0.01)\n"
        "    time.sleep(0.5)\n"
        "    (folder / 'kept').touch()\n"
        "with door.at_work():\n"
        "    (folder / 'begun again').touch()\n"
    )
    environment = {**os.environ, "FEDVEIL_DOOR": str(own / keeper.DOOR)}
    kept = keeper.start(own, [sys.executable, "-P", "-c", at_work], environment)
    assert until((tmp_path / "begun").exists), (own / keeper.LOG).read_text()
    keeper.end(kept)
    assert (tmp_path / "kept").exists(), "a site that had paid was ended before its reply was kept"
    assert not (tmp_path / "begun again").exists(), "a site paid for a round of a run that ends"


def test_a_site_that_works_on_and_on_does_not_hold_the_end_up(tmp_path: Path) -> None:
    (tmp_path / keeper.DOOR).touch()
    with (tmp_path / keeper.DOOR).open() as held:
        fcntl.flock(held, fcntl.LOCK_SH)
        began = time.monotonic()
        keeper.close_door(tmp_path / keeper.DOOR, patience=0.3)
    assert 0.3 <= time.monotonic() - began < 5
    assert not (tmp_path / keeper.DOOR).exists()


@pytest.mark.parametrize("command", ["sweep", "tune"])
def test_sweeps_end_as_a_run_does(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = list[str]()
    monkeypatch.setattr("fedveil.cli.sweep.end_as_by_ctrl_c", lambda: asked.append(command))
    assert CliRunner().invoke(app, [command, str(tmp_path / "none.toml")]).exit_code == 1
    assert asked == [command]


@pytest.mark.parametrize("ignored", [False, True])
def test_a_terminal_that_closes_ends_a_run_as_ctrl_c_does_but_under_nohup(ignored: bool, tmp_path: Path) -> None:
    """The command waits for its settings, which come through a pipe that has a name."""
    settings = tmp_path / "settings.toml"
    os.mkfifo(settings)

    def begin() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)

    typed = [str(BINARIES / "fedveil"), "run", "-c", str(settings)]
    with subprocess.Popen(typed, preexec_fn=begin, stderr=-1, text=True, cwd=tmp_path) as process:
        pipes: list[int] = []

        def waits() -> bool:
            with suppress(OSError):  # nobody reads yet
                pipes.append(os.open(settings, os.O_WRONLY | os.O_NONBLOCK))
            return bool(pipes)

        try:
            assert until(waits, 2 * PATIENCE)
            time.sleep(0.5)  # Python overlooks a signal that comes between its last look and a read that waits
            process.send_signal(signal.SIGHUP)
            if ignored:
                time.sleep(0.5)
                assert process.poll() is None
                os.write(pipes[0], b"unknown = 1")
            else:
                assert process.wait(PATIENCE) == 130
            os.close(pipes[0])
            _, errors = process.communicate(timeout=PATIENCE)
        finally:
            process.kill()
    assert process.returncode == (1 if ignored else 130)
    assert ("Ended by SIGHUP" in errors) is not ignored
    assert "Traceback" not in errors


@contextmanager
def a_run(folder: Path) -> Iterator[ForkProcess]:
    """Yield a process that conducts the run of a folder and ends as ``fedveil run`` does."""
    fork = get_context("fork")  # of this process, which has loaded the libraries
    up = fork.Event()

    def conduct() -> None:
        sys.stderr = io.StringIO()  # for the traceback of its end
        end_as_by_ctrl_c()
        with conducting(folder):
            up.set()
            time.sleep(1000)

    process = fork.Process(target=conduct)
    process.start()
    try:
        assert up.wait(PATIENCE)
        yield process
    finally:
        process.kill()
        process.join()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "ffa-lora-7"
    MadeRun(folder).start()
    return folder


@pytest.mark.parametrize("by", ["folder", "id"])
def test_stop_ends_the_run_that_is_under_way_and_waits_for_its_end(by: str, run: Path) -> None:
    named = str(run) if by == "folder" else "7"
    with a_run(run) as process:
        done = CliRunner().invoke(app, ["stop", named, "--output", str(run.parent)])
        assert done.exit_code == 0, done.output
        assert f"process {process.pid}" in done.output
        assert str(run) in done.output
        process.join(PATIENCE)
        assert process.exitcode
    assert not (run / ProcessFile.NAME).exists()


def test_stop_ends_no_process_that_has_the_number_of_one_that_is_gone(run: Path) -> None:
    """A run that was killed leaves its file, and its number goes to somebody else."""
    with a_run(run) as killed:
        killed.kill()
        killed.join()
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"]) as other:
        path = run / ProcessFile.NAME
        path.write_text(path.read_text().replace(str(killed.pid), str(other.pid)))
        with pytest.raises(ConfigError, match="no `fedveil run` is under way"):
            stop(str(run))
        assert other.poll() is None
        other.kill()


def test_stop_leaves_a_run_of_another_machine_alone(run: Path) -> None:
    with a_run(run) as process:
        path = run / ProcessFile.NAME
        path.write_text(path.read_text().replace('"where": "', '"where": "other '))
        with pytest.raises(ConfigError, match=r"under way on other .*: stop it there"):
            stop(str(run))
        assert process.is_alive()


def test_stop_says_what_it_does_not_end(run: Path, tmp_path: Path) -> None:
    with only_writer(run), pytest.raises(ConfigError, match="another program writes it: end that one"):
        stop(str(run))
    with pytest.raises(ConfigError, match="no run in"):
        stop("8", tmp_path)


def test_a_second_run_does_not_conduct_what_is_under_way(run: Path) -> None:
    with a_run(run), pytest.raises(RunFailed, match="is under way: end it with `fedveil stop"), conducting(run):
        pass


@pytest.mark.parametrize("name", ["a run", 'a "run"', "a\\run", "a'run"])
def test_the_command_that_goes_on_is_read_as_it_is_printed(name: str, tmp_path: Path) -> None:
    folder = tmp_path / name
    folder.mkdir()
    assert "nothing to resume" in ways_on(folder)
    (folder / "checkpoint.safetensors").touch()
    typed = shlex.split(ways_on(folder).splitlines()[-1].removeprefix("resume with: "))
    assert typed[:3] == ["fedveil", "run", "-c"]
    assert parse_settings(typed[3:]) == {"resume": str(folder)}


def conductor(folder: Path) -> str:
    """Return a program that conducts a run as ``fedveil run`` does, without importing what that does."""
    path, about = folder / ProcessFile.NAME, {"where": _here()}
    return (
        "import fcntl, json, os, signal, time\n"
        f"file = open({str(path)!r}, 'w'); fcntl.flock(file, fcntl.LOCK_EX)\n"
        f"file.write(json.dumps({about!r} | {{'process': os.getpid()}})); file.flush()\n"
        "print('ignored:', signal.getsignal(signal.SIGHUP) == signal.SIG_IGN, flush=True)\n"
        "time.sleep(1000)\n"
    )


def test_a_detached_run_outlives_its_terminal_and_stop_ends_it(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The terminal is a real one, and what runs in it dies with it."""
    monkeypatch.setattr(detached, "COMMAND", (sys.executable, "-c", conductor(run)))
    begun = run.parent / "begun"
    shell, terminal = pty.fork()
    if not shell:
        try:
            signal.signal(signal.SIGHUP, signal.SIG_DFL)
            folder, process = detached.begin_detached({"rounds": 1}, run.parent, {"--sites": 2})
            begun.write_text(json.dumps([str(folder), process]))
            time.sleep(1000)
        finally:
            os._exit(1)
    assert until(lambda: begun.exists() and begun.read_text())
    folder, process = json.loads(begun.read_text())
    os.close(terminal)
    assert os.waitpid(shell, 0)[1] == signal.SIGHUP, "the terminal did not go"
    assert folder == str(run)
    assert is_locked(run / ProcessFile.NAME)
    assert (run / detached.LINES).read_text() == "ignored: True\n"
    assert not list(run.parent.glob(".terminal-*"))
    assert stop("latest", run.parent) == (run, process)
    assert not is_alive(process)


def test_a_detached_run_that_ends_at_once_says_why(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(detached, "COMMAND", (sys.executable, "-c", "raise SystemExit('no room')"))
    with pytest.raises(RunFailed, match=r"before it began \(no room\)"):
        detached.begin_detached({}, run.parent, {})
    assert not list(run.parent.glob(".terminal-*"))
