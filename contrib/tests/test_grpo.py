"""GRPO: the loss of its paper, one clip a prompt, completions that no neighbour moves, and one step a sample."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from audits.rollouts import FAULTS, audit_rollouts, coins_of, rollout_world
from audits.tiny_site import OneSite
from audits.worlds import World, flat, fresh_world, plan
from fedveil.client.rehearsal import rehearse
from fedveil.client.unfolding import rows_of, unfolded
from fedveil.common.config.sections import DataConfig
from fedveil.common.config.text import parse_settings
from fedveil.common.data.sources import load_dataset
from fedveil.common.errors import ConfigError, DataError, MechanismError
from fedveil.common.model.recomputed import recompute_layers
from fedveil.common.run_lines import RoundLine, read_lines
from fedveil.common.tasks.base import IGNORED, OWNER, WEIGHT, Record
from fedveil.common.tasks.text import TOKENS, TextExample
from fedveil.contrib.rewards import REWARDS, Completion
from fedveil.contrib.tasks.grpo import ANSWER, GRPO, LABELS, MASK
from fedveil.experiments.evaluate import evaluate_run
from fedveil.experiments.in_process import run_in_process
from fedveil.privacy.accounting import gaussian_release
from fedveil.privacy.dpsgd import ClipAndNoise, PrivateSteps
from fedveil.privacy.no_privacy import ExposingPlan
from fedveil.privacy.privacy_filter import promised
from fedveil.privacy.randomness import private_uniform
from fedveil.privacy.steps import nothing
from fedveil.strategies.job import configure

Folder = Callable[[str], str]
STEPS = 16
"""Tokens of a completion by default."""


@pytest.fixture(scope="module")
def world(model_folder: Folder) -> World:
    return rollout_world(model_folder("llama"))


@pytest.fixture
def exact(model_folder: Folder) -> World:
    """Return a world that computes in float64."""
    own = fresh_world(model_folder("llama"), "llama", "lora", "frozen", task="grpo")
    own.model.module.double()
    return own


def written(row: Record) -> list[int]:
    """The completion of a row."""
    return [label for label in row[LABELS] if label != IGNORED]


def worth(world: World, record: Record, completion: list[int]) -> float:
    """What a completion is worth by the default rewards, the slow way."""
    tokenizer = world.model.base.processor
    text = tokenizer.decode(completion, skip_special_tokens=True)
    ended = completion[-1] == tokenizer.eos_token_id
    said = Completion(text, bytes(record[ANSWER]).decode(), len(completion), STEPS, ended)
    return (REWARDS["number"](said) + 0.5 * REWARDS["format"](said) + 0.25 * REWARDS["end"](said)) / 1.75


def published_loss(world: World, record: Record, rows: list[Record]) -> Tensor:
    """The loss of the paper with ratio and clip, one token after another, each row by itself."""
    rewards = torch.tensor([worth(world, record, written(row)) for row in rows], dtype=torch.float64)
    total, prompt = torch.zeros((), dtype=torch.float64), sum(record[MASK])
    for row, reward in zip(rows, rewards, strict=True):
        advantage = (reward - rewards.mean()) / (rewards.std() + 1e-4) if rewards.std() else torch.tensor(0.0)
        tokens, mask = torch.tensor([row[TOKENS]]), torch.tensor([row[MASK]])
        laws = world.model.module.encoder(input_ids=tokens, attention_mask=mask, use_cache=False).logits[0]
        for t, token in enumerate(written(row)):
            law = laws[prompt + t - 1].log_softmax(-1)[token]
            ratio = (law - law.detach()).exp()
            total = total - torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
    return total / (len(rows) * STEPS)


def clipped_samples(world: World, rows: list[Record], records: int) -> Tensor:
    """What a step on rows clips: one gradient of each record, over all that is trained."""
    found: list[Tensor] = []

    def look(own: ClipAndNoise) -> None:
        found.append(torch.cat([sample.flatten(1).double() for sample in own.grad_samples], 1))
        clip(own)

    clip = ClipAndNoise.clip_and_accumulate
    with patch.object(ClipAndNoise, "clip_and_accumulate", look):
        step_on(world, rows, records)
    return found[0]


def step_on(world: World, rows: list[Record], records: int, rate: float = 0.0) -> None:
    """Take a private step on rows."""
    figures, optimizer = plan(), torch.optim.SGD(world.trained, lr=rate)
    with PrivateSteps(world.model.module, optimizer, figures) as steps:
        steps.step(figures.rows(world.model, rows, records), world.model.losses)


def drawn_rows(world: World) -> list[Record]:
    return unfolded(world.model, world.records, private_uniform, nothing, hides=False)


def test_a_records_gradient_is_that_of_the_published_loss(exact: World) -> None:
    rows = drawn_rows(exact)
    samples = clipped_samples(exact, rows, len(exact.records))
    assert any(row[WEIGHT] for row in rows), "nothing is compared"
    for number, record in enumerate(exact.records):
        own = [row for row in rows if row[OWNER] == number]
        gradient = torch.autograd.grad(published_loss(exact, record, own), exact.trained)
        error = float((samples[number] - flat(list(gradient))).abs().max())
        assert error <= 1e-7 * float(samples[number].abs().max())  # attention rounds its softmax to float32


def test_plain_steps_take_the_mean_over_prompts(exact: World) -> None:
    rows, before = drawn_rows(exact), [p.detach().clone() for p in exact.trained]
    losses = [published_loss(exact, r, [o for o in rows if o[OWNER] == i]) for i, r in enumerate(exact.records)]
    wanted = torch.autograd.grad(torch.stack(losses).mean(), exact.trained)
    own = ExposingPlan(0.5, 64)
    with own.steps(exact.model, torch.optim.SGD(exact.trained, lr=1.0)) as steps:
        steps.step(own.rows(exact.model, rows, len(exact.records)), exact.model.losses)
    for p, old, gradient in zip(exact.trained, before, wanted, strict=True):
        # The batch's padding is another one, and attention takes its softmax in float32.
        assert torch.allclose(old - p, gradient, rtol=1e-5, atol=1e-6 * float(gradient.abs().max()))


def test_one_prompt_moves_the_sum_by_one_clip_and_both_faults_are_found(world: World) -> None:
    sound = audit_rollouts(world)
    assert sound.passed
    assert float(sound.figures["clips moved by one record, at most"]) > 1 - 1e-4, "the bound is not attained"
    for fault in FAULTS:
        assert audit_rollouts(world, fault).passed, f"{fault.name} was not found"


def test_a_second_step_on_one_sample_is_refused(model_folder: Folder) -> None:
    world = rollout_world(model_folder("llama"))
    rows = drawn_rows(world)
    step_on(world, rows, len(world.records), rate=0.1)
    with pytest.raises(MechanismError, match="second step"):
        step_on(world, rows, len(world.records))
    step_on(world, drawn_rows(world), len(world.records))


def test_shapes_and_time_of_rows_follow_from_the_prompt_alone(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    passes, forward = list[Any](), world.model.module.encoder.forward

    def noted(*given: Any, **more: Any) -> Any:
        passes.append(tuple(more["input_ids"].shape))
        return forward(*given, **more)

    monkeypatch.setattr(world.model.module.encoder, "forward", noted)
    for record in world.records:
        rows = rows_of(world.model, record, private_uniform)
        assert {len(row[TOKENS]) for row in rows} == {len(record[TOKENS])}
        assert passes == [(1, sum(record[MASK])), *[(4, 1)] * (STEPS - 1)]
        passes.clear()


def test_a_group_without_spread_has_no_weight_and_is_not_drawn_again(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = list[int]()
    monkeypatch.setattr(GRPO, "_worth", lambda task, parts: 0.5)

    def coins(count: int) -> Tensor:
        drawn.append(count)
        return private_uniform(count)

    rows = rows_of(world.model, world.records[1], coins)
    assert ([row[WEIGHT] for row in rows], drawn) == ([0.0] * 4, [4] * STEPS)


def test_a_prompt_that_a_reward_fails_on_contributes_zero(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    own, bad = GRPO._parts, world.records[2]

    def fails(task: GRPO, *given: Any) -> list[dict[str, float]]:
        if given[-1][0] == bad[ANSWER]:
            raise ZeroDivisionError
        return own(task, *given)

    monkeypatch.setattr(GRPO, "_parts", fails)
    rows = unfolded(world.model, world.records, private_uniform, nothing, hides=True)
    same = {i for i, record in enumerate(world.records) if record[ANSWER] == bad[ANSWER]}
    assert {row[OWNER] for row in rows} == {*range(len(world.records))} - same


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_rehearsal_passes_and_times_the_writing(checkpointing: bool, model_folder: Folder) -> None:
    world = rollout_world(model_folder("llama"))
    if checkpointing:
        recompute_layers(world.model.peft_model, "tiny")
    timing = rehearse(world.model)
    assert (timing.unfolded, timing.unfold > 0) == (4, True)


def test_layers_that_are_computed_again_change_no_completion(world: World, model_folder: Folder) -> None:
    other = rollout_world(model_folder("llama"))
    recompute_layers(other.model.peft_model, "tiny")
    other.model.module.train()
    for record in world.records:
        one, same = (rows_of(each.model, record, coins_of(record)) for each in (world, other))
        assert [row[TOKENS] for row in one] == [row[TOKENS] for row in same]


def test_a_score_has_each_reward_apart(world: World) -> None:
    found = world.model.score(world.records)
    task, policy = GRPO(), world.model.module
    with torch.no_grad(), policy_evaluated(policy):
        parts = [slow_parts(world, task, record) for record in world.records]
    wanted = {name: sum(part[name] for part in parts) / len(parts) for name in ("number", "format", "end")}
    figures = {figure.name: figure.value for figure in found.figures}
    assert figures == pytest.approx({**figures, **wanted})
    assert found.name == "reward"
    assert found.accuracy == pytest.approx((wanted["number"] + 0.5 * wanted["format"] + 0.25 * wanted["end"]) / 1.75)
    assert found.loss == pytest.approx(1 - found.accuracy)


def slow_parts(world: World, task: GRPO, record: Record) -> dict[str, float]:
    """The rewards of a record's likeliest completion, a whole pass for each token."""
    tokens = record[TOKENS][: sum(record[MASK])]
    for _ in range(STEPS):
        logits = world.model.module.encoder(input_ids=torch.tensor([tokens]), use_cache=False).logits
        tokens = [*tokens, int(logits[0, -1].argmax())]
    return task._parts(world.model.module, [tokens[:-STEPS]], [tokens[-STEPS:]], [record[ANSWER]])[0]


