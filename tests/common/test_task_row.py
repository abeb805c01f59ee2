"""A task of another modality is one file and one row: this file's, which the table gets for the time of a test.

Records are eight numbers each; nothing in the product knows of them.
"""

from __future__ import annotations

import inspect
import json
import math
import random
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from made_run import spent
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from audits.tiny_site import OneSite
from fedveil.cli.column_options import with_columns
from fedveil.client.own_records import prepared
from fedveil.common import tasks
from fedveil.common.config.flat import to_mapping
from fedveil.common.data.sources import load_dataset, load_protected
from fedveil.common.errors import ConfigError, DataError
from fedveil.common.messages.round import Refusal, TrainResult
from fedveil.common.model.base import BaseModel
from fedveil.common.model.shapes import Shapes
from fedveil.common.run_lines import PrivacyLine, RoundLine, read_lines
from fedveil.common.tasks.base import Batch, Inventor, Record, Sums, Task, classified
from fedveil.common.tasks.cells import Misfit
from fedveil.common.tasks.examples import Example
from fedveil.common.tasks.loading import OWN_CODE
from fedveil.common.tasks.module import TaskModule
from fedveil.common.tasks.roles import LABEL, Role
from fedveil.common.tasks.tables import Table
from fedveil.deploy.policy_file import pins_of
from fedveil.experiments.evaluate import evaluate_run
from fedveil.experiments.in_process import run_in_process
from fedveil.strategies.job import configure
from fedveil.strategies.resolve import config_of

pytestmark = pytest.mark.rough_prices

WIDTH = 8


# The row.


class TinyConfig(PretrainedConfig):
    model_type = "tiny-numbers"

    def __init__(self, hidden_size: int = 12, **others: Any) -> None:
        super().__init__(**others)
        self.hidden_size = hidden_size


class TinyEncoder(PreTrainedModel):
    config_class = TinyConfig
    _supports_attention_backend = True

    def __init__(self, config: TinyConfig) -> None:
        super().__init__(config)
        self.first = nn.Linear(WIDTH, config.hidden_size)
        self.second = nn.Linear(config.hidden_size, config.hidden_size)
        self.post_init()

    def forward(self, numbers: Tensor) -> Tensor:
        hidden: Tensor = self.second(self.first(numbers).tanh())
        return hidden


@dataclass(frozen=True, slots=True)
class NumbersExample(Example):
    numbers: tuple[float, ...]

    def canonical(self, label: str | None) -> str:
        return json.dumps([self.numbers, label])

    def likeness(self) -> str:
        return json.dumps(self.numbers)


def read_numbers(value: object, folder: Path | None) -> tuple[float, ...]:
    if not isinstance(value, list) or len(value) != WIDTH:
        raise Misfit(f"has no list of {WIDTH} numbers", "give each record one")
    return tuple(float(number) for number in value)


class Numbers(Task):
    name: ClassVar[str] = "numbers"
    roles: ClassVar[tuple[Role, ...]] = (Role("vector", "numbers", "the numbers", read=read_numbers), LABEL)
    example: ClassVar[type[Example]] = NumbersExample
    counted: ClassVar[bool] = True

    def load(self, name: str) -> tuple[nn.Module, Any]:
        return TinyEncoder.from_pretrained(name, **{k: v for k, v in OWN_CODE.items() if v}), None

    def processor_parts(self, processor: Any) -> Mapping[str, Any]:
        return {}

    def limit(self, base: BaseModel, max_length: int) -> int:
        if max_length < WIDTH:
            raise ConfigError(f"model.max-length is {max_length}: a record has {WIDTH} numbers")
        return WIDTH

    def prepare(self, base: BaseModel, examples: Sequence[Example], limit: int) -> list[Record]:
        return [{"numbers": e.numbers, "labels": e.label} for e in examples if isinstance(e, NumbersExample)]

    def size(self, record: Record) -> int:
        return len(record["numbers"])

    def fits(self, base: BaseModel, record: Record, limit: int) -> bool:
        return len(record["numbers"]) == limit and all(math.isfinite(number) for number in record["numbers"])

    def shapes(self, base: BaseModel, limit: int, tokens: int, most: int = sys.maxsize) -> Shapes:
        return Shapes(limit, tokens, most, uniform=True)

    def collate(self, base: BaseModel, records: Sequence[Record], size: int = 0) -> Batch:
        numbers = torch.tensor([record["numbers"] for record in records], dtype=torch.float32)
        return {"numbers": numbers, "labels": torch.tensor([record["labels"] for record in records])}

    def filler(self, base: BaseModel, like: Record) -> Record:
        return {"numbers": (0.0,) * WIDTH, "labels": 0}

    def inventor(self, base: BaseModel, limit: int, *, lifelike: bool = False) -> Inventor:
        def invent(size: int, number: int, label: int) -> Record:
            draw = random.Random(number)
            return {"numbers": tuple(draw.gauss(0, 1) for _ in range(limit)), "labels": label}

        return invent

    def module(self, encoder: nn.Module, base: BaseModel, classes: int, feature_scale: float) -> TaskModule:
        return TaskModule(encoder, self.features, base.hidden_size, classes, feature_scale)

    @staticmethod
    def features(encoder: nn.Module, batch: Batch) -> Tensor:
        hidden: Tensor = encoder(numbers=batch["numbers"]).float()
        return hidden

    def sums(self, module: nn.Module, batch: Batch) -> Sums:
        return classified(module, batch)


