"""Tasks: how records become tokens and losses, one per record and untouched by whoever else is in the batch."""

from __future__ import annotations

import copy
import dataclasses
import random
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from audits.tiny_models import FILLER
from fedveil.common.errors import DataError, ModelNotLoaded
from fedveil.common.model.base import BaseModel, load_base_model
from fedveil.common.model.batching import length_batches
from fedveil.common.tasks import TASKS, CausalLM, Chat, Classification, ImageClassification, Instruction, Record, Task
from fedveil.common.tasks.base import IGNORED
from fedveil.common.tasks.module import TaskModule
from fedveil.common.tasks.text import TextExample

WORDS = random.Random(4)
TEXTS = [" ".join(WORDS.choices(FILLER, k=length)) for length in (1, 14, 3, 9, 5)]
SINGLE = [TextExample(text=text, label=i % 2) for i, text in enumerate(TEXTS)]
PAIRS = [TextExample(text=text, text_pair=other, label=0) for text, other in zip(TEXTS, TEXTS[::-1], strict=True)]
PROMPTS = [
    TextExample(text=f"question {text} answer", completion=" ".join(FILLER[: 1 + 2 * i]))
    for i, text in enumerate(TEXTS)
]

Loaded = Callable[[str], BaseModel]


@pytest.fixture(scope="module")
def loaded(model_folder: Callable[[str], str]) -> Loaded:
    made: dict[str, BaseModel] = {}

    def load(family: str) -> BaseModel:
        if family not in made:
            task = "classification" if family == "bert" else "causal-lm"
            made[family] = load_base_model(model_folder(family), task)
        return made[family]

    return load


