"""Synthetic tables: records written by a finished language model, without reading any record of a site."""

from __future__ import annotations

import csv
import io
import json
import random
import secrets
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from fedveil.common.check import NOT_NEGATIVE, POSITIVE, OneOf
from fedveil.common.config.sections import DataConfig
from fedveil.common.errors import ConfigError, DataError
from fedveil.common.files import write_output
from fedveil.common.labels import labels_of
from fedveil.common.model.device import choose_attention, choose_device
from fedveil.common.tasks import TASKS
from fedveil.common.tasks.cells import shown_as_text
from fedveil.common.tasks.finished import Finished, Sampling
from fedveil.common.tasks.template import COMPLETION, PROMPT, WHOLE, Template, template_of
from fedveil.experiments.evaluate import about_of, data_of
from fedveil.experiments.serving.merge import load_finished
from fedveil.reports import report_of
from fedveil.reports.table_card import Drawn, table_card

DRAWS = 4
"""Most texts that are sampled for each row that is wanted."""
AT_ONCE = 64
"""Texts of one pass."""
Row = Mapping[str, str]


@dataclass(frozen=True)
class Wanted:
    """What a table is to be."""

    rows: int
    shares: str = ""
    """``label=share`` or labels alone, separated by commas; empty: the run's ``data.labels``, evenly."""
    sampling: Sampling = field(default_factory=Sampling)
    seed: int | None = None
    """Of a test; None: the operating system's random numbers."""


def generate_table(run: Path, target: Path, wanted: Wanted, progress: Callable[[str], object] = print) -> Drawn:
    """Write records in a run's columns to ``target`` (JSONL or CSV), and a card beside it.

    Every prompt is public, the model is what the run released, and nothing else is read: whatever the run claims, the
    table has.

    Raises:
        ConfigError: the run does not learn whole records, or the shares are none.
        DataError: a file is there already or cannot be written, or no text fits the run's template.
        ModelError: the base model on this machine is not the run's.
    """
    POSITIVE.check("--rows", wanted.rows)
    OneOf(WRITERS).check("the ending of --out", target.suffix.lower())
    card = target.with_suffix(".md")
    if there := next((path for path in (target, card) if path.exists()), None):
        raise DataError(f"{there} exists already, and nothing is written over: name a new file")
    about = about_of(run / "adapter")
    data = data_of(about)
    template = _template(data, about.task)
    shares = shares_of(wanted.shares, data) if template.prompted else {"": 1.0}
    model = load_finished(run)
    device = choose_device(str(about.settings.get("device", "auto")))
    choose_attention(model.base.module, device)
    model.module.to(device)
    rows, drawn = _draw(model, template, wanted, shares, data, progress)
    written = WRITERS[target.suffix.lower()](rows)
    report = report_of(run)
    write_output({target: written, card: table_card(report, target.name, drawn, written).encode()}, [run])
    return drawn


def _template(data: DataConfig, task: str) -> Template:
    questions = TASKS[task].questions
    if questions and questions.continued and ((template := data.columns["template"]) or not data.columns["prompt"]):
        return template_of(template or WHOLE)
    raise ConfigError(
        f"this run of model.task {task!r} has not learnt whole records, so it can write none: train one with "
        f'-c \'model.task="causal-lm" data.template="Label: {PROMPT}. Text: {COMPLETION}"\''
    )


def shares_of(text: str, data: DataConfig) -> dict[str, float]:
    """Return the share of each label, of sum 1, as the command's option or the run's settings name them.

    Raises:
        ConfigError: no label is named, one is named twice, or a share is no number above 0.
    """
    shares: dict[str, float] = {}
    for part in labels_of(text) or labels_of(data.labels):
        label, given, share = part.rpartition("=") if text else (part, "", "")
        label = (label if given else part).strip()
        try:
            value = float(share) if given else 1.0
        except ValueError:
            value = 0.0
        if not 0 < value < float("inf") or not label or label in shares:
            raise ConfigError(f"--shares has {part!r}: write each label once with a number above 0, such as 'good=3'")
        shares[label] = value
    if not shares:
        raise ConfigError(
            f"which values data.prompt has ({data.columns['prompt']!r}) is not counted from records: name them with "
            "--shares 'good=3,bad=1', or train with data.labels"
        )
    return {label: value / sum(shares.values()) for label, value in shares.items()}


def _counts(rows: int, shares: Mapping[str, float]) -> dict[str, int]:
    """Return how many rows each label gets: its share, rounded so that the sum is ``rows``."""
    counts = {label: int(rows * share) for label, share in shares.items()}
    late = sorted(shares, key=lambda label: counts[label] - rows * shares[label])
    return {label: count + (label in late[: rows - sum(counts.values())]) for label, count in counts.items()}


def _draw(
    model: Finished,
    template: Template,
    wanted: Wanted,
    shares: Mapping[str, float],
    data: DataConfig,
    progress: Callable[[str], object],
) -> tuple[list[Row], Drawn]:
    seed = secrets.randbits(63) if wanted.seed is None else wanted.seed
    NOT_NEGATIVE.check("--seed", seed)
    found: list[Row] = []
    lost, kept = Counter[str](), Counter[str]()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        for label, count in _counts(wanted.rows, shares).items():
            texts, before = list[str](), lost.total()
            while len(texts) < count and (left := DRAWS * count - len(texts) - lost.total() + before) > 0:
                number = min(AT_ONCE, left, count - len(texts))
                texts += _sample(model, template, label, number, wanted.sampling, lost)
                progress(f"{len(found) + len(texts)} of {wanted.rows} rows")
            found += [_row(data, template, label, text) for text in texts]
            kept[label] = len(texts)
    if not found:
        raise DataError(f"none of {lost.total()} texts was a record ({_reasons(lost)}): nothing is written")
    random.Random(seed).shuffle(found)  # noqa: S311 - the order of rows, of which none is anyone's
    return found, Drawn(
        columns=tuple(found[0]),
        rows=len(found),
        wanted=wanted.rows,
        texts=len(found) + lost.total(),
        most=DRAWS * wanted.rows,
        lost=dict(lost),
        repeated=len(found) - len({tuple(row.values()) for row in found}),
        shares=dict(shares),
        kept=dict(kept),
        template=data.columns["template"],
        sampling=wanted.sampling,
        seeded=wanted.seed is not None,
    )


def _sample(
    model: Finished, template: Template, label: str, number: int, how: Sampling, lost: Counter[str]
) -> list[str]:
    """Return the completions of ``number`` sampled texts that are records, and count the others by their reason."""
    kept = []
    for text in model.continued([label] if template.prompted else [""], number, how):
        completion = None if text is None or "\ufffd" in text else template.completion_in(text)
        if completion is not None and " ".join(completion.split()).isprintable():
            kept.append(completion)
        else:
            lost["without an end" if text is None else "not of the template's form"] += 1
    return kept


def _row(data: DataConfig, template: Template, label: str, text: str) -> Row:
    prompt = {data.columns["prompt"]: label} if template.prompted else {}
    return {**prompt, data.columns["completion"]: text}


def _reasons(lost: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in lost.items())


def _jsonl(rows: Sequence[Row]) -> bytes:
    return "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows).encode()


def _csv(rows: Sequence[Row]) -> bytes:
    """Return rows as CSV, in which a spreadsheet computes no cell."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(rows[0])
    writer.writerows([shown_as_text(cell) for cell in row.values()] for row in rows)
    return text.getvalue().encode()


WRITERS: Mapping[str, Callable[[Sequence[Row]], bytes]] = {".jsonl": _jsonl, ".csv": _csv}
"""How a table is written, by its file's ending."""