@contextmanager
def policy_evaluated(module: torch.nn.Module) -> Iterator[None]:
    was, _ = module.training, module.eval()
    yield
    module.train(was)


def test_a_long_prompt_loses_its_beginning_and_an_empty_answer_is_no_record(world: World) -> None:
    (record,) = world.model.prepare([TextExample(text=" ".join(["film"] * 40 + ["dull"]), completion="warm")])
    assert (len(record[TOKENS]), sum(record[MASK])) == (24, 24 - STEPS)
    with pytest.raises(DataError, match="empty answer"):
        world.model.prepare([TextExample(text="film", completion=" ")])


@pytest.mark.parametrize(
    ("more", "match"),
    [
        ({"rollout.completions": 1}, r"rollout\.completions"),
        ({"rollout.temperature": 0.0}, r"rollout\.temperature"),
        ({"rollout.rewards": "number"}, r"rollout\.rewards"),
        ({"rollout.rewards": "[0-9]+:1"}, "write each of exact"),
        ({"rollout.rewards": "judge:1"}, "set all three"),
        ({"rollout.judge": "judge"}, "set all three"),
        ({"rollout.judge": "judge", "rollout.rewards": "judge:1"}, "set all three"),
        ({"rollout.iterations": 2}, r"unknown setting 'rollout\.iterations'"),
        ({"model.task": "causal-lm"}, r"rollout\.rewards cannot be set"),
    ],
)
def test_what_no_run_can_have_is_refused(more: dict[str, Any], match: str) -> None:
    settings = {"model.task": "grpo", "head.policy": "frozen", "rollout.rewards": "number:1", **more}
    with pytest.raises(ConfigError, match=match):
        configure(settings)


