"""Cells of the product task × adapter × start × strategy × mechanism, from the tables themselves, and tiny runs.

A row that comes to a table is in every cell that it can be in, without being named here. What a kind of task reads is
no row's to say: it has tiny records in ``World``.
"""

from __future__ import annotations

import csv
import json
import random
import re
import shutil
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from itertools import combinations, product
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from digits import TOKENS, digits, encoded, save_vit
from libraries import drawn_library

from audits.tiny_models import FILLER, write_reviews
from fedveil.common.adapters import ADAPTERS
from fedveil.common.adapters.layers import layers_of
from fedveil.common.config.flat import defaults
from fedveil.common.errors import ConfigError
from fedveil.common.messages.state import OWN, AdapterState
from fedveil.common.run_lines import RoundLine, read_lines
from fedveil.common.starts import STARTS, check_directions, class_means
from fedveil.common.tasks import TASKS
from fedveil.experiments.evaluate import evaluate_run
from fedveil.experiments.in_process import run_in_process
from fedveil.privacy import MECHANISMS
from fedveil.server import conduct
from fedveil.server.model import ServerModel
from fedveil.strategies import ROWS, STRATEGIES
from fedveil.strategies.base import check_adapter
from fedveil.strategies.job import Job, configure
from fedveil.strategies.options import known_settings

SITES, IN_A_SUM = 2, 3
"""Sites of a run, and of one whose server sees a sum alone."""
LIGHT: Sequence[tuple[str, str]] = (("task", "adapter"), ("task", "mechanism"), ("adapter", "strategy"))
"""Axes of which every pair runs a round, whatever the mechanism's unit."""
BY_MODE: Sequence[tuple[str, str]] = (("adapter", "mechanism"), ("strategy", "mechanism"))
"""Axes of which every pair runs a round with one unit of each mode: the others differ in what is drawn and clipped."""
BEGUN: Sequence[tuple[str, str]] = (("task", "start"), ("adapter", "start"))
"""Axes of which every pair begins, up to round 1."""
LENGTH = 15
"""Most tokens of a record: of two shapes, that are rehearsed, and all records have one."""
TRAIN, TEST = 24, 8
"""Records of the sites together, and of the public test."""
TEMPLATE = (
    "{%- for m in messages %}{{ 'question ' if m.role == 'user' else 'answer ' }}{{ m.content + ' ' }}{% endfor %}"
)
TEMPLATE += "{{ 'answer ' if add_generation_prompt else '' }}"
MODES: Mapping[str, Mapping[str, Any]] = {
    "secure-sum": {
        "privacy.honest-sites": IN_A_SUM - 1,
        "privacy.noise-multiplier": 1.0,
        "privacy.epsilon": 1000.0,
    },
    "client-level": {"privacy.cohort": SITES, "privacy.noise-multiplier": 1.0, "privacy.epsilon": 1000.0},
}
"""What only people know of a mechanism."""


class Cell(NamedTuple):
    """One row of each axis."""

    task: str
    adapter: str
    start: str
    strategy: str
    mechanism: str
    """A mode, and after a blank the unit that it protects."""


Pair = tuple[tuple[str, str], tuple[str, str]]
"""Two rows of two axes, each as (axis, row)."""


def axes(*, core: bool = False) -> dict[str, tuple[str, ...]]:
    """Return the rows of every axis, or the core's; a mechanism that promises something is there once for each unit."""
    mechanisms = [
        f"{mode} {unit.name}" for mode, row in MECHANISMS.items() for unit in (row.units if row.claims else (row.unit,))
    ]
    beside = (ADAPTERS.core, STARTS.core, STRATEGIES.core) if core else (ADAPTERS, STARTS, ROWS)
    return dict(zip(Cell._fields, map(tuple, (TASKS.core if core else TASKS, *beside, mechanisms)), strict=True))


