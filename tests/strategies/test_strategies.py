"""What every strategy must do, whatever its algorithm; a new row of STRATEGIES is tested by being there.

Models are compared by the weights that they stand for (``adapter.delta`` of every layer, and the
head), because a strategy may rewrite its factors as long as their product is right.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fedveil.common.adapters import ADAPTERS, Adapter, LoRA, LoRAFrozenA
from fedveil.common.errors import ConfigError, ProtocolError
from fedveil.common.messages.blocks import decode_state, encode_state, layout_of
from fedveil.common.messages.columns import narrowed, widened
from fedveil.common.messages.state import HEAD, AdapterState
from fedveil.common.messages.tensors import apply, entries, merge, scale, select
from fedveil.strategies import STRATEGIES
from fedveil.strategies.average import Average
from fedveil.strategies.base import Facts, Strategy, Takes, check_adapter, chooses, is_exact, mean
from fedveil.strategies.job import configure
from fedveil.strategies.payload import travels
from fedveil.strategies.state import Contribution, ServerState

RANK = 3
LAYERS = {"encoder.0.query": (5, 7), "encoder.1.dense": (8, 4)}
CLASSES, HIDDEN = 2, 6
Update = Callable[[ServerState, Sequence[Contribution]], ServerState]

OPTIONS: dict[str, tuple[dict[str, object], ...]] = {"fed-svd": ({"period": 2},)}
"""Further settings of a strategy that the contract must hold for."""
MERGING = ("fedex-lora", "flora")
"""Strategies that write into a factor as large as the weight, and send it down in every round."""
REBUILT: dict[str, tuple[str, ...]] = {"fed-svd": ("A",), "flexlora": ("A",), **dict.fromkeys(MERGING, ("D",))}
"""Frozen factors that a strategy is documented to move although no site trains them."""
OTHERS: dict[str, tuple[str, ...]] = {"fedavg-lora": ("lora-frozen-a", "lora-sb")}
"""Further adapters that the contract must hold a strategy's rule to."""


def on(kind: type[Strategy], adapter: str) -> Strategy:
    """Return a strategy whose preset is another adapter that it accepts."""
    check_adapter(kind, ADAPTERS[adapter])
    return type(kind.__name__, (kind,), {"adapters": replace(kind.adapters, default=adapter)})()


def variants() -> list[Strategy]:
    plain = [strategy() for strategy in STRATEGIES.values()]
    options = [STRATEGIES[name](**o) for name, several in OPTIONS.items() if name in STRATEGIES for o in several]
    return plain + options + [on(STRATEGIES[name], adapter) for name, several in OTHERS.items() for adapter in several]


def spoken(strategy: Strategy) -> str:
    changed = {k: v for k, v in vars(strategy).items() if v != getattr(type(strategy)(), k)}
    if (adapter := strategy.adapters.default) != STRATEGIES[strategy.name].adapters.default:
        changed["adapter"] = adapter
    return strategy.name + "".join(f",{k}={v}" for k, v in changed.items())


each_strategy = pytest.mark.parametrize("strategy", variants(), ids=spoken)


def adapter_of(strategy: Strategy) -> Adapter:
    return ADAPTERS[strategy.adapters.default](RANK, 2.0 * RANK, ("query", "dense"))


def exact(strategy: Strategy) -> bool:
    return is_exact(type(strategy), type(adapter_of(strategy)))


def random_state(adapter: Adapter, factors: Sequence[str], seed: int, dtype: torch.dtype) -> AdapterState:
    """Return random ``factors`` of every layer, and a head."""
    generator = torch.Generator().manual_seed(seed)

    def tensor(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=dtype)

    layers = {layer: {f: tensor(*adapter.shapes(*sizes)[f]) for f in factors} for layer, sizes in LAYERS.items()}
    for gated in (own for own in layers.values() if "g" in own):  # a server keeps gates within 0 and 1
        gated["g"] = gated["g"].sigmoid()
    return {**layers, HEAD: {"weight": tensor(CLASSES, HIDDEN), "bias": tensor(CLASSES)}}


def example_states(strategy: Strategy, dtype: torch.dtype = torch.float64) -> AdapterState:
    """Return an adapter's start as the strategy's default adapter would: every factor, and the head."""
    adapter = adapter_of(strategy)
    return random_state(adapter, (*adapter.frozen, *adapter.trained), 1, dtype)


