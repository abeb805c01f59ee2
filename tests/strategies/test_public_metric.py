"""The public metric: what it shrinks, how long it leaves gradients, and that no record has a say in it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Container, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from probes import metric_run
from torch import Tensor

from audits.tiny_models import TARGETS, write_reviews
from fedveil.common.adapters import ADAPTERS
from fedveil.common.adapters.base import parameters_of
from fedveil.common.adapters.lora_metric import SHRUNK, in_weights, shrunk
from fedveil.common.config.sections import HeadConfig
from fedveil.common.errors import ConfigError, ModelError
from fedveil.common.messages.round import TrainTask
from fedveil.common.messages.state import HEAD, METRIC, AdapterState
from fedveil.common.messages.tensors import merge
from fedveil.common.model.base import load_base_model
from fedveil.common.model.federated import FederatedModel
from fedveil.common.run_lines import BaselineFile, RoundLine, read_file, read_lines
from fedveil.common.starts import public_metric
from fedveil.common.starts.base import Labels
from fedveil.common.starts.public_metric import PublicMetric, shrinking
from fedveil.common.tasks import TASKS
from fedveil.common.tasks.text import TextExample
from fedveil.experiments.evaluate import evaluate_run
from fedveil.experiments.in_process import InProcessTransport, run_in_process
from fedveil.privacy.entropy import Source
from fedveil.server.model import ServerModel
from fedveil.server.sites import Exchange
from fedveil.strategies.job import configure

pytestmark = [pytest.mark.rough_prices, pytest.mark.peft]

Folder = Callable[[str], str]
LABELS = Labels(("bad", "good"), (("dull film", "awful story", "cold"), ("warm film", "lovely story", "joyful")))


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def tiny(
    folder: str,
    start: PublicMetric,
    adapter: str = "lora-metric",
    metric: str = "none",
    targets: str = TARGETS["bert"],
) -> FederatedModel:
    return FederatedModel(
        load_base_model(folder, "classification"),
        ADAPTERS[adapter](2, 4.0, tuple(targets.split(",")), start),
        TASKS["classification"],
        HeadConfig(start="random", metric=metric),
        seed=1,
        label_names=LABELS.names,
        max_length=24,
        device="cpu",
        precision="float32",
    )


# --- the map ----------------------------------------------------------------------------------------------------------


def test_v_takes_the_leading_directions_down_to_the_one_after_them_and_leaves_the_others() -> None:
    vectors = torch.linalg.qr(draw(20, 20))[0]
    values = torch.tensor([1000.0, 300, 90, 40, 30, 20, 11, 9, 7, *(1.0 / (i + 1) for i in range(11))]).double()
    V = shrinking(vectors * values @ vectors.T)
    left = torch.eye(20, dtype=torch.float64) - V.T @ V
    found = torch.linalg.eigvalsh(left @ (vectors * values @ vectors.T) @ left).flip(0)
    assert shrunk(20) == 5
    wanted = torch.cat([torch.full((6,), 20.0, dtype=torch.float64), values[6:]])
    assert (found - wanted).abs().max() < 1e-9
    assert (left @ vectors[:, 5:] - vectors[:, 5:]).abs().max() < 1e-12


@pytest.mark.parametrize("width", [1, 3, SHRUNK, 4 * SHRUNK + 1])
def test_a_narrow_layer_has_fewer_directions_to_shrink(width: int) -> None:
    moment = draw(width, width)
    V = shrinking(moment @ moment.T)
    assert V.shape == (max(1, min(SHRUNK, width // 4)), width)
    assert bool(V.isfinite().all())


def test_the_factors_in_weights_are_the_map_in_float64(model_folder: Folder) -> None:
    A, B, V = draw(3, 12), draw(7, 3, seed=1), 0.3 * draw(8, 12, seed=2)
    adapter = ADAPTERS["lora-metric"](3, 6.0, ("query",))
    slow = 2.0 * B @ A @ (torch.eye(12, dtype=torch.float64) - V.T @ V)
    assert (adapter.delta({"A": A, "B": B, "V": V}, torch.zeros(7, 12)) - slow).abs().max() < 1e-12
    assert (2.0 * B @ in_weights({"A": A, "V": V}) - slow).abs().max() < 1e-12


# --- what it is made from ---------------------------------------------------------------------------------------------


def test_moments_of_layers_in_turn_are_those_of_all_at_once(
    model_folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = PublicMetric(records=12)
    model = tiny(model_folder("bert"), start)
    config = configure({"adapter.start": "public-metric", "adapter.name": "lora-metric"}).config
    at_once, gradients, held = start.from_public(model, config, LABELS), public_metric.record_gradients, list[int]()

    def spy(model: FederatedModel, records: Any, only: Collection[str] = ()) -> Any:
        held.append(len(only))
        return gradients(model, records, only)

    monkeypatch.setattr(public_metric, "record_gradients", spy)
    monkeypatch.setattr(public_metric, "MOMENTS", 1)
    in_turn = start.from_public(model, config, LABELS)
    assert held == [0, *[1] * len(in_turn)], "more than one layer's moments are held"
    assert in_turn.keys() == at_once.keys()
    assert all(torch.equal(in_turn[layer][n], at_once[layer][n]) for layer in at_once for n in at_once[layer])


@pytest.mark.parametrize(
    ("adapter", "family", "targets"),
    [
        ("lora-metric", "bert", TARGETS["bert"]),
        ("lora-frozen-b", "bert", TARGETS["bert"]),
        ("lora-metric", "gpt2", TARGETS["gpt2"]),
        ("lora-metric", "gpt2", "attn.c_proj"),  # square and stored transposed: either orientation has its shape
    ],
)
def test_public_gradients_have_the_stated_length_in_each_layer_alike(
    model_folder: Folder, adapter: str, family: str, targets: str
) -> None:
    start = PublicMetric(records=12, clip_share=0.25)
    model = tiny(model_folder(family), start, adapter, targets=targets)
    config = configure({"privacy.clip-norm": 0.5, "adapter.start": "public-metric", "adapter.name": adapter}).config
    made = start.from_public(model, config, LABELS)
    model.write(merge(model.start, {k: {n: t for n, t in f.items() if n in model.start[k]} for k, f in made.items()}))
    # Slowly: each text by itself, through autograd of the trained factors.
    texts = start.texts(model, start.drawn_labels(2, config.seed))
    squares: dict[str, Tensor] = {}
    for record in texts:
        model.module.zero_grad()
        model.losses(model.batch([record])).sum().backward()
        for layer, factors in parameters_of(model.adapter, model.peft_model).items():
            squares[layer] = squares.get(layer, 0.0) + factors["A"].grad.double().square().sum(1) / len(texts)
    # Each row of A belongs to a column of B. One that the tiny model hardly has a gradient in is not blown up to it.
    wanted = (0.5 / 0.25) ** 2 / len(squares) / 2
    rows = torch.stack(list(squares.values())) / wanted
    assert float((rows[:, 0] - 1).abs().max()) < 1e-4
    assert float(rows.max()) < 1 + 1e-4
    if targets in TARGETS.values():
        assert ((rows[:, 1] - 1).abs() < 1e-4).any(), "no second column is as long as the first"


def test_columns_of_b_are_where_the_phrases_say_and_random_ones_are_not(model_folder: Folder) -> None:
    config = configure({"adapter.start": "public-metric", "adapter.name": "lora-metric"}).config
    made = {}
    for outputs in ("public", "random"):
        start = PublicMetric(records=12, outputs=outputs)
        made[outputs] = start.from_public(tiny(model_folder("bert"), start), config, LABELS)
    model = tiny(model_folder("bert"), PublicMetric())
    for layer, factors in made["public"].items():
        B = factors["B"].double()
        B, first, began = (
            t / t.norm(dim=0) for t in (B, made["random"][layer]["B"].double(), model.start[layer]["B"].double())
        )
        assert (B.T @ B - torch.eye(2, dtype=torch.float64)).abs().max() < 1e-5, "columns not orthogonal"
        assert (first - began).abs().max() < 1e-6
        assert (B - began).abs().max() > 0.1


def test_no_record_of_a_site_has_a_say_in_the_metric(
    toy_settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over other records, with one public test file, the server holds the same bytes; by a metric of records not."""
    test = str(write_reviews(tmp_path / "test.csv", 40, seed=3))

    def basis(seed: int) -> AdapterState:
        records = str(write_reviews(tmp_path / f"records{seed}.csv", 60, seed=seed))
        job = configure(metric_run({**toy_settings, "data.name": records, "data.test": test}))
        server = ServerModel(job)
        return job.basis(job.begin(server.start, server.public_statistic()))

    first, second = basis(1), basis(2)
    assert first.keys() == second.keys()
    assert first
    assert all(torch.equal(first[layer][n], second[layer][n]) for layer in first for n in first[layer])

    def private(self: PublicMetric, model: FederatedModel, labels: Any = ()) -> Any:
        lines = (tmp_path / f"records{private.seed}.csv").read_text().splitlines()[1:13]  # type: ignore[attr-defined]
        return model.prepare([TextExample(text=line, label=0) for line in lines])

    monkeypatch.setattr(PublicMetric, "texts", private)
    faulty = []
    for seed in (1, 2):
        private.seed = seed  # type: ignore[attr-defined]
        faulty.append(basis(seed))
    assert not all(torch.equal(faulty[0][layer]["V"], faulty[1][layer]["V"]) for layer in faulty[0])


