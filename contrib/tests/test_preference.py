"""Preferences: losses and gradients of pairs as their papers have them, references kept once, and judges in runs."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from audits.judges import pair_run, write_pairs
from audits.tiny_models import FILLER
from audits.unfolded import summed
from audits.worlds import World, flat, minus, norm, plan
from fedveil.client.cache import Prepared, RecordCache
from fedveil.client.unfolding import rows_of, unfolded
from fedveil.common.adapters import ADAPTERS
from fedveil.common.config.sections import HeadConfig
from fedveil.common.errors import ConfigError, DataError
from fedveil.common.model.base import load_base_model
from fedveil.common.model.federated import FederatedModel
from fedveil.common.run_lines import RoundLine, read_lines
from fedveil.common.starts.kaiming import Kaiming
from fedveil.common.tasks.base import KEPT, WEIGHT, Record
from fedveil.common.tasks.examples import Dataset
from fedveil.contrib.tasks.judge import judged
from fedveil.contrib.tasks.pairs import Pair, rows_of_pair
from fedveil.contrib.tasks.preference import Preference
from fedveil.contrib.tasks.reference import adapter_off
from fedveil.experiments.evaluate import evaluate_run
from fedveil.experiments.in_process import run_in_process
from fedveil.experiments.serving.merge import merge_run
from fedveil.privacy.randomness import private_uniform
from fedveil.privacy.steps import nothing
from fedveil.strategies.job import configure

Folder = Callable[[str], str]
PAIRS = [
    Pair(
        question=" ".join(FILLER[: 2 + i]), chosen=FILLER[i % 5] + " warm", rejected=" ".join(FILLER[-1 - 2 * i :][:4])
    )
    for i in range(5)
]
TARGETS = {"bert": "query,value", "llama": "q_proj,v_proj", "gpt2": "c_attn"}


def model_of(
    model_folder: Folder, loss: str, adapter: str = "lora", beta: float = 0.5, family: str = "llama"
) -> FederatedModel:
    task, family = Preference(loss=loss, beta=beta), "bert" if loss == "bradley-terry" else family
    made = FederatedModel(
        load_base_model(model_folder(family), task),
        ADAPTERS[adapter](4, 8.0, tuple(TARGETS[family].split(",")), Kaiming()),
        task,
        HeadConfig("trained" if task.scalar else "frozen", "random"),
        seed=1,
        max_length=39,
        device="cpu",
        precision="float32",
    )
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in made.module.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=draw))
    return made


def world_of(model_folder: Folder, loss: str, adapter: str = "lora") -> World:
    own = model_of(model_folder, loss, adapter)
    return World(own, own.prepare(PAIRS))


def log_likelihood(decoder: nn.Module, row: Record) -> Tensor:
    """Return log π of a row's answer: the slow and obvious way."""
    logits = decoder(input_ids=torch.tensor([row["input_ids"]])).logits[0].log_softmax(-1)
    targets = [(i, token) for i, token in enumerate(row["labels"]) if token != -100]
    return torch.stack([logits[i - 1, token] for i, token in targets]).sum()


def paper_losses(model: FederatedModel, base: nn.Module, records: Sequence[Record], beta: float) -> list[Tensor]:
    """Return each pair's loss by equation 7 of DPO, or 1 of InstructGPT."""
    found = []
    for record in records:
        better, worse = rows_of_pair(record)
        if model.task.name == "preference" and model.module.head is not None:
            numbers = [model.module({k: torch.tensor([v]) for k, v in row.items()})[0, 0] for row in (better, worse)]
            found.append(-F.logsigmoid(numbers[0] - numbers[1]))
            continue
        ratios = [log_likelihood(model.peft_model, row) - log_likelihood(base, row) for row in (better, worse)]
        found.append(-F.logsigmoid(beta * (ratios[0] - ratios[1])))
    return found