def started(strategy: Strategy, dtype: torch.dtype = torch.float64) -> ServerState:
    return strategy.start(example_states(strategy, dtype), adapter_of(strategy).trained)


def trained_model(strategy: Strategy, state: ServerState, seed: int) -> AdapterState:
    """Return the whole adapter of a site that received ``state`` and trained to random values."""
    dtype = next(tensor for _, _, tensor in entries(state.adapter)).dtype
    received = strategy.downlink(state)
    here = strategy.install(example_states(strategy, dtype), received)
    moved = random_state(adapter_of(strategy), adapter_of(strategy).trained, seed, dtype)
    chosen = strategy.trained_columns(received, state.round_number + 1, 0)
    return merge(here, moved if chosen is None else widened(narrowed(moved, chosen), here, chosen))


def contribution(
    strategy: Strategy, state: ServerState, model: AdapterState, weight: float, name: str = "site"
) -> Contribution:
    """Return what a site sends that received ``state`` and trained to ``model``."""
    trained = select(model, (*adapter_of(strategy).trained, *model[HEAD]))
    chosen = strategy.trained_columns(strategy.downlink(state), state.round_number + 1, 0)
    return Contribution(name, weight, narrowed(trained, chosen))


def participants(strategy: Strategy, state: ServerState, seeds: Sequence[int]) -> list[Contribution]:
    """Return contributions of unequal weights."""
    return [contribution(strategy, state, trained_model(strategy, state, s), 10.0 * s + 7, f"site-{s}") for s in seeds]


def weights_of(strategy: Strategy, model: AdapterState) -> dict[str, Tensor]:
    """Return what the model is: the change of every adapted layer's weight, and the head."""
    adapter = adapter_of(strategy)
    deltas = {layer: adapter.delta(factors) for layer, factors in model.items() if layer != HEAD}
    return {**deltas, **{f"{HEAD}.{name}": tensor for name, tensor in model[HEAD].items()}}


