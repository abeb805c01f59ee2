"""Conversations: only the assistant's words are learnt from, one loss a record, whichever layout they came in."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from audits.tiny_models import FILLER
from fedveil.client.own_records import prepared
from fedveil.common.config.flat import Columns
from fedveil.common.config.sections import DataConfig
from fedveil.common.data.sources import load_dataset, load_protected
from fedveil.common.errors import ConfigError, DataError
from fedveil.common.model.base import BaseModel, load_base_model
from fedveil.common.tasks import TASKS, Chat, Instruction
from fedveil.common.tasks.base import IGNORED, Batch
from fedveil.common.tasks.causal_lm import CausalLM
from fedveil.common.tasks.cells import Misfit
from fedveil.common.tasks.chat import MOST_TURNS, Conversation, prompt_tokens, read_turns
from fedveil.common.tasks.instruction import Exchange, read_history
from fedveil.experiments.in_process import run_in_process
from fedveil.experiments.serving.ask import ask_run
from fedveil.strategies.job import configure

pytestmark = pytest.mark.rough_prices

TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message.role == 'system' and not loop.first -%}"
    "{{ raise_exception('the system speaks first') }}{%- endif -%}"
    "{{ {'system': 'story ', 'user': 'question ', 'assistant': 'answer '}[message.role] + message.content }}"
    "{{ ' [SEP] ' if message.role == 'assistant' else ' ' }}"
    "{%- endfor -%}"
    "{{ 'answer ' if add_generation_prompt else '' }}"
)
FORGETFUL = "{{ messages[-1].content + ' ' }}{{ 'answer ' if add_generation_prompt else '' }}"
"""Shows the last turn alone, so that what was said before changes with every turn."""
TURNS = (
    ("system", "the film"),
    ("user", "is very warm"),
    ("assistant", "quite"),
    ("user", "and a story"),
    ("assistant", "the actor was dull"),
)
SENT = [{"role": who, "content": text} for who, text in TURNS]
COLUMNS = {"prompt": "instruction", "completion": "output"}
"""Of alpaca."""

WithTemplate = Callable[[str], str]


@pytest.fixture(scope="module")
def chatty(model_folder: Callable[[str], str], tmp_path_factory: pytest.TempPathFactory) -> WithTemplate:
    """Return a function from a chat template to a folder with the tiny Llama that has it."""
    made: dict[str, str] = {}

    def make(template: str) -> str:
        if template not in made:
            folder = tmp_path_factory.mktemp("chat") / "model"
            shutil.copytree(model_folder("llama"), folder)
            (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
            made[template] = str(folder)
        return made[template]

    return make


@pytest.fixture(scope="module")
def base(chatty: WithTemplate) -> BaseModel:
    return load_base_model(chatty(TEMPLATE), "chat")


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def loaded(path: Path, task: str, **columns: str) -> list[Any]:
    return list(load_dataset(DataConfig(name=str(path), columns=Columns(columns)), task).examples)


# --- tokens and loss ---


def test_only_the_assistants_turns_and_their_ends_are_targets(base: BaseModel) -> None:
    (record,) = Chat().prepare(base, [Conversation(turns=TURNS)], 40)
    words = (
        "story the film question is very warm answer quite [SEP] question and a story answer the actor was dull [SEP]"
    )
    assert base.processor.convert_ids_to_tokens(record["input_ids"]) == words.split()
    own = [token for token, label in zip(words.split(), record["labels"], strict=True) if label != IGNORED]
    assert " ".join(own) == "quite [SEP] the actor was dull [SEP]"
    assert [label for label in record["labels"] if label != IGNORED] == [
        token for token, label in zip(record["input_ids"], record["labels"], strict=True) if label != IGNORED
    ]


def test_the_parts_together_are_the_whole_conversation_and_begin_as_it_is_asked(base: BaseModel) -> None:
    (record,) = Chat().prepare(base, [Conversation(turns=TURNS)], 40)
    whole = base.processor.apply_chat_template(SENT, tokenize=False)
    assert record["input_ids"] == base.processor(whole, add_special_tokens=False)["input_ids"]
    asked = prompt_tokens(base.processor, Conversation(turns=TURNS[:-1]))
    assert record["input_ids"][: len(asked)] == asked, "the model is asked otherwise than it was taught"


@pytest.mark.parametrize(
    ("limit", "kept"),
    [
        (12, "[SEP] question and a story answer the actor was dull [SEP]"),
        (6, "answer the actor was dull [SEP]"),
        (4, "answer the actor was"),
    ],
)
def test_a_conversation_that_is_too_long_loses_its_beginning_and_never_that_of_its_last_answer(
    base: BaseModel, limit: int, kept: str
) -> None:
    (record,) = Chat().prepare(base, [Conversation(turns=TURNS)], limit)
    words = base.processor.convert_ids_to_tokens(record["input_ids"])
    assert " ".join(words).endswith(kept)
    assert len(words) == len(record["labels"]) == len(record["attention_mask"]) <= limit
    assert record["labels"].count(IGNORED) < limit


def test_one_loss_a_record_whoever_else_is_in_the_batch(base: BaseModel) -> None:
    task = Chat()
    few = [Conversation(turns=TURNS), Conversation(turns=TURNS[1:3]), Conversation(turns=TURNS[3:])]
    records = task.prepare(base, few, 40)
    model = task.module(base.module, base, 0, 0.0).eval()

    def losses(batch: Batch) -> torch.Tensor:
        with torch.no_grad():
            return task.sums(model, batch).losses

    alone = torch.cat([losses(task.collate(base, [record])) for record in records])
    assert torch.allclose(alone, losses(task.collate(base, records)), rtol=1e-6, atol=1e-6)
    # The slow way: the mean over the record's own targets, each told from what stands before it.
    for record, loss in zip(records, alone, strict=True):
        logits = base.module(input_ids=torch.tensor([record["input_ids"]])).logits[0].float().log_softmax(-1)
        told = [-logits[i - 1, label] for i, label in enumerate(record["labels"]) if label != IGNORED and i]
        assert torch.allclose(torch.stack(told).mean(), loss, rtol=1e-5)


# --- templates ---


def test_a_base_model_without_a_chat_template_is_refused_in_one_line(model_folder: Callable[[str], str]) -> None:
    base = load_base_model(model_folder("llama"), "chat")
    with pytest.raises(ConfigError, match=r"has no chat template.*take an instruction-tuned base model") as refused:
        Chat().limit(base, 24)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("template", "why"),
    [
        (FORGETFUL, "it writes earlier turns anew when later ones come"),
        ("{{ raise_exception('only the day after tomorrow') }}", "only the day after tomorrow"),
        ("{% for", "cannot be trained on"),
    ],
)
def test_a_template_that_cannot_be_trained_on_is_refused(chatty: WithTemplate, template: str, why: str) -> None:
    base = load_base_model(chatty(template), "chat")
    with pytest.raises(ConfigError, match=why) as refused:
        Chat().prepare(base, [Conversation(turns=TURNS[1:3])], 24)
    assert "\n" not in str(refused.value)


def test_no_template_is_asked_before_the_models_fingerprint_is_known(chatty: WithTemplate) -> None:
    """A site builds the model, and then holds its fingerprint against what its policy allows."""
    settings = {"model.name": chatty("{{ raise_exception('asked') }}"), "model.task": "chat", "head.policy": "frozen"}
    model = configure({**settings, "adapter.targets": "q_proj", "model.max-length": 24, "device": "cpu"}).model(())
    with pytest.raises(ConfigError, match="asked"):
        model.prepare([Conversation(turns=TURNS)])


def test_the_template_is_part_of_the_base_model(chatty: WithTemplate, model_folder: Callable[[str], str]) -> None:
    other = TEMPLATE.replace("question", "one")
    prints = {load_base_model(folder, "chat").fingerprint for folder in (chatty(TEMPLATE), chatty(other))}
    assert len(prints) == 2, "two templates pass for one model"
    plain = {load_base_model(folder, "causal-lm").fingerprint for folder in (chatty(TEMPLATE), model_folder("llama"))}
    assert len(plain) == 1, "a template that is not used counts"


def test_a_conversation_that_the_template_refuses_contributes_zero_and_is_named_in_public_data(
    base: BaseModel, chatty: WithTemplate, tmp_path: Path
) -> None:
    wrong = Conversation(turns=(("user", "the"), ("system", "film"), ("assistant", "is")))
    with pytest.raises(DataError, match="record 2 is none for the base model's chat template: the system speaks first"):
        Chat().prepare(base, [Conversation(turns=TURNS), wrong], 24)
    settings = {"model.name": chatty(TEMPLATE), "model.task": "chat", "head.policy": "frozen", "device": "cpu"}
    model = configure({**settings, "adapter.targets": "q_proj,v_proj", "model.max-length": 24}).model(())
    assert prepared(model, [wrong, Conversation(turns=TURNS)]) == model.prepare([Conversation(turns=TURNS)])


class Panic(BaseException):
    """As what PyO3 makes of a panic in Rust: no ``Exception``."""


@pytest.mark.parametrize(("error", "stops"), [(Panic, False), (KeyboardInterrupt, True), (SystemExit, True)])
def test_a_record_that_lets_a_tokenizer_panic_contributes_zero(
    error: type[BaseException], stops: bool, chatty: WithTemplate, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"model.name": chatty(TEMPLATE), "model.task": "chat", "head.policy": "frozen", "device": "cpu"}
    model = configure({**settings, "adapter.targets": "q_proj,v_proj", "model.max-length": 24}).model(())
    fine, odd = Conversation(turns=TURNS), Conversation(turns=TURNS[:3])
    prepare, expected = type(model).prepare, model.prepare([fine])

    def panics(own: Any, examples: Sequence[Any]) -> Any:
        if odd in examples:
            raise error("in Rust")
        return prepare(own, examples)

    monkeypatch.setattr(type(model), "prepare", panics)
    if stops:
        with pytest.raises(error):
            prepared(model, [odd, fine])
    else:
        assert prepared(model, [odd, fine]) == expected


# --- layouts ---


def test_three_ways_to_write_a_conversation_are_one_record(tmp_path: Path) -> None:
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    shared = [{"from": names[who], "value": text} for who, text in TURNS]
    with_nulls = [{**turn, "tool_calls": None} for turn in SENT] + [{"role": "user", "content": "thanks"}]
    found = [read_turns(cell) for cell in (SENT, shared, json.dumps(SENT), with_nulls)]
    assert found == [TURNS] * 4
    trl = loaded(write(tmp_path / "trl.jsonl", [{"messages": SENT}]), "chat")
    factory = loaded(write(tmp_path / "factory.jsonl", [{"conversations": shared}]), "chat", messages="conversations")
    assert trl[0].canonical(None) == factory[0].canonical(None)
    assert trl[0].texts() == [text for _, text in TURNS]
    assert trl[0].likeness() == "is very warm and a story"


def test_a_prompt_in_turns_is_read_before_and_only_the_completion_is_learnt(base: BaseModel, tmp_path: Path) -> None:
    """TRL's prompt and completion in turns; what the assistant said in the prompt is no target."""
    row = {"prompt": SENT[:4], "completion": SENT[4:]}
    columns = {"context": "prompt", "messages": "completion"}
    (split,) = loaded(write(tmp_path / "split.jsonl", [row]), "chat", **columns)
    (whole,) = loaded(write(tmp_path / "whole.jsonl", [{"messages": SENT}]), "chat")
    assert split.canonical(None) == whole.canonical(None), "a ledger would not know the conversation again"
    assert split.likeness() == whole.likeness()
    (record,), (other,) = (Chat().tokenise(base.processor, [one], 64) for one in (split, whole))
    assert record["input_ids"] == other["input_ids"]
    learnt = [token for token, label in zip(record["input_ids"], record["labels"], strict=True) if label != IGNORED]
    assert base.processor.decode(learnt).split() == ["the", "actor", "was", "dull", "[SEP]"]
    assert len(learnt) < sum(label != IGNORED for label in other["labels"])
    for cell in (None, "the film", [{"role": "tool", "content": "x"}]):
        reading = load_protected(
            DataConfig(
                name=str(write(tmp_path / "bad.jsonl", [{**row, "prompt": cell}, row])), columns=Columns(columns)
            ),
            "chat",
        )
        assert len(reading.dataset.examples) == 1