@pytest.mark.parametrize("loss", ["dpo", "bradley-terry"])
def test_losses_and_gradients_are_the_papers(loss: str, model_folder: Folder) -> None:
    own = model_of(model_folder, loss, family="gpt2")  # Llama's norm is in float32 whatever the rest is in
    world = World(own, own.prepare(PAIRS))
    world.model.module.double()
    base = load_base_model(model_folder("gpt2"), "causal-lm").module.double()
    wanted = paper_losses(world.model, base, world.records, 0.5)
    batch = world.model.batch(world.records)
    assert torch.allclose(world.model.losses(batch), torch.stack(wanted), rtol=1e-12, atol=1e-14)
    for record, value in zip(world.records, wanted, strict=True):
        own = flat([g.double() for g in torch.autograd.grad(value, world.trained, retain_graph=True)])
        rows = rows_of(world.model, record, private_uniform)
        through = [torch.zeros_like(p) for p in world.trained]
        for row in rows:
            passed = world.model.losses(world.model.fixed_batch([row], world.model.shapes.length_of(39 - 1), 3))
            gradients = torch.autograd.grad(passed.sum(), world.trained)
            through = [a + b for a, b in zip(through, gradients, strict=True)]
        assert float((flat(through) - own).abs().max() / own.abs().max()) < 1e-12


def test_beta_near_zero_weighs_both_answers_by_half_of_it_and_a_swap_turns_the_sign(model_folder: Folder) -> None:
    model = model_of(model_folder, "dpo", beta=1e-6)
    (record,), (swapped,) = (
        model.prepare([Pair(question=p.question, chosen=a, rejected=b)])
        for p in PAIRS[:1]
        for a, b in ((p.chosen, p.rejected), (p.rejected, p.chosen))
    )
    rows = rows_of(model, record, private_uniform)
    assert [row[WEIGHT] for row in rows] == [pytest.approx(0.5e-6, rel=1e-4), pytest.approx(-0.5e-6, rel=1e-4)]
    model = model_of(model_folder, "dpo", beta=0.5)
    weights = [rows_of(model, one, private_uniform)[0][WEIGHT] for one in (record, swapped)]
    for one in (record, swapped):
        del one[KEPT]
    weights = [rows_of(model, one, private_uniform)[0][WEIGHT] for one in (record, swapped)]
    assert sum(weights) == pytest.approx(0.5, rel=1e-5), "σ(z) + σ(-z) is not 1"


def test_a_judge_in_text_sees_both_orders(model_folder: Folder) -> None:
    model = model_of(model_folder, "text")
    (record,) = model.prepare([Pair(question="the film", chosen="warm", rejected="cold")])
    rows = rows_of(model, record, private_uniform)
    said = [model.base.processor.decode(row["input_ids"]) for row in rows]
    assert [text.index("warm") < text.index("cold") for text in said] == [True, False]
    assert [row[WEIGHT] for row in rows] == [0.5, 0.5]
    each = [float(model.losses(model.batch([{k: v for k, v in row.items() if k != WEIGHT}])).detach()) for row in rows]
    score = model.score([record])
    assert score.loss == pytest.approx(sum(each) / 2, rel=1e-5)
    assert [figure.name for figure in score.figures] == [
        "accuracy",
        "right, better answer first",
        "right, better answer second",
    ]


@pytest.mark.parametrize("loss", ["dpo", "bradley-terry", "text"])
def test_one_pair_moves_the_sum_by_one_clip_whoever_is_beside_it(loss: str, model_folder: Folder) -> None:
    world, clip = world_of(model_folder, loss), 1e-4
    everyone = summed(world, world.records, plan(clip))
    moved = [
        norm(minus(everyone, summed(world, [r for j, r in enumerate(world.records) if j != i], plan(clip)))) / clip
        for i in range(len(world.records))
    ]
    assert max(moved) <= 1 + 1e-5
    assert max(moved) > 1 - 1e-3, "the bound is not attained"
    for i, record in enumerate(world.records):
        (alone, beside) = (
            unfolded(world.model, some, private_uniform, nothing, hides=True) for some in ([record], world.records)
        )
        assert [row[WEIGHT] for row in alone] == [row[WEIGHT] for row in beside[2 * i : 2 * i + 2]]