def distance(left: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    assert left.keys() == right.keys(), "the two models have other layers"
    return max(float((left[k] - right[k]).abs().max()) for k in left)


# The invariants, as functions of the update under test, so that planted faults can be put through them.


def order_matters(strategy: Strategy, update: Update) -> float:
    """How far the new model moves when the sites are permuted."""
    state = started(strategy)
    sites = participants(strategy, state, [2, 3, 4])
    results = [weights_of(strategy, update(state, s).adapter) for s in (sites, sites[::-1], sites[1:] + sites[:1])]
    return max(distance(results[0], other) for other in results[1:])


def splitting_matters(strategy: Strategy, update: Update) -> float:
    """How far the new model moves when one site is split into two equal halves."""
    state = started(strategy)
    first, second = participants(strategy, state, [2, 3])
    halves = [replace(second, site=f"half-{i}", weight=second.weight / 2) for i in range(2)]
    whole, split = update(state, [first, second]), update(state, [first, *halves])
    return distance(weights_of(strategy, whole.adapter), weights_of(strategy, split.adapter))


def identical_sites_move(strategy: Strategy, update: Update) -> float:
    """How far the new model is from the one model that all sites sent."""
    state = started(strategy)
    model = trained_model(strategy, state, 5)
    same = [contribution(strategy, state, model, weight, f"site-{weight}") for weight in (1.0, 2.5, 40.0)]
    return distance(weights_of(strategy, update(state, same).adapter), weights_of(strategy, model))


def expected(strategy: Strategy, state: ServerState, seeds: Sequence[int]) -> dict[str, Tensor]:
    """Return the model that this round's sites alone give, by slow arithmetic on whole models."""
    models = [trained_model(strategy, state, seed) for seed in seeds]
    sizes = [10.0 * seed + 7 for seed in seeds]
    shares = [size / sum(sizes) for size in sizes]
    if exact(strategy):
        parts = [weights_of(strategy, model) for model in models]
        return {k: sum((p * part[k] for p, part in zip(shares, parts, strict=True)), torch.zeros(())) for k in parts[0]}
    average: AdapterState = {
        layer: {
            name: sum((p * model[layer][name] for p, model in zip(shares, models, strict=True)), torch.zeros(()))
            for name in factors
        }
        for layer, factors in models[0].items()
    }
    return weights_of(strategy, average)


def earlier_rounds_leak(strategy: Strategy, update: Update) -> float:
    """S6: how far round 2's model is from what round 2's sites alone give."""
    state = started(strategy)
    after = update(state, participants(strategy, state, [2, 3]))
    sites = participants(strategy, after, [4, 6, 7])
    second = weights_of(strategy, update(after, sites).adapter)
    if not isinstance(strategy, Average) and not exact(strategy):
        # No mean says what is right: a server does that saw nothing before.
        alone = replace(started(strategy), adapter=after.adapter, round_number=after.round_number)
        return distance(second, weights_of(strategy, update(alone, sites).adapter))
    return distance(second, expected(strategy, after, [4, 6, 7]))


INVARIANTS = (order_matters, splitting_matters, identical_sites_move, earlier_rounds_leak)


@each_strategy
@pytest.mark.parametrize("broken", INVARIANTS, ids=lambda f: f.__name__)
def test_the_new_model_depends_on_this_rounds_sites_and_their_shares_only(
    strategy: Strategy, broken: Callable[[Strategy, Update], float]
) -> None:
    gap = broken(strategy, strategy.server_update)
    assert gap < 1e-12, f"{strategy.name}: {broken.__name__.replace('_', ' ')} by {gap:.1e}"


def last_site_wins(strategy: Strategy) -> Update:
    return lambda state, sites: strategy.server_update(state, sites[-1:])


def all_sites_count_the_same(strategy: Strategy) -> Update:
    return lambda state, sites: strategy.server_update(state, [replace(c, weight=1.0) for c in sites])


def sum_instead_of_mean(strategy: Strategy) -> Update:
    return lambda state, sites: strategy.server_update(
        state, [replace(c, state=scale(c.state, len(sites))) for c in sites]
    )


def sites_of_earlier_rounds_stay(strategy: Strategy) -> Update:
    """Return the bug of Fed-SB's published code: the list of sites is never emptied."""
    seen: list[Contribution] = []

    def update(state: ServerState, sites: Sequence[Contribution]) -> ServerState:
        seen.extend(sites)
        return strategy.server_update(state, seen)

    return update


@each_strategy
@pytest.mark.parametrize(
    ("fault", "broken"),
    [
        (last_site_wins, order_matters),
        (all_sites_count_the_same, splitting_matters),
        (sum_instead_of_mean, identical_sites_move),
        (sites_of_earlier_rounds_stay, earlier_rounds_leak),
        (all_sites_count_the_same, earlier_rounds_leak),
    ],
    ids=lambda f: f.__name__,
)
def test_a_planted_fault_breaks_the_invariant(
    strategy: Strategy, fault: Callable[[Strategy], Update], broken: Callable[[Strategy, Update], float]
) -> None:
    try:
        gap = broken(strategy, fault(strategy))
    except ProtocolError:  # what rounds send is not alike, where factors take turns
        assert chooses(type(strategy))
        return
    assert gap > 1e-3, f"{broken.__name__} does not notice {fault.__name__}"


@each_strategy
def test_a_strategy_is_exact_if_and_only_if_it_says_so(strategy: Strategy) -> None:
    state = started(strategy)
    new = weights_of(strategy, strategy.server_update(state, participants(strategy, state, [2, 3, 4])).adapter)
    models = [weights_of(strategy, trained_model(strategy, state, seed)) for seed in (2, 3, 4)]
    shares = [27 / 111, 37 / 111, 47 / 111]
    gap = max(
        float((new[k] - sum(p * model[k] for p, model in zip(shares, models, strict=True))).abs().max()) for k in new
    )
    said = exact(strategy)
    assert (gap < 1e-12) == said, f"{strategy.name} says exact: {said}, but the mean is off by {gap:.1e}"


def moved(before: AdapterState, after: AdapterState) -> set[str]:
    return {name for layer, name, tensor in entries(before) if not torch.equal(tensor, after[layer][name])}


@each_strategy
def test_frozen_factors_stay_bit_for_bit_unless_the_strategy_is_known_to_rebuild_them(strategy: Strategy) -> None:
    state, start = started(strategy), example_states(strategy)
    for seeds in ([2, 3], [4], [5, 6]):
        state = strategy.server_update(state, participants(strategy, state, seeds))
    known = REBUILT.get(strategy.name, ())
    kept = set(adapter_of(strategy).frozen) - set(known)
    assert not moved(start, state.adapter) & kept, f"{strategy.name} moved the frozen {kept}"
    assert moved(start, state.adapter) >= {*adapter_of(strategy).trained, *known, "weight", "bias"}


@each_strategy
def test_an_update_counts_one_round_and_changes_nothing_it_was_given(strategy: Strategy) -> None:
    state = started(strategy)
    sites = participants(strategy, state, [2, 3])
    before = [encode_state(state.adapter), encode_state(state.memory), *(encode_state(c.state) for c in sites)]
    after = strategy.server_update(state, sites)
    assert before == [encode_state(state.adapter), encode_state(state.memory), *(encode_state(c.state) for c in sites)]
    assert (state.round_number, after.round_number) == (0, 1)
    assert layout_of(after.adapter) == layout_of(state.adapter), "the adapter changed its layout"
    assert layout_of(after.memory) == layout_of(state.memory), "the memory changed its layout"


@each_strategy
@pytest.mark.parametrize("rounds", [0, 1, 3])
def test_a_site_that_joins_late_has_the_servers_adapter_bit_for_bit(strategy: Strategy, rounds: int) -> None:
    start, state = example_states(strategy, torch.float32), started(strategy, torch.float32)
    for number in range(rounds):
        state = strategy.server_update(state, participants(strategy, state, [number + 2, number + 5]))
    received = strategy.downlink(state)
    over_the_wire = decode_state(encode_state(received), layout_of(received))
    assert not moved(state.adapter, strategy.install(start, over_the_wire)), f"{strategy.name}: the site has another A"


@each_strategy
def test_a_lost_factor_is_noticed_by_the_comparison_of_site_and_server(strategy: Strategy) -> None:
    state = started(strategy)
    state = strategy.server_update(state, participants(strategy, state, [2, 3]))
    received = strategy.downlink(state)
    chosen = strategy.trained_columns(received, 1, 0)
    lost = next(iter(adapter_of(strategy).trained if chosen is None else next(iter(chosen.values()))))
    broken = select(received, {name for _, name, _ in entries(received)} - {lost})
    assert moved(state.adapter, strategy.install(example_states(strategy), broken))


@each_strategy
@pytest.mark.parametrize("head", [True, False], ids=["trained head", "frozen head"])
def test_a_site_sends_what_it_trains_and_no_frozen_factor_travels(strategy: Strategy, head: bool) -> None:
    adapter, start = adapter_of(strategy), {k: v for k, v in example_states(strategy).items() if head or k != HEAD}
    received = strategy.downlink(strategy.start(start, adapter.trained))
    chosen, trained = strategy.trained_columns(received, 1, 0), select(start, (*adapter.trained, "weight", "bias"))
    sent = narrowed(trained, chosen)
    for layer, (out, into) in LAYERS.items():
        down, up = travels(strategy, adapter, out, into)
        assert set(sent[layer]) == set(adapter.trained if chosen is None else chosen[layer]), (
            f"{strategy.name} does not send what is trained"
        )
        again = set(received[layer]) & set(adapter.frozen)
        assert again == ({"D"} if strategy.name in MERGING else set()), f"{strategy.name} sends {again} every round"
        assert layout_of({"layer": received[layer]}) == layout_of(down), "the tables count another message down"
        assert layout_of({"layer": sent[layer]}) == layout_of(up), "the tables count another message up"
    for state in (sent, received):
        assert set(state.get(HEAD, ())) == ({"weight", "bias"} if head else set())
        assert set(state) == {*LAYERS, *([HEAD] if head else [])}


@each_strategy
@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan")])
def test_a_weight_that_is_not_above_zero_is_refused(strategy: Strategy, weight: float) -> None:
    state = started(strategy)
    good, other = participants(strategy, state, [2, 3])
    with pytest.raises(ProtocolError, match="above 0"):
        strategy.server_update(state, [good, replace(other, weight=weight)])


@each_strategy
def test_a_round_without_contributions_is_refused(strategy: Strategy) -> None:
    with pytest.raises(ProtocolError, match="at least one"):
        strategy.server_update(started(strategy), [])


@each_strategy
def test_contributions_of_unlike_layouts_are_refused(strategy: Strategy) -> None:
    state = started(strategy)
    good, other = participants(strategy, state, [2, 3])
    with pytest.raises(ProtocolError):
        strategy.server_update(state, [good, replace(other, state={k: v for k, v in other.state.items() if k != HEAD})])


class LargestTensor(TorchDispatchMode):
    """Remembers the most numbers that any tensor made inside it has."""

    numbers = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, Tensor):
                self.numbers = max(self.numbers, value.numel())
        return result


