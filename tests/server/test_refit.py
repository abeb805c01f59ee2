"""Rounds in which the adapter rests, first or last: what sites train, what moves at the server, what is refused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from audits.tiny_models import TARGETS
from audits.tiny_site import clinic
from fedveil.client import app
from fedveil.client.head_alone import head_on_features
from fedveil.client.linearised import Computation, Derivatives, Keeping
from fedveil.client.rehearsal import rehearse, rehearse_features, rehearse_head
from fedveil.common.adapters import build_adapter
from fedveil.common.config.sections import AdapterConfig, HeadConfig
from fedveil.common.errors import ConfigError, ModelError
from fedveil.common.messages.round import TrainTask
from fedveil.common.messages.state import BASIS, HEAD, METRIC, OWN, AdapterState
from fedveil.common.model.base import load_base_model
from fedveil.common.model.federated import FederatedModel
from fedveil.common.paths import run_folder
from fedveil.common.run_lines import PrivacyLine, RoundLine, read_lines
from fedveil.common.starts import STARTS
from fedveil.common.starts.base import Labels
from fedveil.common.tasks import TASKS, Record
from fedveil.common.tasks.examples import Dataset
from fedveil.common.tasks.featured import FEATURES
from fedveil.common.tasks.module import TaskModule
from fedveil.common.tasks.text import TextExample
from fedveil.contrib.starts.probe import Probe
from fedveil.experiments.evaluate import evaluate_run
from fedveil.experiments.in_process import InProcessTransport, run_in_process
from fedveil.privacy import dpsgd
from fedveil.privacy.plan import gaussian_plan
from fedveil.server.checkpoint import load_checkpoint, save_checkpoint, saved_state
from fedveil.server.model import ServerModel
from fedveil.server.optimizer import server_step
from fedveil.strategies import ServerState
from fedveil.strategies.job import configure, with_recipe

pytestmark = [pytest.mark.rough_prices, pytest.mark.one_length]

Folder = Callable[[str], str]
DATA = Dataset("made-up", (), ())
LAST = Computation("1", 0, 0, "", "")
TEXTS = ("the film", "a warm story and a lovely actor", "dull", "the scene was very cold and the film was awful")
LABELS = Labels(("bad", "good"), (("dull film", "awful story", "cold"), ("warm film", "lovely story", "joyful")))


def tiny(folder: str, **head: Any) -> FederatedModel:
    """Return a model whose adapter has moved."""
    model = FederatedModel(
        load_base_model(folder, "classification"),
        build_adapter(
            "lora", AdapterConfig(name="lora", rank=2, alpha=4.0, targets=TARGETS["bert"]), STARTS["kaiming"]()
        ),
        TASKS["classification"],
        HeadConfig(start="random", **head),
        seed=1,
        label_names=LABELS.names,
        feature_scale=1.0,
        max_length=24,
        device="cpu",
        precision="float32",
    )
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in (*model.below_head().values(), *model.places().get(METRIC, {}).values()):
            p.add_(0.05 * torch.randn(p.shape, generator=draw))
    return model


def records_of(model: FederatedModel) -> list[Record]:
    return model.prepare([TextExample(text=text, label=i % 2) for i, text in enumerate(TEXTS)])


def nothing() -> None:
    """Come before no pass."""


def sums_of(model: FederatedModel, records: Sequence[Record], clip: float) -> Tensor:
    """Return the sum of the clipped gradients of the first step, weight and bias as one vector."""
    with head_on_features(model, records, Keeping(LAST, {}, "site", DATA, nothing)) as (seen, trained):
        optimizer = torch.optim.SGD(trained[HEAD].values(), lr=0.0)
        with gaussian_plan(clip, 1.0, 1.0, 1.0, 1e-5, 8.0).steps(model, optimizer) as steps:
            return torch.cat([g.flatten() for g in steps.release(model.fixed_batches(seen), model.losses)])


# --- at a site --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", ["none", "public"])
def test_a_step_is_that_of_the_head_on_the_moved_features_in_float64(
    model_folder: Folder, monkeypatch: pytest.MonkeyPatch, metric: str
) -> None:
    monkeypatch.setattr(dpsgd, "add_private_noise", lambda total, std: total)
    model = tiny(model_folder("bert"), metric=metric)
    records, C = records_of(model), 0.8
    x = torch.cat([model.features(model.batch([record])) for record in records]).double()
    if metric == "public":
        places = model.places()[METRIC]
        x = (x - places["centre"].double()) @ places["map"].double()
    W, b = (model.head[name].detach().double() for name in ("weight", "bias"))
    want, clipped = torch.zeros(W.numel() + b.numel(), dtype=torch.float64), 0
    for row, label in zip(x, (0, 1, 0, 1), strict=True):
        error = torch.softmax(W @ row + b, 0) - torch.eye(2, dtype=torch.float64)[label]
        g = torch.cat([torch.outer(error, row).flatten(), error])
        clipped += float(g.norm()) > C
        want += min(1.0, C / float(g.norm())) * g
    assert clipped > 0
    assert float((sums_of(model, records, C).double() - want).abs().max()) < 1e-5 * float(want.abs().max())


def test_a_record_moves_the_sum_by_one_clip(model_folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dpsgd, "add_private_noise", lambda total, std: total)
    model = tiny(model_folder("bert"))
    records, features = records_of(model), TaskModule.features
    whole, without = sums_of(model, records, 0.3), sums_of(model, records[1:], 0.3)
    assert 0.29 < float((whole - without).norm()) <= 0.3 * (1 + 1e-5)

    # The planted fault: features of a pass hold one another.
    def mixed(self: TaskModule, batch: Any) -> Tensor:
        found = features(self, batch)
        return found if FEATURES in batch else found + 10 * found.mean(0)

    monkeypatch.setattr(TaskModule, "features", mixed)
    short, other = records[0], records[2]  # of one shape
    whole, without = sums_of(model, [short] * 3 + [other], 0.3), sums_of(model, [short] * 3, 0.3)
    assert float((whole - without).norm()) > 0.3 * (1 + 1e-3)


def test_the_rehearsal_sees_a_step_that_mixes_records(model_folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(model_folder("bert"))
    rehearse(model)
    rehearse_features(model)
    assert list(rehearse_head(model).passes) == [1]
    linear = torch.nn.Linear.forward

    def forward(self: torch.nn.Linear, x: Tensor) -> Tensor:
        found = linear(self, x)
        return found + found.mean(0) if self is model.module.head else found

    monkeypatch.setattr(torch.nn.Linear, "forward", forward)
    with pytest.raises(ModelError, match="depends on the records beside it"):
        rehearse_head(model)


def test_features_are_computed_once_and_no_record_s_noise_sees_them(model_folder: Folder) -> None:
    model = tiny(model_folder("bert"))
    records, kept, passes = records_of(model), dict[str, Derivatives](), list[int]()
    counts = list[int]()
    copies, before, shapes, task = [dict(r) for r in records], model.read(), model.shapes, model.task
    for number in range(3):
        keeping = Keeping(LAST, kept, "site", DATA, lambda: passes.append(1))
        with head_on_features(model, records, keeping) as (seen, trained):
            assert len(seen) == len(records)
            assert set(trained) == {HEAD}
            assert {id(p) for p in model.module.parameters() if p.requires_grad} == {id(p) for p in model.head.values()}
        assert passes, number
        first = seen[0][FEATURES]
        counts.append(len(passes))
    assert counts == counts[:1] * 3
    with head_on_features(model, [], Keeping(LAST, kept, "site", DATA, nothing)) as (seen, _):
        assert seen == []
    received = {place: p.detach().clone() for place, p in model.below_head().items()}
    with torch.no_grad():  # of another adapter they are others
        next(iter(model.below_head().values())).add_(0.5)
    with head_on_features(model, records, Keeping(LAST, kept, "site", DATA, lambda: passes.append(1))) as (moved, _):
        assert len(passes) == 2 * counts[0]
        assert not torch.equal(moved[0][FEATURES], first)
    with torch.no_grad():
        for place, p in model.below_head().items():
            p.copy_(received[place])
    assert records == copies
    assert (model.shapes, model.task, model.head_only) == (shapes, task, False)
    after = model.read()
    assert all(torch.equal(before[layer][n], after[layer][n]) for layer in before for n in before[layer])


def test_a_site_sends_the_adapter_as_it_came_and_keeps_no_features(toy_settings: dict[str, Any], tmp_path: Any) -> None:
    more = {
        "phases": "2 adapter on jacobians, 2 head on features",
        "training.local-steps": 1,
        "training.sample-rate": 0.5,
    }
    site = clinic({**toy_settings, **more}, tmp_path)
    start, kept = site.model().start, []
    for number in (1, 2, 3, 4):
        sent = site.train(number).contribution
        moved = {layer for layer, fs in sent.items() for n, t in fs.items() if not torch.equal(t, start[layer][n])}
        assert (HEAD in moved) == (number > 2)
        assert (moved <= {HEAD}) == (number > 2)
        kept.append(bool(app.process.cache.vectors["clinic"].records))
    assert kept == [True, False, True, False]
    assert [purpose for _, number, purpose in site.charges() if number == 3] == ["training"]


def test_the_head_may_be_first_and_the_adapter_begins_after_it(toy_settings: dict[str, Any], tmp_path: Any) -> None:
    more = {"phases": "2 head on features, 1 adapter on jacobians, 1 head on features"}
    site = clinic({**toy_settings, **more, "training.local-steps": 1, "training.sample-rate": 0.5}, tmp_path)
    start, moved, kept = site.model().start, list[set[str]](), list[bool]()
    for number in (1, 2, 3, 4):
        sent = site.train(number).contribution
        moved.append({k for k, fs in sent.items() for n, t in fs.items() if not torch.equal(t, start[k][n])})
        kept.append(bool(app.process.cache.vectors["clinic"].records))
    assert [HEAD in layers for layers in moved] == [True, True, False, True]
    assert [bool(layers - {HEAD}) for layers in moved] == [False, False, True, False]
    assert kept == [True, False, False, False], "vectors of one phase are kept into another, or made too often"


# --- at the server ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["adam", "momentum", "none"])
def test_the_adapter_rests_at_the_server_and_the_schedule_begins_anew(optimizer: str) -> None:
    job = configure(
        {
            "rounds": 5,
            "phases": "3 adapter+head on examples, 2 head on features",
            "training.learning-rate": 0.5,
            "server.optimizer": optimizer,
            "server.learning-rate": 0.5,
            "server.momentum": 0.9,
            "head-rate": 1.0,
        }
    )
    state = job.start({"layer": {"A": torch.zeros(2, 3), "B": torch.zeros(4, 2)}, HEAD: {"weight": torch.zeros(2, 4)}})
    seen: list[AdapterState] = []
    for number in range(1, 6):
        rests = number > 3
        moved = {
            layer: {n: t + (0.0 if (layer == HEAD) != rests else 1.0) for n, t in fs.items()}
            for layer, fs in state.adapter.items()
        }
        state = replace(server_step(job.config, state, replace(state, adapter=moved)), round_number=number)
        seen.append(state.adapter)
    at = [float(one["layer"]["B"].sum()) for one in seen]
    head = [float(one[HEAD]["weight"].sum()) for one in seen]
    assert at[0] < at[1] < at[2] == at[3] == at[4]
    assert head[2] == 0.0 < head[3] < head[4]
    config = job.config
    rate = config.site_rate if optimizer == "none" else lambda number, _: config.server_rate(number)
    assert [rate(number, 0) for number in range(1, 6)] == pytest.approx([0.5, 1 / 3, 1 / 6, 0.5, 0.25])


@pytest.mark.parametrize("optimizer", ["adam", "momentum"])
def test_a_head_that_was_first_rests_beside_the_adapter_and_begins_anew(optimizer: str) -> None:
    own = {"phases": "2 head on features, 2 adapter on jacobians, 2 head on features", "rounds": 6, "head-rate": 1.0}
    rates = {"server.optimizer": optimizer, "server.learning-rate": 0.5, "server.momentum": 0.9}
    job = configure({**own, **rates})
    state = job.start({"layer": {"A": torch.zeros(2, 3), "B": torch.zeros(4, 2)}, HEAD: {"weight": torch.zeros(2, 4)}})
    seen: list[AdapterState] = []
    for number in range(1, 7):
        rests = number not in (3, 4)
        # What rests comes back as a mean of equal parts has it: not quite as it was.
        moved = {
            layer: {n: t + (1e-4 if (layer == HEAD) != rests else 1.0) for n, t in fs.items()}
            for layer, fs in state.adapter.items()
        }
        state = replace(server_step(job.config, state, replace(state, adapter=moved)), round_number=number)
        seen.append(state.adapter)
    at, head = ([float(one[k][n].mean()) for one in seen] for k, n in (("layer", "B"), (HEAD, "weight")))
    assert at[0] == at[1] == 0.0 < at[2] < at[3] == at[4] == at[5]
    assert 0.0 < head[0] < head[1] < head[4] < head[5]
    assert head[1] == head[2] == head[3], "moments, or what came back, move the head beside the adapter"
    # The last phase takes the steps of the first: neither schedule nor moments are the first's.
    assert [head[4] - head[3], head[5] - head[3]] == pytest.approx(head[:2], rel=1e-5)
    assert [job.config.server_rate(number) for number in range(1, 7)] == pytest.approx([0.5, 0.25] * 3)
    assert [job.config.timeline.span(number) for number in (1, 2, 3, 4, 5, 6)] == [(0, 2)] * 2 + [(2, 2)] * 2 + [
        (4, 2)
    ] * 2


def test_a_schedule_without_a_refit_is_as_it_was() -> None:
    config = configure({"rounds": 4, "training.local-steps": 2, "server.optimizer": "none"}).config
    rate = config.training.learning_rate
    found = [config.site_rate(number, step) for number in (1, 2, 3, 4) for step in (0, 1)]
    assert found == pytest.approx([rate * (1 - i / 8) for i in range(8)])


def test_the_probe_keeps_its_map_where_the_head_has_one(model_folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedveil.common.starts.public_metric.MADE", 48)
    start, states = Probe(records=12), list[AdapterState]()
    step = {"weight": torch.full((2, 32), 0.02), "bias": torch.tensor([0.3, -0.3])}
    for metric in ("none", "public"):
        model = FederatedModel(
            load_base_model(model_folder("bert"), "classification"),
            build_adapter(
                "lora-metric", AdapterConfig(name="lora-metric", rank=2, alpha=4.0, targets=TARGETS["bert"]), start
            ),
            TASKS["classification"],
            HeadConfig(start="random", metric=metric),
            seed=1,
            label_names=LABELS.names,
            feature_scale=1.0,
            max_length=24,
            device="cpu",
            precision="float32",
        )
        step = {
            name: t[:, : p.shape[-1]] if p.dim() > 1 else t
            for (name, p), t in zip(model.head.items(), step.values(), strict=True)
        }
        config = configure({"adapter.start": "probe", "adapter.name": "lora-metric", "head.metric": metric}).config
        state = start.complete(model, config, LABELS, {HEAD: step})
        assert (METRIC in state) == (metric == "public")
        model.write({**model.start, **{k: {**model.start.get(k, {}), **v} for k, v in state.items()}})
        states.append({**state, HEAD: {n: t.clone() for n, t in model.folded_head.items()}})
    for name, tensor in states[0][HEAD].items():
        assert torch.allclose(tensor, states[1][HEAD][name], atol=1e-5)
    for layer in states[0]:
        if layer != HEAD:
            assert torch.allclose(states[0][layer]["B"].abs(), states[1][layer]["B"].abs(), rtol=1e-3)


# --- a run ------------------------------------------------------------------------------------------------------------


def test_a_run_ends_within_its_budget_with_the_adapter_of_its_first_rounds(
    toy_settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedveil.common.starts.public_metric.MADE", 48)
    more = {
        "strategy": "fedavg-lora",
        "rounds": 3,
        "adapter.name": "lora-metric",
        "adapter.start": "probe",
        "adapter.rank": 2,
        "head.metric": "public",
        "start.records": 16,
        "start.steps": 3,
        "start.sample-rate": 1.0,
        "server.optimizer": "momentum",
        "training.optimizer": "sgd",
        "training.learning-rate": 1.0,
        "training.local-steps": 1,
        "phases": "2 adapter on jacobians, 1 head on features",
    }
    folder = run_in_process({**toy_settings, **more, "privacy.epsilon": 5.0}, 2)
    spent = [line.spent for line in read_lines(PrivacyLine, folder) if line.round_number == 3]
    assert len(spent) == 2
    assert all(one is not None and 4.0 < one.epsilon_total <= 5.0 for one in spent)
    assert evaluate_run(folder).accuracy > 0


@pytest.mark.parametrize(
    ("more", "match"),
    [
        ({"adapter.name": "none"}, "trains the head alone"),
        ({"model.task": "causal-lm", "head.policy": "frozen"}, "sends none"),
        ({"head.policy": "frozen"}, "sends none"),
        ({"phases": "6 head on features"}, "never trains the adapter"),
        ({"rounds": 7}, "phases has 6 rounds, and rounds is 7: set rounds to 6"),
    ],
)
@pytest.mark.parametrize(
    "phases",
    ["5 adapter+head on examples, 1 head on features", "1 head on features, 5 adapter+head on examples"],
)
def test_what_has_no_head_to_fit_alone_is_refused(phases: str, more: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        configure({"phases": phases, **more})


# --- the head first, and the metric around it ---


FIRST: dict[str, Any] = {
    "strategy": "fedavg-lora",
    "rounds": 3,
    "adapter.name": "lora-metric",
    "adapter.start": "public-metric",
    "adapter.rank": 2,
    "start.records": 16,
    "head.metric": "public",
    "server.optimizer": "momentum",
    "server.learning-rate": 1.0,
    "training.optimizer": "sgd",
    "training.learning-rate": 1.0,
    "training.local-steps": 1,
    "phases": "2 head on features, 1 adapter on jacobians",
}


class Told(InProcessTransport):
    """Keeps what is sent once, and to whom; in round ``begins_anew`` node 1 has lost what it had, or all of them."""

    once: ClassVar[list[tuple[int, int, AdapterState]]] = []
    begins_anew: ClassVar[int] = 0
    dies: ClassVar[int] = 0
    """The round in which the server is killed when node 1 is to be asked."""

    def deliver(self, node: int, task: Any, content: Any) -> Any:
        if task.round_number == self.dies and node == 1:
            raise KeyboardInterrupt
        if isinstance(task, TrainTask):
            left = {k: {n: t for n, t in f.items() if (BASIS, k, n) not in task.named} for k, f in task.basis.items()}
            if sent := {layer: factors for layer, factors in left.items() if factors}:
                self.once.append((task.round_number, node, sent))
        if task.round_number == self.begins_anew and node == 1 and not any(n == -1 for _, n, _ in self.once):
            self.once.append((task.round_number, -1, {}))
            self._memories[node].clear()
        return super().deliver(node, task, content)


@pytest.mark.parametrize("mode", ["dp-sgd", "secure-sum"])
def test_directions_and_metric_are_made_anew_around_the_head_and_sent_then_alone(
    mode: str, toy_settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Told, "once", [])
    begun: list[AdapterState] = []
    renew = ServerModel.around_head

    def kept(model: ServerModel, state: ServerState) -> ServerState:
        begun.append(state.adapter)
        return renew(model, state)

    monkeypatch.setattr(ServerModel, "around_head", kept)
    summed = {"privacy.mode": mode, "privacy.honest-sites": 2, "privacy.noise-multiplier": 1.0}
    own = summed if mode == "secure-sum" else {"privacy.noise-multiplier": 1.0}
    folder = run_in_process({**toy_settings, **FIRST, **own}, 3, kind=Told)
    assert [(number, node) for number, node, _ in Told.once] == [(1, 0), (1, 1), (1, 2), (3, 0), (3, 1), (3, 2)]
    first, then = Told.once[0][2], Told.once[-1][2]
    assert (set(first), set(then)) == ({METRIC}, set(begun[0]) - {HEAD, METRIC})
    for layer, factors in then.items():
        assert {name for name in factors if not torch.equal(factors[name], begun[0][layer][name])} == {"B", "V"}
    state = saved_state(folder)
    assert all(torch.equal(state.adapter[k][n], t) for k, fs in {**first, **then}.items() for n, t in fs.items())
    assert evaluate_run(folder).loss == pytest.approx(read_lines(RoundLine, folder)[-1].loss, rel=1e-5)


@pytest.mark.parametrize("number", [2, 3])
def test_a_site_that_lost_what_is_sent_once_gets_all_of_it_that_is_due(
    number: int, toy_settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {**toy_settings, **FIRST, "privacy.noise-multiplier": 1.0}
    monkeypatch.setattr(Told, "once", [])
    monkeypatch.setattr(Told, "begins_anew", number)
    folder = run_in_process(settings, 2, kind=Told)
    assert [len(line.participants) for line in read_lines(RoundLine, folder)] == [0, 2, 2, 2]
    again = [set(basis) for at, node, basis in Told.once if (at, node) == (number, 1)][-1]
    assert again == ({METRIC} if number == 2 else {METRIC} | {k for k in saved_state(folder).adapter if k not in OWN})


def cut_in_round_3(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave a run called ``cut``, whose server dies after it has sent the directions."""
    monkeypatch.setattr(Told, "once", [])
    with monkeypatch.context() as patched:
        patched.setattr(Told, "dies", 3)
        with pytest.raises(KeyboardInterrupt):
            run_in_process(settings, 2, "cut", kind=Told)


