"""Class means: what the sites release, that it is what it is priced as, and what the server makes of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from audits.bands import out_of_band
from audits.class_means import EACH_CLIPPED, audit_class_means, clipped
from audits.faults import DOUBLED, SOUND, Fault
from audits.tiny_models import TARGETS
from fedveil.common.adapters import ADAPTERS
from fedveil.common.config.sections import HeadConfig
from fedveil.common.errors import ConfigError
from fedveil.common.messages.state import HEAD, METRIC, AdapterState
from fedveil.common.messages.tensors import weighted_sum
from fedveil.common.model.base import load_base_model
from fedveil.common.model.federated import FederatedModel
from fedveil.common.run_lines import PrivacyLine, RoundLine, read_lines
from fedveil.common.starts import class_means
from fedveil.common.starts.base import Labels
from fedveil.common.starts.class_means import COUNT, ClassMeans
from fedveil.common.tasks import TASKS, Record
from fedveil.common.tasks.text import TextExample
from fedveil.experiments.evaluate import evaluate_run
from fedveil.experiments.in_process import run_in_process
from fedveil.privacy import dpsgd
from fedveil.privacy.accounting import epsilon
from fedveil.privacy.plan import PrivacyPlan, gaussian_plan
from fedveil.strategies.job import configure

Folder = Callable[[str], str]
LABELS = Labels(("bad", "good", "dull"), (("bad",), ("good",), ("dull",)))
TEXTS = ("the film", "a warm story and a lovely actor", "dull", "the scene was very cold", "a film", "cold quiet story")
KINDS = (0, 1, 2, 0, 0, 1)
CLIP = 0.8
Clipped = clipped(CLIP)
RUN = {"strategy": "fedavg-lora", "adapter.name": "none", "adapter.start": "class-means", "head.metric": "public"}
LORA = {"adapter.name": "lora", "head.metric": "none"}


@pytest.fixture(autouse=True)
def few_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the map be of 24 made-up records, not 512: each is a pass, at every site and at the server."""
    monkeypatch.setattr(class_means, "MADE", 24)


@pytest.fixture
def make(model_folder: Folder) -> Callable[..., FederatedModel]:
    def made(start: ClassMeans, metric: str = "public", adapter: str = "none") -> FederatedModel:
        return FederatedModel(
            load_base_model(model_folder("bert"), "classification"),
            ADAPTERS[adapter](2, 4.0, tuple(TARGETS["bert"].split(",")), start),
            TASKS["classification"],
            HeadConfig(start="zeros", metric=metric),
            seed=1,
            label_names=LABELS.names,
            feature_scale=1.0,
            max_length=24,
            device="cpu",
            precision="float32",
        )

    return made


def records_of(model: FederatedModel, first: int = 0, last: int = len(TEXTS)) -> list[Record]:
    return model.prepare([TextExample(text=TEXTS[i], label=KINDS[i]) for i in range(first, last)])


def plan_of(divisor: float, noise: float = 1.0) -> PrivacyPlan:
    return gaussian_plan(CLIP, noise, 1.0, divisor, 1e-5, 50.0)


def without_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dpsgd, "add_private_noise", lambda total, std: total.double())


def vectors_of(model: FederatedModel, records: list[Record], public: dict[str, Tensor]) -> Tensor:
    """Return what each record is to release, the slow way, in float64: mapped features and the count, clipped."""
    seen = torch.cat([model.features(model.batch([r])).double() for r in records])
    mapped = (seen - public["centre"].double()) @ public["map"].double()
    whole = torch.cat([mapped, torch.full((len(mapped), 1), COUNT * CLIP, dtype=torch.float64)], dim=1)
    return whole * (CLIP / whole.norm(dim=1, keepdim=True)).clamp(max=1)


