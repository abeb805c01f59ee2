"""Folders of models in which something is wrong."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer


@contextmanager
def nothing_opened() -> Iterator[None]:
    """Fail where transformers opens a model."""
    with pytest.MonkeyPatch.context() as patch:
        for loader in (AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer):
            patch.setattr(loader, "from_pretrained", lambda *_, **__: pytest.fail("transformers opened the model"))
        yield


def spoil(folder: Path) -> None:
    """Change a value of the model's configuration that nothing computes with."""
    config = folder / "config.json"
    config.write_text(config.read_text(encoding="utf-8").replace("{", '{"note": 1,', 1), encoding="utf-8")
