"""Published systems and what a run has for each: settings that are that system, a command, or why there is none.

A row of a table that no system names here is put into the page all the same, under its own name.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from common.adapters import ADAPTERS
from common.config.sections import Scalar
from common.privacy.figures import epsilon_text
from common.privacy.privacy_filter import promised
from common.starts import STARTS
from common.tasks.sentence_modules import ENCODER
from common.words import bytes_text
from docs.make.tables import DEFAULT_RANK, DEFAULT_SHAPES, markdown
from strategies import ROWS, STRATEGIES
from strategies.job import Job, configure
from strategies.payload import payload, preset_adapter
from strategies.renamed import REFUSED_STRATEGIES
from strategies.rules import RULES
from strategies.systems import BLOCK_LORA

AXES: Mapping[str, Mapping[str, type[Any]]] = {
    "strategy": ROWS,
    "adapter.name": ADAPTERS,
    "adapter.start": STARTS,
    "server.rule": RULES,
}
"""The tables whose rows are parts of published systems, by the setting that names a row."""


CONFIGS = "experiments/configs/systems"
"""Where the configurations of systems lie, from the repository's root."""
RANKS = "1,2,4,8"
"""Of the sites of a simulation, where a system is about sites of unlike ranks; the last is the plain job's."""


@dataclass(frozen=True)
class System:
    """One published system."""

    name: str
    """As the field calls it."""
    settings: Mapping[str, Scalar] = field(default_factory=dict)
    """That make a run of it, where they differ from the plain job's; empty: there is no such run."""
    file: str = ""
    """Where more than two settings are needed: the configuration in ``experiments/configs/systems`` that has them."""
    besides: str = ""
    """What else there is to do than the run, in words; empty: nothing."""
    instead: str = ""
    """What there is where it is no run, in words; empty: the reason stands among refused strategies."""