# --- the head's ---------------------------------------------------------------------------------------------------


def test_the_heads_metric_moves_no_logit_and_whitens_public_features(model_folder: Folder) -> None:
    start = PublicMetric(records=12, ridge=1e-6)
    model = tiny(model_folder("bert"), start, "none", metric="public")
    config = configure({"adapter.start": "public-metric", "adapter.name": "none", "head.metric": "public"}).config
    texts = start.texts(model, [])
    with torch.no_grad():
        before = torch.cat([model.module(model.batch([record])) for record in texts])
        seen = torch.cat([model.features(model.batch([record])) for record in texts]).double()
        model.write(merge(model.start, start.from_public(model, config, LABELS)))
        after = torch.cat([model.module(model.batch([record])) for record in texts])
        mapped = model.module.metric(seen.float()).double()
    assert (after - before).abs().max() < 1e-4
    assert mapped.mean(0).abs().max() < 1e-4 * mapped.abs().max()
    # As many directions as texts can span have one length.
    spectrum = torch.linalg.eigvalsh(mapped.T @ mapped / len(mapped)).flip(0)
    assert float(spectrum[0] / spectrum[min(len(texts), seen.shape[1]) - 3]) < 1.1
    assert model.folded_head["weight"].shape == model.module.head.weight.shape
    with torch.no_grad():
        plain = seen.float() @ model.folded_head["weight"].T + model.folded_head["bias"]
    assert (plain - before).abs().max() < 1e-4


