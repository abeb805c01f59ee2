"""Several labels a text: rows, loss and its gradients, bits beside neighbours, runs, answers and stock classes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer, BertConfig

from audits.class_means import EACH_CLIPPED, audit_class_means
from audits.faults import SOUND, Fault
from audits.several import ANY_COUNTED, LABEL_CLIPPED, LABELS_COUNTED, audit_count, several_world
from audits.tiny_models import VOCABULARY, tiny_tokenizer
from audits.tiny_site import OneSite
from audits.worlds import alone, minus, norm, plan, released
from fedveil.client.own_records import prepared
from fedveil.common.data.sources import load_dataset, load_protected
from fedveil.common.errors import ConfigError, DataError
from fedveil.common.run_lines import RoundLine, read_lines
from fedveil.common.tasks.base import own_logits
from fedveil.common.tasks.multi_label import MultiLabel, SeveralLabels
from fedveil.deploy.policy_file import pins_of
from fedveil.experiments.api.result import Run
from fedveil.experiments.evaluate import evaluate_run
from fedveil.experiments.in_process import run_in_process
from fedveil.experiments.serving.merge import load_finished, merge_run
from fedveil.strategies.job import configure
from fedveil.strategies.resolve import config_of

pytestmark = pytest.mark.rough_prices
WORDS = ("warm", "dull", "tired")
LABELS = "warm,dull,tired"


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def rows_of(count: int) -> list[dict[str, Any]]:
    """Return texts whose labels are those of the words that occur in them, some of them none."""
    rows = []
    for i in range(count):
        labels = [word for bit, word in enumerate(WORDS) if i >> bit & 1]
        rows.append({"text": " ".join(["the", "film", "was", *labels, "quite"][: 5 + i % 2]), "label": labels})
    return rows


@pytest.fixture
def several(toy_settings: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    data = written(tmp_path / "rows.jsonl", rows_of(160))
    return {
        **toy_settings,
        "model.task": "multi-label",
        "data.name": str(data),
        "data.labels": LABELS,
        "data.test-size": 40,
        "data.partition": "iid",
        "rounds": 1,
    }


def read(path: Path, separator: str = "", **data: Any) -> Any:
    settings = {"data.labels": LABELS, "data.label-separator": separator, **data}
    config = config_of({"model.task": "multi-label", **settings}).data
    return load_protected(config, "multi-label", str(path))


def test_rows_have_any_of_the_labels_or_none_and_others_are_left_out(tmp_path: Path) -> None:
    jsonl = written(
        tmp_path / "a.jsonl",
        [
            {"text": "one", "label": ["dull", "warm", "dull"]},
            {"text": "two", "label": []},
            {"text": "three", "label": ["cold"]},
            {"text": "four"},
            {"text": "five", "label": "tired"},
        ],
    )
    reading = read(jsonl)
    assert [cast(SeveralLabels, one).labels for one in reading.dataset.examples] == [(1, 1, 0), (0, 0, 0), (0, 0, 1)]
    assert [one.reason for one in reading.unfit] == [
        "has a label that is not among data.labels",
        "has no value in column 'label' (data.label)",
    ]
    table = tmp_path / "a.csv"
    table.write_text("text,label\none,dull; warm\ntwo,\nthree,dull;cold\nfive,tired\n", encoding="utf-8")
    again = read(table, ";")
    assert again.dataset.fingerprint() == reading.dataset.fingerprint()
    assert len(again.unfit) == 1
    with pytest.raises(DataError, match=r"'cold', which is not among data\.labels"):
        load_dataset(config_of({"model.task": "multi-label", "data.labels": LABELS}).data, "multi-label", str(jsonl))


def test_no_order_of_labels_makes_records_others(tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", rows_of(8))
    turned = read(path, **{"data.labels": "tired,warm,dull"}).dataset
    assert turned.fingerprint() == read(path).dataset.fingerprint()
    other = replace(turned, examples=(*turned.examples[:-1], replace(turned.examples[-1], labels=(1, 0, 0))))
    assert other.fingerprint() != turned.fingerprint(), "the labels are not in the records"


def test_the_separator_is_pinned(several: dict[str, Any]) -> None:
    pins = pins_of("multi-label", {"label-separator": ";"}, LABELS, 32)
    assert pins["label-separator"] == ";"
    assert pins["label"] == "label"


class Linear(nn.Module):
    def __init__(self, width: int, labels: int) -> None:
        super().__init__()
        self.head = nn.Linear(width, labels, dtype=torch.float64)

    def forward(self, batch: Any) -> torch.Tensor:
        logits: torch.Tensor = self.head(batch["x"])
        return logits


def test_a_records_loss_and_gradient_are_the_mean_of_its_labels() -> None:
    task, module = MultiLabel(), Linear(5, 3)
    x, labels = torch.randn(4, 5, dtype=torch.float64), torch.tensor([[1, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0]])
    sums = task.sums(module, {"x": x, "labels": labels})
    for i in range(4):
        own = [
            torch.autograd.grad(loss, [*module.parameters()], retain_graph=True)
            for loss in (
                sums.losses[i],
                F.binary_cross_entropy(module.head(x[i]).sigmoid(), labels[i].double(), reduction="mean"),
            )
        ]
        for one, other in zip(*own, strict=True):
            assert float((one - other).abs().max()) < 1e-14
    given = module({"x": x}) >= 0
    assert sums.whole.tolist() == (given == labels.bool()).all(1).tolist()
    assert sums.parts is not None
    assert sums.parts()[:, 0].sum() == (given & labels.bool()).sum()
    logits = torch.randn(4, 3)
    assert torch.allclose(own_logits(logits, labels), (logits * labels).sum(1))
    assert torch.equal(own_logits(logits, torch.tensor([0, 2, 1, 1])), logits[range(4), [0, 2, 1, 1]])


def test_a_private_step_has_the_gradients_that_autograd_has(model_folder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float64, each record passing alone through autograd, none of them clipped."""
    world = several_world(model_folder("bert"))
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    world.model.module.double()
    own = [alone(world, record) for record in world.records]
    summed = [torch.stack(parts).sum(0) for parts in zip(*own, strict=True)]
    assert norm(minus(released(world, [world.records], plan(100.0)), summed)) < 1e-7 * norm(summed)


