"""Failures after a charge, and what is rehearsed again after a change of how a model computes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rehearsals import SIZE, federated

from audits.tiny_site import OneSite, clinic
from fedveil.client import app, budget, rehearsals
from fedveil.client.ledger.ledger import Ledger
from fedveil.client.ledger.rows import Failure
from fedveil.client.own_records import prepared
from fedveil.client.process import SiteProcess
from fedveil.client.rehearsals import PLAIN
from fedveil.client.site import open_site
from fedveil.client.timing import Timing
from fedveil.common.errors import LedgerError, ModelError
from fedveil.common.messages.columns import Chosen
from fedveil.common.messages.round import Refusal, TrainResult
from fedveil.common.messages.tensors import entries
from fedveil.common.model.federated import FederatedModel, model_of
from fedveil.common.starts import dp_gradient
from fedveil.common.tasks.text import TextExample
from fedveil.privacy.dpsgd import PrivateSteps
from fedveil.strategies.job import configure

pytestmark = pytest.mark.rough_prices


# --- after the charge -------------------------------------------------------------------------------------------------
def test_a_round_that_fails_after_its_charge_sends_noise_and_says_so_at_the_site(
    toy_settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    site = clinic({**toy_settings, "training.sample-rate": 1.0}, tmp_path)
    site.train(1, run="another")  # rehearsed
    step = PrivateSteps.step

    def fail(steps: PrivateSteps, batches: Any, losses: Any) -> None:
        parts = list(batches)
        if parts:
            raise RuntimeError("record 7 says: a lovely film")
        step(steps, parts, losses)

    monkeypatch.setattr(PrivateSteps, "step", fail)
    task = site.task(1)
    reply = site.ask(task)
    assert isinstance(reply, TrainResult), reply
    assert reply.spending is not None
    moved = [float((t != task.state[layer][name]).double().mean()) for layer, name, t in entries(reply.contribution)]
    assert all(share > 0.9 for share in moved), "a tensor carries no noise"
    (line,) = [r.getMessage() for r in caplog.records if "noise alone is sent" in r.getMessage()]
    assert "lovely" not in line
    assert len(site.charges()) == 2
    (failure,) = failures(site)
    assert (failure.dataset, failure.run, failure.round_number) == ("clinic", task.run, 1)
    assert "lovely" not in failure.reason


def failures(site: OneSite) -> list[Failure]:
    with Ledger(site.ledger) as ledger:
        return ledger.failures()


def test_a_ledger_that_cannot_note_the_failure_is_no_refusal(
    toy_settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = clinic(toy_settings, tmp_path)
    step = PrivateSteps.step

    def fail(steps: PrivateSteps, batches: Any, losses: Any) -> None:
        parts = list(batches)
        if parts:
            raise MemoryError
        step(steps, parts, losses)

    def full(*_: Any, **__: Any) -> None:
        raise LedgerError("the disk is full")

    monkeypatch.setattr(PrivateSteps, "step", fail)
    monkeypatch.setattr(Ledger, "fail", full)
    assert isinstance(site.ask(site.task()), TrainResult)
    assert failures(site) == []


def test_round_0_that_fails_after_its_charge_sends_noise(
    toy_settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = {"strategy": "fed-sb", "adapter.start": "dp-gradient", "start.sample-rate": 1.0, "privacy.epsilon": 50.0}
    site = clinic({**toy_settings, **own}, tmp_path)
    private_gradient = dp_gradient.private_gradient

    def fail(model: FederatedModel, parts: Any, plan: Any, *_: Any) -> Any:
        if list(parts):
            raise MemoryError
        return private_gradient(model, [], plan)

    monkeypatch.setattr(dp_gradient, "private_gradient", fail)
    reply = site.ask(replace(site.task(0), state={}, basis={}, basis_fingerprint=""))
    assert isinstance(reply, TrainResult), reply
    assert all(float((tensor != 0).double().mean()) > 0.9 for _, _, tensor in entries(reply.contribution))
    assert [failure.round_number for failure in failures(site)] == [0]


def test_without_privacy_a_failure_is_a_refusal(
    toy_settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = clinic({**toy_settings, "privacy.mode": "none"}, tmp_path)
    site.rule(allow_no_privacy=True)
    monkeypatch.setattr("fedveil.common.model.plain.plain_step", lambda *_: 1 / 0)
    assert isinstance(site.ask(site.task()), Refusal)


def test_a_start_whose_rehearsal_fails_leaves_no_round_rehearsed(
    toy_settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = {"strategy": "fed-sb", "adapter.start": "dp-gradient", "start.sample-rate": 1.0, "privacy.epsilon": 50.0}
    site = clinic({**toy_settings, **own}, tmp_path)
    assert isinstance(site.ask(site.task(1)), TrainResult)
    assert set(app.process.rehearsals.timings) == {PLAIN}
    # As after rounds of another kind, which a server may ask for before round 0.
    app.process.rehearsals.timings["steps on A"] = app.process.rehearsals.timings[PLAIN]

    def fails(model: FederatedModel, _: Any) -> Any:
        model.base.module.set_attn_implementation("sdpa")
        raise ModelError("no memory")

    monkeypatch.setattr(rehearsals, "rehearse_initial", fails)
    refused = site.ask(replace(site.task(0, run="2"), state={}, basis={}, basis_fingerprint=""))
    model_of.cache_clear()  # that model attends otherwise now
    assert isinstance(refused, Refusal)
    assert app.process.rehearsals.timings == {}, (
        "rounds count as rehearsed with an attention that they were not rehearsed with"
    )


def narrow(model: FederatedModel) -> None:
    model.shapes = model.shapes.narrowed(model.shapes.longest, 1)


def attend_otherwise(model: FederatedModel) -> None:
    model.base.module.set_attn_implementation("sdpa")  # type: ignore[operator]


def lower_nothing(model: FederatedModel) -> None:
    model.lowers = False


@pytest.mark.parametrize(
    ("way", "fails"), [(narrow, False), (narrow, True), (attend_otherwise, False), (lower_nothing, False)]
)
def test_a_kind_of_round_that_changes_how_the_model_computes_has_the_others_rehearsed_anew(
    way: Callable[[FederatedModel], None],
    fails: bool,
    toy_settings: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rounds that train B are rehearsed, and those that train A change what was seen then."""
    asked = clinic({**toy_settings, "strategy": "rolora"}, tmp_path)
    model_of.cache_clear()
    job, seen = configure(asked.settings), list[str]()
    site, model = open_site(asked.node, job.config, "1", simulated=False), asked.model()

    def turned(model: FederatedModel, chosen: Chosen) -> Timing:
        seen.extend({name for factors in chosen.values() for name in factors})
        if len(seen) == 2:
            way(model)
            if fails:
                raise ModelError("no memory")
        return Timing({8: 0.1}, {8: 1}, 0.1, 0.1)

    monkeypatch.setattr(app, "process", SiteProcess())
    monkeypatch.setattr(rehearsals, "rehearse_columns", turned)
    for number in (1, 2):
        with pytest.raises(ModelError) if fails and number == 1 else nullcontext():
            app.process.rehearsals.forecasts(job, site, model, asked.task(number))
    model_of.cache_clear()
    # All kinds of rounds are rehearsed before the first; the last in a way that both were seen in.
    wanted = ["B", "A", "A", "B"] if fails else ["B", "A", "B"]
    assert seen == wanted, "a round is trained in a way that no rehearsal has seen"