def test_the_reference_is_computed_once_and_kept_until_features_are_dropped(
    model_folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(model_folder, "dpo", "lora-frozen-a")
    trained = [p.requires_grad for p in model.module.parameters()]
    records = model.prepare(PAIRS[:2])
    rows_of(model, records[0], private_uniform)
    kept = list(records[0][KEPT])
    assert [p.requires_grad for p in model.module.parameters()] == trained
    base = load_base_model(model_folder("llama"), "causal-lm").module
    for cost, row in zip(kept, rows_of_pair(records[0]), strict=True):
        assert cost == pytest.approx(-float(log_likelihood(base, row)), rel=1e-5)
    monkeypatch.setattr("fedveil.contrib.tasks.reference.adapter_off", None)  # whoever asks again fails
    rows_of(model, records[0], private_uniform)
    with pytest.raises(TypeError):
        rows_of(model, records[1], private_uniform)
    cache = RecordCache()
    cache.records["clinic"] = Prepared("1", Dataset("own", (), ()), ("record", 1), records)
    cache.forget_computed("clinic")
    assert cache.records["clinic"].records is None


def test_an_adapter_that_is_off_is_the_base_model(model_folder: Folder) -> None:
    model = model_of(model_folder, "dpo")
    base, row = load_base_model(model_folder("llama"), "causal-lm").module, model.prepare(PAIRS[:1])[0]
    tokens = torch.tensor([row["input_ids"]])
    with torch.no_grad(), adapter_off(model.module.encoder):
        off = model.peft_model(input_ids=tokens).logits
    with torch.no_grad():
        assert torch.allclose(off, base(input_ids=tokens).logits, atol=1e-6)
        assert not torch.allclose(off, model.peft_model(input_ids=tokens).logits, atol=1e-3)


@pytest.fixture
def toy(model_folder: Folder, tmp_path: Path) -> Callable[[str], dict[str, Any]]:
    """Return settings of a private run of a loss."""
    return lambda loss: pair_run(model_folder("bert" if loss == "bradley-terry" else "llama"), loss, tmp_path)


@pytest.mark.rough_prices
@pytest.mark.parametrize("loss", ["dpo", "bradley-terry", "text"])
def test_a_federation_learns_what_is_preferred(loss: str, toy: Any, tmp_path: Path) -> None:
    folder = run_in_process(toy(loss), 2)
    lines = read_lines(RoundLine, folder)
    assert not any(line.refusals or line.failures for line in lines)
    assert evaluate_run(folder).accuracy == pytest.approx(lines[-1].accuracy)
    name, count, left_out, score = judged(folder, str(write_pairs(tmp_path / "others.jsonl", 20, 500)))
    assert (name, count, left_out) == ("others.jsonl", 20, 0)
    if loss != "text":  # the letters A and B are no words of the tiny vocabulary
        assert score.accuracy > 0.9, "nothing was learnt"


def test_what_a_judge_cannot_be_is_refused(toy: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"trains a head without labels: set head.policy to 'trained'"):
        configure({**toy("bradley-terry"), "head.policy": "frozen"})
    with pytest.raises(ConfigError, match=r"preference\.beta must be above 0"):
        configure({**toy("dpo"), "preference.beta": 0.0})
    with pytest.raises(DataError, match="has an empty answer"):
        Preference().tokenise(None, [Pair(question="a", chosen=" ", rejected="b")], 8)  # type: ignore[list-item]
    assert Pair(question="a", chosen="b c", rejected=" b  c").lacks()[0]


@pytest.mark.rough_prices
def test_a_judges_head_is_written_for_sentence_transformers(toy: Any, tmp_path: Path) -> None:
    folder = run_in_process({**toy("bradley-terry"), "rounds": 1}, 2)
    code = merge_run(folder, tmp_path / "judge")
    assert "SentenceTransformer" in code
    modules = json.loads((tmp_path / "judge" / "modules.json").read_text())
    assert [module["path"].partition("_")[2] for module in modules] == ["Transformer", "Pooling", "Normalize", "Dense"]