OF_LANGUAGE: Mapping[str, Scalar] = {
    "rounds": 3,
    "model.name": "SmolLM2-135M-Instruct",
    "model.task": "causal-lm",
    "model.max-length": 128,
    "data.name": "asdiv",
    "data.partition": "iid",
    "data.test-size": 100,
    "adapter.targets": "q_proj,v_proj",
    "head.policy": "frozen",
    "training.sample-rate": 0.06,
    "training.batch-tokens": 1024,
    "privacy.delta": 5e-4,
}
"""Settings of a run of a language model, for systems that are for those alone."""
SYSTEMS: tuple[System, ...] = (
    System("FedAvg on LoRA, FedIT", {"recipe": "plain", "strategy": "fedavg-lora"}),
    System("FFA-LoRA", {"strategy": "ffa-lora"}),
    System("FedSVD", {"strategy": "fed-svd"}),
    System("Fed-SB on LoRA-SB", {"strategy": "fed-sb", "adapter.start": "dp-gradient"}),
    System("LoRA-XS, federated", {"strategy": "fed-sb", "adapter.start": "svd-of-weights"}),
    System("IntTune of NLoRA", {"strategy": "fed-sb", "adapter.start": "nystrom"}),
    System("FedEx-LoRA", {"strategy": "fedex-lora"}),
    System("FLoRA", {"strategy": "flora"}),
    System("RoLoRA", {"strategy": "rolora"}),
    System("FlexLoRA, by increments", {"strategy": "flexlora", "flexlora.simulated": RANKS}),
    System(
        "HetLoRA, padded states and weights by norm",
        {"strategy": "hetlora", "hetlora.simulated": RANKS, "privacy.mode": "none"},
        file="hetlora",
    ),
    System(
        "Heterogeneous ranks (HetLoRA, FLoRA), exact",
        {"strategy": "heterogeneous-ranks", "heterogeneous-ranks.simulated": RANKS},
    ),
    System("DyLoRA", {"strategy": "dylora"}),
    System("FlyLoRA", {"strategy": "flylora", "adapter.start": "sparse"}),
    System("IncreLoRA", {"strategy": "increlora"}),
    System("DiffoRA", {"strategy": "diffora"}),
    System("SwitchLoRA", {"strategy": "switchlora"}),
    System(
        "SoRA, and the rank selection of CoDyRA",
        {
            "strategy": "ffa-lora",
            "server.rule": "soft-threshold",
            "server.optimizer": "momentum",
            "server.momentum": 0.0,
            "server.learning-rate": 10.0,
        },
        file="sora",
    ),
    System("FedSA-LoRA", {"strategy": "fedsa-lora"}),
    System("rsLoRA", {"strategy": "fedavg-lora", "adapter.scale": "sqrt-rank"}),
    System("DoRA", {"strategy": "fedavg-lora", "adapter.name": "dora"}),
    System("DoRA, exact: the magnitudes alone", {"strategy": "fedavg-lora", "adapter.name": "dora-magnitude"}),
    System("DoRA, exact: norms frozen at the start", {"strategy": "fedavg-lora", "adapter.name": "dora-frozen-norm"}),
    System(
        "PiSSA",
        {
            "strategy": "fedavg-lora",
            "adapter.name": "lora-increments",
            "adapter.start": "svd-of-weights",
            "start.singular-values": True,
        },
        file="pissa",
    ),
    System(
        "PiSSA, A alone frozen",
        {"strategy": "ffa-lora", "adapter.start": "svd-of-weights", "adapter.alpha": 0.0},
        file="pissa-a-frozen",
    ),
    System(
        "MiLoRA, A alone frozen",
        {"strategy": "ffa-lora", "adapter.start": "minor-of-weights", "adapter.alpha": 0.0},
        file="milora-a-frozen",
    ),
    System("MiSS", {"strategy": "ffa-lora", "adapter.start": "shards", "adapter.alpha": 0.0}, file="miss"),
    System("MiSS mini", {"strategy": "fed-sb", "adapter.start": "shards"}),
    System(
        "Bone: block affine, later called bat",
        instead="not built: blocks of W0 multiply what is trained, (W_ij + I) D_i, so it has full rank, no form as "
        "LoRA and no export but its own, and it sees no more of a gradient than random directions do",
    ),
    System(
        "EVA from public text, ranks not spread",
        {"strategy": "ffa-lora", "adapter.start": "eva", "adapter.alpha": 0.0},
        file="eva",
    ),
    System(
        "EVA, paid for, ranks not spread",
        {"strategy": "ffa-lora", "adapter.start": "dp-eva", "adapter.alpha": 0.0},
        file="eva-paid-for",
    ),
    System(
        "LoRA-GA from public records",
        {
            "strategy": "fedavg-lora",
            "adapter.name": "lora-increments",
            "adapter.start": "lora-ga",
            "start.data": "imdb-endings",
        },
        file="lora-ga",
    ),
    System(
        "LoRA-GA from public records, A alone frozen",
        {
            "strategy": "ffa-lora",
            "adapter.start": "lora-ga",
            "start.data": "imdb-endings",
            "adapter.alpha": 0.0,
        },
        file="lora-ga-a-frozen",
    ),
    System(
        "LoRA-GA, A alone, paid for",
        {"strategy": "ffa-lora", "adapter.start": "dp-lora-ga", "adapter.alpha": 0.0},
        file="lora-ga-paid-for",
    ),
    System("RandLoRA", {"strategy": "fedavg-lora", "adapter.name": "randlora"}),
    System(
        "LoLDU",
        {
            "strategy": "fedavg-lora",
            "adapter.name": "lora-diagonal",
            "adapter.start": "lu-of-weights",
            "adapter.alpha": 0.0,
        },
        file="loldu",
    ),
    System(
        "Singular values alone, LoLDU's control",
        {
            "strategy": "fedavg-lora",
            "adapter.name": "lora-diagonal",
            "adapter.start": "svd-of-weights",
            "adapter.alpha": 0.0,
        },
        file="svd-diagonal",
    ),
    System(
        "S2-LoRA",
        {
            "strategy": "fedavg-lora",
            "adapter.name": "lora-diagonal",
            "adapter.start": "shared",
            "server.rule": "soft-threshold",
            "server.optimizer": "momentum",
            "server.momentum": 0.0,
            "server.learning-rate": 10.0,
        },
        file="s2-lora",
    ),
    System(
        "SALT",
        {"strategy": "fedavg-lora", "adapter.name": "salt", "adapter.start": "svd-of-weights"},
        file="salt",
    ),
    System(
        "LoRA-Pro",
        {
            "strategy": "fedavg-lora",
            "server.rule": "lora-pro",
            "server.optimizer": "momentum",
            "server.learning-rate": 10.0,
        },
        file="lora-pro",
    ),
    System("ALLoRA", {"strategy": "ffa-lora", "server.rule": "allora"}),
    System(
        "AlignGuard",
        {**OF_LANGUAGE, "strategy": "ffa-lora", "server.rule": "align-guard", "server.learning-rate": 0.005},
        file="align-guard",
    ),
    System("FedAdam (FedOpt)", {"strategy": "fedavg-lora", "server.optimizer": "adam"}),
    System("Block-LoRA", instead=BLOCK_LORA),
    System(
        "CoDyRA, from task to task",
        {
            "strategy": "ffa-lora",
            "model.name": f"merged/{ENCODER}",
            "server.rule": "soft-threshold",
            "server.optimizer": "momentum",
            "server.momentum": 0.0,
            "server.learning-rate": 10.0,
        },
        file="codyra",
        besides="on the encoder of what `fedveil merge RUN_FOLDER merged` made, charged to the same ledger "
        "([by columns](strategies.md#by-columns-of-b))",
    ),
    System(
        "LoRAM",
        {**OF_LANGUAGE, "model.name": "small", "strategy": "ffa-lora"},
        file="loram",
        besides="on what `fedveil prune` made, then `fedveil recover RUN_FOLDER` ([pruned bases](pruned.md))",
    ),
    System(
        "LoRAPrune",
        {
            **OF_LANGUAGE,
            "strategy": "ffa-lora",
            "adapter.targets": "v_proj,down_proj",
            "server.scores": True,
            "training.local-steps": 1,
            "training.optimizer": "sgd",
            "training.learning-rate": 1.0,
        },
        file="loraprune",
        besides="then `fedveil prune --by RUN_FOLDER` ([pruned bases](pruned.md))",
    ),
    System(
        "Gazal-R1, its first stage",
        instead="`fedveil run -c experiments/configs/gazal-r1-stage1.toml`: DoRA at rsLoRA's scale on prompts and "
        "completions; the second stage, which learns from rewards, is not built",
    ),
    System(
        "Intruder dimensions", instead="`fedveil intruders RUN_FOLDER` ([planning](planning.md#intruder-dimensions))"
    ),
)


