"""Which cells hold a clip, and what a clip is known by: its samples."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from spoken_world import RATE, tone, wav

from fedveil.common.config.sections import DataConfig
from fedveil.common.data.sources import load_dataset, load_protected
from fedveil.common.tasks.cells import Misfit
from fedveil.contrib.tasks.sound import read_sound, sound_of, waveform
from fedveil.contrib.tasks.voices import made_up_voice
from fedveil.contrib.tasks.words import word_errors, words_in

CLIPS = Path(__file__).parent / "clips"
COARSE = np.round(tone(0, 0) * 100) / 128
"""Samples that eight bits hold."""


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_samples_are_the_same_in_any_number_of_bits(width: int) -> None:
    steps = np.arange(-100, 100) / 128 / (1 - 2**-7)  # each a whole number of the coarsest steps
    one, other = read_sound(wav(steps, width=width)), read_sound(wav(steps, width=4))
    assert one.samples == other.samples
    heard = waveform(one, RATE, 1)
    assert heard.dtype == np.float32
    assert np.allclose(heard, np.arange(-100, 100) / 128, atol=1e-6)


def test_a_clip_is_told_by_samples_rate_and_channels() -> None:
    mono = tone(0, 0)
    clips = [wav(mono), wav(mono, rate=RATE + 1), wav(np.stack([mono, mono], 1)), wav(mono[:-1])]
    assert len({read_sound(clip).samples for clip in clips}) == len(clips)
    assert read_sound(wav(mono)).samples == read_sound(wav(mono) + b"LIST\x04\0\0\0note").samples


def test_channels_are_averaged_and_only_the_window_is_heard() -> None:
    left, right = tone(0, 1, seconds=3), tone(1, 2, seconds=3)
    heard = waveform(read_sound(wav(np.stack([left, right], 1))), RATE, 2)
    assert heard.shape == (2 * RATE,)
    assert np.allclose(heard, (left + right)[: 2 * RATE] / 2, atol=0.01)


def test_a_clip_of_another_rate_is_the_same_sound() -> None:
    time = np.arange(8000) / 8000
    swell = np.sin(np.pi * time) ** 2
    heard = waveform(read_sound(wav(0.5 * swell * np.sin(2 * np.pi * 440 * time), rate=8000)), 16000, 1)
    wanted = np.arange(16000) / 16000
    assert np.allclose(heard, 0.5 * np.sin(np.pi * wanted) ** 2 * np.sin(2 * np.pi * 440 * wanted), atol=5e-3)


GOOD = wav(tone(0, 0))
BAD = {
    "nothing": (b"", "has no value"),
    "a number": (3, "has no bytes and no path"),
    "another file": (b"\x89PNG\r\n", "cannot be decoded"),
    "no PCM": (GOOD[:20] + b"\x55\0" + GOOD[22:], "cannot be decoded"),
    "cut short": (GOOD[:-100], "empty or cut short"),
    "empty": (wav(np.zeros(0)), "empty or cut short"),
    "half a sample": (GOOD[:-1], "cannot be decoded"),
    "slow": (wav(tone(0, 0), rate=900), "fewer than 1000"),
    "outside": ("../clip.wav", "outside the table's own folder"),
}


@pytest.mark.parametrize("what", BAD)
def test_what_is_no_clip_is_a_misfit_that_quotes_nothing(what: str, tmp_path: Path) -> None:
    value, words = BAD[what]
    with pytest.raises(Misfit, match=words):
        read_sound(value, tmp_path)


def test_a_folder_with_a_sub_folder_for_each_label_is_a_data_set(tmp_path: Path) -> None:
    for label in ("low", "high"):
        (tmp_path / label).mkdir()
        (tmp_path / label / "a.wav").write_bytes(wav(tone(label == "high", 3)))
    (tmp_path / "low" / "b.wav").write_bytes(b"RIFF")
    config, task = DataConfig(labels="low,high", test_size=1), "audio-classification"
    reading = load_protected(config, task, str(tmp_path))
    assert [example.label for example in reading.dataset.examples] == [1, 0]
    assert [row.reason for row in reading.unfit] == ["has a clip that cannot be decoded in column 'audio' (data.audio)"]


def test_committed_clips_are_speech_of_espeak_ng() -> None:
    clips = [sound_of(str(path)) for path in sorted(CLIPS.glob("*.wav"))]
    assert len({clip.samples for clip in clips}) == len(clips) == 4
    assert all(0.1 < np.abs(waveform(clip, 16000, 1)).max() < 1 for clip in clips)


def test_fsdd_is_read_from_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "fsdd").mkdir(parents=True)
    for digit in (7, 0):
        (tmp_path / "data" / "fsdd" / f"{digit}_jackson_3.wav").write_bytes(wav(tone(0, digit)))
    found = load_dataset(DataConfig(name="fsdd", partition="natural", key="voice"), "audio-classification")
    assert [(found.label_names[e.label or 0], e.key) for e in found.examples] == [
        ("zero", "jackson"),
        ("seven", "jackson"),
    ]


def test_made_up_voices_are_the_same_every_time_and_unlike_each_other() -> None:
    one, other = made_up_voice(1, 2, RATE), made_up_voice(2, 2, RATE)
    assert one.shape == (2 * RATE,)
    assert np.array_equal(one, made_up_voice(1, 2, RATE))
    assert abs(np.corrcoef(one, other)[0, 1]) < 0.5


@pytest.mark.parametrize(
    ("said", "given", "errors"),
    [("a b c", "a b c", 0), ("a b c", "", 3), ("", "a", 1), ("a b c", "b c d", 2), ("Take two.", "take TWO", 0)],
)
def test_word_errors_are_the_fewest_changes(said: str, given: str, errors: int) -> None:
    assert word_errors(words_in(said), words_in(given)) == errors
