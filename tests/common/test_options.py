"""What a decoder of bytes does: which of a question's options it finds likeliest, and where a sampled text ends."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fedveil.common.model.base import BaseModel
from fedveil.common.model.scoring import RIGHT_OPTION, score_records
from fedveil.common.tasks import TASKS
from fedveil.common.tasks.causal_lm import continued
from fedveil.common.tasks.finished import Finished, Sampling
from fedveil.common.tasks.options import options_of
from fedveil.common.tasks.text import TextExample

QUESTION = "Which?\nA. one\nB. two or three\nC. four\nAnswer:"


@pytest.fixture(scope="module")
def base() -> BaseModel:
    """A tiny decoder whose tokens are bytes, with an end mark."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE({**letters, "<end>": len(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    processor = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>")
    torch.manual_seed(50)
    module = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(letters) + 1,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=256,
        )
    ).eval()
    return cast(BaseModel, SimpleNamespace(processor=processor, positions=256, module=module, name="bytes"))


def record_of(base: BaseModel, text: str, completion: str, limit: int = 200) -> dict[str, Any]:
    (record,) = TASKS["causal-lm"].prepare(base, [TextExample(text=text, completion=completion)], limit)
    return record


def completions(base: BaseModel, records: list[dict[str, Any]]) -> list[str]:
    return [base.processor.decode([t for t in record["labels"] if t != -100]) for record in records]


def test_the_options_are_the_lines_of_the_prompt_and_the_right_one_is_first(base: BaseModel) -> None:
    record = record_of(base, QUESTION, " B. two or three")
    found = options_of(base, record)
    assert completions(base, found) == [" B. two or three<end>", " A. one<end>", " C. four<end>"]
    assert found[0] == record
    prompts = [one["input_ids"][: one["labels"].index(next(t for t in one["labels"] if t != -100))] for one in found]
    assert prompts == [prompts[0]] * 3


@pytest.mark.parametrize(
    ("text", "completion"),
    [
        ("Which?\nAnswer:", " one"),
        (QUESTION, " D. five"),
        (QUESTION, " B"),
        ("A. one\nAnswer:", " A. one"),
        ("Lines:\nB. one\nC. two\nAnswer:", " B. one"),
    ],
)
def test_an_answer_that_is_no_listed_option_is_no_multiple_choice(base: BaseModel, text: str, completion: str) -> None:
    assert options_of(base, record_of(base, text, completion)) == []


def test_of_several_lists_the_last_counts(base: BaseModel) -> None:
    text = "First?\nA. x\nB. y\nAnswer: A. x\n\n" + QUESTION
    assert len(options_of(base, record_of(base, text, " A. one"))) == 3
    assert options_of(base, record_of(base, text, " A. x")) == []


def test_the_figure_is_the_share_of_questions_whose_right_option_has_the_least_loss_a_token(base: BaseModel) -> None:
    options = ["A. one", "B. two or three", "C. four"]
    records = [record_of(base, QUESTION, f" {option}") for option in options]
    records.append(record_of(base, "No options?\nAnswer:", " yes"))

    def loss(completion: str) -> float:
        prompt = base.processor(QUESTION)["input_ids"]
        answer = [*base.processor(completion, add_special_tokens=False)["input_ids"], base.processor.eos_token_id]
        with torch.no_grad():
            logits = cast(Any, base.module)(input_ids=torch.tensor([prompt + answer])).logits[0].double()
        steps = logits.log_softmax(-1)[len(prompt) - 1 : -1]
        return -float(steps[range(len(answer)), answer].mean())

    losses = [loss(f" {option}") for option in options]
    assert len(set(losses)) == 3
    score = score_records(
        TASKS["causal-lm"].module(cast(nn.Module, base.module), base, 0, 1.0),
        TASKS["causal-lm"],
        base,
        records,
        torch.device("cpu"),
        torch.float32,
    )
    (figure,) = [figure for figure in score.figures if figure.name == RIGHT_OPTION]
    assert math.isclose(figure.value, 1 / 3), "the least of three losses is right once"
    assert score.name == "accuracy", "a run is judged as before"


def test_records_without_options_have_no_such_figure(base: BaseModel) -> None:
    task = TASKS["causal-lm"]
    module = task.module(cast(nn.Module, base.module), base, 0, 1.0)
    records = [record_of(base, "Which?\nAnswer:", " one")]
    score = score_records(module, task, base, records, torch.device("cpu"), torch.float32)
    assert score.figures == ()


@pytest.mark.parametrize("end", ["\n", ""])
def test_a_sampled_text_is_over_at_its_templates_new_line(base: BaseModel, end: str) -> None:
    model = cast(Finished, SimpleNamespace(base=base, module=SimpleNamespace(encoder=base.module), limit=200))
    example = TextExample(text="good", template=f"A {{prompt}} film: {{completion}}{end}")
    with torch.random.fork_rng():
        torch.manual_seed(1)
        texts = continued(model, example, 64, Sampling(top_p=1.0))
    lines = [text.count("\n") for text in texts if text is not None]
    assert 0 < len(lines) < 64
    assert any(lines)
    assert (max(lines) == 1) == bool(end)
    if end:
        assert all(text is None or "\n" not in text[:-1] for text in texts)