@each_strategy
def test_the_server_never_forms_a_product_of_the_factors(strategy: Strategy, monkeypatch: pytest.MonkeyPatch) -> None:
    out, into = 300, 200
    monkeypatch.setitem(LAYERS, "encoder.0.query", (out, into))
    state = started(strategy)
    sites = participants(strategy, state, [2, 3])
    with LargestTensor() as largest:
        state = strategy.server_update(state, sites)
    if strategy.name in MERGING:
        assert largest.numbers == out * into
        return
    assert largest.numbers < out * into / 10, f"{strategy.name} made a tensor of {largest.numbers} numbers"
    with LargestTensor() as control:
        weights_of(strategy, state.adapter)
    assert control.numbers == out * into, "a product would not be seen"


def test_only_ratios_of_weights_matter() -> None:
    strategy = variants()[0]
    sites = participants(strategy, started(strategy), [2, 3])
    small, large = mean(sites), mean([replace(c, weight=c.weight * 1e6) for c in sites])
    for layer, name, tensor in entries(small):
        assert float((tensor - large[layer][name]).abs().max()) < 1e-12


def test_names_are_kept_in_one_table() -> None:
    assert all(strategy.name == name for name, strategy in STRATEGIES.items())
    for strategy in STRATEGIES.values():
        check_adapter(strategy, ADAPTERS[strategy.adapters.default])
    assert set(REBUILT) <= set(STRATEGIES)
    assert set(OPTIONS) <= set(STRATEGIES)