# --- records ----------------------------------------------------------------------------------------------------------
def test_steps_of_every_kind_are_rehearsed_by_a_name_of_their_own() -> None:
    """Steps that passed for others would train in shapes, or through factors, that nothing has looked at."""

    def name(columns: Any = None) -> str:
        job: Any = None
        site: Any = SimpleNamespace(trained_columns=lambda *_: (columns, 0))
        task: Any = SimpleNamespace(round_number=1, state={})
        whole = {layer: {factor: torch.zeros(2, 3) for factor in "AB"} for layer in "ab"}
        model: Any = SimpleNamespace(start=whole)
        return rehearsals.steps_of(job, site, model, task).name

    none, first, two = torch.arange(0), torch.arange(1), torch.arange(2)
    chosen = [{"a": {"B": first}}, {"a": {"B": two}}, {"a": {"B": first}, "b": {"B": first}}, {"a": {"B": none}}]
    chosen += [{"a": {factor: torch.arange(3)}} for factor in "AB"]
    kinds = [name(), *(name(columns=columns) for columns in chosen)]
    assert len(set(kinds)) == len(kinds)


def test_a_record_that_the_model_cannot_take_is_left_out(
    model_folder: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = federated(model_folder("bert"), "classification", "query,value")
    good = [TextExample(text="the film", label=0), TextExample(text="warm story", label=1)]
    wanted = model.prepare(good)
    tokenise = model.task.tokenise

    def picky(tokenizer: Any, examples: Any, longest: int) -> Any:
        if any(example.text == "odd" for example in examples):
            raise TypeError("TextInputSequence must be str")
        records = tokenise(tokenizer, examples, longest)
        # Unknown, not cut, and without a number.
        others: dict[str, Any] = {"two": [SIZE + 3], "three": [5] * (model.max_length + 1), "four": [5, None]}
        pairs = zip(records, examples, strict=True)
        return [{**record, "input_ids": others.get(e.text, record["input_ids"])} for record, e in pairs]

    monkeypatch.setattr(type(model.task), "tokenise", lambda _, *arguments: picky(*arguments))
    odd = [TextExample(text=text, label=1) for text in ("odd", "two", "three", "four")]
    assert prepared(model, [good[0], *odd, good[1]]) == wanted
    assert prepared(model, []) == []


def test_denormal_numbers_are_flushed_in_every_pass_and_in_no_price(
    toy_settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a state of them takes more than twice the processor time that was rehearsed."""
    site = clinic({**toy_settings, "training.sample-rate": 1.0}, tmp_path)
    task = site.task()
    passed, priced, losses, pay = list[bool](), list[bool](), FederatedModel.losses, budget.pay_round

    def flushes() -> bool:
        return not float(torch.tensor(1e-40) * 1.0)

    def passing(self: FederatedModel, *args: Any, **options: Any) -> Any:
        passed.append(flushes())
        return losses(self, *args, **options)

    def pricing(*args: Any, **options: Any) -> Any:
        priced.append(flushes())
        return pay(*args, **options)

    can = torch.set_flush_denormal(True)
    torch.set_flush_denormal(False)
    monkeypatch.setattr(FederatedModel, "losses", passing)
    monkeypatch.setattr(budget, "pay_round", pricing)
    monkeypatch.setattr(app.process.rehearsals, "timings", {})
    assert isinstance(site.ask(task), TrainResult)
    rehearsed = len(passed)
    assert set(passed) == {can}
    assert (priced, flushes()) == ([False], False)
    assert isinstance(site.ask(site.task(2)), TrainResult)
    assert len(passed) > rehearsed
    assert set(passed) == {can}
