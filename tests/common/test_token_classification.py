"""Names in texts: files, words and tokens, losses of records, scores of names, and the stock class."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from audits.tiny_models import FILLER
from fedveil.client.rehearsal import rehearse, rehearse_features
from fedveil.common.adapters import ADAPTERS
from fedveil.common.config.sections import DataConfig, HeadConfig
from fedveil.common.data.sources import load_dataset, load_protected
from fedveil.common.errors import ConfigError, DataError
from fedveil.common.model.base import load_base_model
from fedveil.common.model.federated import FederatedModel
from fedveil.common.model.public_features import with_features
from fedveil.common.starts import STARTS
from fedveil.common.tasks import Finished, Record, TokenClassification
from fedveil.common.tasks.base import IGNORED
from fedveil.common.tasks.entities import counts_of, names_in, words_of
from fedveil.common.tasks.token_classification import WordsExample
from fedveil.privacy.dpsgd import PrivateSteps
from fedveil.privacy.plan import gaussian_plan

TASK = TokenClassification()
LABELS = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")
DATA = DataConfig(labels=",".join(LABELS))
WORDS = random.Random(4)
EXAMPLES = [
    WordsExample(text=tuple(WORDS.choices(FILLER, k=length)), marks=tuple(WORDS.choices(range(len(LABELS)), k=length)))
    for length in (1, 14, 3, 9, 5)
]
STEP = gaussian_plan(1.0, 1.0, 1.0, 1.0, 1e-5, 1.0)


def federated(folder: str, adapter: str = "lora") -> FederatedModel:
    model = FederatedModel(
        load_base_model(folder, TASK.name),
        ADAPTERS[adapter](2, 2.0, ("query",), STARTS["orthonormal"]()),
        TASK,
        HeadConfig("trained", "random"),
        seed=1,
        label_names=LABELS,
        max_length=24,
        device="cpu",
        precision="float32",
    )
    with torch.no_grad():
        for p in (p for p in model.module.parameters() if p.requires_grad):
            p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(3)))
    return model


@pytest.fixture(scope="module")
def tiny(model_folder: Callable[[str], str]) -> FederatedModel:
    return federated(model_folder("bert"))


# --- files ------------------------------------------------------------------------------------------------------------


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def read(source: str, **options: Any) -> list[tuple[list[str], list[str]]]:
    data = load_dataset(DataConfig(**{"labels": ",".join(LABELS), **options}), TASK.name, source)
    examples = cast(Sequence[WordsExample], data.examples)
    return [(words_of(e.text), json.loads(e.answer(data.label_names) or "")) for e in examples]


def test_a_conll_file_has_a_word_and_its_label_a_line(tmp_path: Path) -> None:
    lines = "-DOCSTART- -X- O\n\nAda NNP B-PER\nLovelace NNP I-PER\n\n\nthe\tO\r\nend\tO"
    assert read(write(tmp_path / "a.conll", lines)) == [
        (["Ada", "Lovelace"], ["B-PER", "I-PER"]),
        (["the", "end"], ["O", "O"]),
    ]


def test_spans_of_characters_are_labels_of_words_and_the_ledger_knows_them_again(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"text": "Dr. Ada Lovelace of Bath.", "spans": [{"start": 4, "end": 16, "label": "PER"}]},
        {"text": "no name", "spans": []},
    ]
    rows[0]["spans"].insert(0, {"start": 20, "end": 24, "label": "LOC"})
    source = write(tmp_path / "a.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    spans = {"columns": {"label": "spans"}}
    (words, labels), nothing = read(source, **spans)
    assert words == ["Dr", ".", "Ada", "Lovelace", "of", "Bath", "."]
    assert labels == ["O", "O", "B-PER", "I-PER", "O", "B-LOC", "O"]
    assert nothing == (["no", "name"], ["O", "O"])
    lines = "\n\n".join("\n".join(map("\t".join, zip(*record, strict=True))) for record in read(source, **spans))
    other = DataConfig(labels="O,B-LOC,I-LOC,B-PER,I-PER")
    conll = load_dataset(other, TASK.name, write(tmp_path / "a.conll", lines))
    ours = load_dataset(DataConfig(labels=",".join(LABELS), **cast(Any, spans)), TASK.name, source)
    assert conll.fingerprint() == ours.fingerprint()


def test_labels_that_nobody_names_are_read_off_public_records_alone(tmp_path: Path) -> None:
    source = write(tmp_path / "a.conll", "Ada I-PER\n\nBath B-LOC\n")
    assert load_dataset(DataConfig(), TASK.name, source).label_names == ("O", "B-LOC", "I-LOC", "B-PER", "I-PER")
    with pytest.raises(ConfigError, match=r"name all in data\.labels"):
        load_protected(DataConfig(), TASK.name, source)


def test_a_row_that_is_no_record_is_left_out_at_a_site_and_an_error_in_public(tmp_path: Path) -> None:
    rows = [
        {"text": ["Ada"], "label": ["B-ORG"]},
        {"text": ["Ada", "went"], "label": ["B-PER"]},
        {"text": "Ada", "label": [{"start": 0, "end": 9, "label": "PER"}]},
        {"text": "Ada", "label": [{"start": 0, "end": 3, "label": "PER"}, {"start": 1, "end": 2, "label": "LOC"}]},
        {"text": "Ada", "label": [{"start": 0, "end": 3}]},
        {"text": "Ada", "label": "B-PER"},
        {"text": ["the", "end"], "label": ["O", "O"]},
    ]
    source = write(tmp_path / "a.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    reading = load_protected(DATA, TASK.name, source)
    assert [row.row for row in reading.unfit] == [1, 2, 3, 4, 5, 6]
    assert reading.unfit[0].reason == "has a label that is not among data.labels"
    assert not any("Ada" in row.reason for row in reading.unfit)
    assert [example.label for example in reading.dataset.examples] == [0]
    with pytest.raises(DataError, match=r"line 1 has the label 'B-ORG', which is not among data\.labels"):
        load_dataset(DATA, TASK.name, source)
    broken = write(tmp_path / "b.conll", "Ada B-PER\nwent\n\nthe O\n")
    assert [row.row for row in load_protected(DATA, TASK.name, broken).unfit] == [2]


BAD_LINES = {
    "\tO": "line 3 has no word before its label",
    " \tNN\tO": "line 3 has no word before its label",
    " O": "line 3 has no word before its label",
    "\u00a0\tO": "line 3 has no word before its label",
    "went": "line 3 has no label behind its word",
}


@pytest.mark.parametrize(("line", "said"), BAD_LINES.items())
def test_a_sentence_with_a_word_that_is_none_is_one_invalid_row(line: str, said: str, tmp_path: Path) -> None:
    source = write(tmp_path / "a.conll", f"the O\n\n{line}\nAda B-PER\n\nthe\tO\n\ufe0f\tO\n\n{line}\n\n  the O\n")
    with pytest.raises(DataError, match=rf"{said}.* \(2 rows in all cannot be used: .*data\.invalid-rows = 'skip'"):
        read(source)
    others = [(["the"], ["O"]), (["the", "\ufe0f"], ["O", "O"]), (["the"], ["O"])]
    assert read(source, invalid_rows="skip") == others
    with pytest.raises(DataError, match=said) as nothing_left:
        read(write(tmp_path / "b.conll", f"\n\n{line}\n"))
    assert "skip" not in str(nothing_left.value)


def test_labels_of_another_form_are_refused_with_the_right_ones() -> None:
    from fedveil.strategies.job import configure

    for labels in ("PER,LOC", "B-PER,I-PER,O", "O,B-PER,I-PER,B-LOC"):
        with pytest.raises(ConfigError, match=r"data\.labels is .* write 'O,B-PER,I-PER"):
            configure({"model.task": TASK.name, "data.labels": labels, "data.name": "a.conll"})


# --- words and tokens -------------------------------------------------------------------------------------------------


def test_the_first_token_of_each_word_has_its_label(tiny: FederatedModel) -> None:
    examples = [WordsExample(text=("film", "filmzz", "was"), marks=(1, 2, 3)), WordsExample(text="the film", label=4)]
    one, other = TASK.prepare(tiny.base, examples, 24)
    tokens = tiny.base.processor.convert_ids_to_tokens(one["input_ids"])
    assert [label for label in one["labels"] if label != IGNORED] == [1, 2, 3]
    assert one["labels"][0] == one["labels"][-1] == IGNORED
    assert tokens[0] == "[CLS]"
    assert len(one["labels"]) == len(tokens)
    assert other["labels"] == [IGNORED, 4, 4, IGNORED]
    (cut,) = TASK.prepare(tiny.base, [EXAMPLES[1]], 6)
    assert len(cut["labels"]) == 6


def test_a_records_loss_is_the_mean_over_its_words(tiny: FederatedModel) -> None:
    (record,) = TASK.prepare(tiny.base, [EXAMPLES[2]], 24)
    batch = tiny.batch([record])
    with torch.no_grad():
        logits = tiny.module(batch)[0].double()
    own = [(i, label) for i, label in enumerate(record["labels"]) if label != IGNORED]
    wanted = sum(float(logits[i].logsumexp(0) - logits[i][label]) for i, label in own) / len(own)
    assert float(TASK.sums(tiny.module, batch).losses.detach()) == pytest.approx(wanted, rel=1e-5)


def without_labels(record: Record) -> Record:
    return {**record, "labels": [IGNORED] * len(record["labels"])}


def test_a_record_without_a_labelled_token_has_no_loss_and_no_gradient(tiny: FederatedModel) -> None:
    records = TASK.prepare(tiny.base, EXAMPLES, 24)
    trained = [p for p in tiny.module.parameters() if p.requires_grad]
    with PrivateSteps(tiny.module, torch.optim.SGD(trained, lr=0.0), STEP) as steps:
        batch = tiny.fixed_batch([records[2], without_labels(records[4])], 16, 4)
        assert tiny.losses(batch).detach()[1] == 0.0
        for sample in steps.samples(batch, tiny.losses):
            assert bool((sample[1:] == 0).all())
            assert bool(sample[0].isfinite().all())


@pytest.mark.parametrize("adapter", ["lora", "none"])
def test_private_gradients_are_autograds_whoever_is_beside(
    adapter: str, model_folder: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = federated(model_folder("bert"), adapter)
    records = model.featurise(TASK.prepare(model.base, EXAMPLES, 24))
    trained = [p for p in model.module.parameters() if p.requires_grad]
    exact = copy.deepcopy(model.module).double()
    doubled = [p for p in exact.parameters() if p.requires_grad]
    with PrivateSteps(model.module, torch.optim.SGD(trained, lr=0.0), STEP) as steps:
        for i, record in enumerate(records):
            others = [other for k, other in enumerate(records) if k != i][:2]
            first = [s[0].clone() for s in steps.samples(model.fixed_batch([record, *others], 24, 4), model.losses)]
            last = [s[2] for s in steps.samples(model.fixed_batch([*others, record], 24, 4), model.losses)]
            assert all(map(torch.equal, first, last))
            batch = {k: v.double() if v.is_floating_point() else v for k, v in model.batch([record]).items()}
            with monkeypatch.context() as patch:
                patch.setattr(torch.Tensor, "float", torch.Tensor.double)
                logits = exact(batch)[0]
            loss = torch.nn.functional.cross_entropy(logits, batch["labels"][0], ignore_index=IGNORED)
            for sample, wanted in zip(first, torch.autograd.grad(loss, doubled), strict=True):
                assert float((sample.double() - wanted).norm()) <= 1e-5 * float(wanted.norm())


def test_a_loss_over_the_batchs_words_is_refused(
    model_folder: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rehearse(federated(model_folder("bert")))
    alone = federated(model_folder("bert"), "none")
    rehearse_features(alone)
    rehearse(alone)
    own = TokenClassification.sums

    def shared(self: TokenClassification, module: Any, batch: Any) -> Any:
        sums = own(self, module, batch)
        return type(sums)(sums.loss, sums.correct, sums.weight.sum().expand(len(sums.weight)))

    monkeypatch.setattr(TokenClassification, "sums", shared)
    for adapter in ("lora", "none"):
        with pytest.raises(Exception, match="cannot be trained privately"):
            rehearse(federated(model_folder("bert"), adapter))


def test_public_records_are_scored_as_features_to_the_same_bits(tiny: FederatedModel) -> None:
    records = TASK.prepare(tiny.base, EXAMPLES, 24)
    assert tiny.score(records) == tiny.score(records, vectors=with_features(tiny, records))


# --- scores -----------------------------------------------------------------------------------------------------------


def conlleval(labels: Sequence[str]) -> set[tuple[str, int, int]]:
    """Return the names by conlleval.pl's own functions startOfChunk and endOfChunk, as seqeval has them."""
    names, begin, before, kind_before = set(), 0, "O", ""
    for i, label in enumerate([*labels, "O"]):
        sign, kind = label[0], label[2:]
        ends = (
            (before == "B" and sign in "BO")
            or (before == "I" and sign in "BO")
            or (before not in "O." and kind_before != kind)
        )
        starts = sign == "B" or (before == "O" and sign == "I") or (sign not in "O." and kind_before != kind)
        if ends:
            names.add((kind_before, begin, i - 1))
        if starts:
            begin = i
        before, kind_before = sign, kind
    return names