def test_an_answer_that_nobody_asked_for_is_no_record(tmp_path: Path) -> None:
    """As of TRL's layout in turns whose prompt nobody named; a system's turn asks for nothing."""
    for completion in (SENT[4:], [SENT[0], SENT[4]]):
        path = write(tmp_path / "split.jsonl", [{"prompt": SENT[:4], "completion": completion}])
        with pytest.raises(DataError, match=r"line 1 has no turn of the user: .*name that in data\.context"):
            loaded(path, "chat", messages="completion")
        reading = load_protected(DataConfig(name=str(path), columns=Columns({"messages": "completion"})), "chat")
        assert not reading.dataset.examples
        assert reading.unfit[0].reason == "has no turn of the user"


def test_a_column_of_text_alone_is_learnt_whole_and_divided_by_its_words(base: BaseModel, tmp_path: Path) -> None:
    """TRL's language modelling layout; equal texts stay on one side of the test part's cut."""
    texts = ["the film is warm", "The film  is warm", "a dull story"]
    path = write(tmp_path / "texts.jsonl", [{"text": text} for text in texts])
    examples = loaded(path, "causal-lm", prompt="", completion="text")
    assert [one.texts() for one in examples] == [["", text] for text in texts]
    assert [one.likeness() for one in examples] == ["the film is warm"] * 2 + ["a dull story"]
    records = CausalLM().tokenise(base.processor, examples, 64)
    words = len(base.processor(texts[2], add_special_tokens=False)["input_ids"])
    assert sum(label != IGNORED for label in records[2]["labels"]) >= words