@pytest.mark.parametrize("sums", ["labels", "all"])
def test_two_unequal_sites_sum_up_to_all_records_as_a_slow_reference_does(
    sums: str, make: Callable[..., FederatedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    without_noise(monkeypatch)
    start = Clipped(sums=sums, sample_rate=1.0)
    model = make(start)
    made_map = start._map(model)
    longest = torch.cat([model.features(model.batch([r])) for r in records_of(model)]) - made_map["centre"]
    shorter = {**made_map, "map": made_map["map"] * (CLIP / (longest @ made_map["map"]).norm(dim=1).median())}
    monkeypatch.setattr(ClassMeans, "_map", lambda own, model: shorter)  # so that half of the records are clipped
    parts = [start.privatise(model, records_of(model, *ends), plan_of(n)) for ends, n in (((0, 2), 2.0), ((2, 6), 4.0))]
    whole: AdapterState = weighted_sum([2 / 6, 4 / 6], parts)
    public = start._map(model)
    records = records_of(model)
    vectors = vectors_of(model, records, public)
    assert 0 < int((vectors.norm(dim=1) < CLIP * (1 - 1e-9)).sum()) < 6, "all are clipped, or none"
    labels = KINDS if sums == "labels" else (0,) * 6
    wanted = torch.stack([vectors[[y == i for y in labels]].sum(0) for i in sorted(set(labels))]) / 6
    assert {n: t.shape for n, t in whole[HEAD].items()} == {n: tuple(s) for n, s in start.layout(model)[HEAD].items()}
    assert (whole[HEAD]["sums"] - wanted[:, :-1]).abs().max() < 1e-6
    assert (whole[HEAD]["counts"] - wanted[:, -1]).abs().max() < 1e-6

    config = configure({**RUN, "start.sums": sums, "privacy.clip-norm": 2.0}).config
    made = start.complete(model, config, LABELS, whole)
    counts = wanted[:, -1] / (COUNT * CLIP)
    mean = wanted[:, :-1].sum(0) / counts.sum()
    longer = 2 * 2.0 / (start.clip_share * CLIP)
    P, raw = public["map"].double(), torch.cat([model.features(model.batch([r])).double() for r in records])
    behind = longer * ((raw - public["centre"].double()) @ P - mean)
    assert ((raw - made[METRIC]["centre"].double()) @ made[METRIC]["map"].double() - behind).abs().max() < 1e-3
    if sums == "all":
        assert not made[HEAD]["weight"].any(), "the head begins where head.start says"
        return
    rows = longer * (wanted[:, :-1] / counts[:, None] - mean)
    rows *= config.head.margin / (rows.square().sum(1).mean() * 3 / 2)
    assert (made[HEAD]["weight"] - rows).abs().max() < 1e-4 * float(rows.abs().max())
    # Without a map before it the head says the same.
    plain = make(start, metric="none")
    folded = start.complete(plain, config, LABELS, whole)
    assert set(folded) == {HEAD}
    said = raw @ folded[HEAD]["weight"].double().T + folded[HEAD]["bias"].double()
    assert (said - behind @ rows.T).abs().max() < 1e-2 * float((behind @ rows.T).abs().max())


def test_a_noised_count_that_is_next_to_nothing_or_negative_is_taken_for_the_least(
    make: Callable[..., FederatedModel],
) -> None:
    start = Clipped(sample_rate=1.0)
    model, config = make(start), configure({**RUN, "privacy.clip-norm": 2.0}).config
    draw = torch.Generator().manual_seed(4)
    sums = torch.randn(start.layout(model)[HEAD]["sums"], generator=draw, dtype=torch.float64)
    for told in ((-0.4, 0.1, 0.05), (2.0, -1.2, 0.001)):
        counts = torch.tensor(told, dtype=torch.float64)
        statistic: AdapterState = {HEAD: {"sums": sums, "counts": counts * COUNT * CLIP}}
        made, public = start.complete(model, config, LABELS, statistic), start._map(model)
        everyone = max(0.1, sum(told))
        mean, P = sums.sum(0) / everyone, public["map"].double()
        centre = public["centre"].double() + torch.linalg.solve(P.T, mean)
        assert torch.allclose(made[METRIC]["centre"].double(), centre, rtol=1e-5, atol=1e-5 * float(centre.abs().max()))
        rows = sums / counts.clamp(min=0.1 * everyone / 3)[:, None] - mean
        found = made[HEAD]["weight"].double()
        assert torch.allclose(found / found.norm(), rows / rows.norm(), rtol=1e-5, atol=1e-6)


def test_what_is_public_is_the_same_bytes_at_sites_with_other_records(make: Callable[..., FederatedModel]) -> None:
    start = Clipped(sample_rate=1.0)
    seen = []
    for ends in ((0, 3), (3, 6)):
        model = make(start)
        before = {name: p.detach().clone() for name, p in model.module.named_parameters()}
        start.privatise(model, records_of(model, *ends), plan_of(3.0))
        after = dict(model.module.named_parameters())
        assert set(before) == set(after), "something of the records stays in the model"
        assert all(torch.equal(before[name], p) for name, p in after.items())
        seen.append({name: tensor.numpy().tobytes() for name, tensor in start._map(model).items()})
    assert seen[0] == seen[1]


@pytest.mark.parametrize("fault", [SOUND, DOUBLED, EACH_CLIPPED], ids=lambda fault: fault.name or "sound")
def test_the_audit_of_class_means_passes_on_the_code_as_it_is_and_finds_every_fault(
    fault: Fault, make: Callable[..., FederatedModel]
) -> None:
    model = make(ClassMeans())
    assert audit_class_means(model, records_of(model), fault).passed


def test_a_site_without_a_record_sends_noise_alone_and_the_server_makes_numbers_of_it(
    make: Callable[..., FederatedModel],
) -> None:
    start = Clipped(sample_rate=1.0)
    model = make(start)
    sent = start.privatise(model, [], plan_of(2.0, noise=3.0))
    flat = torch.cat([t.flatten() for t in sent[HEAD].values()])
    # A hundred numbers: half or twice the noise is out of the band, whatever is drawn.
    assert not out_of_band(float((flat / (3.0 * CLIP / 2)).square().sum()), flat.numel())
    made = start.complete(model, configure(RUN).config, LABELS, sent)
    assert all(bool(t.isfinite().all()) for layer in made.values() for t in layer.values())


def test_its_noise_is_that_of_its_share_of_the_budget() -> None:
    start = configure({**RUN, "start.share": 0.25, "start.sample-rate": 1.0, "privacy.epsilon": 8.0}).origin
    release = start.release()
    assert release is not None
    assert release.count == 1
    whole = configure({**RUN, "start.share": 1.0, "start.sample-rate": 1.0}).origin.release()
    assert whole is not None
    assert release.event.noise_multiplier == pytest.approx(2 * whole.event.noise_multiplier)
    assert 7.9 < epsilon([whole], 1e-5) <= 8.0
    kept = configure({**RUN, "start.share": 0.0}).origin.release()
    assert kept is not None
    assert kept.event.noise_multiplier == 5.0


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"privacy.mode": "none"}, "alone pays for: use 'public-metric'"),
        ({"privacy.mode": "secure-sum", "privacy.honest-sites": 2}, "nobody sees more than a sum: choose another"),
        ({"privacy.mode": "client-level", "privacy.unit": "site", "privacy.cohort": 20}, "adapter.start 'class-means'"),
        ({**LORA, "head.policy": "frozen", "head.start": "random"}, "set head.policy to 'trained'"),
        ({"head.metric": "none", "start.sums": "all"}, "set head.metric to 'public', or start.sums to 'labels'"),
        ({"start.sums": "some"}, "start.sums is 'some'"),
        ({**LORA, "model.task": "causal-lm", "data.name": "asdiv", "head.policy": "frozen"}, "is of labels, and"),
    ],
    ids=str,
)
def test_a_run_that_cannot_begin_so_is_refused_in_one_line(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        configure({**RUN, **settings})
    assert words in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("adapter", ["none", "lora"])
def test_a_run_is_charged_for_it_and_scores_as_it_says(adapter: str, toy_settings: dict[str, Any]) -> None:
    own: dict[str, Any] = {"adapter.name": adapter, "start.noise-multiplier": 4.0, "start.sample-rate": 1.0}
    folder = run_in_process({**toy_settings, **RUN, **own, "head.start": "zeros", "rounds": 2}, 2)
    rounds = read_lines(RoundLine, folder)
    assert [line.round_number for line in rounds] == [0, 1, 2]
    assert not any(line.refusals or line.failures for line in rounds)
    first = [line for line in read_lines(PrivacyLine, folder) if line.round_number == 0]
    assert len(first) == 2
    assert all(line.spent.epsilon_total > 0 for line in first if line.spent)
    scored = evaluate_run(folder)
    # What is saved has the map folded into the head.
    assert (scored.accuracy, scored.loss) == pytest.approx((rounds[-1].accuracy, rounds[-1].loss), abs=1e-6)