@pytest.mark.parametrize("task", [name for name, kind in TASKS.items() if isinstance(kind, CausalLM)])
def test_a_model_that_sees_what_it_is_to_predict_is_none_for_language(
    task: str, model_folder: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for family in ("gpt2", "llama"):
        load_base_model(model_folder(family), task)
    with pytest.raises(ModelNotLoaded, match=r"sees the tokens that it should predict.* set model\.name to a decoder"):
        load_base_model(model_folder("bert"), task)
    # The planted fault: nobody looks, and transformers takes an encoder for a language model.
    monkeypatch.setattr(CausalLM, "check_model", lambda *_: None)
    assert load_base_model(model_folder("bert"), task)


def classifier(base: BaseModel, feature_scale: float = 0.0) -> TaskModule:
    model = Classification().module(base.module, base, 2, feature_scale)
    assert model.head is not None
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        model.head.weight.copy_(torch.randn(model.head.weight.shape, generator=draw))
        model.head.bias.copy_(torch.randn(2, generator=draw))
    return model.eval()


def padding_with(base: BaseModel, token: int) -> BaseModel:
    """Return the base with a tokenizer that knows its padding alone."""
    return dataclasses.replace(base, processor=SimpleNamespace(pad_token_id=token, eos_token_id=None))


def alone_and_together(
    task: Task, base: BaseModel, output: Callable[[dict[str, Tensor]], Tensor], records: Sequence[Record]
) -> tuple[Tensor, Tensor]:
    """Return per-record outputs from forward passes of one record each, and from one padded batch."""
    with torch.no_grad():
        return torch.cat([output(task.collate(base, [r])) for r in records]), output(task.collate(base, records))


# --- classification ---------------------------------------------------------------------------------------------------


def test_a_text_is_one_segment_and_a_pair_two(loaded: Loaded) -> None:
    tokenizer, task = loaded("bert").processor, Classification()
    single = task.tokenise(tokenizer, [TextExample(text="the film", label=1)], 24)[0]
    pair = task.tokenise(tokenizer, [TextExample(text="the film", text_pair="was warm", label=0)], 24)[0]
    assert tokenizer.convert_ids_to_tokens(single["input_ids"]) == ["[CLS]", "the", "film", "[SEP]"]
    assert tokenizer.convert_ids_to_tokens(pair["input_ids"]) == [
        "[CLS]",
        "the",
        "film",
        "[SEP]",
        "was",
        "warm",
        "[SEP]",
    ]
    assert (single["labels"], pair["labels"]) == ([1], [0])


def test_the_segments_of_a_pair_reach_a_model_that_knows_them(loaded: Loaded) -> None:
    tokenizer = copy.deepcopy(loaded("bert").processor)
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    records = Classification().tokenise(
        tokenizer, [TextExample(text="the film", text_pair=other, label=0) for other in ("was warm", "was")], 24
    )
    batch = Classification().collate(loaded("bert"), records)
    assert batch["token_type_ids"].tolist() == [[0, 0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 1, 1, 0]]


def test_the_second_text_of_a_pair_reaches_the_model(loaded: Loaded) -> None:
    task, model = Classification(), classifier(loaded("bert"))
    examples = [TextExample(text="the film", text_pair=other, label=0) for other in ("was warm", "was cold")]
    with torch.no_grad():
        one, other = model(task.collate(loaded("bert"), task.tokenise(loaded("bert").processor, examples, 24)))
    assert not torch.allclose(one, other)


def test_no_record_is_longer_than_the_run_allows(loaded: Loaded) -> None:
    for task, examples in ((Classification(), SINGLE), (Classification(), PAIRS), (CausalLM(), PROMPTS)):
        records = task.tokenise(loaded("bert").processor, examples, 7)
        assert len(records) == len(examples)
        assert max(len(record["input_ids"]) for record in records) == 7


def test_a_record_without_a_label_is_named(loaded: Loaded) -> None:
    with pytest.raises(DataError, match="record 2 has no label"):
        Classification().tokenise(loaded("bert").processor, [TextExample(text="a", label=0), TextExample(text="b")], 24)


def test_no_examples_are_no_records(loaded: Loaded) -> None:
    assert Classification().tokenise(loaded("bert").processor, [], 24) == []
    assert CausalLM().tokenise(loaded("llama").processor, [], 24) == []


@pytest.mark.parametrize("feature_scale", [0.0, 4.0])
@pytest.mark.parametrize("examples", [SINGLE, PAIRS], ids=["single", "pairs"])
def test_class_logits_do_not_depend_on_batch_mates_or_padding(
    examples: list[TextExample], feature_scale: float, loaded: Loaded
) -> None:
    base, task = loaded("bert"), Classification()
    model, records = classifier(base, feature_scale), task.tokenise(loaded("bert").processor, examples, 40)
    alone, together = alone_and_together(task, base, model, records)
    assert torch.allclose(alone, together, rtol=1e-6, atol=1e-6)

    def mean_over_padding(batch: dict[str, Tensor]) -> Tensor:
        return model({**batch, "attention_mask": torch.ones_like(batch["attention_mask"])})

    alone, together = alone_and_together(task, base, mean_over_padding, records)
    assert not torch.allclose(alone, together, rtol=1e-3, atol=1e-3), "a model that sees padding went unnoticed"


def test_what_stands_in_the_padding_does_not_matter(loaded: Loaded) -> None:
    task, model = Classification(), classifier(loaded("bert"))
    records = task.tokenise(loaded("bert").processor, SINGLE, 40)
    with torch.no_grad():
        assert torch.allclose(
            *(model(task.collate(padding_with(loaded("bert"), pad), records)) for pad in (0, 9)), rtol=1e-6, atol=1e-6
        )


@pytest.mark.parametrize("scale", [0.5, 4.0])
def test_features_have_the_length_of_the_feature_scale(scale: float, loaded: Loaded) -> None:
    task = Classification()
    batch = task.collate(loaded("bert"), task.tokenise(loaded("bert").processor, SINGLE, 40))
    with torch.no_grad():
        raw, scaled = classifier(loaded("bert")).features(batch), classifier(loaded("bert"), scale).features(batch)
    assert torch.allclose(scaled.norm(dim=1), torch.full((len(TEXTS),), scale), rtol=1e-6)
    assert torch.allclose(scaled, scale * F.normalize(raw, dim=1), rtol=1e-5)
    assert not torch.allclose(raw.norm(dim=1), raw.norm(dim=1)[0], rtol=1e-3), "raw features all have one length anyway"


def test_features_are_the_mean_over_the_records_own_tokens(loaded: Loaded) -> None:
    base, task = loaded("bert"), Classification()
    records = task.tokenise(base.processor, SINGLE, 40)
    with torch.no_grad():
        features = classifier(base).features(task.collate(loaded("bert"), records))
        for record, row in zip(records, features, strict=True):
            hidden = base.module(input_ids=torch.tensor([record["input_ids"]])).last_hidden_state[0]
            assert torch.allclose(row, hidden.mean(0), atol=1e-5)


def test_a_record_without_a_token_has_finite_features(loaded: Loaded) -> None:
    batch = {"input_ids": torch.tensor([[0, 0]]), "attention_mask": torch.tensor([[0, 0]])}
    with torch.no_grad():
        assert classifier(loaded("bert"), 4.0).features(batch).isfinite().all()


def test_class_losses_are_one_cross_entropy_per_record(loaded: Loaded) -> None:
    task, model = Classification(), classifier(loaded("bert"))
    records = task.tokenise(loaded("bert").processor, SINGLE, 40)
    with torch.no_grad():
        losses, sums = (
            task.sums(model, task.collate(loaded("bert"), records)).losses,
            task.sums(model, task.collate(loaded("bert"), records)),
        )
        for i, record in enumerate(records):
            logits = model(task.collate(loaded("bert"), [record]))[0].double()
            label = record["labels"][0]
            assert float(losses[i]) == pytest.approx(float(logits.logsumexp(0) - logits[label]), abs=1e-5)
            assert bool(sums.correct[i]) == (int(logits.argmax()) == label)
    assert losses.shape == (len(records),)
    assert sums.weight.tolist() == [1.0] * len(records)


# --- causal language modelling ----------------------------------------------------------------------------------------

DECODERS = ["gpt2", "llama"]


def test_a_record_is_prompt_completion_and_end_and_only_the_last_two_are_targets(loaded: Loaded) -> None:
    tokenizer = loaded("llama").processor
    record = CausalLM().tokenise(tokenizer, [TextExample(text="question one", completion="warm film")], 24)[0]
    # The toy tokenizer puts [CLS] and [SEP] around a prompt; its end mark is [SEP].
    assert tokenizer.convert_ids_to_tokens(record["input_ids"]) == [
        "[CLS]",
        "question",
        "one",
        "[SEP]",
        "warm",
        "film",
        "[SEP]",
    ]
    assert record["labels"] == [IGNORED] * 4 + record["input_ids"][4:]
    assert record["attention_mask"] == [1] * 7


@settings(max_examples=30, deadline=None)
@given(prompt=st.integers(1, 30), completion=st.integers(1, 30), room=st.integers(2, 24))
def test_a_record_that_is_too_long_loses_the_beginning_of_its_prompt(
    prompt: int, completion: int, room: int, loaded: Loaded
) -> None:
    tokenizer = loaded("llama").processor
    example = TextExample(text=" ".join(["film"] * prompt), completion=" ".join(["warm"] * completion))
    full = CausalLM().tokenise(tokenizer, [example], 1000)[0]
    cut = CausalLM().tokenise(tokenizer, [example], room)[0]
    targets = [t for t in cut["labels"] if t != IGNORED]
    assert len(cut["input_ids"]) == min(room, len(full["input_ids"]))
    assert len(targets) == min(completion + 1, room - 1), "more of the completion was lost than had to be"
    assert targets == [t for t in full["labels"] if t != IGNORED][: len(targets)]
    kept = len(cut["input_ids"]) - len(targets)
    assert kept >= 1, "no token is left to predict the completion from"
    assert cut["input_ids"][:kept] == full["input_ids"][: prompt + 2][-kept:], "the end of the prompt was lost"


@pytest.mark.parametrize("completion", ["", None])
def test_an_empty_completion_is_refused_and_named(completion: str | None, loaded: Loaded) -> None:
    examples = [TextExample(text="a", completion="b"), TextExample(text="a", completion=completion)]
    with pytest.raises(DataError, match="record 2 has an empty completion"):
        CausalLM().tokenise(loaded("llama").processor, examples, 24)


@pytest.mark.parametrize("family", DECODERS)
def test_the_loss_is_the_mean_over_the_records_own_completion(family: str, loaded: Loaded) -> None:
    base, task = loaded(family), CausalLM()
    records = task.tokenise(base.processor, PROMPTS, 40)
    with torch.no_grad():
        losses = task.sums(task.module(base.module, base, 0, 0.0), task.collate(base, records)).losses
        for i, record in enumerate(records):
            logits = base.module(input_ids=torch.tensor([record["input_ids"]])).logits[0].double()
            ids, start = record["input_ids"], record["labels"].count(IGNORED)
            # Token t is predicted at position t - 1.
            naive = [float(logits[t - 1].logsumexp(0) - logits[t - 1, ids[t]]) for t in range(start, len(ids))]
            assert float(losses[i]) == pytest.approx(sum(naive) / len(naive), abs=1e-5)
            with_prompt = [float(logits[t - 1].logsumexp(0) - logits[t - 1, ids[t]]) for t in range(1, len(ids))]
            assert float(losses[i]) != pytest.approx(sum(with_prompt) / len(with_prompt), abs=1e-4)


@pytest.mark.parametrize("family", DECODERS)
def test_the_prompts_own_tokens_are_never_targets(family: str, loaded: Loaded) -> None:
    base, task = loaded(family), CausalLM()
    example = TextExample(text="question the film was very quite and a with answer", completion="warm film")
    record = task.tokenise(base.processor, [example], 40)[0]
    model = task.module(base.module, base, 0, 0.0)
    logits = model(task.collate(base, [record])).detach().requires_grad_()

    class Fixed(nn.Module):
        def forward(self, batch: dict[str, Tensor]) -> Tensor:
            return logits

    task.sums(Fixed(), task.collate(base, [record])).losses.sum().backward()
    assert logits.grad is not None
    touched = [t for t in range(logits.shape[1]) if logits.grad[0, t].abs().max() > 0]
    start = record["labels"].count(IGNORED)
    assert touched == list(range(start - 1, logits.shape[1] - 1))


@pytest.mark.parametrize("family", DECODERS)
def test_completion_losses_do_not_depend_on_batch_mates_or_padding(family: str, loaded: Loaded) -> None:
    base, task = loaded(family), CausalLM()
    records, model = task.tokenise(base.processor, PROMPTS, 40), task.module(base.module, base, 0, 0.0).eval()
    alone, together = alone_and_together(task, base, lambda batch: task.sums(model, batch).losses, records)
    assert torch.allclose(alone, together, rtol=1e-6, atol=1e-6)

    def token_mean(batch: dict[str, Tensor]) -> Tensor:
        sums = task.sums(model, batch)
        return sums.loss * len(sums.loss) / sums.weight.sum()

    alone, together = alone_and_together(task, base, token_mean, records)
    assert not torch.allclose(alone, together, rtol=0.05), "a mean over the tokens of the batch went unnoticed"


def test_hits_are_counted_on_the_completion_only(loaded: Loaded) -> None:
    task = CausalLM()
    record = {"input_ids": [5, 6, 7, 8], "attention_mask": [1] * 4, "labels": [IGNORED, IGNORED, 7, 8]}

    class Oracle(nn.Module):
        """Predicts the next token everywhere but at the last place that counts."""

        def forward(self, batch: dict[str, Tensor]) -> Tensor:
            following = batch["input_ids"].roll(-1, 1)
            following[:, 2] = 0
            return 9.0 * F.one_hot(following, 12).float()

    sums = task.sums(Oracle(), task.collate(loaded("llama"), [record, record]))
    assert (sums.correct.tolist(), sums.weight.tolist()) == ([1.0, 1.0], [2.0, 2.0])


def test_padding_is_on_the_right_masked_and_never_a_target(loaded: Loaded) -> None:
    batch = CausalLM().collate(padding_with(loaded("llama"), 3), CausalLM().prepare(loaded("llama"), PROMPTS[:2], 40))
    padding = batch["attention_mask"] == 0
    assert padding.any()
    assert (padding.int().diff(dim=1) >= 0).all(), "padding is not on the right"
    assert (batch["input_ids"][padding] == 3).all()
    assert (batch["labels"][padding] == IGNORED).all()


# --- cutting a logical batch ------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(1, 60), max_size=50), budget=st.integers(1, 200))
def test_batches_hold_every_record_once_and_keep_to_the_budget(lengths: list[int], budget: int) -> None:
    groups = length_batches(lengths, budget)
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    for group in groups:
        assert group
        assert len(group) == 1 or len(group) * max(lengths[i] for i in group) <= budget
    in_order = [lengths[i] for group in groups for i in group]
    assert in_order == sorted(lengths, reverse=True), "records of like length are not together"


def test_batches_are_as_few_as_the_budget_allows() -> None:
    assert length_batches([2] * 10, budget=8) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert length_batches([], budget=8) == []


def test_every_task_says_what_it_is(loaded: Loaded) -> None:
    tasks: list[Any] = [Classification(), CausalLM(), Chat(), Instruction(), ImageClassification()]
    words = [("classification", True), ("causal-lm", False), ("chat", False), ("instruction", False)]
    names = [*words, ("image-classification", True)]
    assert [(task.name, task.labelled) for task in tasks] == names
    assert set(TASKS) >= {task.name for task in tasks}
