"""The head alone: features computed once, after the charge, each record's its own; steps on them are the same steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from audits.tiny_site import clinic
from fedveil.client import app, budget, rehearsals
from fedveil.client.cache import RecordCache
from fedveil.client.ledger.ledger import Ledger
from fedveil.client.rehearsal import _PLAN, rehearse, rehearse_features
from fedveil.common.adapters import ADAPTERS
from fedveil.common.config.sections import HeadConfig
from fedveil.common.errors import ConfigError, ModelError
from fedveil.common.messages.round import Refusal, TrainResult
from fedveil.common.messages.state import HEAD, METRIC
from fedveil.common.model.base import load_base_model
from fedveil.common.model.federated import FederatedModel
from fedveil.common.run_lines import BaselineFile, PrivacyLine, RoundLine, read_file, read_lines
from fedveil.common.tasks import TASKS, Record
from fedveil.common.tasks.featured import FEATURES
from fedveil.common.tasks.module import Metric
from fedveil.common.tasks.text import TextExample
from fedveil.experiments.evaluate import evaluate_run
from fedveil.experiments.in_process import run_in_process
from fedveil.privacy.dpsgd import PrivateSteps
from fedveil.server.model import ServerModel
from fedveil.strategies.job import configure

pytestmark = pytest.mark.rough_prices

Folder = Callable[[str], str]
TEXTS = ("the film", "a warm story and a lovely actor", "dull", "the scene was very cold and the film was awful", "is")


def head_only(folder: str, precision: str = "float32", metric: str = "none") -> FederatedModel:
    return FederatedModel(
        *(load_base_model(folder, "classification"), ADAPTERS["none"](8, 8.0, ("query",))),
        *(TASKS["classification"], HeadConfig(start="random", metric=metric)),
        seed=1,
        label_names=("bad", "good"),
        feature_scale=2.0,
        max_length=24,
        device="cpu",
        precision=precision,
    )


def records_of(model: FederatedModel, texts: Sequence[str] = TEXTS) -> list[Record]:
    return model.prepare([TextExample(text=text, label=i % 2) for i, text in enumerate(texts)])


def featured(model: FederatedModel, texts: Sequence[str] = TEXTS) -> list[Record]:
    records = records_of(model, texts)
    model.featurise(records)
    return records


def settings(toy: dict[str, Any], **more: Any) -> dict[str, Any]:
    own = {
        "strategy": "fedavg-lora",
        "adapter.name": "none",
        "training.sample-rate": 1.0,
        "training.local-steps": 5,
        "training.optimizer": "momentum",
        "training.learning-rate": 0.5,
    }
    return {**toy, **own, **{key.replace("__", ".").replace("_", "-"): value for key, value in more.items()}}


# --- features ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_features_are_a_records_own_to_the_bit_whoever_is_beside_it(model_folder: Folder, precision: str) -> None:
    model = head_only(model_folder("bert"), precision)
    rehearse_features(model)
    together = featured(model, TEXTS * 9)
    for i, text in enumerate(TEXTS):
        (alone,) = featured(model, [text])
        assert all(torch.equal(alone[FEATURES], other[FEATURES]) for other in together[i :: len(TEXTS)])
    assert {tuple(sorted(record)) for record in together} == {(FEATURES, "labels")}, "more of a record is kept"


def test_gradients_through_features_are_those_of_the_whole_model(model_folder: Folder) -> None:
    model = head_only(model_folder("bert"))
    for record, known in zip(records_of(model), featured(model), strict=True):
        found = []
        for each in (record, known):
            model.module.zero_grad()
            model.losses(model.batch([each])).sum().backward()
            found.append([p.grad.clone() for p in model.head.values()])
        assert max(float((a - b).abs().max()) for a, b in zip(*found, strict=True)) < 1e-6


def test_a_records_gradient_is_equal_in_every_row_and_beside_any_others(model_folder: Folder) -> None:
    model = head_only(model_folder("bert"))
    rehearse(model)
    records = featured(model, TEXTS * 3)
    with PrivateSteps(model.module, torch.optim.SGD(list(model.head.values()), lr=0.0), _PLAN) as steps:
        (alone,) = model.fixed_batches(records[:1])
        wanted = [sample[0].clone() for sample in steps.samples(alone, model.losses)]
        for place in (0, 7, len(records) - 1):
            order = [*records[1 : place + 1], records[0], *records[place + 1 :]]
            (batch,) = model.fixed_batches(order)
            found = [sample[place].clone() for sample in steps.samples(batch, model.losses)]
            assert all(map(torch.equal, found, wanted))


def test_features_are_computed_once(model_folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    model = head_only(model_folder("bert"))
    records, passes = records_of(model), []
    reading = model.module.reading
    monkeypatch.setattr(model.module, "reading", lambda *given: (passes.append(1), reading(*given))[1])
    model.featurise(records)
    first = len(passes)
    model.featurise(records)
    model.score(records)
    assert first
    assert len(passes) == first


def test_a_record_that_cannot_be_computed_contributes_zero_and_no_other_one_less(
    model_folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = head_only(model_folder("bert"))
    odd = model.base.processor.convert_tokens_to_ids("two")
    reading = model.module.reading

    def failing(encoder: nn.Module, batch: Any) -> Tensor:
        if bool((batch["input_ids"] == odd).any()):
            raise RuntimeError("planted")
        return reading(encoder, batch)

    monkeypatch.setattr(model.module, "reading", failing)
    records, asked = records_of(model, ["the film", "two", "a story"]), []
    kept = model.featurise(records, lambda: asked.append(1))
    assert [id(record) for record in kept] == [id(records[0]), id(records[2])]
    assert len(asked) == 1 + 3, "a record passes without asking whether there is time left"
    first = [record[FEATURES] for record in kept]
    # What failed for want of memory, say, is not lost for good.
    monkeypatch.setattr(model.module, "reading", reading)
    assert len(model.featurise(records)) == 3
    assert all(map(torch.equal, first, [records[0][FEATURES], records[2][FEATURES]]))


def test_features_that_are_no_numbers_contribute_zero(model_folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    model = head_only(model_folder("bert"))
    records = featured(model)
    records[1][FEATURES].fill_(torch.nan)
    whole, rest = (noiseless(model, part, monkeypatch) for part in (records, [records[0], *records[2:]]))
    assert all(map(torch.equal, whole, rest)), "it contributes something"
    assert any(bool(tensor.any()) for tensor in rest)


def noiseless(model: FederatedModel, records: Sequence[Record], monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Return the clipped sum of the records' gradients, in the order of the head's tensors."""
    monkeypatch.setattr("fedveil.privacy.dpsgd.add_private_noise", lambda total, _: total)
    with PrivateSteps(model.module, torch.optim.SGD(list(model.head.values()), lr=0.0), _PLAN) as steps:
        return [tensor.double() for tensor in steps.release(model.fixed_batches(records), model.losses)]