@pytest.mark.parametrize(
    ("cell", "words"),
    [
        (None, "no list of turns"),
        ([], "no list of turns"),
        ("the film", "no list of turns"),
        ([SENT[0], SENT[1]], "no turn of the assistant"),
        ([{"role": "tool", "content": "x"}, SENT[2]], "somebody else than system, user and assistant"),
        ([{"role": "user", "content": ["x"]}, SENT[2]], "no text"),
        ([{"role": "user", "content": "x", "tool_calls": ["y"]}, SENT[2]], "not who speaks and what is said"),
        ([{"role": "user", "content": " "}, SENT[2]], "has no value"),
        ([SENT[1], SENT[2]] * MOST_TURNS, "more than 256 turns"),
        ([SENT[1], {"role": "assistant", "content": "x" * 131_073}], "more than 131072 characters"),
        ("[" * 100_000, "no list of turns"),
    ],
)
def test_a_cell_that_is_no_conversation_is_none(cell: object, words: str, tmp_path: Path) -> None:
    with pytest.raises(Misfit, match=words):
        read_turns(cell)
    path = write(tmp_path / "mixed.jsonl", [{"messages": cell}, {"messages": SENT}])
    reading = load_protected(DataConfig(name=str(path)), "chat")
    assert [example.texts() for example in reading.dataset.examples] == [[text for _, text in TURNS]]
    assert "film" not in reading.unfit[0].reason, "the site's reason quotes a record"


