"""A question to the model that a run ended with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fedveil.common.tasks import Answer
from fedveil.experiments.serving.merge import load_finished


def ask_run(run: Path, words: Sequence[str]) -> list[Answer]:
    """Return what a run's final model answers, the likeliest first; float32, on the CPU.

    Args:
        run: a run's folder.
        words: a text (and its pair, where the run's records have one), a prompt, an image's or clip's path.

    Raises:
        ConfigError: there are more words, or fewer, than this run's records have.
        DataError: there is no saved adapter, or a word names nothing that can be read.
        ModelError: the base model on this machine is not the run's.
    """
    return load_finished(run).answers([words])[0]
