"""What a finished run answers, and how near another form of it has to come."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from typer.testing import CliRunner

from fedveil.cli.main import app
from fedveil.experiments.evaluate import load_result

TEXTS = ["a warm and joyful film", "the story is dull", "quite a tired scene with a very cold actor " * 4]

CLOSE = 1e-5


def fedveil(*words: Any) -> tuple[int, str]:
    """Return the exit code of a command, and what it prints, or where it fails the one line of its error."""
    done = CliRunner().invoke(app, [str(word) for word in words])
    said = [line for line in done.output.splitlines() if line.startswith("fedveil: ")]
    assert len(said) == (done.exit_code == 1)
    return done.exit_code, said[0] if said else done.output


def logits_of(run: Path, texts: list[Any]) -> Tensor:
    """Return what stock PEFT and the head beside it make of texts, or of pairs of them, one at a time."""
    result = load_result(run / "adapter")
    module, task, base = result.module, result.task, result.base
    columns = [text if isinstance(text, list) else [text] for text in texts]
    assert task.questions is not None
    examples = [task.questions.example(words) for words in columns]
    records = task.prepare(base, examples, task.limit(base, result.about.max_length))
    with torch.no_grad():
        return torch.cat([module.eval()(task.collate(base, [record])) for record in records])
