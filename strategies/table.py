"""The tables of the axes in docs, made from the code; tests keep the pages equal."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import torch

from common.adapters import ADAPTERS, Adapter
from common.config.sections import defaults
from common.data.sets import DATASETS, UserFile
from common.docstrings import said_of
from common.errors import ConfigError
from common.messages.columns import narrowed
from common.messages.state import AdapterState
from common.starts import STARTS, Start
from common.tasks import TASKS
from common.words import bytes_text
from strategies import STRATEGIES, Strategy, of_turn
from strategies.rules import RULES

DEFAULT_SHAPES: Sequence[tuple[int, int]] = ((384, 384),) * 12
"""(m, n) of the plain job's layers: query and value of MiniLM's six blocks."""
DEFAULT_RANK = 8
SHOWN_LABELS = 6
"""Labels of a data set that its table lists."""
_SIDES = ((5, 7, 11), (3, 29, 19))
"""Stand-ins for the rank r, the outputs m and the inputs n of a layer: different primes, so that a product of them
tells its factors."""
_POWERS = {2: "²", 3: "³"}


def travels(strategy: Strategy, adapter: Adapter, out: int, into: int) -> tuple[AdapterState, AdapterState]:
    """Return what travels down and up in a round for one layer with ``into`` inputs and ``out`` outputs, as examples.

    The numbers are random; names and shapes are a run's. The head and what is sent once are left out.
    """
    draw = torch.Generator().manual_seed(0)
    shapes = adapter.shapes(out, into).items()
    layer = {"layer": {factor: torch.randn(shape, generator=draw) for factor, shape in shapes}}
    trained = {"layer": {factor: layer["layer"][factor] for factor in adapter.trained}}
    down = strategy.downlink(strategy.start(layer, adapter.trained))
    chosen = strategy.columns(down, 0)
    trained = of_turn(trained, strategy.turn(1))
    return down, strategy.uplink(trained if chosen is None else narrowed(trained, chosen))


def payload(strategy: Strategy, adapter: Adapter, layers: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Return the bytes that travel down and up in a round over all layers of (out, in), at four bytes a number."""
    down = up = 0
    for (out, into), times in Counter(layers).items():
        both = travels(strategy, adapter, out, into)
        down, up = (total + 4 * times * _numbers(state) for total, state in zip((down, up), both, strict=True))
    return down, up


def preset_adapter(strategy: type[Strategy], rank: int) -> Adapter:
    """Return the adapter that a strategy takes by default, at a rank, on no layer in particular."""
    return ADAPTERS[strategy.adapter](rank, float(rank), ())


def _numbers(state: AdapterState) -> int:
    return sum(tensor.numel() for factors in state.values() for tensor in factors.values())


def _formulas(strategy: type[Strategy]) -> list[str]:
    """Return how many numbers of a layer travel down and up, in r, m and n."""
    said = []
    for sides in _SIDES:
        rank, out, into = sides
        both = travels(strategy(), preset_adapter(strategy, rank), out, into)
        said.append([" + ".join(_product(t.shape, sides) for f in s.values() for t in f.values()) for s in both])
    first, second = said
    return [_agreed(left, right) for left, right in zip(first, second, strict=True)]


def _agreed(left: str, right: str) -> str:
    return left if left == right else "by layer"


def _product(shape: Sequence[int], sides: tuple[int, int, int]) -> str:
    """Return the number of elements of a shape in letters.

    >>> _product((7, 5), (5, 7, 11)), _product((5, 5), (5, 7, 11)), _product((22,), (5, 7, 11))
    ('m·r', 'r²', '2·n')
    """
    rest, letters = math.prod(shape), Counter[str]()
    for size in shape:
        for letter, side in zip("rmn", sides, strict=True):
            while size % side == 0:
                size, rest, letters = size // side, rest // side, letters + Counter(letter)
    words = [letter + _POWERS.get(power, "" if power == 1 else f"^{power}") for letter, power in letters.items()]
    return "·".join([str(rest)] * (rest != 1 or not words) + words)


def _row(strategy: type[Strategy]) -> str:
    adapter = preset_adapter(strategy, DEFAULT_RANK)
    down, up = payload(strategy(), adapter, DEFAULT_SHAPES)
    down_formula, up_formula = _formulas(strategy)
    cells = [
        f"`{strategy.name}` ({strategy.paper})",
        f"`{adapter.name}`",
        ", ".join(adapter.trained),
        f"{up_formula} = {up:,} B",
        f"{down_formula} = {down:,} B",
        "yes" if strategy.exact(type(adapter)) else "no",
        strategy.noise or adapter.noise,
        strategy.privacy,
    ]
    return "| " + " | ".join(cells) + " |"


def strategy_table() -> str:
    """Return the Markdown table of all strategies, each with the adapter that it takes by default."""
    header = "| strategy | adapter | trained | up: per layer = per site and round "
    header += "| down: per layer = per site and round | exact | noise in the weights, per step | privacy modes |"
    return "\n".join([header, "|" + "---|" * 8, *map(_row, STRATEGIES.values())])