# --- in a run -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"adapter__name": "lora-frozen-b"},
        {"start__outputs": "random"},
        {"head__metric": "public"},
        {"adapter__name": "none", "head__metric": "public"},
    ],
    ids=["metric", "directions alone", "metric alone", "with the head's", "the head's alone"],
)
def test_a_private_run_trains_in_the_metric_and_evaluates_as_it_scored(
    toy_settings: dict[str, Any], more: dict[str, Any]
) -> None:
    folder = run_in_process(metric_run(toy_settings, **more), 2)
    lines = list(read_lines(RoundLine, folder))
    assert lines[-1].accuracy is not None
    score = evaluate_run(folder)
    assert score.accuracy == pytest.approx(lines[-1].accuracy)
    assert score.loss == pytest.approx(lines[-1].loss, rel=1e-4)


@pytest.mark.parametrize(
    "more",
    [
        {"server__learning_rate": 0.003},
        {"adapter__name": "none", "head__metric": "public", "server__learning_rate": 0.01},
    ],
    ids=["the adapter's", "the head's"],
)
def test_without_noise_the_loss_falls_in_the_metric(toy_settings: dict[str, Any], more: dict[str, Any]) -> None:
    own = {"privacy__mode": "none", "rounds": 3, "training__sample_rate": 1.0}
    folder = run_in_process(metric_run(toy_settings, **own, **more), 2)
    losses = [read_file(BaselineFile, folder).loss, *(line.loss for line in read_lines(RoundLine, folder))]
    told = [loss for loss in losses if loss is not None]
    assert len(told) == 4
    assert told == sorted(told, reverse=True)
    assert told[-1] < told[0] - 0.015  # measured: 0.706 before, 0.673 and 0.565 after


