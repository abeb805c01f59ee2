"""Averages of which a round trains a part of the columns, of A as of B: what moves, what stays, in every mode."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import pytest
import torch
from site_runs import SITE
from summed_runs import SUMMED
from torch import Tensor

from audits.faults import zero_noise
from docs.make.tables import modes_of
from fedveil.common.errors import ProtocolError
from fedveil.common.messages import columns
from fedveil.common.messages.blocks import numbers_in
from fedveil.common.messages.columns import Chosen, check_chosen, columns_of
from fedveil.common.messages.state import AdapterState, below_head
from fedveil.common.run_lines import RoundLine, read_lines
from fedveil.experiments.in_process import run_in_process
from fedveil.privacy import dpsgd
from fedveil.privacy.secure_sum import rounding
from fedveil.server.checkpoint import saved_state
from fedveil.server.collect import trusted
from fedveil.server.model import ServerModel
from fedveil.server.optimizer import server_step
from fedveil.strategies import STRATEGIES, Average, Contribution, ServerState
from fedveil.strategies.base import Facts, Takes
from fedveil.strategies.job import configure

pytestmark = [pytest.mark.rough_prices, pytest.mark.one_length]


@dataclass(frozen=True)
class Halves(Average):
    """Rounds train the first half of B's columns, of A's, the second half of B's, of A's, and so on."""

    name: ClassVar[str] = "halves"
    facts: ClassVar[Facts] = Facts("no paper", exact="always")
    adapters: ClassVar[Takes] = Takes("lora", trains=("A", "B"), others=False)

    def trained_columns(self, received: AdapterState, round_number: int, rank: int) -> Chosen:
        """Return half of the columns of one factor."""
        del rank
        return columns_of(received, {"BA"[(round_number - 1) % 2]: partial(half_of, round_number)})


def half_of(round_number: int, width: int) -> Tensor:
    return torch.arange(width).chunk(2)[(round_number - 1) // 2 % 2]


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("optimizer", ["none", "adam", "momentum"])
def test_what_a_round_trains_is_the_mean_and_all_else_stays_to_the_bit(optimizer: str) -> None:
    config = configure({"recipe": "plain", "rounds": 8, "server.optimizer": optimizer}).config
    state = Halves().start({"layer": {"A": normal(3, 8, seed=1), "B": normal(5, 3, seed=2)}}, ("A", "B"))
    for number in range(1, 9):
        name, before = "BA"[(number - 1) % 2], state.adapter["layer"]
        half = half_of(number, before[name].shape[-1])
        sent = [normal(*before[name][:, half].shape, seed=10 * number + site) for site in (1, 2)]
        sites = [
            Contribution(f"{i}", w, {"layer": {name: t}}) for i, (w, t) in enumerate(zip((1, 3), sent, strict=True))
        ]
        averaged = Halves().combine(state, sites)
        assert torch.allclose(averaged.adapter["layer"][name][:, half], 0.25 * sent[0] + 0.75 * sent[1], rtol=1e-15)
        state = Halves().server_update(state, sites, partial(server_step, config))
        moved = {n: (state.adapter["layer"][n] != t).any(0).nonzero()[:, 0].tolist() for n, t in before.items()}
        assert moved == {name: half.tolist(), "AB".replace(name, ""): []}
    if optimizer == "adam":  # four rounds a factor, two a half
        clocks = state.optimizer.clocks["layer"]
        assert {n: clock.unique().tolist() for n, clock in clocks.items()} == {"A": [2.0], "B": [2.0]}


def test_parts_of_other_factors_are_refused() -> None:
    whole = {"layer": {"A": normal(3, 8, seed=1), "B": normal(5, 3, seed=2), "R": normal(3, 3, seed=3)}}
    half = torch.arange(1)
    for name in columns.PARTS:
        check_chosen({"layer": {name: half}}, whole)
    with pytest.raises(ProtocolError, match="a part of R is chosen"):
        check_chosen({"layer": {"R": half}}, whole)


MODES: dict[str, dict[str, Any]] = {
    "none": {"privacy.mode": "none"},
    "dp-sgd": {},
    "secure-sum": SUMMED,
    "client-level": {**SITE, "privacy.cohort": 3, "privacy.clip-norm": 100.0},
}


def parts_that_moved(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> tuple[list[dict[str, set[int]]], int]:
    """Return the columns of one layer that one round and two rounds move without noise, and how many its A has."""
    monkeypatch.setitem(STRATEGIES, "halves", Halves)
    monkeypatch.setattr(rounding, "add_private_noise", lambda sums, std, step=0.0: (sums / step).round() * step)
    monkeypatch.setattr(dpsgd, "add_private_noise", zero_noise)
    monkeypatch.setattr(trusted, "add_private_noise", lambda total, std: total.double())
    own: dict[str, Any] = {**settings, "strategy": "halves", "server.optimizer": "none", "adapter.name": "auto"}
    job = configure(own)
    states: list[ServerState] = [job.start(ServerModel(job).start)]
    for rounds in (1, 2):
        folder = run_in_process({**own, "rounds": rounds, "schedule": "constant"}, 3, run=str(rounds))
        states.append(saved_state(folder))
    layer = min(below_head(states[0].adapter))
    moved = [
        {n: set((now.adapter[layer][n] != t).any(0).nonzero()[:, 0].tolist()) for n, t in before.adapter[layer].items()}
        for before, now in zip(states[:1] * 2, states[1:], strict=True)
    ]
    assert read_lines(RoundLine, folder)[0].bytes_up == 12 * numbers_in(ServerModel(job).reply_layout(1, states[0]))
    return moved, states[0].adapter[layer]["A"].shape[1]


@pytest.mark.parametrize("mode", MODES)
def test_a_run_moves_the_chosen_columns_and_no_other(
    mode: str, toy_settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    moved, into = parts_that_moved({**toy_settings, **MODES[mode]}, monkeypatch)
    assert moved[0] == {"A": set(), "B": {0, 1}}, "of three columns the first half is two"
    assert moved[1]["B"] == {0, 1}
    assert set() < moved[1]["A"] <= set(range((into + 1) // 2)), "a column may move by less than the grid of a sum"


def test_a_trusted_server_that_holds_parts_against_whole_factors_moves_nothing_and_is_found(
    toy_settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trusted, "narrowed", lambda state, chosen: state)
    real = ServerModel.reply_layout
    monkeypatch.setattr(ServerModel, "reply_layout", lambda model, number, state=None: real(model, number))
    with pytest.raises(ProtocolError, match="a contribution has"):
        parts_that_moved({**toy_settings, **MODES["client-level"]}, monkeypatch)


def test_a_strategy_has_the_modes_whose_runs_it_does_not_refuse() -> None:
    assert modes_of(Halves) == "dp-sgd, secure-sum, client-level, none"
    assert modes_of(STRATEGIES["increlora"]) == "dp-sgd, none"