def test_a_systems_turn_without_words_is_none() -> None:
    assert read_turns([{"role": "system", "content": ""}, SENT[1], SENT[2]]) == TURNS[1:3]


def test_alpaca_is_one_exchange_with_instruction_and_input_on_lines_of_their_own(
    base: BaseModel, tmp_path: Path
) -> None:
    rows = [
        {"instruction": "is the film warm", "input": "a story", "output": "very"},
        {"instruction": "and the actor", "input": "", "output": "dull"},
    ]
    found = loaded(write(tmp_path / "alpaca.jsonl", rows), "instruction", **COLUMNS, **{"text-pair": "input"})
    assert [example.spoken[0] for example in found] == [
        ("user", "is the film warm\na story"),
        ("user", "and the actor"),
    ]
    records = Instruction().prepare(base, found, 40)
    assert records == Chat().prepare(base, [Conversation(turns=example.spoken) for example in found], 40)
    bare = [{name: text for name, text in row.items() if name != "input"} for row in rows]
    without = loaded(write(tmp_path / "bare.jsonl", bare), "instruction", **COLUMNS)
    assert without[1] == found[1] == Exchange(instruction="and the actor", output="dull")


def test_a_system_column_is_the_first_turn_unless_a_turn_is_the_systems(base: BaseModel, tmp_path: Path) -> None:
    rows = [
        {"messages": SENT[1:], "system": "the film"},
        {"messages": SENT, "system": "another one"},
        {"messages": SENT[1:], "system": None},
    ]
    found = loaded(write(tmp_path / "talks.jsonl", rows), "chat", system="system")
    assert [example.spoken for example in found] == [TURNS, TURNS, TURNS[1:]]
    assert found[0].canonical(None) == Conversation(turns=TURNS).canonical(None)
    assert "the film" in found[0].texts()
    assert found[0].likeness() == found[2].likeness()
    records = Chat().prepare(base, found, 40)
    assert records[0] == records[1] == Chat().prepare(base, [Conversation(turns=TURNS)], 40)[0]