@pytest.fixture
def toy(model_folder: Folder, tmp_path: Path) -> dict[str, Any]:
    rows = [{"prompt": f"the film {i} was", "completion": "warm"} for i in range(60)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return {
        "model.name": model_folder("llama"),
        "model.task": "grpo",
        "model.max-length": 24,
        "data.name": str(path),
        "data.test-size": 10,
        "data.partition": "iid",
        "strategy": "ffa-lora",
        "adapter.targets": "q_proj,v_proj",
        "head.policy": "frozen",
        "rollout.rewards": "exact:1,end:1",
        "rounds": 2,
        "training.sample-rate": 0.3,
        "privacy.delta": 1e-3,
        "privacy.noise-multiplier": 1.0,
        "privacy.epsilon": 1000.0,
        "device": "cpu",
        "precision": "float32",
        "output": str(tmp_path / "runs"),
    }


@pytest.mark.rough_prices
@pytest.mark.parametrize("mode", ["dp-sgd", "none"])
def test_a_run_says_its_rewards_apart_and_what_its_unit_is(mode: str, toy: dict[str, Any]) -> None:
    folder = run_in_process({**toy, "privacy.mode": mode}, 2)
    last = read_lines(RoundLine, folder)[-1]
    assert {"reward", "exact", "end"} <= {figure.name for figure in last.figures}
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert ("a prompt with its answer" in page) == (mode == "dp-sgd")
    assert evaluate_run(folder).accuracy == pytest.approx(last.accuracy)


@pytest.mark.rough_prices
def test_both_stages_of_gazal_r1_are_paid_from_one_budget(toy: dict[str, Any], tmp_path: Path) -> None:
    node: dict[str, Any] = {"site": "clinic", "data": toy["data.name"], "public-size": 60}
    node["ledger"] = str(tmp_path / "clinic.sqlite")
    first = {key: value for key, value in toy.items() if not key.startswith("rollout.")}
    first |= {"model.task": "causal-lm", "adapter.name": "dora", "strategy": "fedavg-lora"}
    totals = []
    for run, settings in (("1", first), ("2", toy)):
        site = OneSite(settings, node)
        site.rule()
        sent = site.train(1, run)
        assert sent.spending is not None
        totals.append(sent.spending.epsilon_total)
        assert (sent.words, sent.noised_correct, sent.rank) == (b"", None, 0), "more than the noised sum is sent"
    assert totals == [promised([gaussian_release(1.0, 0.3, count)], 1e-3)[0] for count in (1, 2)]


def test_the_shipped_stages_are_of_the_same_records_and_the_second_begins_where_merge_writes() -> None:
    stages = [parse_settings([f"gazal-r1-stage{number}"]) for number in (1, 2)]
    assert [stage["adapter.name"] for stage in stages] == ["dora", "dora"]
    assert [stage["adapter.scale"] for stage in stages] == ["sqrt-rank", "sqrt-rank"]
    one, other = (load_dataset(DataConfig(name=str(stage["data.name"])), str(stage["model.task"])) for stage in stages)
    assert one.fingerprint() == other.fingerprint()
    assert (stages[1]["model.name"], stages[1]["model.task"]) == ("gazal-r1-stage1", "grpo")