class Mixing(Numbers):
    """The fault: what a record is compared with is the mean of the batch that it is in."""

    @staticmethod
    def features(encoder: nn.Module, batch: Batch) -> Tensor:
        numbers = batch["numbers"]
        return Numbers.features(encoder, {"numbers": numbers - numbers.mean(0, keepdim=True)})


class Folders(Numbers):
    """Numbers whose files are the task's own: one folder a label, one file a record."""

    def read_source(self, source: Path) -> Table | None:
        if not source.is_dir() or not any(entry.is_dir() for entry in source.iterdir()):
            return None
        files = sorted(source.glob("*/*.json"))
        columns: dict[str, list[object]] = {
            "vector": [json.loads(file.read_text()) for file in files],
            "label": [file.parent.name for file in files],
        }
        return Table(str(source), columns, folder=source)


# The tests.


@pytest.fixture
def row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tasks.TASKS, "numbers", Numbers())


def rows_of(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Return records whose label is the sign of their first number."""
    draw = random.Random(seed)
    made = []
    for i in range(count):
        numbers = [draw.gauss(0, 1) for _ in range(WIDTH)]
        numbers[0] = (1 if i % 2 else -1) * (1 + abs(numbers[0]))
        made.append({"vector": numbers, "label": ["low", "high"][i % 2]})
    return made


def write(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def toy(row: None, tmp_path: Path) -> dict[str, Any]:
    """Return settings of a private run on 240 records of numbers."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        TinyEncoder(TinyConfig()).save_pretrained(tmp_path / "model")
    return {
        "strategy": "ffa-lora",
        "model.name": str(tmp_path / "model"),
        "model.task": "numbers",
        "data.name": str(write(tmp_path / "numbers.jsonl", rows_of(240))),
        "data.labels": "low,high",
        "data.test-size": 40,
        "data.partition": "iid",
        "adapter.rank": 3,
        "adapter.targets": "first,second",
        "head.start": "random",
        "rounds": 2,
        "server.optimizer": "none",
        "training.learning-rate": 1.0,
        "training.local-steps": 3,
        "training.sample-rate": 0.5,
        "privacy.delta": 1e-3,
        "privacy.noise-multiplier": 0.3,
        "privacy.epsilon": 1000.0,
        "precision": "float32",
        "device": "cpu",
        "output": str(tmp_path / "runs"),
    }


@pytest.fixture
def site(toy: dict[str, Any], tmp_path: Path) -> OneSite:
    data = write(tmp_path / "own.jsonl", rows_of(40, seed=1))
    node = {"site": "clinic", "data": str(data), "public-size": 40, "ledger": str(tmp_path / "clinic.sqlite")}
    own = OneSite(toy, dict(node))
    own.rule(send_noised_metrics=True, metrics_noise=5.0)
    return own


@pytest.mark.parametrize("strategy", ["ffa-lora", "fed-sb"])
def test_a_private_federation_learns_and_its_adapter_scores_as_the_run_says(strategy: str, toy: dict[str, Any]) -> None:
    folder = run_in_process({**toy, "strategy": strategy}, 2)
    lines = read_lines(RoundLine, folder)
    assert [len(line.participants) for line in lines] == [2, 2]
    assert not any(line.refusals or line.failures for line in lines)
    scored = evaluate_run(folder)
    assert (scored.accuracy, scored.loss) == (lines[-1].accuracy, lines[-1].loss)
    assert scored.accuracy > 0.6, "nothing was learned"
    assert all(spent(line).epsilon_total > 0 for line in read_lines(PrivacyLine, folder))


def test_a_round_at_a_site_is_charged_trained_and_counted(site: OneSite) -> None:
    result = site.train()
    assert set(result.contribution) == {"first", "second", "head"}
    assert result.noised_correct is not None
    assert site.charges() == [("1", 1, "training"), ("1", 1, "evaluation")]


def test_a_model_that_mixes_the_records_is_refused_unpaid(site: OneSite, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(tasks.TASKS, "numbers")
    monkeypatch.setitem(tasks.TASKS, "numbers", Mixing())
    site.settings["adapter.rank"] = 2  # another model than the one that is kept
    assert "depends on the records beside it" in site.refuse().reason


def test_a_record_that_does_not_fit_contributes_nothing_and_the_round_goes_on(site: OneSite) -> None:
    rows = [*rows_of(3), {"vector": "none", "label": "low"}, {"vector": [1.0] * 7 + ["x"], "label": "low"}]
    nan = {"vector": [math.nan] * WIDTH, "label": "low"}
    path = write(Path(str(site.node["data"])).with_name("odd.jsonl"), [*rows, nan])
    reading = load_protected(config_of(site.settings).data, "numbers", str(path))
    assert [unfit.reason for unfit in reading.unfit] == [
        "has no list of 8 numbers in column 'vector' (data.vector)",
        "has a cell that cannot be read in column 'vector' (data.vector)",
    ]
    with pytest.raises(DataError, match=r"line 4 has no list of 8 numbers .*: give each record one"):
        load_dataset(config_of(site.settings).data, "numbers", str(path))
    task, model = site.task(), site.model()
    site.node["data"] = str(path)
    assert isinstance(site.ask(task), TrainResult)
    assert len(reading.dataset.examples) == 4
    assert len(prepared(model, reading.dataset.examples)) == 3, "a record of no numbers was taken"


def test_the_ledger_knows_the_records_again_in_another_file_under_another_name(site: OneSite, tmp_path: Path) -> None:
    first = site.train().spending
    assert first is not None
    again = [{"note": i, **row} for i, row in reversed(list(enumerate(rows_of(40, seed=1))))]
    for name, rows, known in (("again", again, True), ("others", rows_of(40, seed=2), False)):
        site.node |= {"data": str(write(tmp_path / f"{name}.jsonl", rows)), "dataset-id": name}
        spent = site.train(run=name).spending
        assert spent is not None
        assert (spent.epsilon_total > first.epsilon_total + 0.1) is known, f"of {name} the records are taken for others"


def test_its_columns_are_settings_pins_and_options(site: OneSite, toy: dict[str, Any]) -> None:
    assert to_mapping(configure(toy).config)["data.vector"] == "vector"
    assert pins_of("numbers", {}, "low,high", 8) == {
        "task": "numbers",
        "vector": "vector",
        "label": "label",
        "labels": ["low", "high"],
        "max-length": 8,
    }
    task = site.task()
    site.settings["data.vector"] = "label"
    reply = site.ask(task)
    assert isinstance(reply, Refusal)
    assert "has vector = 'vector'; the run asks for data.vector = 'label'" in reply.reason

    @with_columns
    def command(folder: str, *, columns: dict[str, str]) -> None:
        assert (folder, columns) == ("here", {"vector": "v"})

    assert "vector" in inspect.signature(command).parameters
    options = (role.setting.replace("-", "_") for role in tasks.roles_of_all())
    command(folder="here", **{**dict.fromkeys(options), "vector": "v"})


def test_a_setting_of_a_task_that_is_not_there_is_none() -> None:
    with pytest.raises(ConfigError, match=r"unknown setting 'data\.vector'"):
        config_of({"data.vector": "vector"})


def test_records_without_words_start_no_head_from_words(toy: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"'numbers' hold no words: set head.start to 'random' or 'zeros'"):
        configure({**toy, "head.start": "label-words"})
    with pytest.raises(ConfigError, match=r"set head.start to 'random', or head.policy to 'trained'"):
        configure({**toy, "head.policy": "frozen", "head.start": "zeros"})


def test_a_task_may_read_files_of_its_own(toy: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(tasks.TASKS, "numbers")
    monkeypatch.setitem(tasks.TASKS, "numbers", Folders())
    for i, row in enumerate(rows_of(4)):
        place = tmp_path / "images" / row["label"]
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{i}.json").write_text(json.dumps(row["vector"]))
    config = config_of(toy).data
    by_folder = load_dataset(config, "numbers", str(tmp_path / "images"))
    by_file = load_dataset(config, "numbers", str(write(tmp_path / "four.jsonl", rows_of(4))))
    assert by_folder.fingerprint() == by_file.fingerprint()
    assert load_dataset(config, "numbers", toy["data.name"]).label_names == ("low", "high")