def test_system_and_history_of_alpaca_are_turns_and_their_answers_are_learnt(base: BaseModel, tmp_path: Path) -> None:
    last = {"instruction": "and a story", "output": "the actor was dull"}
    rows = [
        {**last, "system": "the film", "history": [["is very warm", "quite"]]},
        {**last, "system": "", "history": []},
        {**last, "system": None, "history": '[["is very warm", "quite"]]'},
    ]
    columns = {**COLUMNS, "system": "system", "context": "history"}
    found = loaded(write(tmp_path / "alpaca.jsonl", rows), "instruction", **columns)
    assert [example.spoken for example in found] == [TURNS, TURNS[3:], TURNS[1:]]
    assert found[0].canonical(None) == Conversation(turns=TURNS).canonical(None)
    assert {text for _, text in TURNS} == set(found[0].texts())
    assert Instruction().prepare(base, found[:1], 40) == Chat().prepare(base, [Conversation(turns=TURNS)], 40)


@pytest.mark.parametrize(
    ("cell", "words"),
    [
        ("the film", "no list of exchanges"),
        ([["a", "b", "c"]], "no list of exchanges"),
        ([["a", 1]], "whose words are no text"),
        ([["a", " "]], "has no value"),
        ([["a", "b"]] * MOST_TURNS, "more than 126 exchanges"),
        ("[" * 100_000, "no list of exchanges"),
    ],
)
def test_a_history_that_is_none_makes_no_record(cell: object, words: str) -> None:
    with pytest.raises(Misfit, match=words):
        read_history(cell)


ALPACA = {"instruction": "is the film warm", "output": "very"}
SETTINGS = {"input": "text-pair", "history": "context"}
"""The settings that name columns of other names."""


