"""Published systems and what a run has for each: settings that make it, a command, or the reason why it is missing.

A row of a table that no system names here is put into the page all the same, under its own name.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from docs.make.differences import DIFFERENCES
from docs.make.tables import markdown
from fedveil.common.adapters import ADAPTERS
from fedveil.common.config.flat import Scalar
from fedveil.common.starts import STARTS
from fedveil.common.tasks.sentence_modules import ENCODER
from fedveil.strategies import ROWS
from fedveil.strategies.requirements import REFUSED_STRATEGIES
from fedveil.strategies.rules import RULES

AXES: Mapping[str, Mapping[str, type[Any]]] = {
    "strategy": ROWS,
    "adapter.name": ADAPTERS,
    "adapter.start": STARTS,
    "server.rule": RULES,
}
"""The tables whose rows are parts of published systems, by the setting that names a row."""


CONFIGS = "experiments/configs/systems"
"""Where the configurations of systems lie, from the repository's root."""
LIBRARY = "[a library](../guides/serve.md#a-library-of-adapters)"
"""Where a page says how adapters of one basis are kept."""
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
    System("FlexLoRA, by increments", {"strategy": "flexlora", "adapter.site-ranks": RANKS}),
    System(
        "HetLoRA, padded states and weights by norm",
        {"strategy": "hetlora", "adapter.site-ranks": RANKS, "privacy.mode": "none"},
        file="hetlora",
    ),
    System(
        "Heterogeneous ranks (HetLoRA, FLoRA), exact",
        {"strategy": "heterogeneous-ranks", "adapter.site-ranks": RANKS},
    ),
    System("DyLoRA", {"strategy": "dylora"}),
    System("FlyLoRA", {"strategy": "flylora", "adapter.start": "sparse"}),
    System("IncreLoRA", {"strategy": "increlora"}),
    System("DiffoRA", {"strategy": "diffora"}),
    System("DiffoRA, its gates in turn", {"strategy": "diffora-gates"}),
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
    System(
        "Full fine-tuning of square layers",
        {
            "strategy": "ffa-lora",
            "adapter.start": "shards",
            "adapter.rank": 384,
            "adapter.alpha": 384.0,
            "adapter.targets": "query,key,value,attention.output.dense",
        },
        file="full-square",
    ),
    System("MiSS mini", {"strategy": "fed-sb", "adapter.start": "shards"}),
    System("Bone: block affine, later called bat", {"strategy": "fedavg-lora", "adapter.name": "bone"}),
    System(
        "EVA from public text, ranks not spread",
        {"strategy": "ffa-lora", "adapter.start": "eva", "adapter.alpha": 0.0},
        file="eva",
    ),
    System(
        "EVA from public text, ranks spread",
        {"strategy": "eva-ranks", "adapter.start": "eva", "start.mean-rank": 3, "adapter.alpha": 0.0},
        file="eva-ranks",
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
    System("S2-LoRA, the pair trained in turn", {"strategy": "s2-lora", "s2-lora.threshold": 0.001}),
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
    System(
        "Block-LoRA",
        instead="n blocks are LoRA of n times less rank, whose scale is √n times as large, and would send n times the "
        "numbers: divide adapter.rank by n and adapter.alpha by √n",
    ),
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
        "([by columns](../concepts/strategies.md#others))",
    ),
    System(
        "LoRAM",
        {**OF_LANGUAGE, "model.name": "small", "strategy": "ffa-lora"},
        file="loram",
        besides="on what `prune` made, then `recover RUN_FOLDER` of `python -m fedveil.contrib.experiments` "
        "([pruned bases](../guides/serve.md#pruned-base-models))",
    ),
    System(
        "LoRAPrune",
        {
            **OF_LANGUAGE,
            "strategy": "ffa-lora",
            "adapter.targets": "v_proj,down_proj",
            "server.rule": "loraprune",
            "training.local-steps": 1,
            "training.optimizer": "sgd",
            "training.learning-rate": 1.0,
        },
        file="loraprune",
        besides="then `python -m fedveil.contrib.experiments prune --by RUN_FOLDER` "
        "([pruned bases](../guides/serve.md#pruned-base-models))",
    ),
    System(
        "GRPO",
        instead="`fedveil run -c experiments/configs/grpo-asdiv.toml`: sites reward what the model writes to their "
        "prompts, on Fed-SB's R",
    ),
    System(
        "Gazal-R1",
        instead="`fedveil run -c experiments/configs/gazal-r1-stage1.toml`: DoRA at rsLoRA's scale on prompts and "
        "completions; then `fedveil merge RUN_FOLDER gazal-r1-stage1`, and GRPO from there by gazal-r1-stage2.toml",
    ),
    System(
        "A LoRA judge as the reward",
        instead="`fedveil run -c experiments/configs/medmcqa-pairs.toml` trains a judge that gives answers numbers, "
        "`asdiv-pairs.toml` beside it prefers answers without one; `fedveil judge RUN --pairs FILE` asks either; a "
        "merged judge is GRPO's reward (`rollout.judge`)",
    ),
    System(
        "Trans-LoRA",
        instead="`fedveil transfer RUN_FOLDER --to MODEL --texts FILE` ([another base model]"
        "(../guides/serve.md#another-base-model))",
    ),
    System(
        "LoRALib",
        instead='`fedveil library init`, `add` and `list` keep adapters on one basis; `adapter.start = "library"` '
        f"begins at the one that most records vote for, in private ({LIBRARY})",
    ),
    System(
        "LoraHub",
        instead='`adapter.name = "lora-mixture"` behind `adapter.start = "library"` or `"described"` '
        f"trains a weight of each adapter in each layer ({LIBRARY})",
    ),
    System(
        "SG-LoRA",
        instead='`adapter.start = "described"`, or `fedveil library suggest`, weighs a library\'s adapters by public '
        f"descriptions ({LIBRARY}); its generator learns from hundreds of adapters of one base and is not built",
    ),
    System(
        "CMLoRA",
        instead="`fedveil compose --rule cat` is the merge that it compares itself with; its order and its cache are "
        "of the steps of image diffusion, and no task here has one",
    ),
    System(
        "LiON-LoRA",
        instead="`fedveil library list` shows overlaps and norms, `fedveil compose --equal-norms` makes norms equal "
        f"({LIBRARY}); its token scales the motion of a video model, and no task here has one",
    ),
    System(
        "RSAR",
        instead="not applicable: it has no adapter, its detector has batch norm, so that a record has no gradient "
        "of its own, and its code is under CC BY-NC",
    ),
    System(
        "Intruder dimensions",
        instead="`python -m fedveil.contrib.experiments intruders RUN_FOLDER` "
        "([planning](../guides/planning.md#intruder-dimensions))",
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
    """Return the Markdown table of every system: its row or command, its paper, and what differs."""
    return markdown(("system", "run it with", "paper", "what differs here"), [_row(system) for system in SYSTEMS])


def _row(system: System) -> list[str]:
    paper, differs = DIFFERENCES.get(system.name, ("", ""))
    return [system.name, _how(system), paper, differs]


def _how(system: System) -> str:
    if system.instead:
        return system.instead
    strategy = str(system.settings["strategy"])
    if strategy in REFUSED_STRATEGIES:
        return f"refused: {REFUSED_STRATEGIES[strategy]}"
    typed = f"`fedveil run -c {CONFIGS}/{system.file}.toml`" if system.file else written(system.settings)
    return f"{typed} {system.besides}" if system.besides else typed


def written(settings: Mapping[str, Scalar]) -> str:
    """Return settings as they stand in a configuration, each in Markdown's marks."""
    return " ".join(f"`{key} = {_toml(value)}`" for key, value in settings.items())


def row_table() -> str:
    """Return the Markdown table of all rows that no system names."""
    rows = []
    for key, name in unnamed_rows():
        rows.append([f"`{key} = {_toml(name)}`", title_of(AXES[key][name])])
    return markdown(("row", "what it is"), rows)


def text_of(row: type[Any]) -> str:
    """Return the whole text about a row, as Markdown.

    >>> from fedveil.contrib.strategies.fedex_lora import FedExLoRA
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
