"""Whisper's plain copy is strictly of its file's weights; without the voices' program no clip is made."""

from __future__ import annotations

import struct
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from fedveil.common.errors import DataError
from fedveil.demo import voices
from fedveil.demo.packaged import packaged_folder
from fedveil.demo.whisper import KINDS, PLAIN_WHISPER_TINY_EN, WHISPER_TINY_EN, arrays_of, weights_of, write

BIAS = "encoder/layer_0/self_attention/linear_0/bias"
VALUES = {
    "encoder/num_heads": torch.tensor(1, dtype=torch.int8),
    "encoder/conv1/weight": torch.randn(4, 3, 3).half(),
    "encoder/layer_0/self_attention/linear_0/weight": torch.arange(48.0).reshape(12, 4).half(),
    BIAS: torch.tensor([1.0] * 4 + [0.0] * 4 + [2.0] * 4).half(),
    "decoder/layer_1/attention/linear_1/weight": torch.arange(32.0).reshape(8, 4).half(),
    "decoder/layer_1/ffn/layer_norm/gamma": torch.ones(4).half(),
    "decoder/embeddings/weight": torch.randn(5, 4).half(),
}


def written(values: Mapping[str, torch.Tensor], aliases: Mapping[str, str], version: int = 6) -> bytes:
    """Return arrays as CTranslate2's converter writes them."""

    def text(words: str) -> bytes:
        return struct.pack("<H", len(words) + 1) + words.encode() + b"\0"

    made = struct.pack("<I", version) + text("WhisperSpec") + struct.pack("<II", 3, len(values))
    for name, value in values.items():
        kind = KINDS.index(str(value.dtype).removeprefix("torch."))
        made += text(name) + struct.pack(f"<B{value.ndim}I", value.ndim, *value.shape)
        raw = value.numpy().tobytes()
        made += struct.pack("<BI", kind, len(raw)) + raw
    return made + struct.pack("<I", len(aliases)) + b"".join(text(a) + text(b) for a, b in aliases.items())


ALIASES = {"decoder/projection/weight": "decoder/embeddings/weight"}
WHOLE = written(VALUES, ALIASES)


def test_arrays_are_read_by_all_of_their_names() -> None:
    found = arrays_of(WHOLE)
    assert found.keys() == {*VALUES, *ALIASES}
    assert all(torch.equal(found[name], value) for name, value in VALUES.items())
    assert torch.equal(found["decoder/projection/weight"], VALUES["decoder/embeddings/weight"])


def test_weights_have_transformers_names_and_what_is_one_matrix_is_cut() -> None:
    found = weights_of(WHOLE)
    layer = "model.encoder.layers.0.self_attn"
    q, k, v = VALUES["encoder/layer_0/self_attention/linear_0/weight"].float().chunk(3)
    assert torch.equal(found[f"{layer}.q_proj.weight"], q)
    assert torch.equal(found[f"{layer}.k_proj.weight"], k)
    assert torch.equal(found[f"{layer}.v_proj.weight"], v)
    assert f"{layer}.k_proj.bias" not in found
    assert found[f"{layer}.v_proj.bias"].tolist() == [2.0] * 4
    assert torch.equal(found["proj_out.weight"], found["model.decoder.embed_tokens.weight"])
    assert {"model.decoder.layers.1.final_layer_norm.weight", "model.encoder.conv1.weight"} <= found.keys()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (WHOLE[:-3], "cut short"),
        (written(VALUES, ALIASES, version=5), "not of version 6"),
        (written({**VALUES, BIAS: torch.ones(12).half()}, {}), "bias of keys"),
    ],
)
def test_another_file_is_refused(content: bytes, words: str) -> None:
    with pytest.raises(DataError, match=words):
        weights_of(content)


@pytest.mark.speech
def test_the_copy_that_is_made_is_the_known_one(tmp_path: Path) -> None:
    from transformers import WhisperForConditionalGeneration

    with packaged_folder(WHISPER_TINY_EN) as source:
        weights = weights_of((source / "model.bin").read_bytes())
        write(source, tmp_path / "model")
    with PLAIN_WHISPER_TINY_EN.folder() as folder:
        assert PLAIN_WHISPER_TINY_EN.is_known(folder), "the libraries write the plain copy differently: hash it anew"
        loaded = WhisperForConditionalGeneration.from_pretrained(folder).state_dict()
    assert loaded.keys() == weights.keys()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in loaded.items())


@pytest.mark.speech
def test_a_made_clip_is_read(tmp_path: Path) -> None:
    """The whole way: a voice speaks, the window is cut, and the model writes the words down."""
    from typing import Any, cast

    from fedveil.common.model.base import load_base_model
    from fedveil.common.tasks import TASKS
    from fedveil.contrib.tasks.clips import ClipExample
    from fedveil.contrib.tasks.sound import sound_of

    voices.make([voices.Clip("en-us", "The patient slept well last night.", "")], tmp_path, "one", "text")
    task, base = TASKS["speech-to-text"], load_base_model("whisper-tiny.en", "speech-to-text")
    limit = task.limit(base, 200)
    example = ClipExample(sound_of(str(tmp_path / "one" / "0000.wav")), text="words")
    batch = task.collate(base, task.prepare(base, [example], limit))
    assert "The patient slept well last night." in cast(Any, task.module(base.module, base, 0, 0.0)).written(batch)[0]


def test_no_voice_and_no_sentence_of_the_test_is_in_training() -> None:
    train = list(voices.sentences(voices.VOICES, voices.PREDICATES))
    test = list(voices.sentences(voices.HELD_OUT, voices.TEST_PREDICATES))
    assert (len(train), len(test)) == (14 * 160, 2 * 40)
    assert not {clip.voice for clip in train} & {clip.voice for clip in test}
    assert not {clip.answer for clip in train} & {clip.answer for clip in test}
    assert len({*voices.digits(voices.VOICES)}) == 14 * 200


def test_a_machine_without_voices_is_said_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("shutil.which", lambda _: None)
    monkeypatch.setattr(sys, "argv", ["voices", "--folder", str(tmp_path)])
    assert voices.main() == 1
    said = capsys.readouterr().err
    assert said == "espeak-ng is not installed, which speaks the clips: apt-get install espeak-ng\n"