@pytest.mark.parametrize(
    ("task", "row", "filled", "advice"),
    [
        ("chat", {"messages": SENT}, {"system": "be kind"}, "set data.system to 'system'"),
        ("chat", {"messages": SENT}, {"tools": '[{"name": "look"}]'}, "tools are not read: remove the rows"),
        ("instruction", ALPACA, {"system": "be kind"}, "set data.system to 'system'"),
        ("instruction", ALPACA, {"history": [["a", "b"]]}, "set data.context to 'history'"),
        ("instruction", ALPACA, {"input": "a story"}, "set data.text-pair to 'input'"),
        ("instruction", ALPACA, {"tools": [{"name": "look"}]}, "tools are not read"),
    ],
)
def test_no_record_is_trained_on_as_another_text_than_was_written(
    tmp_path: Path, task: str, row: dict[str, Any], filled: dict[str, Any], advice: str
) -> None:
    """Public data is refused in one line; a site leaves the row out, whatever the others are."""
    (column,) = filled
    blank = [{**row, column: value} for value in (None, "", [] if column == "tools" else " ")]
    path = write(tmp_path / "theirs.jsonl", [*blank, {**row, **filled}])
    own = COLUMNS if task == "instruction" else {}
    with pytest.raises(
        DataError, match=rf"line 4 fills in the column '{column}', which is not read: {advice}"
    ) as caught:
        loaded(path, task, **own)
    assert "\n" not in str(caught.value)
    reading = load_protected(DataConfig(name=str(path), columns=Columns(own)), task)
    assert len(reading.dataset.examples) == 3
    assert [unfit.reason for unfit in reading.unfit] == [f"fills in the column '{column}', which is not read"]
    if column != "tools":
        assert len(loaded(path, task, **own, **{SETTINGS.get(column, column): column})) == 4


@pytest.mark.parametrize(
    ("row", "task", "words"),
    [
        ({"messages": SENT}, "classification", "TRL's conversational layout: set model.task to 'chat'"),
        ({"prompt": "a", "completion": "b"}, "chat", "TRL's prompt and completion: set model.task to 'causal-lm'"),
        (
            {"conversations": SENT},
            "chat",
            "LLaMA-Factory's sharegpt layout: set model.task to 'chat' and data.messages",
        ),
        ({"instruction": "a", "output": "b"}, "causal-lm", "alpaca layout: set model.task to 'instruction', data.p"),
        ({"prompt": SENT, "completion": SENT}, "chat", "to 'chat' with data.context 'prompt' and data.messages"),
        (
            {"text": "a"},
            "causal-lm",
            "TRL's language modelling layout: set model.task to 'causal-lm', data.prompt to ''",
        ),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "causal-lm", "set model.task to 'preference'"),
    ],
)
def test_layouts_of_other_programs_are_named_with_what_to_set(
    row: dict[str, Any], task: str, words: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError) as refused:
        loaded(write(tmp_path / "theirs.jsonl", [row]), task)
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("key", ["packing", "training.packing", "sample_packing", "training.neat-packing"])
def test_packing_is_refused_in_a_sentence_that_says_why(key: str) -> None:
    with pytest.raises(ConfigError, match=r"cannot be set: packing puts several records into one sequence") as refused:
        configure({key: True})
    assert "\n" not in str(refused.value)


# --- a run ---


def test_conversations_are_trained_on_and_the_model_is_asked(
    chatty: WithTemplate, toy_generation: dict[str, Any], tmp_path: Path
) -> None:
    rows = [
        {
            "messages": [
                SENT[1],
                SENT[2],
                {"role": "user", "content": f"{one} {two}"},
                {"role": "assistant", "content": two},
            ]
        }
        for one in FILLER
        for two in FILLER
    ]
    data = write(tmp_path / "talks.jsonl", rows)
    chat = {"model.task": "chat", "model.name": chatty(TEMPLATE), "data.name": str(data), "rounds": 1}
    run = run_in_process({**toy_generation, **chat}, 2)
    (answer,) = ask_run(run, ["the film"])
    assert answer.probability is None
    with pytest.raises(ConfigError, match="asked with messages: give 1, not 2"):
        ask_run(run, ["the", "film"])
    assert TASKS["chat"].roles[0].setting == "messages"
