"""Fixtures over the tiny worlds of ``audits.tiny_models``."""

from __future__ import annotations

import gc
import hashlib
import logging
import os
import random
import socket
import ssl
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

# Before torch is imported. Tests run in several processes at once; with a thread for each core in each of them,
# as a site in production takes them, they wait for each other and last three times as long.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("FEDVEIL_CORES", "1")
os.environ["FEDVEIL_PROCESS"] = "1"  # as in all that FedVeil starts
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # as ``common.threads`` says

import numpy as np
import pytest
import seconds
import torch
from forked_python import Run, parent_of_forks

from audits.tiny_models import TARGETS, save_tiny_model, toy_run, write_questions
from fedveil.privacy import accounting, calibration, meaning
from fedveil.privacy.entropy import Source, replaced_entropy, system_integers

ROUGH: dict[tuple[Any, str], Any] = {
    (accounting, "PLD_INTERVAL"): 1e-2,
    (meaning, "PLD_INTERVAL"): 1e-2,
    (meaning, "POINTS"): 100,
    # With memories of their own: what one grid said is no answer for the other.
    **{
        (module, name): lru_cache(maxsize=4096)(getattr(module, name).__wrapped__)
        for module, name in ((accounting, "_priced"), (calibration, "_least_noise"), (meaning, "_meaning"))
    },
}


def pytest_configure(config: pytest.Config) -> None:
    """Let xdist keep the order in which tests are collected, and nothing search what is collected for garbage."""
    config.option.loadscopereorder = False
    gc.disable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with slow files and those of many tests, so that no process is left alone with one of them at the end."""
    tests = Counter(item.path for item in items)
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: (item.path not in slow, -tests[item.path], item.path))


SPENT: list[float] = []
"""Processor time of each worker that has ended, in seconds."""


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Take from a worker what it spent; one that died says nothing."""
    SPENT.append(getattr(node, "workeroutput", {}).get("seconds", 0.0))


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Tell the process that hands out tests what this worker spent, or fail a session in CI that took too long."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["seconds"] = seconds.own()
    elif os.environ.get("FEDVEIL_CI") and seconds.too_many(sum(SPENT)):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say where the time of a session of several workers went."""
    if not SPENT:
        return
    reports = (report for kind in ("passed", "failed", "", "skipped") for report in terminalreporter.getreports(kind))
    tests = ((report.location[0], report.duration) for report in reports if isinstance(report, pytest.TestReport))
    for line in (*seconds.summary(sum(SPENT), tests), seconds.too_many(sum(SPENT))):
        if line:
            terminalreporter.write_line(line)


def price_roughly(patch: pytest.MonkeyPatch) -> None:
    for (module, name), value in ROUGH.items():
        patch.setattr(module, name, value)


def pytest_collection_finish() -> None:
    """Let garbage collection pass over what is there for good: libraries and thousands of collected tests."""
    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session", autouse=True)
def quick_losses() -> Iterator[None]:
    """Let every price be made of arrays, where the library takes a loss at a time: the same, in a tenth of the time."""
    from quick_losses import QUICK  # and not above, for SciPy with it: who hands out tests prices nothing

    with pytest.MonkeyPatch.context() as patch:
        for (kind, name), quick in QUICK.items():
            patch.setattr(kind, name, quick)
        yield


class NamedDraws:
    """Private randomness that follows from a test's name, so that a test passes whenever it has passed."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.draw: np.random.Generator | None = None

    def restart(self, test: str, *, fresh: bool) -> None:
        """Seed every source with a test's name; ``fresh`` leaves private ones to the operating system."""
        digest = hashlib.sha256(test.encode()).digest()
        self.draw = None if fresh else np.random.default_rng(list(digest))
        for seed in (torch.manual_seed, np.random.seed, random.seed):
            seed(int.from_bytes(digest[:4], "big"))

    def entropy(self, count: int) -> np.ndarray:
        """Return uniform 64-bit integers as ``privacy.entropy.Source`` does."""
        with self.lock:  # sites of a test may be threads, and a generator serves one at a time
            if self.draw is None:
                return system_integers(count)
            return self.draw.integers(0, 2**64, count, dtype=np.uint64)


DRAWS = NamedDraws()


@pytest.fixture(scope="session", autouse=True)
def named_draws() -> Iterator[None]:
    """Let no test fail by an unlucky draw alone: a gate that does so one time in many stops other work.

    ``FEDVEIL_FRESH_NOISE=1 make test`` draws anew, to find bands that are too narrow.
    """
    with replaced_entropy(DRAWS.entropy):
        yield