class Dies(InProcessTransport):
    """A server that is gone before round 3."""

    def exchange(self, tasks: Mapping[int, TrainTask], timeout: float) -> Exchange:
        if any(task.round_number == 3 for task in tasks.values()):
            raise KeyboardInterrupt
        return super().exchange(tasks, timeout)


@pytest.mark.parametrize("adapter", ["lora-metric", "none"])
def test_a_resumed_run_goes_on_in_the_metric_and_with_the_velocity_that_it_had(
    toy_settings: dict[str, Any], replace_entropy: Callable[[Source], None], adapter: str
) -> None:
    fixed = np.random.default_rng(5).integers(0, 2**64, 200_000, dtype=np.uint64)
    replace_entropy(lambda count: fixed[:count])
    asked = metric_run(toy_settings, head__metric="public", adapter__name=adapter, rounds=3, privacy__epsilon=50.0)
    whole = run_in_process(asked, 2, "whole")
    with pytest.raises(KeyboardInterrupt):
        run_in_process(asked, 2, "cut", Dies)
    cut = Path(asked["output"]) / ("head-only-cut" if adapter == "none" else "fedavg-lora-cut")
    assert run_in_process({**asked, "resume": "cut"}, 2, "again") == cut
    scores = [[(line.accuracy, line.loss) for line in read_lines(RoundLine, folder)] for folder in (whole, cut)]
    assert scores[0] == scores[1]
    for path in (whole / "adapter").glob("*.safetensors"):
        assert path.read_bytes() == (cut / "adapter" / path.name).read_bytes()


class JoinsLate(InProcessTransport):
    """The second site is there from round 2 on."""

    asked = 0

    def nodes(self, wanted: int, besides: Container[int]) -> list[int]:
        self.asked += 1
        return [node for node in super().nodes(wanted, besides) if self.asked > 1 or node == 0]


def test_the_heads_metric_travels_to_each_site_once(toy_settings: dict[str, Any]) -> None:
    asked = metric_run(toy_settings, head__metric="public", adapter__name="none", rounds=3)
    folder = run_in_process(asked, 2, "late", JoinsLate)
    head, metric = 4 * (2 * 16 + 2), 4 * (16 * 16 + 16)
    down = [line.bytes_down for line in read_lines(RoundLine, folder) if line.round_number]
    assert down == [head + metric, 2 * head + metric, 2 * head]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"adapter__name": "lora"}, "gives no A"),
        (
            {"head__metric": "public", "adapter__start": "orthonormal", "adapter__name": "lora"},
            "set adapter.start to 'public-metric'",
        ),
        ({"head__metric": "public", "head__policy": "frozen"}, "set head.policy to 'trained'"),
        ({"start__outputs": "private"}, "start.outputs"),
        ({"start__clip_share": 0.0}, "start.clip-share"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_to_do(
    toy_settings: dict[str, Any], more: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        configure({k: v for k, v in metric_run(toy_settings, **more).items() if k != "start.records"})


def test_a_head_at_zero_is_refused_because_no_text_has_a_gradient(model_folder: Folder) -> None:
    start = PublicMetric(records=4)
    model = tiny(model_folder("bert"), start)
    with torch.no_grad():
        model.module.head.weight.zero_()
    model.start = model.read()
    config = replace(configure({"adapter.start": "public-metric", "adapter.name": "lora-metric"}).config)
    with pytest.raises(ModelError, match=r"head\.start"):
        start.from_public(model, config, LABELS)
    assert HEAD in model.start
    assert METRIC not in model.start