def is_core(pair: Pair) -> bool:
    """Return whether no row of a pair is beside the core."""
    rows = axes(core=True)
    return all(row in rows[axis] for axis, row in pair)


def pairs_of(cell: Cell) -> list[Pair]:
    return list(combinations(zip(Cell._fields, cell, strict=True), 2))


def all_pairs(*, core: bool = False) -> list[Pair]:
    rows = {axis: [(axis, row) for row in values] for axis, values in axes(core=core).items()}
    return [pair for one, two in combinations(rows, 2) for pair in product(rows[one], rows[two])]


def sentence(error: ConfigError) -> str:
    """Return the message of a refusal; an AssertionError unless it is one sentence that names a setting."""
    said = str(error)
    assert "\n" not in said, f"more than one line: {said!r}"
    assert not re.search(r"[.!?] [A-Z]", said.replace("e.g. ", "")), f"more than one sentence: {said!r}"
    words = set(re.findall(r"[a-z][a-z0-9.-]*[a-z0-9]", said))
    assert words & named(), f"no setting is named: {said!r}"
    return said


@cache
def named() -> frozenset[str]:
    return frozenset(known_settings())


# Records and models of every kind of task -----------------------------------------------------------------------------


@dataclass
class World:
    """A folder with tiny records and a tiny model for every task; runs go there too."""

    folder: Path
    model_folder: Callable[[str], str]
    made: dict[str, dict[str, Any]] = field(default_factory=dict)
    libraries: dict[str, dict[str, str]] = field(default_factory=dict)

    def of_task(self, task: str) -> dict[str, Any]:
        """Return the settings that are the task's."""
        if task not in self.made:
            own, made_by = self.folder / task, f"_{task.replace('-', '_')}"
            assert hasattr(self, made_by), f"give contracts.World a method {made_by} with tiny records of the task"
            own.mkdir()
            self.made[task] = {"model.task": task, **getattr(self, made_by)(own)}
        return self.made[task]

    def of_library(self, task: str) -> dict[str, str]:
        """Return the settings of a start at a library for the task's model, which is drawn once."""
        folder = self.folder / "libraries" / task
        if not folder.exists():
            plain = self.settings(Cell(task, "lora-frozen-a", "orthonormal", "ffa-lora", "none record"))
            self.libraries[task] = drawn_library(folder, plain)
        return self.libraries[task]

    def settings(self, cell: Cell) -> dict[str, Any]:
        """Return the flat settings of the cell's run."""
        mode, unit = cell.mechanism.split(" ")
        own = dict(self.of_task(cell.task))
        public = own.pop("public")
        options = defaults(STARTS[cell.start])
        private = {"privacy.unit": unit} if MECHANISMS[mode].claims else {}
        return {
            **own,
            "strategy": cell.strategy,
            "adapter.name": cell.adapter,
            "adapter.start": cell.start,
            "privacy.mode": mode,
            "privacy.delta": 1e-3,
            **private,
            **MODES.get(mode, {}),
            **({"data.person": "author"} if unit == "person" else {}),
            **({"start.data": public} if "data" in options else {}),
            **({"start.about": "letters"} if "about" in options else {}),
            **(self.of_library(cell.task) if "library" in options else {}),
            **({"start.records": 16} if "records" in options else {}),
            "data.test-size": TEST,
            "data.partition": "iid",
            "adapter.rank": 3,
            "adapter.alpha": 6.0,
            "rounds": 1,
            "server.optimizer": "none",
            "training.optimizer": "sgd",
            "training.learning-rate": 0.5,
            "training.local-steps": 1,
            "training.sample-rate": 0.5,
            "precision": "float32",
            "device": "cpu",
            "output": str(self.folder / "runs"),
        }

    def _classification(self, folder: Path) -> dict[str, Any]:
        for seed, name in enumerate(("reviews", "public")):
            write_reviews(folder / f"{name}.csv", TRAIN + TEST, seed)
        return {
            "model.name": self.model_folder("bert"),
            "model.max-length": LENGTH,
            "data.name": str(folder / "reviews.csv"),
            "adapter.targets": "query,intermediate.dense",
            "head.start": "random",
            "public": str(folder / "public.csv"),
        }

    def _multi_label(self, folder: Path) -> dict[str, Any]:
        draw = random.Random(0)
        for name in ("texts", "public"):
            texts = [draw.choices(FILLER, k=6) for _ in range(TRAIN + TEST)]
            rows = [
                {"text": " ".join(text), "label": sorted({*text} & {*FILLER[:3]}), "author": f"a{i % 7}"}
                for i, text in enumerate(texts)
            ]
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return {
            **{key: value for key, value in self.of_task("classification").items() if key != "model.task"},
            "data.name": str(folder / "texts.jsonl"),
            "data.labels": ",".join(FILLER[:3]),
            "public": str(folder / "public.jsonl"),
        }

    def _token_classification(self, folder: Path) -> dict[str, Any]:
        draw = random.Random(0)
        for name in ("names", "public"):
            rows = [
                {
                    "text": draw.choices(FILLER, k=6),
                    "label": ["B-PER", *["I-PER", "O"][: i % 3], "O"],
                    "author": f"a{i % 7}",
                }
                for i in range(TRAIN + TEST)
            ]
            for row in rows:
                row["label"] = [*row["label"], *["O"] * 6][:6]
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return {
            "model.name": self.model_folder("bert"),
            "model.max-length": LENGTH,
            "data.name": str(folder / "names.jsonl"),
            "data.labels": "O,B-PER,I-PER",
            "adapter.targets": "query,intermediate.dense",
            "head.start": "random",
            "public": str(folder / "public.jsonl"),
        }

    def _causal_lm(self, folder: Path) -> dict[str, Any]:
        return self._generative(folder, lambda one, two: {"prompt": one, "completion": two})

    def _instruction(self, folder: Path) -> dict[str, Any]:
        return self._generative(folder, lambda one, two: {"prompt": one, "completion": two})

    def _chat(self, folder: Path) -> dict[str, Any]:
        def turns(one: str, two: str) -> dict[str, Any]:
            return {"messages": [{"role": "user", "content": one}, {"role": "assistant", "content": two}]}

        return self._generative(folder, turns)

    def _generative(self, folder: Path, record: Callable[[str, str], dict[str, Any]]) -> dict[str, Any]:
        draw = random.Random(0)
        for name in ("talks", "public"):
            rows = [
                {
                    **record(" ".join(draw.choices(FILLER, k=5)), " ".join(draw.choices(FILLER, k=3))),
                    "author": f"a{i % 7}",
                }
                for i in range(TRAIN + TEST)
            ]
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        shutil.copytree(self.model_folder("llama"), folder / "model")
        (folder / "model" / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
        return {
            "model.name": str(folder / "model"),
            "model.max-length": LENGTH,
            "data.name": str(folder / "talks.jsonl"),
            "adapter.targets": "q_proj,v_proj",
            "head.policy": "frozen",
            "public": str(folder / "public.jsonl"),
        }

    def _image_classification(self, folder: Path) -> dict[str, Any]:
        for name, first in (("digits", 0), ("public", 100)):
            with (folder / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
                table = csv.writer(file)
                table.writerow(["image", "label", "author"])
                for i, (pixels, label) in enumerate(digits(start=first, count=TRAIN + TEST)):
                    (folder / f"{name}-{i}.png").write_bytes(encoded(pixels))
                    table.writerow([f"{name}-{i}.png", label, f"a{i % 7}"])
        (folder / "model").mkdir()
        return {
            "model.name": save_vit(folder / "model"),
            "model.max-length": TOKENS,
            "data.name": str(folder / "digits.csv"),
            "data.labels": "0,1",
            "adapter.targets": "q_proj,fc1",
            "head.start": "random",
            "public": str(folder / "public.csv"),
        }

    def _grpo(self, folder: Path) -> dict[str, Any]:
        own = self._generative(folder, lambda one, two: {"prompt": one, "completion": two})
        return {**own, "rollout.new-tokens": 4, "rollout.completions": 2, "rollout.rewards": "length:1"}

    def _preference(self, folder: Path) -> dict[str, Any]:
        return self._generative(folder, lambda one, two: {"prompt": one, "chosen": two, "rejected": f"{one} {two}"})

    def _audio_classification(self, folder: Path) -> dict[str, Any]:
        from spoken_world import world_of

        return world_of(folder, "audio-classification", TRAIN + TEST)

    def _speech_to_text(self, folder: Path) -> dict[str, Any]:
        from spoken_world import world_of

        return world_of(folder, "speech-to-text", TRAIN + TEST)


# What a cell must do --------------------------------------------------------------------------------------------------


@dataclass
class Contracts:
    """The verdicts of cells, each asked for once."""

    world: World
    verdicts: dict[Cell, Job | str] = field(default_factory=dict)

    def verdict(self, cell: Cell) -> Job | str:
        """Return the cell's job, or the sentence by which it is refused; any other exception goes through."""
        if cell not in self.verdicts:
            try:
                self.verdicts[cell] = configure(self.world.settings(cell))
            except ConfigError as error:
                self.verdicts[cell] = sentence(error)
        return self.verdicts[cell]

    def asked(self, cell: Cell) -> None:
        """Ask for the cell's verdict."""
        self.verdict(cell)

    def begun(self, cell: Cell) -> None:
        """Begin the accepted cell's run, by a statistic of the shape that it asks for.

        An AssertionError unless every factor is there, finite and in its shape, what hangs on another fits it, and
        what was asked for moved something.
        """
        job = self.verdict(cell)
        assert isinstance(job, Job)
        server = ServerModel(job)
        state = job.start(server.start)
        if job.origin.asked != "nobody":
            if job.origin.asked == "server":
                statistic = server.public_statistic()
            else:
                drawn = torch.Generator().manual_seed(1)
                layout = job.origin.layout(server.model)
                statistic = server.completed(
                    {k: {n: torch.randn(s, generator=drawn) for n, s in f.items()} for k, f in layout.items()}
                )
            state = job.begin(server.start, statistic)
            assert moved(state.adapter, server.start) or not statistic, "what round 0 asked for moved nothing"
        shapes = {
            layer: job.adapter.shapes(int(held.out_features), int(held.in_features))  # type: ignore[call-overload]
            for layer, held in layers_of(server.model.peft_model).items()
        }
        for layer, every in shapes.items():
            factors = state.adapter.get(layer, {})
            wanted = {n: shape for n, shape in every.items() if n in factors or n not in job.adapter.traits.shared}
            assert {name: tuple(tensor.shape) for name, tensor in factors.items()} == wanted, layer
            assert all(bool(tensor.isfinite().all()) for tensor in factors.values()), layer
            given = {name: factors[name] for name in job.adapter.directions if name in factors}
            for name, tensor in job.adapter.begin(given, factors).items():
                assert torch.allclose(tensor, factors[name], atol=1e-5), f"{name} of {layer} fits another start"
        assert not shapes or set(state.adapter) - {*OWN} == {layer for layer, wanted in shapes.items() if wanted}

    def ran(self, cell: Cell) -> None:
        """Run the accepted cell; an AssertionError unless all sites answered and the export scores as the run did."""
        settings = self.world.settings(cell)
        shutil.rmtree(self.world.folder / "runs", ignore_errors=True)
        summed = MECHANISMS[settings["privacy.mode"]].summed
        folder = run_in_process(settings, IN_A_SUM if summed else SITES)
        lines = read_lines(RoundLine, folder)
        assert lines[-1].round_number == settings["rounds"]
        assert not [said for line in lines for said in (*line.refusals, *line.failures)]
        assert lines[-1].loss is not None
        scored = evaluate_run(folder)
        assert abs(scored.loss - lines[-1].loss) <= 1e-4 * max(1.0, lines[-1].loss), (scored.loss, lines[-1].loss)


def moved(adapter: AdapterState, start: AdapterState) -> bool:
    return any(
        layer not in start or name not in start[layer] or not torch.equal(tensor, start[layer][name])
        for layer, factors in adapter.items()
        for name, tensor in factors.items()
    )


# Which cells ----------------------------------------------------------------------------------------------------------


def refused_by_tables(*, core: bool = False) -> set[Pair]:
    """Return the pairs that the rows themselves refuse, whatever the rest of a run is: their own checks are asked."""
    found: set[Pair] = set()
    rows = axes(core=core)
    for adapter, start in product(rows["adapter"], rows["start"]):
        if ADAPTERS[adapter].directions and refuses(check_directions, STARTS[start](), ADAPTERS[adapter]):
            found.add((("adapter", adapter), ("start", start)))
    for adapter, strategy in product(rows["adapter"], rows["strategy"]):
        if refuses(check_adapter, ROWS[strategy], ADAPTERS[adapter]):
            found.add((("adapter", adapter), ("strategy", strategy)))
    for start, mechanism in product(rows["start"], rows["mechanism"]):
        if STARTS[start].needs not in MECHANISMS[mechanism.split(" ")[0]].starts:
            found.add((("start", start), ("mechanism", mechanism)))
    return found


def refuses(check: Callable[..., object], *given: Any) -> bool:
    try:
        check(*given)
    except ConfigError:
        return True
    return False


def cells(without: Collection[Pair] = (), *, core: bool = False) -> Iterator[Cell]:
    """Yield every cell in which none of these pairs is."""
    refused = set(without)
    for cell in map(Cell._make, product(*axes(core=core).values())):
        if not refused or refused.isdisjoint(pairs_of(cell)):
            yield cell


def cover(
    wanted: Iterable[Pair], among: Sequence[Cell], accepts: Callable[[Cell], bool], held: Iterable[Cell] = ()
) -> tuple[list[Cell], set[Pair]]:
    """Return accepted cells that hold every wanted pair that some accepted cell holds, and the pairs that none does.

    Greedy, and the same every time: of the cells with a pair that is not covered yet, the one with the most such pairs.
    What cells that are ``held`` already cover is not wanted.
    """
    left = dict.fromkeys(wanted)
    for pair in (pair for cell in held for pair in pairs_of(cell)):
        left.pop(pair, None)
    holding: dict[Pair, list[Cell]] = defaultdict(list)
    for cell in among:
        for pair in pairs_of(cell):
            if pair in left:
                holding[pair].append(cell)
    refused: set[Cell] = set()
    chosen, never = list[Cell](), set[Pair]()
    for pair in list(left):
        while pair in left:
            open_cells = [cell for cell in holding[pair] if cell not in refused]
            if not open_cells:
                never.add(pair)
                del left[pair]
                break
            best = max(open_cells, key=lambda cell: sum(p in left for p in pairs_of(cell)))
            if accepts(best):
                chosen.append(best)
                for one in pairs_of(best):
                    left.pop(one, None)
            else:
                refused.add(best)
    return chosen, never


def of_axes(wanted: Iterable[Pair], kinds: Collection[tuple[str, str]]) -> list[Pair]:
    return [pair for pair in wanted if (pair[0][0], pair[1][0]) in kinds]


def derived(pair: Pair) -> bool:
    """Return whether a pair is of an adapter and a start that asks nobody: ``test_new_starts`` begins all of them."""
    return pair[0][0] == "adapter" and pair[1][0] == "start" and STARTS[pair[1][1]]().asked == "nobody"


def one_unit(pair: Pair) -> bool:
    """Return whether the mechanism of a pair, its last row, is the first of its mode."""
    mode = pair[1][1].split(" ")[0]
    return pair[1][1] == next(name for name in axes()["mechanism"] if name.startswith(f"{mode} "))


def broken(check: Callable[[Cell], None], some: list[Cell]) -> dict[Cell, str]:
    """Return the cells that do not hold what they promise, and what is wrong."""
    found = {}
    for cell in some:
        try:
            check(cell)
        except Exception as error:  # whatever a cell raises is what is to be found
            found[cell] = f"{type(error).__name__}: {error}"
    return found


class Covered:
    """The cells that hold all pairs of the core's rows, or all others, in three parts by what is done with each."""

    def __init__(self, contracts: Contracts, *, core: bool) -> None:
        self.by_tables = refused_by_tables(core=core)
        self.pairs = {pair for pair in all_pairs(core=core) if core or not is_core(pair)}
        wanted = [pair for pair in all_pairs(core=core) if pair in self.pairs and pair not in self.by_tables]
        among = list(cells(self.by_tables, core=core))

        def accepts(cell: Cell) -> bool:
            return isinstance(contracts.verdict(cell), Job)

        runs = [*of_axes(wanted, LIGHT), *(pair for pair in of_axes(wanted, BY_MODE) if one_unit(pair))]
        self.run, _ = cover(runs, among, accepts)
        begun = [pair for pair in of_axes(wanted, BEGUN) if core or not derived(pair)]
        self.begun, _ = cover(begun, among, accepts, self.run)
        self.rest, self.never = cover(wanted, among, accepts, [*self.run, *self.begun])

    def check(self, contracts: Contracts) -> None:
        """Raise AssertionError unless every pair is accepted somewhere or refused everywhere."""
        held = {pair for cell in (*self.run, *self.begun, *self.rest) for pair in pairs_of(cell)} & self.pairs
        refused = (self.never | self.by_tables) & self.pairs
        assert held | refused == self.pairs
        assert not held & refused
        assert all(isinstance(contracts.verdict(cell), Job) for cell in self.rest)
        rows = {item for pair in self.pairs for item in pair}
        assert {item for pair in held for item in pair} == rows, "a row goes with nothing"
        kinds = Counter((pair[0][0], pair[1][0]) for pair in refused)
        print("pairs that no run has:", *(f"{one} and {two}: {n}" for (one, two), n in sorted(kinds.items())), sep="\n")

    def check_refused(self, contracts: Contracts) -> None:
        """Raise AssertionError unless what tables refuse is refused in one sentence."""
        plain = {
            "task": "classification",
            "start": "orthonormal",
            "strategy": "fedavg-lora",
            "mechanism": "none record",
        }
        for pair in self.by_tables & self.pairs:
            cell = Cell(**{"adapter": "lora", **plain, **dict(pair)})
            if pair[0][0] == "start":  # of a mechanism: an adapter and a strategy that take any start
                cell = cell._replace(adapter="lora-metric" if STARTS[cell.start].gives[0] == "B" else "lora")
            assert isinstance(contracts.verdict(cell), str), f"{pair} is accepted"


@contextmanager
def quickened(folder: Path, model_folder: Callable[[str], str]) -> Iterator[Contracts]:
    """Yield contracts over tiny worlds in a folder, which is removed afterwards."""
    with pytest.MonkeyPatch.context() as patch:
        # Thousands of jobs are asked for, and nobody reads the reports.
        patch.setattr(conduct, "write_reports", lambda *_, **__: None)
        # A map of the tiny models' 16 features needs no more made-up texts, each of which is a pass of its own.
        patch.setattr(class_means, "MADE", 48)
        patch.setattr("fedveil.common.starts.public_metric.MADE", 48)
        yield Contracts(World(folder, model_folder))
    shutil.rmtree(folder)