def short_table() -> str:
    """Return the Markdown table of all strategies in words, for whoever reads the first page."""
    header = ("strategy", "sites train", "frozen", "averages are exact", "a site sends in a round of the plain job")
    rows = []
    for strategy in STRATEGIES.values():
        adapter = preset_adapter(strategy, DEFAULT_RANK)
        factors = [", ".join(adapter.trained), ", ".join(adapter.frozen) or "none"]
        exact = "yes" if strategy.exact(type(adapter)) else "no"
        sent = f"{bytes_text(payload(strategy(), adapter, DEFAULT_SHAPES)[1])}, and the head"
        rows.append([f"`{strategy.name}` ({strategy.paper})", *factors, exact, sent])
    return markdown(header, rows)


def _factors(adapter: type[Adapter], names: Sequence[str]) -> str:
    """Return each factor with how many numbers it has in a layer."""
    first, second = (
        {name: _product(shape, sides) for name, shape in adapter(sides[0], 1.0, ()).shapes(*sides[1:]).items()}
        for sides in _SIDES
    )
    return ", ".join(f"{name} ({_agreed(first[name], second[name])})" for name in names) or "none"


def adapter_table() -> str:
    """Return the Markdown table of all adapters."""
    header = ("adapter", "trained", "frozen", "linear in what is trained", "noise in the weights, per step")
    rows = []
    for adapter in ADAPTERS.values():
        trained, frozen = (_factors(adapter, names) for names in (adapter.trained, adapter.frozen))
        rows.append([f"`{adapter.name}`", trained, frozen, "yes" if adapter.linear else "no", adapter.noise])
    return markdown(header, rows)


def pair_table() -> str:
    """Return the Markdown table of every adapter that each strategy takes, its own first."""
    header = ("strategy", "adapter", "trained", "frozen", "averages are exact", "up, B", "down, B")
    rows = []
    for strategy in STRATEGIES.values():
        own = ADAPTERS[strategy.adapter]
        for adapter in (own, *(other for other in ADAPTERS.values() if other is not own)):
            if not _takes(strategy, adapter):
                continue
            down, up = payload(strategy(), adapter(DEFAULT_RANK, float(DEFAULT_RANK), ()), DEFAULT_SHAPES)
            said = f"`{adapter.name}`" + (" (its own)" if adapter is own else "")
            factors = [", ".join(adapter.trained), ", ".join(adapter.frozen) or "none"]
            exact = "yes" if strategy.exact(adapter) else "no"
            rows.append([f"`{strategy.name}`", said, *factors, exact, f"{up:,}", f"{down:,}"])
    return markdown(header, rows)


def _takes(strategy: type[Strategy], adapter: type[Adapter]) -> bool:
    try:
        strategy.check_adapter(adapter)
    except ConfigError:
        return False
    return True


def start_table() -> str:
    """Return the Markdown table of all starts."""
    header = ("`adapter.start`", "what it is", "made from", "round 0 asks", "gives", "options under `start`")
    return markdown(header, [_start_row(start) for start in STARTS.values()])


def _start_row(start: type[Start]) -> list[str]:
    options = ", ".join(f"`{name} = {_toml(value)}`" for name, value in defaults(start).items())
    cells = [f"`{start.name}`", said_of(start), start.needs, start().asked, _given(start)]
    return [*cells, options or "none"]


def _given(start: type[Start]) -> str:
    asked = start().asked != "nobody"
    return ", ".join(f"{name} (seed)" if asked and name in start.from_seed else name for name in start.gives)


def rule_table() -> str:
    """Return the Markdown table of all rules around the server's optimiser."""
    rows = []
    for name, rule in RULES.items():
        options = ", ".join(f"`{name}.{key} = {_toml(value)}`" for key, value in defaults(rule).items())
        called = f"`{name}`" + (f" ({rule.paper})" if rule.paper else "")
        rows.append([called, said_of(rule), rule.noise, options or "none"])
    return markdown(("`server.rule`", "what it is", "noise of a plain step in the weights", "options"), rows)


def _toml(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, str) else str(value)


def task_table() -> str:
    """Return the Markdown table of all tasks."""
    header = ("`model.task`", "what it is", "columns it reads (`data.*`)", "labels and a head", "a noised count")
    rows = []
    for task in TASKS.values():
        columns = ", ".join(f"`{role.setting}`" + (" (optional)" if role.optional else "") for role in task.roles)
        flags = ["yes" if flag else "no" for flag in (task.labelled, task.counted)]
        rows.append([f"`{task.name}`", said_of(type(task)), columns, *flags])
    return markdown(header, rows)


def dataset_table() -> str:
    """Return the Markdown table of all data sets that have a name."""
    header = ("`data.name`", "`model.task`", "labels", "package, not imported, or your file")
    rows = []
    for dataset in DATASETS.values():
        file, labels = dataset.file, dataset.label_names
        place = f"`{file.path}`" if isinstance(file, UserFile) else f"`{file.distribution}` {file.version}"
        named = ", ".join(labels[:SHOWN_LABELS]) + (f", … ({len(labels)})" if len(labels) > SHOWN_LABELS else "")
        rows.append([f"`{dataset.name}`", f"`{dataset.task}`", named or "none", place])
    return markdown(header, rows)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table.

    >>> print(markdown(("a", "b"), [("1", "x|y")]))
    | a | b |
    |---|---|
    | 1 | x\\|y |
    """
    lines = [header, *rows]
    shown = [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines]
    return "\n".join([shown[0], "|" + "---|" * len(header), *shown[1:]])
