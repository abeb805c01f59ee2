"""The probe: what the sites release of the head, what it costs, and what the server makes of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from probes import ask, settings

from audits.tiny_models import TARGETS
from audits.tiny_site import clinic
from fedveil.client.rehearsal import rehearse, rehearse_features, rehearse_initial
from fedveil.common.adapters import ADAPTERS
from fedveil.common.config.sections import HeadConfig
from fedveil.common.errors import ConfigError, ModelError
from fedveil.common.messages.round import TrainResult
from fedveil.common.messages.state import HEAD
from fedveil.common.messages.tensors import merge
from fedveil.common.model.alone import head_alone
from fedveil.common.model.base import load_base_model
from fedveil.common.model.federated import FederatedModel
from fedveil.common.run_lines import PrivacyLine, RoundLine, read_lines
from fedveil.common.starts import public_metric
from fedveil.common.starts.base import Labels
from fedveil.common.tasks import TASKS, Record
from fedveil.common.tasks.featured import FEATURES
from fedveil.common.tasks.text import TextExample
from fedveil.contrib.starts.probe import Probe
from fedveil.experiments.evaluate import evaluate_run
from fedveil.experiments.in_process import run_in_process
from fedveil.privacy import dpsgd
from fedveil.privacy.accounting import gaussian_release
from fedveil.privacy.dpsgd import PrivateSteps
from fedveil.privacy.plan import gaussian_plan
from fedveil.privacy.privacy_filter import promised
from fedveil.reports import report_of
from fedveil.strategies.job import configure

pytestmark = pytest.mark.slow

Folder = Callable[[str], str]
LABELS = Labels(("bad", "good"), (("dull film", "awful story", "cold"), ("warm film", "lovely story", "joyful")))
TEXTS = ("the film", "a warm story and a lovely actor", "dull", "the scene was very cold and the film was awful")


def tiny(folder: str, start: Probe) -> FederatedModel:
    return FederatedModel(
        load_base_model(folder, "classification"),
        ADAPTERS["lora-metric"](2, 4.0, tuple(TARGETS["bert"].split(",")), start),
        TASKS["classification"],
        HeadConfig(start="random"),
        seed=1,
        label_names=LABELS.names,
        feature_scale=1.0,
        max_length=24,
        device="cpu",
        precision="float32",
    )


def records_of(model: FederatedModel) -> list[Record]:
    return model.prepare([TextExample(text=text, label=i % 2) for i, text in enumerate(TEXTS)])


# --- at a site --------------------------------------------------------------------------------------------------------


@pytest.fixture
def few_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the map be of 64 made-up texts, not 512: each is a pass, at every site and at the server."""
    monkeypatch.setattr("fedveil.common.starts.public_metric.MADE", 64)


def without_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dpsgd, "add_private_noise", lambda total, std: total)


