"""A small base model out of a large one, as a folder that every site loads like any other."""

from __future__ import annotations

import shutil
from pathlib import Path

from common.errors import DataError, ModelError, ModelNotLoaded
from common.model.base import load_base_model, model_fingerprint
from common.model.pruned import by_weights, pruned, units_of
from common.tasks import TASKS
from experiments.pruning.files import Pruned, write_pruned


def prune_model(large: str, target: Path, groups: int, neurons: int, task: str = "causal-lm") -> Pruned:
    """Write a model with so many groups of heads and neurons a layer into a new folder; whole or not at all.

    The longest units by their weights stay. No record is asked, so it costs no privacy.

    Args:
        large: the model, as ``model.name`` calls it.
        target: a folder that does not exist yet.
        groups: of heads that share a key and a value head, that stay in each layer. 0: all.
        neurons: of the gated layer, that stay in each layer. 0: all.
        task: kind of task, as ``model.task``.

    Raises:
        DataError: ``target`` exists, or cannot be written.
        ModelError: the model cannot be loaded, or not be pruned to a stock model.
        ConfigError: more units are to stay than there are.
    """
    if target.exists():
        raise DataError(f"{target} exists already, and nothing is written over: name a new folder")
    base = load_base_model(large, task)
    units = units_of(base.module)
    kept = by_weights(base.module, groups or units.groups, neurons or units.neurons)
    small = pruned(base.module, kept)
    about = Pruned(
        large=large,
        large_fingerprint=base.fingerprint,
        small_fingerprint=model_fingerprint(small, TASKS[task].processor_parts(base.processor)),
        task=task,
        kept=kept,
    )
    try:
        target.mkdir(parents=True)
        small.save_pretrained(str(target))  # type: ignore[operator]
        base.processor.save_pretrained(str(target))
        write_pruned(target, about)
        if _fingerprint(target, task, units.queries * len(kept.groups[0])) != about.small_fingerprint:
            raise ModelError(f"{large!r} pruned and written is another model than it was: it cannot be used so")
    except BaseException:
        shutil.rmtree(target, ignore_errors=True)
        raise
    return about


def _fingerprint(folder: Path, task: str, heads: int) -> str:
    try:
        return load_base_model(str(folder), task).fingerprint
    except ModelNotLoaded as error:  # its configuration may ask that the hidden size be a multiple of the heads
        raise ModelError(f"a stock model of this class cannot have {heads} heads: choose another --groups") from error
