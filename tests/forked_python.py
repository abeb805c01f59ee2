"""Code in processes of its own, without the seconds that libraries take to load: forks of one that has loaded them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

PARENT = """
import json, os, sys, traceback
import datasets, flwr.app, flwr.clientapp, flwr.serverapp, opacus, peft, scipy.stats, torch, transformers
import dp_accounting.pld, dp_accounting.rdp

for line in sys.stdin:
    code, words, folder, more, files = json.loads(line)
    if not (child := os.fork()):
        status = 1
        try:
            os.chdir(folder)
            os.environ.update(more)
            for number, path in enumerate(files):
                os.dup2(os.open(path, os.O_RDWR), number)
            sys.stdin, sys.argv = open(0), ["-c", *words]
            exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
            status = 0
        except SystemExit as left:
            status = left.code if isinstance(left.code, int) else 0 if left.code is None else 1
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
"""Knows the libraries and nothing of this project; its hashes are not those of the process of the tests."""


class Run(Protocol):
    """Runs code as ``python -c`` does, and raises CalledProcessError where it fails."""

    def __call__(
        self, code: str, *words: str, given: str = "", folder: Path = Path(), environment: Mapping[str, str] = {}
    ) -> subprocess.CompletedProcess[str]:
        """Return what code has said.

        Args:
            code, words: what is run, with its arguments.
            given: standard input.
            folder: where it is run.
            environment: variables beside those of the tests.
        """


@contextmanager
def parent_of_forks(folder: Path) -> Iterator[Run]:
    """Yield what runs code in forks of one process; what they say goes through files in ``folder``."""
    files = [folder / name for name in ("in", "out", "err")]
    process: list[subprocess.Popen[str]] = []

    def run(
        code: str, *words: str, given: str = "", folder: Path = Path(), environment: Mapping[str, str] = {}
    ) -> subprocess.CompletedProcess[str]:
        for path, text in zip(files, (given, "", ""), strict=True):
            path.write_text(text, encoding="utf-8")
        asked = [code, words, str(folder.resolve()), dict(environment), list(map(str, files))]
        return _ended(process, asked, words, files)

    try:
        yield run
    finally:
        for one in process:
            one.communicate()


def _ended(
    process: list[subprocess.Popen[str]], asked: list[object], words: Sequence[str], files: Sequence[Path]
) -> subprocess.CompletedProcess[str]:
    if not process:
        env = {**os.environ, "PYTHONHASHSEED": "1"}
        process.append(subprocess.Popen([sys.executable, "-c", PARENT], env=env, stdin=-1, stdout=-1, text=True))
    told, heard = process[0].stdin, process[0].stdout
    assert told is not None
    assert heard is not None
    print(json.dumps(asked), file=told, flush=True)
    done = subprocess.CompletedProcess(
        words, int(heard.readline()), *(path.read_text(encoding="utf-8") for path in files[1:])
    )
    assert done.returncode == 0, done.stderr
    return done