def named_rows() -> set[tuple[str, str]]:
    """Return the rows of the axes that some system names, as (setting, row)."""
    return {(key, str(value)) for system in SYSTEMS for key, value in system.settings.items() if key in AXES}


def unnamed_rows() -> Iterator[tuple[str, str]]:
    """Yield the rows of the axes that no system names, as (setting, row)."""
    named = named_rows()
    yield from ((key, name) for key, rows in AXES.items() for name in rows if (key, name) not in named)


def system_table() -> str:
    """Return the Markdown table of every system: how it is run, whether averages are exact, its price and its bytes."""
    header = (
        "system",
        "run it with",
        "averages are exact",
        "privacy modes",
        "the start costs",
        "up, a site and round",
        "down",
        "up before round 1",
        "down, once",
    )
    return markdown(header, [_row(system) for system in SYSTEMS])


def _row(system: System) -> list[str]:
    if system.instead:
        return [system.name, system.instead, *[""] * 7]
    strategy = str(system.settings["strategy"])
    if strategy in REFUSED_STRATEGIES:
        return [system.name, f"refused: {REFUSED_STRATEGIES[strategy]}", *[""] * 7]
    job = configure(system.settings)
    down, up = payload(job.strategy, _at_default_rank(job), DEFAULT_SHAPES)
    typed = f"`fedveil run -c {CONFIGS}/{system.file}.toml`" if system.file else written(system.settings)
    typed += f" {system.besides}" if system.besides else ""
    exact = "yes" if job.strategy.exact(type(job.adapter)) else "no"
    sizes = [bytes_text(number) if number else "nothing" for number in (up, down, _released(job), _once(job))]
    return [system.name, typed, exact, job.strategy.privacy, _price(job), *sizes]


