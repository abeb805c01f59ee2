"""Tiny worlds: random models of three families, text whose label is in its words, and settings of a short run."""

from __future__ import annotations

import csv
import random
from pathlib import Path
from typing import Any

import torch

GOOD = ("bright", "warm", "lovely", "joyful")
BAD = ("dull", "cold", "awful", "tired")
FILLER = ("the", "film", "story", "actor", "scene", "is", "was", "very", "quite", "and", "a", "with")
VOCABULARY = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", *FILLER, *GOOD, *BAD, "question", "answer", "one", "two")


def tiny_tokenizer() -> Any:
    """Return a tokenizer of ``VOCABULARY``."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        eos_token="[SEP]",
    )


def tiny_deberta(shared: bool = True) -> Any:
    """Return a tiny DeBERTa-v2; with shared projections they also take the relative positions, a batch of 1."""
    from transformers import DebertaV2Config, DebertaV2Model

    with torch.random.fork_rng():
        torch.manual_seed(7)
        # The config takes them by name only at run time.
        attention: dict[str, Any] = {
            "relative_attention": True,
            "pos_att_type": ["p2c", "c2p"],
            "share_att_key": shared,
            "position_buckets": 16,
            "norm_rel_ebd": "layer_norm",
            # Attention that is far from even, so that relative positions weigh.
            "initializer_range": 0.5,
        }
        return DebertaV2Model(
            DebertaV2Config(
                vocab_size=len(VOCABULARY),
                hidden_size=16,
                num_hidden_layers=2,
                num_attention_heads=2,
                intermediate_size=24,
                max_position_embeddings=40,
                **attention,
            )
        )


def tiny_model(family: str, hidden: int = 16) -> Any:
    """Return a random model of a family: bert (as wide as ``hidden``), gpt2 or llama."""
    from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    size = len(VOCABULARY)
    if family == "bert":
        return BertModel(
            BertConfig(
                vocab_size=size,
                hidden_size=hidden,
                num_hidden_layers=2,
                num_attention_heads=2,
                intermediate_size=3 * hidden // 2,
                max_position_embeddings=40,
            ),
            add_pooling_layer=False,
        )
    if family == "gpt2":
        return GPT2LMHeadModel(
            GPT2Config(vocab_size=size, n_embd=16, n_layer=2, n_head=2, n_positions=40, bos_token_id=2, eos_token_id=3)
        )
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=size,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            # Fewer key and value heads than query heads: the value projection is not square.
            num_key_value_heads=2,
            max_position_embeddings=40,
            bos_token_id=2,
            eos_token_id=3,
        )
    )


def with_biases(model: Any) -> Any:
    """Fill every bias of a model, in place, with the same random numbers every time; return the model.

    As they are made, models of the library have biases of 0, and a layer that forgets its own computes the same.
    """
    drawn = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.rpartition(".")[2] == "bias":
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=drawn))
    return model


TARGETS = {"bert": "query,value,dense", "gpt2": "c_attn", "llama": "q_proj,v_proj"}
"""Layers to adapt per family; each set holds a layer that is not square."""


def save_tiny_model(family: str, folder: Path, hidden: int = 16) -> str:
    """Write the family's model, the same numbers every time, with its tokenizer; return the folder."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        tiny_model(family, hidden).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def write_reviews(path: Path, count: int, seed: int = 0) -> Path:
    """Write ``count`` two-class records (columns text, label, author) whose words tell the label."""
    draw = random.Random(seed)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label", "author"])
        for i in range(count):
            label = i % 2
            words = draw.choices(FILLER, k=draw.randint(2, 9)) + draw.choices(GOOD if label else BAD, k=2)
            draw.shuffle(words)
            writer.writerow(
                [f"{' '.join(words)} {' '.join(draw.choices(FILLER, k=4))}", ["bad", "good"][label], f"a{i % 7}"]
            )
    return path


def write_questions(path: Path, count: int, seed: int = 0) -> Path:
    """Write ``count`` records with columns prompt and completion."""
    draw = random.Random(seed)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["prompt", "completion"])
        for _ in range(count):
            words = draw.choices(FILLER, k=draw.randint(2, 8))
            writer.writerow([f"question {' '.join(words)} answer", " ".join(words[: draw.randint(1, 3)])])
    return path


PLAIN_STEP: dict[str, Any] = {"training.optimizer": "sgd", "training.local-steps": 1}
"""What strategies that choose by known noise need beside the settings of ``toy_run``."""
NEED_PLAIN_STEP = ("increlora", "diffora")


def toy_run(model: str, folder: Path) -> dict[str, Any]:
    """Return what ``toy_settings`` returns, for the tiny BERT in the folder ``model``; the rest goes to ``folder``."""
    return {
        "strategy": "ffa-lora",
        "model.name": model,
        "model.max-length": 24,
        "data.name": str(write_reviews(folder / "reviews.csv", 240)),
        "data.test-size": 40,
        "data.partition": "iid",
        "adapter.rank": 3,
        "adapter.alpha": 6.0,
        "adapter.targets": TARGETS["bert"],
        "head.start": "random",
        "rounds": 2,
        "server.optimizer": "none",
        "training.optimizer": "adam",
        "training.learning-rate": 0.005,
        "training.local-steps": 2,
        "training.sample-rate": 0.25,
        "privacy.delta": 1e-3,
        "precision": "float32",
        "device": "cpu",
        "output": str(folder / "runs"),
    }