@pytest.mark.usefixtures("few_texts")
def test_without_noise_it_is_clipped_gradient_descent_on_whitened_features(
    model_folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_noise(monkeypatch)
    clip = 0.8
    monkeypatch.setattr(Probe, "clip_norm", clip)
    start = Probe(steps=3, rate=0.7, sample_rate=1.0, clip_share=0.2, head_clip_share=0.4)
    model = tiny(model_folder("bert"), start)
    records = records_of(model)
    released = start.privatise(model, records, gaussian_plan(clip, 1.0, 1.0, 4.0, 1e-5, 8.0))[HEAD]

    # The slow way, in float64: the same map, one record after another.
    texts = replace(start, text="made-up", records=public_metric.MADE).texts(model)
    seen = torch.cat([model.features(model.batch([t])).double() for t in texts])
    centre = seen.mean(0)
    values, vectors = torch.linalg.eigh((seen - centre).T @ (seen - centre) / len(seen))
    values = values.clamp(min=0)
    roots = (values + start.ridge * values.mean()).rsqrt()
    scale = clip / 0.4 / (0.5 * float((values * roots.square()).sum().sqrt()))
    P = scale * vectors * roots @ vectors.T
    x = (torch.cat([model.features(model.batch([r])).double() for r in records]) - centre) @ P
    y = torch.eye(2, dtype=torch.float64)[[0, 1, 0, 1]]
    begun = {name: p.detach().double() for name, p in model.head.items()}
    W = begun["weight"] @ torch.linalg.inv(P)
    b = begun["bias"] + begun["weight"] @ centre
    for step in range(3):
        total_w, total_b = torch.zeros_like(W), torch.zeros_like(b)
        for row, label in zip(x, y, strict=True):
            error = torch.softmax(W @ row + b, 0) - label
            g = torch.outer(error, row)
            factor = min(1.0, clip / float((g.square().sum() + error.square().sum()).sqrt()))
            total_w, total_b = total_w + factor * g, total_b + factor * error
        rate = 0.7 * (1 - step / 3)
        W, b = W - rate * total_w / 4, b - rate * total_b / 4
    moved = {
        "weight": W - begun["weight"] @ torch.linalg.inv(P),
        "bias": b - begun["bias"] - begun["weight"] @ centre,
    }
    for name, want in moved.items():
        assert float((released[name].double() - want).abs().max()) < 2e-4 * float(want.abs().max())

    # What the server makes of it is the same head on features as they are.
    model.write(model.start)
    config = configure({"adapter.start": "probe", "adapter.name": "lora-metric"}).config
    head = start.complete(model, config, LABELS, {HEAD: released})[HEAD]
    weight = W @ P
    for name, want in {"weight": weight, "bias": b - weight @ centre}.items():
        assert float((head[name].double() - want).abs().max()) < 2e-4 * float(want.abs().max())


def test_the_model_and_the_records_are_left_as_they_were(model_folder: Folder) -> None:
    start = Probe(steps=2)
    model = tiny(model_folder("bert"), start)
    records = records_of(model)
    before, trained = model.read(), {name for name, p in model.module.named_parameters() if p.requires_grad}
    shapes, task = model.shapes, model.task
    start.privatise(model, records, gaussian_plan(1.0, 1.0, 1.0, 4.0, 1e-5, 8.0))
    assert all(FEATURES not in record for record in records)
    assert (model.shapes, model.task, model.head_only, model.module.metric) == (shapes, task, False, None)
    assert {name for name, p in model.module.named_parameters() if p.requires_grad} == trained
    after = model.read()
    assert all(torch.equal(before[layer][n], after[layer][n]) for layer in before for n in before[layer])


@pytest.mark.usefixtures("few_texts")
def test_its_steps_are_as_many_and_as_noisy_as_are_charged(
    toy_settings: dict[str, Any], tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    site, seen = clinic(settings(toy_settings), tmp_path), list[tuple[float, float, float]]()
    privatise = PrivateSteps._privatise

    def spy(self: PrivateSteps, *given: Any) -> None:
        mechanism = self._mechanism
        seen.append((mechanism.noise_multiplier, mechanism.max_grad_norm, float(mechanism.expected_batch_size)))
        privatise(self, *given)

    monkeypatch.setattr(PrivateSteps, "_privatise", spy)
    answer = ask(site)
    assert isinstance(answer, TrainResult)
    assert answer.spending is not None
    # The rehearsal's are divided by another number.
    mine = [step for step in seen if step[2] == 0.5 * answer.public_size]
    assert mine == [(4.0, 1.0, 0.5 * answer.public_size)] * 5
    alone = promised([gaussian_release(4.0, 0.5, 5, "initialisation", clip_norm=1.0)], answer.spending.delta)[0]
    assert answer.spending.epsilon_round == pytest.approx(alone, rel=1e-6)
    assert set(answer.contribution) == {HEAD}


def test_round_0_rehearses_the_head_alone(model_folder: Folder) -> None:
    start = Probe(steps=2)
    model = tiny(model_folder("bert"), start)
    rehearse(model)
    narrowed = model.shapes
    rehearse_features(model)
    timing = rehearse_initial(model, start)
    assert list(timing.passes) == [1]
    assert model.shapes == narrowed
    with pytest.raises(ModelError, match="no head"), head_alone(tiny_without_head(model)):
        pass


def tiny_without_head(model: FederatedModel) -> FederatedModel:
    model.module.head = None
    return model


# --- at the server ----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("few_texts")
def test_the_server_adds_the_mean_step_and_looks_for_labels_around_it(model_folder: Folder) -> None:
    start = Probe(records=12)
    model = tiny(model_folder("bert"), start)
    config = configure({"adapter.start": "probe", "adapter.name": "lora-metric"}).config
    step = {name: torch.full_like(p, 0.25) for name, p in model.start[HEAD].items()}
    step["weight"][0] *= -1
    found = start.complete(model, config, LABELS, {HEAD: step})
    model.write(model.start)
    still = start.complete(model, config, LABELS, {HEAD: {n: torch.zeros_like(t) for n, t in step.items()}})
    assert all(float((still[HEAD][n] - model.start[HEAD][n]).abs().max()) < 1e-5 for n in step)
    assert not torch.equal(found[HEAD]["bias"], still[HEAD]["bias"])
    layers = [layer for layer in found if layer != HEAD]
    assert layers
    assert all(found[layer].keys() == {"B", "V"} for layer in layers)
    assert not all(torch.equal(found[layer]["B"], still[layer]["B"]) for layer in layers)
    model.write(merge(model.start, found))


@pytest.mark.usefixtures("rough_prices", "few_texts")
def test_a_run_counts_every_step_and_evaluates_as_it_scored(toy_settings: dict[str, Any]) -> None:
    folder = run_in_process(settings(toy_settings, privacy__epsilon=30.0), 2)
    lines = list(read_lines(RoundLine, folder))
    spent = [line for line in read_lines(PrivacyLine, folder) if line.round_number == 0]
    assert len(spent) == 2
    last = [line for line in read_lines(PrivacyLine, folder) if line.round_number == lines[-1].round_number]
    assert all(line.spent is not None and line.spent.epsilon_total <= 30.0 for line in last)
    score = evaluate_run(folder)
    assert score.accuracy == pytest.approx(lines[-1].accuracy)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"head__policy": "frozen"}, "set head.policy to 'trained'"),
        ({"privacy__mode": "none"}, "use 'public-metric'"),
        ({"adapter__name": "lora"}, "gives no A"),
        ({"adapter__name": "none"}, "has no factors"),
        ({"start__steps": 0}, "start.steps"),
        ({"start__rate": 0.0}, "start.rate"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_to_do(
    toy_settings: dict[str, Any], more: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        configure({k: v for k, v in settings(toy_settings, **more).items() if k != "start.records"})


def test_its_noise_is_that_of_its_share_of_the_budget() -> None:
    own: dict[str, Any] = {
        "adapter.start": "probe",
        "adapter.name": "lora-metric",
        "start.steps": 40,
        "start.sample-rate": 1.0,
    }

    def spent(**more: Any) -> float:
        job = configure({**own, "privacy.epsilon": 3.0, **more})
        return promised([job.origin.release()], job.config.privacy.delta)[0]

    assert spent(**{"start.share": 1.0}) == pytest.approx(3.0, rel=2e-3)
    # Of a Gaussian 1/σ² adds up: half the noise of a quarter.
    quarter, whole = (configure({**own, "start.share": share}).origin.noise_multiplier for share in (0.25, 1.0))
    assert quarter == pytest.approx(2 * whole)
    set_by_hand = configure({**own, "start.noise-multiplier": 9.0})
    assert set_by_hand.origin.noise_multiplier == 9.0
    # What a run is written down as makes the same run again.
    again = configure(configure(own).settings())
    assert again.origin == configure(own).origin


# --- in the report ----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("rough_prices", "few_texts")
def test_a_report_counts_every_step_of_the_probe(toy_settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """ε is recomputed from what was released: 40 steps taken for one would flatter it, and all that it means."""
    more = {"start.steps": 40, "start.noise-multiplier": 12.0, "start.sample-rate": 1.0}
    folder = run_in_process({**settings(toy_settings), **more}, 2)
    report = report_of(folder)
    assert [site.agreement for site in report.sites] == ["agrees", "agrees"]
    for site in report.sites:
        assert site.epsilon_recomputed == pytest.approx(site.epsilon_total, abs=1e-6)
    assert report.meaning is not None
    assert report.meaning.epsilon == pytest.approx(report.headline.epsilon, abs=1e-6)
    assert [release.count for release in report.other_releases] == [40, 40]
    monkeypatch.setattr("fedveil.reports.releases._count_of_start", lambda files: 1)
    assert [site.agreement for site in report_of(folder).sites] == ["larger", "larger"], "the planted fault is not seen"
