"""Score a finished run's model beside the one that the run began with, on sets other than the run's own test data.

Public data and the run's folder are read, and nothing else. Both models answer the same batches, so that no difference
is one of rounding.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from fedveil.common.config.sections import DataConfig
from fedveil.common.data.named import DATASETS
from fedveil.common.data.sources import is_paired, load_dataset, public_test, slice_of, slices_of, train_and_test
from fedveil.common.errors import ConfigError, DataError
from fedveil.common.files import expanded, finite, replace_file
from fedveil.common.hub import name_sources
from fedveil.common.labels import labels_text
from fedveil.common.model.batching import length_batches
from fedveil.common.model.device import autocast, choose_attention, choose_batch_tokens
from fedveil.common.model.federated import FederatedModel
from fedveil.common.model.score import MOST_CONFUSED
from fedveil.common.model.scoring import score_records
from fedveil.common.run_lines import AdapterFile, read_if_there
from fedveil.common.strict_json import to_json
from fedveil.common.tasks import TASKS, Batch, Sums, Task
from fedveil.common.tasks.base import IGNORED, unfolds
from fedveil.common.tasks.examples import Dataset, Example
from fedveil.common.tasks.roles import LABEL
from fedveil.experiments.evaluate import PRECISIONS, Result, about_of, base_of, data_of, load_result, result_of
from fedveil.reports.evaluated import Answer, EvaluatedFile, Evaluation, Pair, change_of
from fedveil.reports.scores import ALL, FigureReport, figure_reports
from fedveil.server.begin import begun_in_public
from fedveil.server.model import ServerModel
from fedveil.strategies.job import configure


@dataclass(frozen=True)
class ScoredSet:
    """Records to score on, with the run's labels."""

    name: str
    data: Dataset
    column: str = ""
    """Of their slices; empty: they have none."""
    left_out: int = 0
    """Records that the run's sites trained on."""


def evaluate_on(run: Path, sources: Sequence[str], column: str = "") -> list[Evaluation]:
    """Score a run's final model, and its cuts to smaller ranks, on sets, beside the model that the run began with.

    Args:
        run: the run's folder, which gets the file ``evaluated.json``.
        sources: named data sets, or files with the run's columns.
        column: of the files, by whose values scores are given as well; empty: ``data.slice`` of the run's test data.

    Raises:
        DataError: there is no saved adapter, or a set cannot be read, or is none of the run's task and labels.
        ConfigError: a row of the run is not registered here, or a column is asked for of a named set.
        ModelError: the base model on this machine has other weights than the run's.
    """
    adapter = run / "adapter"
    about = about_of(adapter)
    name_sources(sources)
    sets = [set_of(about, source, column) for source in dict.fromkeys(sources)]
    kept = read_if_there(EvaluatedFile, run) or EvaluatedFile([])
    final = load_result(adapter)
    before = _beginning(about)
    found = [_evaluation(one, before, final, "final") for one in sets]
    for rank, cut in sorted((int(path.name), path) for path in (run / "ranks").glob("[0-9]*")):
        result = result_of(about, base_of(about, about.base_model, about.base_files), adapter, cut)
        found += [_evaluation(one, before, result, f"rank {rank}") for one in sets]
    others = [one for one in kept.evaluations if one.set not in {new.set for new in found}]
    content = json.dumps(finite(to_json(EvaluatedFile([*others, *found]))), indent=2, ensure_ascii=False) + "\n"
    replace_file(run / EvaluatedFile.NAME, content.encode())
    return found


def set_of(about: AdapterFile, source: str, column: str) -> ScoredSet:
    """Return the records of a source; of the run's own data those that no site trained on.

    Raises:
        DataError: it cannot be read, is none of the run's task and labels, or sites trained on all of it.
        ConfigError: a column is asked for, of a named set.
    """
    own, named, labels = data_of(about), DATASETS.get(source), tuple(about.label_names)
    name = source if named or source.startswith("hub:") else expanded(source).name
    if _same(source, own.test or own.name):
        own = replace(own, slice=column or own.slice)
        return ScoredSet(name + ", the test part" * (not own.test), public_test(own, about.task), own.slice)
    if named and column:
        raise ConfigError(f"--slice names a column of files, and {name} is a named set: score it without --slice")
    if _same(source, own.name):
        raise DataError(f"the run's sites trained on {name}: name other records, or the run's test data")
    if named is None:
        beside = replace(own, name=source, test=source * bool(column), slice=column, labels=labels_text(labels))
        data = load_dataset(replace(beside, partition="iid", person=""), about.task)
        return _untrained(own, about.task, ScoredSet(name, data, column))
    paired = ("text_pair" in named.fields) == is_paired(own, about.task)
    # A record's one label is renumbered; where it has several, they are in the run's order.
    alike = {*named.label_names} <= {*labels} if LABEL in TASKS[about.task].roles else named.label_names == labels
    if named.task != about.task or not paired or not alike:
        raise DataError(
            f"{name} has other records than this run, which is of model.task {about.task!r}"
            f"{f' with the labels {labels_text(labels)}' if labels else ''}: name a set of these, or a file with the "
            "run's columns"
        )
    data = load_dataset(replace(own, name=source, slice="", labels="", partition="iid", person=""), about.task)
    places = [labels.index(label) for label in data.label_names]
    moved = [e if e.label is None else replace(e, label=places[e.label]) for e in data.examples]
    return _untrained(own, about.task, ScoredSet(name, replace(data, examples=tuple(moved), label_names=labels)))