def test_a_server_killed_between_the_phases_makes_nothing_anew(
    toy_settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Made on another machine, the directions would differ in a last bit, and what sites have paid for be lost."""
    settings = {**toy_settings, **FIRST, "privacy.noise-multiplier": 1.0}
    cut_in_round_3(settings, monkeypatch)
    sent = Told.once[-1][2]
    monkeypatch.setattr(ServerModel, "around_head", None)
    folder = run_in_process({**settings, "resume": "cut"}, 2, kind=Told)
    state = saved_state(folder)
    assert all(torch.equal(state.adapter[k][n], t) for k, fs in sent.items() for n, t in fs.items())


class Broken(Exception):
    """What no code expects."""


def test_a_failure_between_the_phases_costs_no_round_that_was_paid_for(
    toy_settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {**toy_settings, **FIRST, "privacy.noise-multiplier": 1.0}

    def fails(model: ServerModel, state: ServerState) -> ServerState:
        raise Broken

    with monkeypatch.context() as patched:
        patched.setattr(ServerModel, "around_head", fails)
        with pytest.raises(Broken):
            run_in_process(settings, 2, "cut")
    monkeypatch.setattr(Told, "once", [])
    folder = run_in_process({**settings, "resume": "cut"}, 2, kind=Told)
    assert [number for number, _, _ in Told.once] == [3, 3], "the head's last round was paid for once more"
    assert [line.round_number for line in read_lines(RoundLine, folder)] == [0, 1, 2, 3]


def test_a_checkpoint_from_before_the_renewal_is_renewed_where_the_run_goes_on(
    toy_settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that went on without would pay for rounds in directions of before the head was fitted."""
    settings = {**toy_settings, **FIRST, "privacy.noise-multiplier": 1.0}
    cut_in_round_3(settings, monkeypatch)
    job = configure(with_recipe({**settings, "resume": "cut"})[0])
    folder = run_folder(job.config, "cut")
    saved = load_checkpoint(folder, job, "cut")
    assert saved.renewed
    begun = ServerModel(job)
    old = {**saved.state.adapter, **begun.job.begin(begun.start, begun.public_statistic()).adapter}
    old[HEAD] = saved.state.adapter[HEAD]
    save_checkpoint(folder, replace(saved, state=replace(saved.state, adapter=old), renewed=False))
    state = saved_state(run_in_process({**settings, "resume": "cut"}, 2))
    for layer, factors in saved.state.adapter.items():
        if layer not in (HEAD, METRIC):
            assert torch.equal(factors["B"], state.adapter[layer]["B"])
            assert not torch.equal(old[layer]["B"], state.adapter[layer]["B"])


def test_a_server_that_comes_back_between_the_phases_makes_the_same_of_the_head(toy_settings: dict[str, Any]) -> None:
    """Twice of one state: the adapter, which adds nothing yet, does not matter."""
    settings, _ = with_recipe({**toy_settings, **FIRST})
    server = ServerModel(configure(settings))
    begun = server.job.begin(server.start, server.public_statistic())
    draw = torch.Generator().manual_seed(1)
    head = {name: t + 0.1 * torch.randn(t.shape, generator=draw) for name, t in begun.adapter[HEAD].items()}
    state = replace(begun, adapter={**begun.adapter, HEAD: head}, round_number=2)
    once = server.around_head(state)
    again = server.around_head(once)
    for layer, factors in once.adapter.items():
        for name, tensor in factors.items():
            assert torch.equal(tensor, again.adapter[layer][name])
            changed = not torch.equal(tensor, state.adapter[layer][name])
            assert changed == (layer not in (HEAD, METRIC) and name in ("B", "V"))
    kept = server.around_head(replace(begun, round_number=2))
    places = [(layer, name) for layer, factors in kept.adapter.items() for name in factors]
    pairs = [(kept.adapter[layer][name], begun.adapter[layer][name]) for layer, name in places]
    assert max(float((one - other).norm()) / (1e-9 + float(other.norm())) for one, other in pairs) < 1e-3, (
        "the head that it began with has another metric"
    )


def test_a_head_of_its_own_rounds_is_whitened_by_made_up_words_and_the_adapter_by_the_runs_text(
    toy_settings: dict[str, Any],
) -> None:
    def made(**own: Any) -> AdapterState:
        settings, _ = with_recipe({**toy_settings, **FIRST, **own})
        return ServerModel(configure(settings)).public_statistic()

    text = {"start.text": "prose"}
    later = {"phases": "3 adapter on jacobians"}
    first, usual = made(**text), made(**text, **later)
    by_words = made(**later, **{"start.text": "made-up", "start.records": 512})
    for name in ("centre", "map"):
        assert torch.equal(first[METRIC][name], by_words[METRIC][name])
        assert not torch.equal(first[METRIC][name], usual[METRIC][name])
    for layer in set(first) - {HEAD, METRIC}:
        assert all(torch.equal(first[layer][name], usual[layer][name]) for name in ("B", "V"))
        assert not torch.equal(first[layer]["V"], by_words[layer]["V"])