def _price(job: Job) -> str:
    """Return what the start is made from; of a paid release, what that alone comes to at the job's ε and δ."""
    privacy, release = job.config.privacy, job.origin.release()
    if release is None:
        return job.origin.needs
    alone = promised([release], privacy.delta)[0]
    return f"{job.origin.needs}: ε {epsilon_text(alone)} if it stood alone, of {privacy.epsilon:g}"


def _once(job: Job) -> int:
    """Return the bytes of the frozen factors that travel once to each site; 0 where it derives them."""
    adapter = _at_default_rank(job)
    layers = {
        f"layer {i}": {name: torch.zeros(shape) for name, shape in adapter.shapes(out, into).items()}
        for i, (out, into) in enumerate(DEFAULT_SHAPES)
    }
    basis = job.basis(job.strategy.start(layers, adapter.trained))
    return 4 * sum(tensor.numel() for factors in basis.values() for tensor in factors.values())


def _released(job: Job) -> int:
    """Return the bytes of what a site sends in round 0 for the start; 0 where it is not asked."""
    if job.origin.asked != "sites":
        return 0
    model = replace(job, adapter=replace(job.adapter, rank=DEFAULT_RANK)).model(("bad", "good"))
    layout = job.origin.layout(model)
    return 4 * sum(math.prod(shape) for factors in layout.values() for shape in factors.values())


def written(settings: Mapping[str, Scalar]) -> str:
    """Return settings as they stand in a configuration, each in Markdown's marks."""
    return " ".join(f"`{key} = {_toml(value)}`" for key, value in settings.items())


def _at_default_rank(job: Job) -> Any:
    return type(job.adapter)(DEFAULT_RANK, float(DEFAULT_RANK), ())


def row_table() -> str:
    """Return the Markdown table of all rows that no system names."""
    rows = []
    for key, name in unnamed_rows():
        rows.append([f"`{key} = {_toml(name)}`", title_of(AXES[key][name])])
    return markdown(("row", "what it is"), rows)


def strategy_costs() -> str:
    """Return the Markdown table of what each strategy sends and how its noise enters, at the plain job's layers."""
    rows = []
    for strategy in STRATEGIES.values():
        adapter = preset_adapter(strategy, DEFAULT_RANK)
        down, up = payload(strategy(), adapter, DEFAULT_SHAPES)
        noise = strategy.noise or adapter.noise
        rows.append([f"`{strategy.name}`", strategy.needs, noise, bytes_text(up), bytes_text(down)])
    header = ("strategy", "the server takes", "noise in the weights, per step", "up, a site and round", "down")
    return markdown(header, rows)


def row_texts(key: str) -> str:
    """Return what the file of every row of an axis says of it: its paper, what differs from that, and why."""
    return "\n\n".join(f"### `{name}`\n\n{text_of(row)}" for name, row in AXES[key].items())


def text_of(row: type[Any]) -> str:
    """Return the whole text about a row, as Markdown.

    >>> from strategies.fedex_lora import FedExLoRA
    >>> text_of(FedExLoRA).split("\\n")[0]
    'FedEx-LoRA: both factors averaged, and what their product misses added to the base.'
    """
    module = inspect.getmodule(row)
    return inspect.cleandoc((module.__doc__ if module else "") or row.__doc__ or "").replace("``", "`")


def title_of(row: type[Any]) -> str:
    """Return the first line of the text about a row, without its dot."""
    return text_of(row).split("\n\n")[0].replace("\n", " ").rstrip(".")


def _toml(value: object) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value).lower()
