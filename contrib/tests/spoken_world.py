"""A tiny Whisper with a tokenizer of letters, and clips whose label is in their pitch."""

from __future__ import annotations

import csv
import io
import wave
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedveil.common.model.base import BaseModel, load_base_model
from fedveil.common.tasks import TASKS
from fedveil.contrib.tasks.clips import ClipExample
from fedveil.contrib.tasks.sound import read_sound

RATE, BINS, SECONDS = 16000, 8, 2
MARKS = ("<|endoftext|>", "<|startoftranscript|>", "<|notimestamps|>", "<|translate|>", "<|transcribe|>")
WORDS = ("low", "high")
AUDIO, SPEECH = "audio-classification", "speech-to-text"


def save_whisper(folder: Path) -> str:
    """Write a random Whisper of two seconds, the same numbers every time, with its processor; return the folder."""
    from tokenizers import pre_tokenizers
    from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration, WhisperTokenizer

    letters = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = WhisperTokenizer(vocab=letters, merges=[])
    tokenizer.add_special_tokens({"additional_special_tokens": list(MARKS)})
    tokenizer.set_prefix_tokens()
    end, begin = tokenizer.convert_tokens_to_ids(MARKS[0]), tokenizer.convert_tokens_to_ids(MARKS[1])
    config = WhisperConfig(
        vocab_size=len(tokenizer),
        num_mel_bins=BINS,
        d_model=16,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        max_source_positions=50 * SECONDS,
        max_target_positions=40,
        dropout=0.1,
        encoder_layerdrop=0.1,
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
        decoder_start_token_id=begin,
        init_std=0.3,
    )
    with torch.random.fork_rng():
        torch.manual_seed(7)
        WhisperForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=BINS, chunk_length=SECONDS).save_pretrained(folder)
    return str(folder)


def wav(samples: np.ndarray, rate: int = RATE, width: int = 2) -> bytes:
    """Return samples from -1 to 1, shape (samples,) or (samples, channels), as a WAV file."""
    whole = np.round(samples * (2**31 - 2**24)).astype("<i4")
    whole = whole[:, None] if whole.ndim == 1 else whole
    raw = whole.view(np.uint8).reshape(*whole.shape, 4)[..., 4 - width :].copy()
    if width == 1:
        raw ^= 0x80
    target = io.BytesIO()
    with wave.open(target, "wb") as file:
        file.setnchannels(whole.shape[1])
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(raw.tobytes())
    return target.getvalue()


def tone(label: int, number: int, seconds: float = 0.7) -> np.ndarray:
    """Return a low or a high tone with noise of its own."""
    draw = np.random.default_rng(number)
    time = np.arange(round(seconds * RATE)) / RATE
    pitch = (300, 2500)[label] * (1 + 0.1 * draw.uniform())
    return 0.4 * np.sin(2 * np.pi * pitch * time) + 0.05 * draw.uniform(-1, 1, len(time))


def clip(label: int = 0, number: int = 0, **how: Any) -> ClipExample:
    return ClipExample(read_sound(wav(tone(label, number, **how))), text=WORDS[label], label=label)


def write_tones(folder: Path, count: int, first: int = 0) -> Path:
    """Write clips from number ``first`` on, and their table: audio, label, text and author; return the table."""
    (folder / "clips").mkdir(parents=True)
    rows = []
    for number in range(first, first + count):
        label = number % 2
        (folder / "clips" / f"{number}.wav").write_bytes(wav(tone(label, number)))
        rows.append((f"clips/{number}.wav", WORDS[label], f"{WORDS[label]} {number}", f"voice {number % 4}"))
    table = folder / "clips.csv"
    with table.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([("audio", "label", "text", "author"), *rows])
    return table


def world_of(folder: Path, task: str, count: int) -> dict[str, Any]:
    """Return the settings that are the task's, as ``contracts.World`` has them."""
    own = {"data.labels": ",".join(WORDS), "head.start": "random"} if task == AUDIO else {"head.policy": "frozen"}
    return {
        "model.name": save_whisper(folder / "model"),
        "model.max-length": 50,
        "data.name": str(write_tones(folder / "tones", count)),
        "adapter.targets": "q_proj,fc1",
        **own,
        "public": str(write_tones(folder / "public", count, first=count)),
    }


def loaded(folder: str, task: str, max_length: int = 50) -> tuple[BaseModel, int]:
    base = load_base_model(folder, task)
    return base, TASKS[task].limit(base, max_length)


def toy_tones(folder: Path, task: str) -> dict[str, Any]:
    """Return settings of a private run of two sites on 60 tones."""
    own = {"data.labels": ",".join(WORDS), "head.start": "zeros"} if task == AUDIO else {"head.policy": "frozen"}
    return {
        "strategy": "ffa-lora",
        "model.name": save_whisper(folder / "whisper"),
        "model.task": task,
        "model.max-length": 50,
        "model.feature-scale": 8.0,
        "data.name": str(write_tones(folder / "tones", 60)),
        "data.test-size": 12,
        "data.partition": "natural",
        "data.key": "author",
        **own,
        "adapter.rank": 3,
        "adapter.targets": "auto",
        "rounds": 2,
        "server.optimizer": "none",
        "training.optimizer": "adam",
        "training.learning-rate": 0.03,
        "training.local-steps": 4,
        "training.sample-rate": 0.5,
        "privacy.delta": 1e-3,
        "privacy.noise-multiplier": 0.2,
        "privacy.epsilon": 1000.0,
        "precision": "float32",
        "device": "cpu",
        "output": str(folder / "runs"),
    }