HOSTILE = {
    "huge": lambda width: 1e18 * torch.eye(width),
    "beyond float32": lambda width: 1e30 * torch.eye(width),
    "no number": lambda width: torch.full((width, width), torch.nan),
    "one direction": lambda width: torch.ones(width, width) * torch.linspace(0, 1e6, width),
    "tiny": lambda width: 1e-30 * torch.eye(width),
    "random": lambda width: 50 * torch.randn(width, width, generator=torch.Generator().manual_seed(1)),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_metric_of_a_hostile_server_lets_no_record_move_the_sum_by_more_than_a_clip(
    model_folder: Folder, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    model = head_only(model_folder("bert"), metric="public")
    records, width = featured(model, TEXTS * 2), model.base.hidden_size
    model.write({METRIC: {"centre": 3 * torch.ones(width), "map": HOSTILE[kind](width)}})
    whole = noiseless(model, records, monkeypatch)
    for left_out in range(len(TEXTS)):
        rest = noiseless(model, [*records[:left_out], *records[left_out + 1 :]], monkeypatch)
        moved = torch.stack([(a - b).norm() for a, b in zip(whole, rest, strict=True)]).norm()
        assert float(moved) <= 1 + 1e-5


class Mixing:
    """The fault: an encoder whose output for a record depends on the others of its batch, or on what passed before."""

    def __init__(self, inner: Callable[..., Tensor], kind: str) -> None:
        self.inner, self.kind, self.longest = inner, kind, 0

    def __call__(self, encoder: nn.Module, batch: Any) -> Tensor:
        features = self.inner(encoder, batch)
        if self.kind == "centred by the batch":
            return features - 0.01 * features.mean(0)
        self.longest = max(self.longest, batch["input_ids"].shape[1])
        return features * (1 + 0.01 * self.longest)


@pytest.mark.parametrize("kind", ["centred by the batch", "scaled by the longest so far"])
def test_features_that_mix_records_are_refused(
    model_folder: Folder, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    model = head_only(model_folder("bert"))
    rehearse_features(model)
    monkeypatch.setattr(model.module, "reading", Mixing(model.module.reading, kind))
    # The length that features are brought to would hide a factor.
    monkeypatch.setattr(model.module, "feature_scale", 0.0)
    with pytest.raises(ModelError, match="a record's feature vector depends"):
        rehearse_features(model)


def test_rows_that_a_map_is_computed_otherwise_in_share_no_pass(
    model_folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fault: from the fifth row on a device adds in another order, which no map shows that is the identity."""

    def forward(self: Metric, features: Tensor) -> Tensor:
        moved = features - self.centre
        return torch.cat([moved[:4] @ self.map, moved[4:].flip(1) @ self.map.flip(0)])

    model = head_only(model_folder("bert"), metric="public")
    monkeypatch.setattr(Metric, "forward", forward)
    before = model.read()
    rehearse(model)
    assert model.shapes.rows_of(1) <= 4
    assert all(torch.equal(tensor, before[METRIC][name]) for name, tensor in model.read()[METRIC].items())


# --- a site -----------------------------------------------------------------------------------------------------------


def test_nothing_of_a_record_is_computed_before_it_is_paid_for(
    toy_settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site, seen = clinic(settings(toy_settings), tmp_path), []
    pay, featurise = budget.pay_round, FederatedModel.featurise

    def paying(*given: Any) -> Any:
        seen.append("charge")
        return pay(*given)

    def computing(self: FederatedModel, records: Sequence[Record], *given: Any) -> list[Record]:
        seen.append("features")
        return featurise(self, records, *given)

    monkeypatch.setattr(budget, "pay_round", paying)
    monkeypatch.setattr(FederatedModel, "featurise", computing)
    assert isinstance(site.ask(site.task()), TrainResult)
    assert seen == ["charge", "features"]


def test_features_that_fail_after_the_charge_are_answered_by_noise_and_written_down(
    toy_settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = clinic(settings(toy_settings), tmp_path)

    def failing(*_: Any) -> None:
        raise MemoryError("planted")

    app.process.model = None
    monkeypatch.setattr(FederatedModel, "featurise", failing)
    reply = site.ask(site.task())
    assert isinstance(reply, TrainResult), reply
    assert reply.spending is not None
    with Ledger(site.ledger) as ledger:
        assert len(ledger.failures()) == 1


def test_a_site_refuses_an_encoder_that_mixes_records_before_the_charge(
    toy_settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = clinic(settings(toy_settings), tmp_path)
    model = site.model()
    monkeypatch.setattr(model.module, "reading", Mixing(model.module.reading, "centred by the batch"))
    app.process.model = None
    reply = site.ask(site.task())
    assert isinstance(reply, Refusal)
    assert "feature vector depends" in reply.reason
    with Ledger(site.ledger) as ledger:
        assert not list(ledger.entries())


def test_the_worst_case_of_reply_after_has_the_features_in_it(
    toy_settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = clinic(settings(toy_settings), tmp_path)
    app.process.model = None
    real = rehearsals.rehearse_features

    def slow(model: FederatedModel) -> Any:
        timing = real(model)
        return type(timing)(dict.fromkeys(timing.passes, 1000.0), timing.rows, timing.empty, timing.score)

    monkeypatch.setattr(rehearsals, "rehearse_features", slow)
    site.rule(reply_after=60)
    reply = site.ask(site.task())
    assert isinstance(reply, Refusal)
    assert "reply-after" in reply.reason


def test_features_that_no_rehearsal_saw_reach_no_private_run(
    toy_settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run without privacy rehearses nothing: what it computed may depend on the records beside a record."""
    app.process.model = None
    monkeypatch.setattr(RecordCache, "forget_computed", lambda own, site: None)  # as if a run's end dropped nothing
    run_in_process(settings(toy_settings, privacy__mode="none"), 1, "exposing")
    before = app.process.cache.records["site-0"].records
    assert before
    assert FEATURES in before[0]
    assert rehearsals.FEATURED not in app.process.rehearsals.timings
    model = app.process.model
    run_in_process(settings(toy_settings), 1, "private")
    assert app.process.model is model
    after = app.process.cache.records["site-0"].records
    assert after
    assert not {id(record) for record in before} & {id(record) for record in after}


def test_features_are_rehearsed_as_the_model_is_left_by_all_other_rehearsals(
    toy_settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site, seen = clinic(settings(toy_settings), tmp_path), []
    app.process.model = None
    for name in ("rehearse", "rehearse_features"):
        real = getattr(rehearsals, name)
        monkeypatch.setattr(rehearsals, name, lambda model, name=name, real=real: (seen.append(name), real(model))[1])
    site.train()
    assert seen == ["rehearse", "rehearse_features"]


def test_a_site_that_conceals_nothing_gives_no_round_up_for_the_time_that_features_take(
    toy_settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = clinic(settings(toy_settings, privacy__mode="none"), tmp_path)
    site.rule(allow_no_privacy=True, reply_after=1e-3)
    site.train()


def test_the_failure_of_what_comes_before_round_0_is_written_down_too(
    toy_settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = clinic({**toy_settings, "adapter.start": "dp-gradient"}, tmp_path)

    def failing(*_: Any) -> None:
        raise MemoryError("planted")

    monkeypatch.setattr(FederatedModel, "featurise", failing)
    reply = site.ask(replace(site.task(0), state={}, basis={}, basis_fingerprint=""))
    assert isinstance(reply, TrainResult), reply
    with Ledger(site.ledger) as ledger:
        assert len(ledger.failures()) == 1


def test_the_metric_of_one_task_is_gone_before_the_next(toy_settings: dict[str, Any], tmp_path: Path) -> None:
    mapped = {"adapter__start": "public-metric", "head__metric": "public", "start__records": 8}
    site = clinic(settings(toy_settings, **mapped), tmp_path)
    site.train()
    model = site.model()
    assert app.process.model is model
    width = model.base.hidden_size
    model.write({METRIC: {"centre": torch.ones(width), "map": 3 * torch.eye(width)}})
    assert app.process.is_clean()
    assert torch.equal(model.read()[METRIC]["map"], torch.eye(width))


def test_a_public_test_record_that_cannot_be_computed_ends_the_run_before_it_begins(
    toy_settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: Any) -> None:
        raise RuntimeError("planted")

    monkeypatch.setattr(FederatedModel, "features", failing)
    with pytest.raises(ModelError, match="public test records"):
        ServerModel(configure(settings(toy_settings)))


# --- a run ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["dp-sgd", "none"])
def test_a_run_of_the_head_alone_learns_and_evaluates_as_it_scored(toy_settings: dict[str, Any], mode: str) -> None:
    more = {"privacy__mode": mode, "privacy__epsilon": 50.0, "rounds": 4, "training__batch_tokens": 0}
    folder = run_in_process(settings(toy_settings, **more), 2)
    lines = list(read_lines(RoundLine, folder))
    score = evaluate_run(folder)
    assert score.accuracy == pytest.approx(lines[-1].accuracy)
    assert score.loss == pytest.approx(lines[-1].loss, rel=1e-5)
    assert not (folder / "adapter" / "adapter_config.json").exists()
    paid = list(read_lines(PrivacyLine, folder))
    assert [line.spent is None for line in paid] == [mode == "none"] * len(paid)
    losses = [read_file(BaselineFile, folder).loss, *(line.loss for line in lines if line.loss is not None)]
    assert len(losses) == 5
    if mode == "none":
        assert losses == sorted(losses, reverse=True), "without noise every round is nearer to the minimum"
    # Measured: 0.706 before, 0.607 without noise, and 0.63 at this ε, of which noise is a tenth.
    assert losses[-1] < losses[0] - (0.08 if mode == "none" else 0.03)


def test_only_the_head_travels(toy_settings: dict[str, Any]) -> None:
    job = configure(settings(toy_settings))
    config = job.config
    model = FederatedModel(
        *(load_base_model(config.model.name, config.model.task), job.adapter, TASKS[config.model.task], config.head),
        seed=config.seed,
        label_names=("bad", "good"),
    )
    assert set(job.strategy.downlink(job.start(model.start))) == {HEAD}
    assert {p.shape for p in model.module.parameters() if p.requires_grad} == {p.shape for p in model.head.values()}


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"head__policy": "frozen"}, "because nothing else is trained"),
        ({"model__task": "causal-lm", "head__policy": "frozen"}, "needs head.policy 'trained'"),
        *(({"adapter__start": start}, "has no factors") for start in ("eva", "public-gradient")),
        ({"adapter__start": "dp-gradient"}, "has no factors"),
        ({"adapter__start": "nonprivate-gradient", "privacy__mode": "none"}, "has no factors"),
        ({"model__checkpointing": True}, r"needs model\.checkpointing False, because no gradient"),
    ],
)
def test_a_run_that_would_train_nothing_is_refused(
    toy_settings: dict[str, Any], more: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        configure(settings(toy_settings, **more))
