"""Steps on the linearised model: what they compute, what they cost, what is kept, and what is refused."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from audits.tiny_models import TARGETS
from audits.tiny_site import clinic
from audits.worlds import give_metric
from fedveil.client import app, rehearsals
from fedveil.client import linearised as wing
from fedveil.client.head_alone import head_on_features
from fedveil.client.linearised import Computation, Derivatives, Keeping, linearised
from fedveil.client.rehearsal import rehearse, rehearse_linearised
from fedveil.client.timing import Timing
from fedveil.common.adapters import build_adapter
from fedveil.common.config.sections import AdapterConfig, HeadConfig
from fedveil.common.errors import ConfigError, ModelError
from fedveil.common.messages.state import HEAD
from fedveil.common.model.base import load_base_model
from fedveil.common.model.federated import FederatedModel
from fedveil.common.run_lines import PrivacyLine, RoundLine, read_lines
from fedveil.common.starts import STARTS
from fedveil.common.tasks import TASKS, Record
from fedveil.common.tasks.examples import Dataset
from fedveil.common.tasks.featured import FEATURES, ROWS, SCALES, TANGENTS
from fedveil.common.tasks.tangent import Tangent
from fedveil.common.tasks.text import TextExample
from fedveil.experiments.in_process import run_in_process
from fedveil.experiments.planner.forecast import forecast
from fedveil.privacy import dpsgd, grid
from fedveil.privacy.plan import gaussian_plan
from fedveil.strategies.job import configure

pytestmark = pytest.mark.rough_prices

Folder = Callable[[str], str]
DATA = Dataset("made-up", (), ())
FIRST = Computation("1", 4, 0, "", "")
NAMES = ("bad", "fair", "good")
TEXTS = ("the film", "a warm story and a lovely actor", "dull", "the scene was very cold and the film was awful")


def tiny(folder: str, adapter: str = "lora", labels: int = 3, **head: Any) -> FederatedModel:
    """Return a model whose trained tensors are away from zero and whose logits depend on all of them."""
    origin = STARTS["kaiming"]()
    config = AdapterConfig(name=adapter, rank=2, alpha=4.0, targets=TARGETS["bert"])
    model = FederatedModel(
        load_base_model(folder, "classification"),
        build_adapter(adapter, config, origin),
        TASKS["classification"],
        HeadConfig(start="random", **head),
        seed=1,
        label_names=NAMES[:labels],
        feature_scale=1.0,
        max_length=24,
        device="cpu",
        precision="float32",
    )
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in model.below_head().values():
            p.add_(0.05 * torch.randn(p.shape, generator=draw))
        give_metric(model)
    return model


def records_of(model: FederatedModel) -> list[Record]:
    return model.prepare([TextExample(text=text, label=i % model.classes) for i, text in enumerate(TEXTS)])


def logits_of(model: FederatedModel, record: Record) -> Tensor:
    return model.module(model.batch([record]))[0].double()


def nothing() -> None:
    """Come before no pass."""


def vectors_of(model: FederatedModel, records: Sequence[Record]) -> list[Record]:
    with linearised(model, records, Keeping(FIRST, {}, "site", DATA, nothing)) as (vectors, _):
        return vectors


def rows_of(vector: Record) -> Tensor:
    """Return a record's derivatives, shape (labels - 1, numbers), as a step takes them."""
    return vector[TANGENTS].float() * vector[SCALES][:, None]


# --- what is computed -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapter", ["lora", "lora-frozen-a", "lora-metric", "dora"])
def test_derivatives_are_those_of_the_logits_less_the_first_one(model_folder: Folder, adapter: str) -> None:
    model = tiny(model_folder("bert"), adapter)
    records = records_of(model)
    below = list(model.below_head().values())
    for record, vector in zip(records, vectors_of(model, records), strict=True):
        logits = logits_of(model, record)
        for label in (1, 2):
            found = torch.autograd.grad(logits[label] - logits[0], below, retain_graph=True)
            want = torch.cat([g.flatten() for g in found])
            # Kept in half precision.
            assert float((rows_of(vector)[label - 1] - want).abs().max()) < 2e-3 * float(want.abs().max())
        assert torch.allclose(vector[FEATURES], model.features(model.batch([record]))[0], atol=1e-5)
        assert [vector["labels"]] == record["labels"]