class Middle(Strategy):
    """The coordinate-wise median: a rule that no mean is enough for."""

    name, facts, adapters = "middle", Facts("none"), Takes("lora")

    def combine(self, state: ServerState, contributions: Sequence[Contribution]) -> ServerState:
        middle = apply(lambda *tensors: torch.stack(tensors).median(0).values, *(c.state for c in contributions))
        return replace(state, round_number=state.round_number + 1, adapter=merge(state.adapter, middle))


def test_a_strategy_that_needs_each_contribution_gets_them_and_one_that_needs_the_mean_gets_no_more() -> None:
    states = [random_state(LoRA(RANK, 6.0, ()), ("A", "B"), seed, torch.float64) for seed in (1, 2, 3)]
    sites = [Contribution(str(i), 1.0 + i, state) for i, state in enumerate(states)]
    new = Middle().server_update(Middle().start(states[0], ("A", "B")), sites)
    layer = next(iter(LAYERS))
    wanted = torch.stack([state[layer]["A"] for state in states]).sort(0).values[1]
    assert torch.equal(new.adapter[layer]["A"], wanted)
    assert not is_exact(Middle, LoRAFrozenA)
    with pytest.raises(ConfigError, match="more than a sum"):
        Middle().check(configure({"privacy.mode": "secure-sum", "privacy.honest-sites": 2}).config)

    assert earlier_rounds_leak(Middle(), Middle().server_update) == 0
    seen: list[Contribution] = []

    def remembers(state: ServerState, contributions: Sequence[Contribution]) -> ServerState:
        seen.extend(contributions)
        return Middle().server_update(state, seen)

    assert earlier_rounds_leak(Middle(), remembers) > 0.1, "the fault is not found"

    given: list[AdapterState] = []

    class Watching(Average):
        name = "watching"

        def update(self, state: ServerState, mean: AdapterState) -> ServerState:
            given.append(mean)
            return super().update(state, mean)

    Watching().server_update(Watching().start(states[0], ("A", "B")), sites)
    assert [layout_of(state) for state in given] == [layout_of(states[0])]
    assert all(torch.equal(tensor, mean(sites)[layer][name]) for layer, name, tensor in entries(given[0]))
    for strategy in STRATEGIES.values():
        assert not issubclass(strategy, Average) or strategy.combine is Average.combine, "the mean is gone around"