def test_neighbours_and_padding_move_no_bit(several: dict[str, Any], tmp_path: Path) -> None:
    model = OneSite(several, {"site": "clinic", "data": several["data.name"], "public-size": 160}).model()
    dataset = load_dataset(configure(several).config.data, "multi-label")
    records = prepared(model, dataset.examples)[:6]
    length, rows = model.shapes.length_of(max(map(model.collator.size, records))), model.shapes.rows_of(128)
    with torch.no_grad():
        beside = model.losses(model.fixed_batch(records, length, max(rows, 6)))
        for i, record in enumerate(records):
            alone = model.losses(model.fixed_batch([record], length, max(rows, 6)))
            assert torch.equal(alone[0], beside[i])


def test_a_private_run_is_judged_by_micro_f1_and_answers_with_labels(several: dict[str, Any], tmp_path: Path) -> None:
    settings = {**several, "rounds": 2, "training.learning-rate": 2.0}
    folder = run_in_process(settings, 2)
    line = read_lines(RoundLine, folder)[-1]
    assert not line.failures
    assert [figure.name for figure in line.figures] == ["micro F1", "macro F1", "exact match"]
    assert [part.label for part in line.parts] == [*WORDS]
    assert line.accuracy == line.figures[0].value
    scored = evaluate_run(folder)
    assert (scored.accuracy, scored.name) == (line.accuracy, "micro F1")
    assert "micro F1" in repr(Run(folder).accuracy)
    model = load_finished(folder)
    (answers,) = model.answers([("the film was warm",)])
    assert {answer.text for answer in answers} == {*WORDS}
    assert all(answer.chosen == ((answer.probability or 0) >= 0.5) for answer in answers)
    predicted = Run(folder).predict(["the film was warm", "dull"])
    assert [*predicted.columns] == ["labels", *WORDS]


def test_stock_classes_compute_the_same_logits_after_the_merge(several: dict[str, Any], tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    config = BertConfig(vocab_size=len(VOCABULARY), max_position_embeddings=40, **sizes)
    AutoModel.from_config(config).save_pretrained(tmp_path / "bert")
    tiny_tokenizer().save_pretrained(tmp_path / "bert")
    settings = {**several, "model.name": str(tmp_path / "bert"), "head.pool": "stock", "model.feature-scale": 0.0}
    folder = run_in_process({**settings, "adapter.targets": "query,value"}, 2)
    code = merge_run(folder, tmp_path / "merged")
    assert "text-classification" in code
    stock = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    assert stock.config.problem_type == "multi_label_classification"
    tokens = AutoTokenizer.from_pretrained(tmp_path / "merged")("the film was warm", return_tensors="pt")
    finished = load_finished(folder)
    record = finished.task.prepare(finished.base, [SeveralLabels(text="the film was warm", label=0)], finished.limit)
    with torch.no_grad():
        own = finished.module(finished.task.collate(finished.base, record))
        assert float((stock(**tokens).logits - own).abs().max()) < 1e-5


def test_derivatives_of_one_label_are_refused(several: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="phases has jacobians, which are of one label a record"):
        configure({**several, "recipe": "metric", "rounds": 12})


@pytest.mark.parametrize("fault", [SOUND, EACH_CLIPPED, LABEL_CLIPPED], ids=lambda fault: fault.name or "sound")
def test_one_record_moves_class_means_of_all_its_labels_by_one_clip(fault: Fault, model_folder: Any) -> None:
    world = several_world(model_folder("bert"))
    assert audit_class_means(world.model, world.records, fault).passed


@pytest.mark.parametrize("fault", [SOUND, LABELS_COUNTED, ANY_COUNTED], ids=lambda fault: fault.name or "sound")
def test_one_record_moves_the_count_of_whole_answers_by_one(fault: Fault, model_folder: Any) -> None:
    world = several_world(model_folder("bert"))
    assert audit_count(world.model, world.records, fault).passed