def check_digits(model: FederatedModel, size: float) -> None:
    """Hold half precision to its eleven bits where a head of this size makes derivatives small or large."""
    records = records_of(model)
    with torch.no_grad():
        model.head["weight"].mul_(size)
    below = list(model.below_head().values())
    for record, vector in zip(records, vectors_of(model, records), strict=True):
        logits = logits_of(model, record)
        want = torch.cat([g.flatten() for g in torch.autograd.grad(logits[1] - logits[0], below)])
        wrong = float((rows_of(vector)[0] - want).abs().max())
        assert wrong < 1e-3 * float(want.abs().max()), "digits are lost"


@pytest.mark.parametrize("size", [1e-7, 1e7])
def test_derivatives_keep_their_digits_whatever_their_size(
    model_folder: Folder, size: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_digits(tiny(model_folder("bert")), size)
    # The planted fault: half precision as it is.
    monkeypatch.setattr(wing, "_scales", lambda rows: torch.ones(len(rows)))
    with pytest.raises(AssertionError, match="digits are lost"):
        check_digits(tiny(model_folder("bert")), size)


@pytest.mark.parametrize(("labels", "rows"), [(2, ROWS), (3, ROWS // 2)])
def test_a_pass_has_as_many_rows_of_derivatives_whatever_the_labels(
    model_folder: Folder, labels: int, rows: int
) -> None:
    model = tiny(model_folder("bert"), labels=labels)
    with linearised(model, records_of(model), Keeping(FIRST, {}, "site", DATA, nothing)) as (vectors, _):
        (batch, *_) = model.fixed_batches(vectors)
    assert (batch.rows, batch[TANGENTS].shape[:2].numel()) == (rows, ROWS)


def test_logits_are_the_models_to_first_order(model_folder: Folder) -> None:
    """Ten times nearer to the point, the linearised model is a hundred times nearer to the real one."""
    model = tiny(model_folder("bert"))
    record = records_of(model)[1]
    start, direction = model.read(), torch.Generator().manual_seed(3)
    kept: dict[str, Derivatives] = {}
    records = [record]
    with linearised(model, records, Keeping(FIRST, kept, "site", DATA, nothing)):
        pass
    moves = {key: torch.randn(p.shape, generator=direction) for key, p in model.below_head().items()}
    apart = []
    for scale in (0.03, 0.003):
        model.write(start)
        with torch.no_grad():
            for key, p in model.below_head().items():
                p.add_(scale * moves[key])
        real = logits_of(model, record).detach()
        with linearised(model, records, Keeping(FIRST, kept, "site", DATA, nothing)) as (vectors, _), torch.no_grad():
            linear = model.module(model.batch(vectors))[0].double()
        both = [z - z[0] for z in (real, linear)]
        apart.append(float((both[0] - both[1]).norm()))
    assert apart[0] > 1e-4
    assert apart[1] < apart[0] / 30


def test_a_clipped_step_is_that_of_the_slow_way_in_float64(
    model_folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dpsgd, "add_private_noise", lambda total, std: total)
    model = tiny(model_folder("bert"))
    records, C, rates = records_of(model), 0.02, (0.5, 0.3)
    plan = gaussian_plan(C, 1.0, 1.0, 8.0, 1e-5, 8.0)
    begun = {key: p.detach().clone() for key, p in model.below_head().items()}
    head = {name: p.detach().double().clone() for name, p in model.head.items()}
    with linearised(model, records, Keeping(FIRST, {}, "site", DATA, nothing)) as (vectors, trained):
        optimizer = torch.optim.SGD([p for fs in trained.values() for p in fs.values()], lr=1.0)
        with plan.steps(model, optimizer) as steps:
            for rate in rates:
                optimizer.param_groups[0]["lr"] = rate
                steps.step(model.fixed_batches(vectors), model.losses)

    J = [torch.cat([torch.zeros(1, v[TANGENTS].shape[1]), rows_of(v)]).double() for v in vectors]
    u = [v[FEATURES].double() for v in vectors]
    step = torch.zeros(J[0].shape[1], dtype=torch.float64)
    W, b = head["weight"].clone(), head["bias"].clone()
    clipped = 0
    for rate in rates:
        total = torch.zeros_like(step)
        for Ji, ui, record in zip(J, u, records, strict=True):
            error = torch.softmax(W @ ui + b + Ji @ step, 0) - torch.eye(3, dtype=torch.float64)[record["labels"][0]]
            g = Ji.T @ error
            clipped += float(g.norm()) > C
            total = total + min(1.0, C / float(g.norm())) * g
        step = step - rate * total / 8
    assert clipped
    moved = torch.cat([(p.detach() - begun[key]).flatten() for key, p in model.below_head().items()]).double()
    assert float((moved - step).abs().max()) < 1e-4 * float(step.abs().max())
    assert all(torch.equal(p.detach().double(), head[name]) for name, p in model.head.items())


def test_the_first_step_of_a_round_is_the_real_models(
    toy_settings: dict[str, Any], tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dpsgd, "add_private_noise", lambda total, std: total)
    monkeypatch.setattr(grid, "SUM_BITS", 30)  # the clip is far above what is clipped
    monkeypatch.setattr(grid, "MOST_BITS", 60)
    found = []
    for phases in ("", "4 adapter on jacobians"):
        more = {"training.sample-rate": 1.0, "training.local-steps": 1, "phases": phases}
        more["privacy.clip-norm"] = 1e3
        more.update({"training.optimizer": "sgd", "server.optimizer": "none"})
        (tmp_path / str(len(phases))).mkdir()
        site = clinic({**toy_settings, **more}, tmp_path / str(len(phases)))
        found.append(site.train().contribution)
    start = clinic(toy_settings, tmp_path).model().start
    assert HEAD not in found[1], "a head that is not trained is sent"
    # The head's part of the clip is none's there; here nothing is clipped.
    moves: list[float] = []
    for layer, factors in found[0].items():
        for name, tensor in factors.items():
            if layer == HEAD:
                continue
            moved = float((tensor - start[layer][name]).abs().max())
            moves.append(moved)
            assert float((tensor - found[1][layer][name]).abs().max()) <= 5e-3 * moved
    assert max(moves) > 0


# --- one record and no other ------------------------------------------------------------------------------------------


def sums_of(model: FederatedModel, records: Sequence[Record], clip: float) -> Tensor:
    """Return the noiseless sum of the first step, all trained tensors as one vector."""
    with linearised(model, records, Keeping(FIRST, {}, "site", DATA, nothing)) as (vectors, trained):
        optimizer = torch.optim.SGD([p for fs in trained.values() for p in fs.values()], lr=0.0)
        with gaussian_plan(clip, 1.0, 1.0, 1.0, 1e-5, 8.0).steps(model, optimizer) as steps:
            return torch.cat([g.flatten() for g in steps.release(model.fixed_batches(vectors), model.losses)])


def test_a_record_moves_the_sum_by_one_clip_and_no_other_record(
    model_folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dpsgd, "add_private_noise", lambda total, std: total)
    model = tiny(model_folder("bert"))
    records = records_of(model)
    # The odd one: derivatives a hundred times those of others.
    compute, first = wing.derivatives, vectors_of(model, records)[0][FEATURES]

    def odd(*given: Any) -> tuple[Tensor, Tensor, Tensor]:
        features, tangents, scales = compute(*given)
        return features, tangents, scales * torch.where((features == first).all(1), 100.0, 1.0)

    monkeypatch.setattr(wing, "derivatives", odd)
    whole, without = sums_of(model, records, 0.05), sums_of(model, records[1:], 0.05)
    assert float((whole - without).norm()) <= 0.05 * (1 + 1e-5)

    # The planted fault: one record's derivatives hold another's as well.
    def mixed(*given: Any) -> tuple[Tensor, Tensor, Tensor]:
        features, tangents, scales = compute(*given)
        return features, tangents + 10 * tangents.flip(0), scales

    monkeypatch.setattr(wing, "derivatives", mixed)
    short, other = records[0], records[2]  # of one shape
    whole, without = sums_of(model, [short] * 3 + [other], 0.05), sums_of(model, [short] * 3, 0.05)
    assert float((whole - without).norm()) > 0.05 * (1 + 1e-3)


def test_a_record_that_cannot_be_computed_is_left_out_alone(
    model_folder: Folder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny(model_folder("bert"))
    records = records_of(model)
    all_of_them = vectors_of(model, records)
    bad, features = records[2]["input_ids"][1], model.module.features

    def fails(batch: Any) -> Tensor:
        if bool((batch["input_ids"][:, 1] == bad).any()):
            raise RuntimeError("odd")
        return features(batch)

    monkeypatch.setattr(model.module, "features", fails)
    with caplog.at_level(logging.WARNING):
        left = vectors_of(model, records)
    assert "contributes zero" in caplog.text
    assert [
        bool((v[TANGENTS] == w[TANGENTS]).all()) for v, w in zip(left, [all_of_them[i] for i in (0, 1, 3)], strict=True)
    ] == [True] * 3


def others_that_move(model: FederatedModel, records: Sequence[Record], made: Callable[[Any, Any], Any]) -> int:
    """Return how many vectors get other bits, over each record's absence."""
    whole, moved = made(model, records), 0
    for i in range(len(records)):
        left = made(model, [*records[:i], *records[i + 1 :]])
        for before, after in zip([*whole[:i], *whole[i + 1 :]], left, strict=True):
            moved += any(isinstance(t, Tensor) and not torch.equal(t, after[name]) for name, t in before.items())
    return moved


def features_of(model: FederatedModel, records: Sequence[Record]) -> list[Record]:
    with head_on_features(model, records, Keeping(FIRST, {}, "site", DATA, nothing)) as (features, _):
        return features


def by_neighbours(model: FederatedModel, records: Sequence[Record], length: int, rows: int) -> Any:
    """The planted fault: a batch as long as its longest record, with padding that counts, and of its records alone."""
    del length, rows
    batch = batch_of(model, records, max(model.collator.size(record) for record in records), len(records))
    batch["attention_mask"].fill_(1)
    return batch


batch_of = FederatedModel.fixed_batch


@pytest.mark.parametrize("made", [vectors_of, features_of])
def test_at_a_hostile_point_no_record_moves_anothers_vector(
    model_folder: Folder, made: Callable[[Any, Any], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Large factors blow rounding up, until another shape is another answer."""
    model = tiny(model_folder("bert"), "lora-frozen-a")
    rehearse(model)
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in model.below_head().values():
            p.copy_(30 * torch.randn(p.shape, generator=draw))
    texts = [text[: 4 + 5 * i] for i in range(4) for text in TEXTS]
    examples = [TextExample(text=text, label=i % model.classes) for i, text in enumerate(texts)]
    records = model.prepare(examples)
    assert not others_that_move(model, records, made)
    monkeypatch.setattr(FederatedModel, "fixed_batch", by_neighbours)
    assert others_that_move(model, records, made), "shapes by neighbours go unnoticed"


def test_the_rehearsal_sees_a_step_that_mixes_records(model_folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(model_folder("bert"))
    rehearse(model)
    narrowed, before = model.shapes, model.read()
    timing = rehearse_linearised(model)
    assert list(timing.passes) == [1]
    assert model.shapes == narrowed
    after = model.read()
    assert all(torch.equal(before[layer][n], after[layer][n]) for layer in before for n in before[layer])

    def forward(self: Tangent, tangents: Tensor, scales: Tensor) -> Tensor:
        moved = (tangents.float() * self.step).sum(-1) * scales
        return torch.nn.functional.pad(moved + moved.mean(), (1, 0))

    monkeypatch.setattr(Tangent, "forward", forward)
    with pytest.raises(ModelError, match="depends on the records beside it"):
        rehearse_linearised(model)


# --- what is kept -----------------------------------------------------------------------------------------------------


def step_and_fail(model: FederatedModel, records: Sequence[Record]) -> None:
    with linearised(model, records, Keeping(FIRST, {}, "site", DATA, nothing)) as (_, parts):
        with torch.no_grad():
            parts[TANGENTS]["step"].add_(1.0)
        raise KeyError


def test_all_is_as_it_was_but_for_the_step(model_folder: Folder) -> None:
    model = tiny(model_folder("bert"))
    records = records_of(model)
    copies = [dict(record) for record in records]
    trained = {name for name, p in model.module.named_parameters() if p.requires_grad}
    before, shapes, task = model.read(), model.shapes, model.task
    with pytest.raises(KeyError):
        step_and_fail(model, records)
    after = model.read()
    assert all(torch.equal(before[layer][n], after[layer][n]) for layer in before for n in before[layer])
    assert records == copies
    assert (model.shapes, model.task, model.head_only, model.module.tangent) == (shapes, task, False, None)
    assert {name for name, p in model.module.named_parameters() if p.requires_grad} == trained


def test_derivatives_serve_as_many_rounds_as_are_set(
    toy_settings: dict[str, Any], tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = {
        "phases": "4 adapter on jacobians every 2",
        "rounds": 4,
        "training.local-steps": 1,
        "training.sample-rate": 0.5,
    }
    settings = {**toy_settings, **more}
    made, compute = list[int](), wing._vectors

    def spy(model: FederatedModel, records: Sequence[Record], before_pass: Callable[[], None]) -> list[Record]:
        made.append(len(records))
        return compute(model, records, before_pass)

    monkeypatch.setattr(wing, "_vectors", spy)
    site = clinic(settings, tmp_path)
    seen = []
    for number in (1, 2, 3, 4):
        site.train(number)
        seen.append(len(made))
    assert seen == [1, 1, 2, 2]
    site.train(1, run="2")
    assert len(made) == 3


def test_the_step_goes_on_from_what_was_received(model_folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a later round the point stays, and the way to what is received now is already made."""
    model = tiny(model_folder("bert"))
    records, kept = records_of(model), dict[str, Derivatives]()
    with linearised(model, records, Keeping(FIRST, kept, "site", DATA, nothing)) as (_, parts):
        assert not parts[TANGENTS]["step"].any()
    with torch.no_grad():
        for p in model.below_head().values():
            p.add_(0.25)
    received = model.read()
    with linearised(model, records, Keeping(FIRST, kept, "site", DATA, nothing)) as (_, parts):
        assert torch.allclose(parts[TANGENTS]["step"], torch.full_like(parts[TANGENTS]["step"], 0.25), atol=1e-6)
    assert all(torch.equal(model.read()[layer][n], received[layer][n]) for layer in received for n in received[layer])


def test_the_point_is_the_same_whether_records_are_there_fail_or_not(
    model_folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A round that is answered by noise begins where every other does: its way must not tell that it failed."""
    model = tiny(model_folder("bert"))
    records, begun = records_of(model), model.read()

    def way(kept: dict[str, Derivatives], seen: Sequence[Record]) -> Tensor:
        with linearised(model, seen, Keeping(FIRST, kept, "site", DATA, nothing)) as (vectors, parts):
            assert len(vectors) == len(seen)
            return parts[TANGENTS]["step"].detach().clone()

    def failed(kept: dict[str, Derivatives]) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(wing, "_vectors", lambda *_: (_ for _ in ()).throw(OSError("late")))
            with pytest.raises(OSError, match="late"):
                way(kept, records)

    sound, empty, broken = dict[str, Derivatives](), dict[str, Derivatives](), dict[str, Derivatives]()
    way(sound, records)
    way(empty, [])
    failed(broken)
    first = sound["site"].records
    with torch.no_grad():
        for p in model.below_head().values():
            p.add_(0.25)
    moved = model.read()
    ways = [way(sound, records), way(empty, []), way(broken, []), way(broken, records)]
    assert float(ways[0].abs().min()) > 0.2
    assert all(torch.equal(ways[0], other) for other in ways[1:])
    assert all(torch.equal(model.read()[layer][n], moved[layer][n]) for layer in moved for n in moved[layer])
    # Made later, the derivatives are those of the point all the same.
    for early, late in zip(first, broken["site"].records, strict=True):
        assert torch.equal(early[TANGENTS], late[TANGENTS])
    model.write(begun)


def test_vectors_are_dropped_when_no_round_needs_them(toy_settings: dict[str, Any], tmp_path: Any) -> None:
    site = clinic({**toy_settings, "phases": "4 adapter on jacobians every 3", "training.local-steps": 1}, tmp_path)
    kept = []
    for number in (1, 2, 3, 4):
        site.train(number)
        kept.append(bool(app.process.cache.vectors["clinic"].records))
    assert kept == [True, True, False, False]


def test_the_head_stays_and_goes_on_afterwards(model_folder: Folder) -> None:
    model = tiny(model_folder("bert"))
    with linearised(model, records_of(model), Keeping(FIRST, {}, "site", DATA, nothing)) as (_, parts):
        assert set(parts) == {TANGENTS}
        assert not any(p.requires_grad for p in model.head.values())
    assert all(p.requires_grad for p in model.head.values())


# --- a run ------------------------------------------------------------------------------------------------------------


def test_a_run_ends_within_its_budget(toy_settings: dict[str, Any]) -> None:
    more = {"phases": "2 adapter on jacobians", "rounds": 2, "training.local-steps": 3, "training.sample-rate": 0.5}
    folder = run_in_process({**toy_settings, **more, "privacy.epsilon": 5.0}, 2)
    spent = [line.spent for line in read_lines(PrivacyLine, folder) if line.round_number == 2]
    assert len(spent) == 2
    assert all(one is not None and 4.5 < one.epsilon_total <= 5.0 for one in spent)


def test_without_privacy_it_runs_as_well(toy_settings: dict[str, Any]) -> None:
    more = {"phases": "1 adapter on jacobians", "rounds": 1, "training.local-steps": 2, "privacy.mode": "none"}
    folder = run_in_process({**toy_settings, **more}, 2)
    assert len(list(read_lines(RoundLine, folder))) == 1


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "match"),
    [
        ({"adapter.name": "none"}, "trains the head alone"),
        ({"model.task": "causal-lm", "head.policy": "frozen"}, "has none: leave phases empty"),
    ],
)
def test_what_cannot_be_linearised_is_refused(more: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        configure({"phases": "6 adapter on jacobians", **more})


def test_more_derivatives_than_fit_are_refused_before_the_charge(
    toy_settings: dict[str, Any], tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wing, "MOST_BYTES", 1000)
    site = clinic({**toy_settings, "phases": "4 adapter on jacobians"}, tmp_path)
    assert "lower adapter.rank" in site.refuse().reason


def test_a_process_of_many_sites_holds_no_more_than_one_site_may(
    model_folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, kept = tiny(model_folder("bert")), dict[str, Derivatives]()
    records = records_of(model)
    monkeypatch.setattr(wing, "MOST_BYTES", 2 * len(records) * wing.bytes_each(model))

    def play(site: str) -> None:
        with linearised(model, records, Keeping(FIRST, kept, site, DATA, nothing)) as (vectors, _):
            assert len(vectors) == len(records)

    for site in ("north", "south", "west", "east"):
        play(site)
    held = [site for site, one in kept.items() if one.records]
    assert held == ["north", "east"]
    assert sum(v[TANGENTS].nbytes for one in kept.values() for v in one.records) <= wing.MOST_BYTES
    assert set(kept) == {"north", "south", "west", "east"}, "a point is lost with the vectors"
    play("south")
    monkeypatch.setattr(wing, "_make_room", lambda *own: None)
    play("west")
    play("east")
    assert len([one for one in kept.values() if one.records]) == 4, (
        "planted: nothing is dropped where nobody makes room"
    )


def test_the_planner_counts_what_is_trained_and_not_the_head(toy_settings: dict[str, Any]) -> None:
    settings = {**toy_settings, "privacy.noise-multiplier": 2.0, "privacy.epsilon": 60.0}
    plain, other = (
        forecast(configure({**settings, "phases": phases}), [100, 100], calibrated=False).signal
        for phases in ("", "2 adapter on jacobians")
    )
    assert plain is not None
    assert other is not None
    assert plain.trained_numbers - other.trained_numbers == 2 * 16 + 2


@pytest.mark.parametrize("round_number", [1, 2])
def test_a_pass_that_would_end_too_late_is_refused(
    toy_settings: dict[str, Any], tmp_path: Any, monkeypatch: pytest.MonkeyPatch, round_number: int
) -> None:
    """Derivatives are counted in every round, since a process that begins anew computes them in any."""
    passes = Timing({8: 20.0, 16: 20.0, 24: 20.0}, {8: 4, 16: 4, 24: 4}, 0.0, 0.0)
    monkeypatch.setattr(rehearsals, "rehearse", lambda model: passes)
    monkeypatch.setattr(rehearsals, "rehearse_linearised", lambda model: Timing({1: 0.0}, {1: 4}, 0.0, 0.0))
    site = clinic({**toy_settings, "phases": "4 adapter on jacobians"}, tmp_path)
    app.process.rehearsals.forget()
    try:
        site.rule(reply_after=60.0)
        assert "a round of this run may take" in site.refuse(round_number).reason
    finally:
        app.process.rehearsals.forget()


@pytest.mark.parametrize(
    ("more", "match"),
    [({"strategy": "fed-svd"}, "turns frozen factors"), ({"training.weight-decay": 0.1}, "weight-decay would draw")],
)
def test_what_would_train_in_other_coordinates_is_refused(more: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        configure({"phases": "6 adapter on jacobians", **more})
