"""Tasks on clips: one shape, no mask, nothing of a neighbour; a private run, its score, its exports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from spoken_world import AUDIO, BINS, RATE, SPEECH, WORDS, clip, loaded, save_whisper, tone, toy_tones, wav

from fedveil.client.rehearsal import rehearse
from fedveil.common.adapters import ADAPTERS
from fedveil.common.config.sections import HeadConfig
from fedveil.common.errors import ConfigError, ModelNotLoaded
from fedveil.common.model.base import load_base_model
from fedveil.common.model.federated import FederatedModel
from fedveil.common.run_lines import RoundLine, read_lines
from fedveil.common.starts import STARTS
from fedveil.common.tasks import TASKS
from fedveil.common.tasks.base import IGNORED
from fedveil.contrib.tasks.clips import MEL, READ, encoder_in
from fedveil.contrib.tasks.speech_to_text import RIGHT, room
from fedveil.experiments.evaluate import evaluate_run
from fedveil.experiments.in_process import run_in_process
from fedveil.experiments.serving.ask import ask_run
from fedveil.experiments.serving.merge import merge_run

BOTH = (AUDIO, SPEECH)


@pytest.fixture(scope="module")
def whisper(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_whisper(tmp_path_factory.mktemp("tiny-whisper"))


def model_of(folder: str, task: str) -> FederatedModel:
    labelled = task == AUDIO
    return FederatedModel(
        load_base_model(folder, task),
        ADAPTERS["lora"](3, 6.0, ("auto",), STARTS["orthonormal"]()),
        TASKS[task],
        HeadConfig(policy="trained" if labelled else "frozen", start="random"),
        seed=1,
        label_names=WORDS if labelled else (),
        max_length=50,
        device="cpu",
        precision="float32",
    )


@pytest.mark.parametrize("task", BOTH)
def test_all_clips_have_one_shape_that_follows_from_the_run_alone(whisper: str, task: str) -> None:
    base, limit = loaded(whisper, task, max_length=99)
    assert limit == 50
    records = TASKS[task].prepare(base, [clip(seconds=0.2), clip(seconds=1.9)], limit)
    assert {tuple(record[MEL].shape) for record in records} == {(BINS, 100)}
    assert {TASKS[task].size(record) for record in records} == {50}
    assert all(TASKS[task].fits(base, record, limit) for record in records)
    with pytest.raises(ConfigError, match=r"model\.max-length is 49: set it to 50 or more, a second of sound"):
        TASKS[task].limit(base, 49)


@pytest.mark.parametrize("task", BOTH)
def test_what_follows_a_window_moves_no_bit_and_silence_is_as_if_it_were_said(whisper: str, task: str) -> None:
    base, limit = loaded(whisper, task)
    short = tone(0, 5)[: RATE // 2]
    made = [
        TASKS[task].prepare(base, [clip_of(samples)], limit)[0]
        for samples in (
            short,
            np.concatenate([short, np.zeros(RATE // 2)]),
            np.concatenate([short, np.zeros(RATE // 2), short]),
        )
    ]
    assert all(torch.equal(made[0][MEL], other[MEL]) for other in made[1:])


def clip_of(samples: np.ndarray) -> Any:
    from fedveil.contrib.tasks.clips import ClipExample
    from fedveil.contrib.tasks.sound import read_sound

    return ClipExample(read_sound(wav(samples)), text="low", label=0)


@pytest.mark.parametrize("task", BOTH)
def test_the_cut_window_computes_what_a_stock_model_of_that_window_does(whisper: str, task: str) -> None:
    """Equal to a stock encoder whose configuration and table have that length from the start."""
    from transformers import WhisperConfig, WhisperModel

    base, limit = loaded(whisper, task)
    config = WhisperConfig.from_pretrained(whisper, max_source_positions=limit, dropout=0.0)
    stock = WhisperModel(config).eval()
    whole = WhisperModel.from_pretrained(whisper).state_dict()
    table = "encoder.embed_positions.weight"
    stock.load_state_dict({**whole, table: whole[table][:limit]})
    (record,) = TASKS[task].prepare(base, [clip()], limit)
    with torch.no_grad():
        ours = encoder_in(base.module)(record[MEL][None]).last_hidden_state
        assert torch.equal(ours, stock.encoder(record[MEL][None]).last_hidden_state)


@pytest.mark.parametrize("task", BOTH)
def test_a_record_alone_and_among_others_has_the_same_gradient_to_the_bit(whisper: str, task: str) -> None:
    model = model_of(whisper, task)
    records = model.prepare([clip(i % 2, i) for i in range(5)])
    rows = model.shapes.rows_of(model.max_length)

    def gradients(chosen: list[int]) -> list[torch.Tensor]:
        (batch,) = model.fixed_batches([records[i] for i in chosen])
        assert batch.rows == rows
        loss = model.losses(batch)[chosen.index(0)]
        return list(torch.autograd.grad(loss, [p for p in model.module.parameters() if p.requires_grad]))

    alone = gradients([0])
    assert any(gradient.abs().max() > 0 for gradient in alone)
    assert all(torch.equal(a, b) for a, b in zip(alone, gradients([0, 1, 2, 3, 4]), strict=True))


@pytest.mark.parametrize("task", BOTH)
def test_a_rehearsal_passes_and_no_layer_that_nothing_is_read_from_has_an_adapter(whisper: str, task: str) -> None:
    model = model_of(whisper, task)
    rehearse(model)
    layers = [layer for layer in model.read() if layer != "head"]
    assert layers
    if task == AUDIO:
        assert all(layer.startswith("encoder.layers.") for layer in layers)
    loss = model.losses(model.batch(model.prepare([clip()]))).sum()
    loss.backward()
    for layer, factors in model.trained().items():
        assert all(p.grad is not None for p in factors.values()), f"{layer} gets no gradient"


def test_tokens_of_words_are_the_models_own_and_the_rest_is_not_learnt(whisper: str) -> None:
    base, limit = loaded(whisper, SPEECH)
    (record,) = TASKS[SPEECH].prepare(base, [clip()], limit)
    tokenizer = base.processor.tokenizer
    whole = [
        *tokenizer.prefix_tokens,
        *tokenizer(" low", add_special_tokens=False)["input_ids"],
        tokenizer.eos_token_id,
    ]
    assert record[READ][: len(whole) - 1] == whole[:-1]
    marks = len(tokenizer.prefix_tokens)
    assert record["labels"][: marks - 1] == [IGNORED] * (marks - 1)
    assert record["labels"][marks - 1 :] == [*whole[marks:], *[IGNORED] * (room(limit) - len(whole) + 1)]
    assert len(record["labels"]) == len(record[READ]) == room(limit)
    long = clip_of(tone(0, 0))
    (cut,) = TASKS[SPEECH].prepare(base, [type(long)(long.audio, text="low " * 99, label=0)], limit)
    assert len(cut["labels"]) == room(limit)
    assert cut["labels"][-1] == tokenizer.eos_token_id


def test_tokens_that_fill_a_record_up_change_no_bit_of_its_loss(whisper: str) -> None:
    model = model_of(whisper, SPEECH)
    (record,) = model.prepare([clip()])
    last = max(place for place, token in enumerate(record["labels"]) if token != IGNORED)
    other = {**record, READ: [*record[READ][: last + 1], *[5] * (len(record[READ]) - last - 1)]}
    one, two = (model.losses(next(iter(model.fixed_batches([which])))) for which in (record, other))
    assert torch.equal(one, two)


def test_greedy_words_are_those_of_the_likeliest_tokens_computed_without_a_cache(whisper: str) -> None:
    model = model_of(whisper, SPEECH)
    batch = model.batch(model.prepare([clip(), clip(1, 1)]))
    tokenizer = model.base.processor.tokenizer
    tokens = batch[READ][:, : len(tokenizer.prefix_tokens)]
    with torch.no_grad():
        while tokens.shape[1] < batch[READ].shape[1]:
            logits = model.module.encoder(input_features=batch[MEL], decoder_input_ids=tokens).logits
            tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], 1)
    end = tokenizer.eos_token_id
    rows = [row[: row.index(end)] if end in row else row for row in tokens.tolist()]
    assert model.module.written(batch) == [tokenizer.decode(row, skip_special_tokens=True).strip() for row in rows]


def test_only_whisper_is_taken(model_folder: Any) -> None:
    with pytest.raises(ModelNotLoaded, match="of the kind 'bert', and only Whisper's windows can be cut"):
        load_base_model(model_folder("bert"), AUDIO)


@pytest.fixture(scope="module", params=BOTH)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp("tones")
    return request.param, run_in_process(toy_tones(folder, request.param), 2)


def test_a_private_run_scores_as_it_says_and_merges_into_what_stock_libraries_load(
    run: tuple[str, Path], tmp_path: Path
) -> None:
    task, folder = run
    lines = read_lines(RoundLine, folder)
    assert not any(line.refusals or line.failures for line in lines)
    scored = evaluate_run(folder)
    assert (scored.accuracy, scored.loss) == (lines[-1].accuracy, lines[-1].loss)
    assert scored.name == ("accuracy" if task == AUDIO else RIGHT)
    code = merge_run(folder, tmp_path / "merged")
    (tmp_path / "clip.wav").write_bytes(wav(tone(1, 77)))
    answers = ask_run(folder, [str(tmp_path / "clip.wav")])
    assert str(tmp_path / "merged") in code
    assert answers


def test_an_adapter_loads_in_stock_peft_onto_the_stock_class_with_equal_outputs(run: tuple[str, Path]) -> None:
    import transformers

    task, folder = run
    base, limit = loaded(str(folder.parents[1] / "whisper"), task)
    stock = getattr(transformers, TASKS[task].export.loader).from_pretrained(folder.parents[1] / "whisper").eval()
    from fedveil.contrib.tasks.clips import cut_window

    cut_window(stock, limit)
    stock = PeftModel.from_pretrained(stock, folder / "adapter").eval()
    names = [name for name, _ in stock.named_modules() if name.endswith("lora_A")]
    assert names
    if task == AUDIO:
        assert all("encoder.layers." in name and "decoder" not in name for name in names)
    from fedveil.experiments.evaluate import load_result

    result = load_result(folder / "adapter")
    ours, limit = result.module, TASKS[task].limit(result.base, 50)
    records = TASKS[task].prepare(base, [clip(), clip(1, 1)], limit)
    batch = TASKS[task].collate(base, records)
    with torch.no_grad():
        assert torch.equal(
            encoder_in(ours)(batch[MEL]).last_hidden_state, encoder_in(stock)(batch[MEL]).last_hidden_state
        )