def test_names_are_those_of_conlleval() -> None:
    draw = random.Random(7)
    for length in (0, 1, 2, 3, 9) * 200:
        there, given = ([draw.randrange(len(LABELS)) for _ in range(length)] for _ in range(2))
        slow = [conlleval([LABELS[i] for i in labels]) for labels in (there, given)]
        found = {(LABELS[2 * kind + 1][2:], start, end - 1) for start, end, kind in names_in(there)}
        assert found == slow[0]
        wanted = [[sum(n[0] == kind for n in group) for kind in ("PER", "LOC")] for group in (slow[0] & slow[1], *slow)]
        assert counts_of(there, given, 2) == wanted


# --- the finished model -----------------------------------------------------------------------------------------------


def test_the_stock_class_gives_the_same_logits(tiny: FederatedModel, tmp_path: Path) -> None:
    from transformers import AutoModelForTokenClassification

    model = copy.deepcopy(tiny)
    encoder: Any = model.module.encoder
    model.module.encoder = encoder.merge_and_unload()
    finished = Finished(TASK, model.module.eval(), model.base, LABELS, 24, "", ("text",))
    TASK.export.write(finished, tmp_path)
    stock: Any = AutoModelForTokenClassification.from_pretrained(tmp_path)
    assert stock.config.id2label == dict(enumerate(LABELS))
    batch = model.batch(TASK.prepare(model.base, EXAMPLES, 24))
    with torch.no_grad():
        ours = model.module(batch)
        theirs = stock(**{key: value for key, value in batch.items() if key != "labels"}).logits
    mask = batch["attention_mask"].bool()
    torch.testing.assert_close(theirs[mask], ours[mask], rtol=1e-5, atol=1e-5)
    (answers,) = finished.answers([[" ".join(EXAMPLES[1].text)]])
    given = theirs[1].argmax(-1)[batch["labels"][1] != IGNORED].tolist()
    named = [f"{LABELS[2 * kind + 1][2:]}: {' '.join(EXAMPLES[1].text[a:b])}" for a, b, kind in names_in(given)]
    assert named
    assert [answer.text for answer in answers] == named