def _untrained(own: DataConfig, task: str, one: ScoredSet) -> ScoredSet:
    """Return a set without what sites trained on, where that is a named data set; no other records of sites are read.

    Two texts that differ by case, blanks and marks alone are one: GLUE has blanks before its full stops.

    Raises:
        DataError: nothing is left.
    """
    trained = set(map(_bare, train_and_test(own, task)[0].examples)) if own.name in DATASETS else set()
    left = tuple(example for example in one.data.examples if _bare(example) not in trained)
    if not left:
        raise DataError(f"the run's sites trained on all records of {one.name}: name another set")
    return replace(one, data=replace(one.data, examples=left), left_out=len(one.data.examples) - len(left))


def _bare(example: Example) -> str:
    return re.sub(r"\W", "", example.likeness())


def _same(source: str, other: str) -> bool:
    return bool(other) and (source == other or expanded(source).absolute() == expanded(other).absolute())


def _beginning(about: AdapterFile) -> FederatedModel:
    """Return the model of a run before any record was used."""
    job = configure({**about.settings, "model.name": about.base_model})
    server = ServerModel(job)
    server.model.write(begun_in_public(job, server).adapter)
    return server.model


def _evaluation(one: ScoredSet, before: FederatedModel, result: Result, model: str) -> Evaluation:
    """Return what a model gained and forgot on a set."""
    labels, counts = result.about.label_names, result.task.counted
    classes = len(labels) if len(labels) <= MOST_CONFUSED else 0
    pairs, figures = _pairs(one, before, result)
    names = [slice_of(example) for example in one.data.examples]
    slices = slices_of(one.data, one.column)
    changes = [change_of(ALL, pairs, counts=counts, classes=classes)]
    for name in slices:
        own = [pair for pair, of in zip(pairs, names, strict=True) if of == name]
        changes.append(change_of(name, own, counts=counts, classes=classes))
    column = one.column or "site" * bool(slices)
    said = (one.name, one.data.fingerprint(), one.left_out, model, list(labels), column)
    return Evaluation(*said, changes, figures)


@torch.no_grad()
def _pairs(one: ScoredSet, before: FederatedModel, result: Result) -> tuple[list[Pair], list[FigureReport]]:
    """Return both models' answers to each record of a set, and what the task's score has beside of all of them."""
    task, base, device, examples = result.task, result.base, before.device, one.data.examples
    choose_attention(base.module, device)
    modules = before.module.to(device).eval(), result.module.to(device).eval()
    records = task.prepare(base, examples, task.limit(base, result.about.max_length))
    options = task.scored.options
    beside = options is not None and any(len(options(base, record)) > 1 for record in records)
    precision, pairs = PRECISIONS[result.about.precision], dict[int, Pair]()
    for group in length_batches([task.size(record) for record in records], choose_batch_tokens(0, device)):
        batch = {k: v.to(device) for k, v in task.collate(base, [records[i] for i in group]).items()}
        with autocast(device, precision):
            (first, had), (last, has) = (_sums(task, module, batch) for module in modules)
        drifts: list[float | None] = [None] * len(group)
        if not unfolds(task):
            drifts[:] = drift_of(had[-1], has[-1], batch["labels"], ahead=result.module.head is None)
        for i, earlier, later, drift in zip(group, _answers(first), _answers(last), drifts, strict=True):
            pairs[i] = Pair(earlier, later, drift, examples[i].label)
        beside = beside or first.parts is not None or bool(first.beside) or first.ratios is not None
    whole = [score_records(module, task, base, records, device, precision) for module in modules if beside]
    figures = figure_reports(*(score.figures for score in whole)) if whole else []
    return [pairs[i] for i in range(len(records))], figures


def _sums(task: Task, module: nn.Module, batch: Batch) -> tuple[Sums, list[Tensor]]:
    """Return a model's sums of a batch, and the logits of each pass that they come from."""
    logits = list[Tensor]()
    hook = module.register_forward_hook(lambda _module, _given, out: logits.append(out))
    try:
        return task.sums(module, batch), logits
    finally:
        hook.remove()


def _answers(sums: Sums) -> list[Answer]:
    given = sums.predicted.tolist() if sums.predicted is not None else [None] * len(sums.loss)
    columns = sums.correct.tolist(), sums.loss.tolist(), sums.weight.tolist(), given
    return [Answer(*values) for values in zip(*columns, strict=True)]


def drift_of(before: Tensor, after: Tensor, labels: Tensor, *, ahead: bool) -> list[float]:
    """Return KL(before || after) of each record's answers, in nats, summed over them.

    Args:
        before, after: logits, shape (records, classes), or (records, tokens, classes).
        labels: of the records, shape (records,), or of the tokens, where ``IGNORED`` ones are no answers; or for each
            class a yes or no, shape (records, classes).
        ahead: whether a token's logits are of the next token.
    """
    if before.dim() == labels.dim():  # each class is a yes or no
        before, after = (torch.stack([logits, torch.zeros_like(logits)], -1) for logits in (before, after))
        labels = torch.zeros_like(labels)
    elif ahead:
        before, after, labels = before[:, :-1], after[:, :-1], labels[:, 1:]
    return [_divergence(p[chosen], q[chosen]) for p, q, chosen in zip(before, after, labels != IGNORED, strict=True)]


def _divergence(before: Tensor, after: Tensor) -> float:
    p, q = before.double().log_softmax(-1), after.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum())
