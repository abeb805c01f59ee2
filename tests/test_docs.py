"""What README and docs say is true: commands exist, settings are accepted, tables are the code's, examples run."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from typer.testing import CliRunner

from cli.main import app
from client.site import NODE_KEYS
from common.adapters import ADAPTERS
from common.config.text import parse_settings
from common.data.packaged import MINILM, packaged_folder
from common.errors import ConfigError
from common.privacy import MECHANISMS
from common.run_lines import PrivacyLine, RoundLine, read_lines
from common.starts import STARTS
from experiments.evaluate import evaluate_run
from experiments.in_process import run_in_process
from strategies import STRATEGIES
from strategies.job import configure
from strategies.table import DEFAULT_RANK, DEFAULT_SHAPES, adapter_table, strategy_table

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
CONFIGS = sorted((ROOT / "experiments" / "configs").glob("*.toml"))


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.S)


def commands() -> list[tuple[str, str]]:
    found = []
    for page in PAGES:
        for block in blocks(page, "(?:sh|bash|console)"):
            lines = block.replace("\\\n", " ").splitlines()
            found += [(page.name, line.strip().removeprefix("$ ")) for line in lines if line.strip()]
    return found


def check_settings(words: list[str]) -> None:
    texts = [words[i + 1] for i, word in enumerate(words[:-1]) if word == "-c"]
    texts = [str(ROOT / text) if text.endswith(".toml") else text for text in texts]
    configure(parse_settings(texts))


@pytest.mark.parametrize(("page", "line"), commands(), ids=lambda value: value[:60])
def test_every_command_in_the_docs_exists(page: str, line: str) -> None:
    words = shlex.split(line, comments=True)
    for word in list(words):
        if "=" in word and word.split("=")[0].isupper():
            words.remove(word)
    if not words or words[0] in ("git", "cd", "export", "source", "."):
        return
    program = Path(words[0]).name
    if program == "make":
        targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.M)
        assert set(words[1:]) <= set(targets), f"{page}: make has no target {words[1:]}"
    elif program == "fedveil":
        names = [word for word in words[1:3] if re.fullmatch(r"[a-z]+", word)]
        group = ["ledger", "show"] if words[1] == "ledger" else names[:1]
        assert CliRunner().invoke(app, [*group, "--help"]).exit_code == 0, f"{page}: {line}"
        check_settings(words)
    elif program == "flwr":
        check_settings(words)
    elif program == "flower-supernode":
        node = parse_settings([words[words.index("--node-config") + 1]])
        assert set(node) <= set(NODE_KEYS), f"{page}: a site knows no {set(node) - set(NODE_KEYS)}"
    elif program in ("python", "python3"):
        script = next(word for word in words[1:] if not word.startswith("-"))
        assert (ROOT / script).is_file(), f"{page}: {script} is not there"
    else:
        raise AssertionError(f"{page}: nobody knows how to check {line!r}")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_config_is_accepted_and_starts_with_its_command(path: Path) -> None:
    configure(parse_settings([str(path)]))
    first = path.read_text().splitlines()[0]
    assert first.startswith("#")
    assert f"fedveil run -c experiments/configs/{path.name}" in first


@pytest.mark.parametrize("page", ["README.md", "docs/strategies.md"])
def test_the_table_of_strategies_is_the_codes(page: str) -> None:
    assert strategy_table() in (ROOT / page).read_text(encoding="utf-8"), (
        f"the table in {page} is not what the code says: put in the output of 'fedveil strategies'"
    )


def test_the_tables_bytes_are_of_the_default_jobs_own_layers() -> None:
    config = configure({}).config
    assert config.model.name == "all-MiniLM-L6-v2", "the default model is another: read that one's layers here"
    targets = config.adapter.target_modules
    with packaged_folder(MINILM) as folder, safe_open(str(folder / "model.safetensors"), framework="pt") as file:
        weights = [key for key in file.keys() if key.removesuffix(".weight").rsplit(".", 1)[-1] in targets]  # noqa: SIM118
        shapes = sorted(tuple(file.get_slice(key).get_shape()) for key in weights)
    assert shapes == sorted(DEFAULT_SHAPES), f"the default job adapts {len(shapes)} layers, of {set(shapes)}"
    assert config.adapter.rank == DEFAULT_RANK, "the table counts bytes at another rank than the default job's"


def test_links_between_pages_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+?)\)", page.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name} links to {target}, which is not there"


def test_tests_named_in_the_page_on_privacy_exist() -> None:
    text = (ROOT / "docs" / "privacy.md").read_text(encoding="utf-8")
    for file, test in re.findall(r"`(?:tests/)?(test_\w+\.py)(?:::(\w+))?`", text):
        source = (ROOT / "tests" / file).read_text(encoding="utf-8")
        assert not test or f"def {test}(" in source, f"docs/privacy.md names {file}::{test}, which is not there"


def test_every_pitfall_that_is_of_code_has_a_test_and_every_edge_a_severity() -> None:
    text = (ROOT / "docs" / "privacy.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \| ([^|]+) \| ([^|]+) \|$", text, flags=re.M)
    assert {int(number) for number, _, _ in rows} == set(range(1, 17))
    untested = [pitfall for _, pitfall, tests in rows if "::test_" not in tests and "not of code" not in tests]
    assert not untested, f"no test would find: {untested}"
    edges = text.split("## Sharp edges")[1].split("\n## ")[0]
    severities = [line.split("|")[1].strip() for line in edges.splitlines() if line.startswith("|")][2:]
    assert set(severities) == {"high", "medium", "low"}
    assert severities == sorted(severities, key=["high", "medium", "low"].index)


@pytest.fixture
def the_pages_strategy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Write the strategy of the page into a file, put it into the table, and return the row's source."""
    source, row, _ = blocks(ROOT / "docs" / "add-a-strategy.md", "python")
    (tmp_path / "fedavg_qr.py").write_text(source, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    before = dict(STRATEGIES)
    exec(row, {"STRATEGIES": STRATEGIES, "FedAvgQR": __import__("fedavg_qr").FedAvgQR})
    yield row
    STRATEGIES.clear()
    STRATEGIES.update(before)
    sys.modules.pop("fedavg_qr")


@pytest.mark.usefixtures("the_pages_strategy")
@pytest.mark.parametrize("server", ["none", "adam"])
def test_the_page_on_adding_a_strategy_works(server: str, toy_settings: dict[str, Any]) -> None:
    run = blocks(ROOT / "docs" / "add-a-strategy.md", "python")[2]
    settings = {**toy_settings, "rounds": 3, "server.optimizer": server}
    namespace: dict[str, Any] = {"run_in_process": run_in_process, "toy_settings": settings}
    exec(f"folder = {run}", namespace)
    lines = read_lines(RoundLine, namespace["folder"])
    assert [line.strategy for line in lines] == ["fedavg-qr"] * 3


def contract_tests(plugin: str, file: str, name: str, tmp_path: Path) -> int:
    """Run the tests of ``file`` that are about the row ``name``, which ``plugin`` adds; return how many passed."""
    (tmp_path / "the_row.py").write_text(plugin, encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-p", "the_row", "-p", "no:cacheprovider", "-p", "no:xdist"]
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    done = subprocess.run(
        [*command, file, "-k", name],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path, "PYTEST_ADDOPTS": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return int(re.findall(r"(\d+) passed", done.stdout)[0])


def test_the_contract_tests_cover_the_pages_strategy_as_the_page_says(the_pages_strategy: str, tmp_path: Path) -> None:
    plugin = f"from fedavg_qr import FedAvgQR\nfrom strategies import STRATEGIES\n{the_pages_strategy}"
    assert contract_tests(plugin, "tests/test_strategies.py", "fedavg-qr", tmp_path) >= 20


@pytest.fixture
def the_pages_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Write the adapter of the page into a file, put it into the table, and return the row's source."""
    source, row, _ = blocks(ROOT / "docs" / "add-an-adapter.md", "python")
    (tmp_path / "output_scale.py").write_text(source, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    before = dict(ADAPTERS)
    exec(row, {"ADAPTERS": ADAPTERS, "OutputScale": __import__("output_scale").OutputScale})
    yield row
    ADAPTERS.clear()
    ADAPTERS.update(before)
    sys.modules.pop("output_scale")


@pytest.mark.usefixtures("the_pages_adapter")
@pytest.mark.parametrize("mode", ["dp-sgd", "none"])
def test_the_page_on_adding_an_adapter_works(mode: str, toy_settings: dict[str, Any]) -> None:
    run = blocks(ROOT / "docs" / "add-an-adapter.md", "python")[2]
    settings = {**toy_settings, "privacy.mode": mode}
    namespace: dict[str, Any] = {"run_in_process": run_in_process, "toy_settings": settings}
    exec(f"folder = {run}", namespace)
    last = read_lines(RoundLine, namespace["folder"])[-1]
    scored = evaluate_run(namespace["folder"])
    assert (scored.accuracy, scored.loss) == (last.accuracy, pytest.approx(last.loss, rel=1e-6))
    # Five layers in each of two blocks with 88 outputs, and a head of 2 × 16 + 2, of four bytes, from two sites.
    assert last.bytes_up == 2 * 4 * (2 * 88 + 34), "it sends something else than z and the head"
    assert "output-scale" in adapter_table()


def test_the_contract_tests_cover_the_pages_adapter_as_the_page_says(the_pages_adapter: str, tmp_path: Path) -> None:
    plugin = f"from output_scale import OutputScale\nfrom common.adapters import ADAPTERS\n{the_pages_adapter}"
    assert contract_tests(plugin, "tests/test_adapters.py", "output-scale", tmp_path) >= 40


def test_the_table_of_adapters_is_the_codes() -> None:
    assert adapter_table() in (ROOT / "docs" / "strategies.md").read_text(encoding="utf-8"), (
        "the table in docs/strategies.md is not what the code says: put in the output of 'fedveil strategies'"
    )


@pytest.fixture
def the_pages_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Write the start of the page into a file, put it into the table, and return the row's source."""
    source, row, _ = blocks(ROOT / "docs" / "add-a-start.md", "python")
    (tmp_path / "longest_rows.py").write_text(source, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    before = dict(STARTS)
    exec(row, {"STARTS": STARTS, "LongestRows": __import__("longest_rows").LongestRows})
    yield row
    STARTS.clear()
    STARTS.update(before)
    sys.modules.pop("longest_rows")


@pytest.mark.usefixtures("the_pages_start")
@pytest.mark.parametrize("strategy", ["ffa-lora", "fed-sb"])
def test_the_page_on_adding_a_start_works(strategy: str, toy_settings: dict[str, Any]) -> None:
    run = blocks(ROOT / "docs" / "add-a-start.md", "python")[2]
    settings = {**toy_settings, "strategy": strategy, "privacy.mode": "none"}
    namespace: dict[str, Any] = {"run_in_process": run_in_process, "toy_settings": settings}
    exec(f"folder = {run}", namespace)
    lines = read_lines(RoundLine, namespace["folder"])
    assert [line.round_number for line in lines] == [1, 2], "a start that every party derives has no round 0"
    assert lines[0].bytes_down == lines[1].bytes_down, "something travelled once"
    skipped, kept = (configure({**settings, "adapter.start": "longest-rows", "start.skip": n}) for n in (1, 0))
    assert skipped.origin != kept.origin


def test_the_tests_of_starts_cover_the_pages_start_as_the_page_says(the_pages_start: str, tmp_path: Path) -> None:
    plugin = f"from longest_rows import LongestRows\nfrom common.starts import STARTS\n{the_pages_start}"
    (tmp_path / "the_row.py").write_text(plugin, encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-p", "the_row", "-p", "no:cacheprovider", "-p", "no:xdist"]
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    done = subprocess.run(
        [*command, "tests/test_starts.py", "tests/test_new_starts.py", "-k", "longest-rows"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path, "PYTEST_ADDOPTS": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert int(re.findall(r"(\d+) passed", done.stdout)[0]) >= 12, done.stdout


@pytest.fixture
def the_pages_mechanism(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Write the mechanism of the page into a file, put it into the table, and return the row's source."""
    source, row, _ = blocks(ROOT / "docs" / "add-a-mechanism.md", "python")
    (tmp_path / "full_batch.py").write_text(source, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    before = dict(MECHANISMS)
    exec(row, {"MECHANISMS": MECHANISMS, "FullBatch": __import__("full_batch").FullBatch})
    yield row
    MECHANISMS.clear()
    MECHANISMS.update(before)
    sys.modules.pop("full_batch")


@pytest.mark.usefixtures("the_pages_mechanism")
def test_the_page_on_adding_a_mechanism_works(toy_settings: dict[str, Any]) -> None:
    run = blocks(ROOT / "docs" / "add-a-mechanism.md", "python")[2]
    namespace: dict[str, Any] = {"run_in_process": run_in_process, "toy_settings": toy_settings}
    exec(f"folder = {run}", namespace)
    lines = read_lines(PrivacyLine, namespace["folder"])
    assert {line.sampler for line in lines} == {"none: every record is in every step"}
    assert {line.spent.event.sample_rate for line in lines if line.spent} == {1.0}
    with pytest.raises(ConfigError, match="takes every record in every step"):
        configure({**toy_settings, "privacy.mode": "full-batch", "training.sample-rate": 0.5})


def test_the_tests_of_mechanisms_cover_the_pages_row_as_the_page_says(the_pages_mechanism: str, tmp_path: Path) -> None:
    plugin = f"from full_batch import FullBatch\nfrom common.privacy import MECHANISMS\n{the_pages_mechanism}"
    assert contract_tests(plugin, "tests/test_mechanisms.py", "full-batch", tmp_path) == 7


@pytest.mark.parametrize("page", ["README.md", "docs/deploy.md"])
def test_no_command_of_flowers_reports_to_anyone(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for block in re.findall(r"```(?:sh|text)\n(.*?)```", text, flags=re.DOTALL):
        if re.search(r"^(\w+=\S* )*(flower-\w+|flwr) ", block, flags=re.MULTILINE):
            assert "FLWR_TELEMETRY_ENABLED=0" in block, f"{page} starts Flower's programs as they come:\n{block}"
