"""A made run's adapter, with a card."""

from __future__ import annotations

import json

from made_run import MadeRun, adapter_told


def with_adapter(run: MadeRun, base: str = "sentence-transformers/all-MiniLM-L6-v2") -> MadeRun:
    """Leave the files of an adapter in a made run's folder."""
    folder = run.folder / "adapter"
    folder.mkdir()
    (folder / "fedveil.json").write_text(json.dumps(adapter_told(base_model=base, bundle="cd" * 32)))
    for name in ("adapter_config.json", "adapter_model.safetensors", "head.safetensors"):
        (folder / name).write_bytes(name.encode())
    return run