@pytest.fixture
def replace_entropy() -> Iterator[Callable[[Source], None]]:
    """Return a function that has the rest of a test draw private randomness from a source."""
    with ExitStack() as sources:
        yield lambda source: sources.enter_context(replaced_entropy(source))


@pytest.fixture
def own_rows(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Take away the rows that a test registers: beside one, each site of a later test in this process would refuse."""
    from fedveil.common import registered
    from fedveil.experiments.api.register import KINDS

    monkeypatch.setattr(registered, "_ROWS", [])
    before = {kind: {*table} for kind, (_, table) in KINDS.items()}
    yield
    for kind, (_, table) in KINDS.items():
        for name in {*table} - before[kind]:
            del table[name]


@pytest.fixture
def programs_may_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a test see what a program starts: in this process, whose draws are the test's, it would refuse."""
    monkeypatch.setattr("fedveil.deploy.start.require_system_entropy", lambda: None)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Begin each test's draws where its name and its file's say, in whichever folder, before its fixtures draw."""
    top = item.nodeid.partition("tests/")[0]
    fresh = bool(os.environ.get("FEDVEIL_FRESH_NOISE") or item.get_closest_marker("system_entropy"))
    DRAWS.restart(f"{top}tests/{item.path.name}::{item.nodeid.partition('::')[2]}", fresh=fresh)


@pytest.fixture(scope="module", autouse=True)
def prices(request: pytest.FixtureRequest) -> Iterator[None]:
    """Let the files that are about no price do with rough ones, which take a fifth of the time."""
    with pytest.MonkeyPatch.context() as patch:
        if request.node.get_closest_marker("rough_prices"):
            price_roughly(patch)
        yield


@pytest.fixture
def rough_prices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let one test do with rough prices, in a file that is about prices too."""
    price_roughly(monkeypatch)


@pytest.fixture(autouse=True)
def caught(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Let ``caplog`` hear the project's logger, which hands no line up to the root once it is set up."""
    logger = logging.getLogger("fedveil")
    logger.propagate = False
    logger.addHandler(caplog.handler)
    yield
    logger.removeHandler(caplog.handler)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """Return a function from family (bert, gpt2, llama) to a folder with a tiny random model of it."""
    made: dict[str, str] = {}

    def make(family: str) -> str:
        if family not in made:
            folder = tmp_path_factory.mktemp(f"tiny-{family}")
            made[family] = save_tiny_model(family, folder)
        return made[family]

    return make


@pytest.fixture(scope="session")
def fresh_python(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """Return what runs code in another process, which has loaded the libraries already."""
    with parent_of_forks(tmp_path_factory.mktemp("fresh-python")) as run:
        yield run


@pytest.fixture
def toy_settings(model_folder: Callable[[str], str], tmp_path: Path, request: pytest.FixtureRequest) -> dict[str, Any]:
    """Return settings of a run that takes a second: tiny BERT, 240 made-up reviews, 40 of them the public test."""
    shorter = {"model.max-length": 15} if request.node.get_closest_marker("one_length") else {}
    return toy_run(model_folder("bert"), tmp_path) | shorter


@pytest.fixture
def toy_generation(model_folder: Callable[[str], str], tmp_path: Path, toy_settings: dict[str, Any]) -> dict[str, Any]:
    """Return settings of a run that teaches a tiny Llama to complete prompts."""
    return {
        **toy_settings,
        "model.name": model_folder("llama"),
        "model.max-length": 24,
        "model.task": "causal-lm",
        "data.name": str(write_questions(tmp_path / "questions.csv", 160)),
        "adapter.targets": TARGETS["llama"],
        "head.policy": "frozen",
    }


@pytest.fixture(params=[torch.float32, torch.float64], ids=["as rounded", "before rounding"])
def kept(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.dtype:
    """Return in what factors are kept that were computed in float64: rounded to float32, as they are, and as computed.

    The formulas are held to far more digits than float32 has.
    """
    dtype: torch.dtype = request.param
    if dtype is torch.float64:
        monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    return dtype


@pytest.fixture
def tls_server(tmp_path: Path) -> Iterator[Callable[[Any], int]]:
    """Return a function that serves bare TLS with a server folder's certificate and returns the port."""
    sockets: list[socket.socket] = []

    def serve(folder: Any) -> int:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(folder.path / "server.pem", folder.path / "server.key")
        listening = socket.create_server(("127.0.0.1", 0))
        sockets.append(listening)

        def answer() -> None:
            with suppress(OSError):
                while True:
                    plain, _ = listening.accept()
                    with suppress(OSError), context.wrap_socket(plain, server_side=True):
                        pass

        threading.Thread(target=answer, daemon=True).start()
        return int(listening.getsockname()[1])

    yield serve
    for one in sockets:
        one.close()
