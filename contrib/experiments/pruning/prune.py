"""A small base model out of a large one, as a folder that every site loads like any other."""

from __future__ import annotations

import shutil
from pathlib import Path

from fedveil.common.data.prose import prose
from fedveil.common.derived import IN_MODEL, marks_of
from fedveil.common.errors import ConfigError, DataError, ModelError, ModelNotLoaded
from fedveil.common.files import with_usual_mode
from fedveil.common.messages.state import AdapterState
from fedveil.common.model.base import BaseModel, load_base_model, model_fingerprint
from fedveil.common.model.device import choose_device
from fedveil.common.run_lines import AdapterFile, read_file
from fedveil.common.tasks import TASKS
from fedveil.contrib.experiments.pruning.files import Pruned, write_pruned
from fedveil.contrib.experiments.pruning.units import Kept, by_scores, by_text, pruned, units_of
from fedveil.reports.derived import sources_of
from fedveil.server.checkpoint import memory_of

SENTENCES = 256
"""Of the prose that comes with FedVeil, about 5,000 tokens."""


def prune_model(
    large: str, target: Path, groups: int, neurons: int, task: str = "causal-lm", by: Path | None = None
) -> Pruned:
    """Write a model with fewer groups of heads and neurons a layer into a new folder; whole or not at all.

    Those units stay that add most on sentences that come with FedVeil, or that a run's scores put first: those are of
    what was sent, and the model names the run. No record is read, so it costs no privacy.

    Args:
        large: the model, as ``model.name`` calls it.
        target: a folder that does not exist yet.
        groups: of heads that share a key and a value head, that stay in each layer. 0: all.
        neurons: of the gated layer, that stay in each layer. 0: all.
        task: kind of task, as ``model.task``.
        by: folder of a run on the large model with ``server.rule = "loraprune"``; None: the sentences decide.

    Raises:
        DataError: ``target`` exists, or cannot be written; or ``by`` holds no run.
        ModelError: the model cannot be loaded, or not be pruned to a stock model; or ``by`` trained another.
        ConfigError: all units are to stay or more than there are, or the run has no scores of them.
    """
    if target.exists():
        raise DataError(f"{target} exists already, and nothing is written over: name a new folder")
    if not groups and not neurons:
        raise ConfigError("nothing is taken out: name with --groups or --neurons how many stay in each layer")
    base = load_base_model(large, task)
    units = units_of(base.module)
    counts = groups or units.groups, neurons or units.neurons
    kept = by_scores(base.module, _scores(by, base), *counts) if by else _by_prose(base, *counts)
    small = pruned(base.module, kept)
    if by:  # whoever begins a run with it sees what that one claims
        setattr(small.config, IN_MODEL, marks_of(sources_of(by)))
    about = Pruned(
        large=large,
        large_fingerprint=base.fingerprint,
        large_files=base.files,
        small_fingerprint=model_fingerprint(small, TASKS[task].processor_parts(base.processor)),
        task=task,
        kept=kept,
    )
    try:
        target.mkdir(parents=True)
        small.save_pretrained(str(target))  # type: ignore[operator]
        base.processor.save_pretrained(str(target))
        write_pruned(target, about)
        with_usual_mode(target)
        if _fingerprint(target, task, units.queries * len(kept.groups[0])) != about.small_fingerprint:
            raise ModelError(f"{large!r} pruned and written is another model than it was: it cannot be used so")
    except BaseException:
        shutil.rmtree(target, ignore_errors=True)
        raise
    return about


def _by_prose(base: BaseModel, groups: int, neurons: int) -> Kept:
    device, tokens = choose_device("auto"), str(base.module.main_input_name)
    texts = (base.processor(sentence, return_tensors="pt")[tokens].to(device) for sentence in prose()[:SENTENCES])
    try:
        return by_text(base.module.to(device), texts, groups, neurons)
    finally:
        base.module.cpu()


def _scores(run: Path, base: BaseModel) -> AdapterState:
    memory, name = memory_of(run)
    try:
        fingerprint = read_file(AdapterFile, run / "adapter").base_fingerprint
    except DataError as error:
        raise DataError(f"{run} holds no adapter that can be read: name the folder of a finished run") from error
    if fingerprint != base.fingerprint:
        raise ModelError(f"{run} trained on {name!r} ({fingerprint[:12]}), not on this model: name its run")
    return memory


def _fingerprint(folder: Path, task: str, heads: int) -> str:
    try:
        return load_base_model(str(folder), task).fingerprint
    except ModelNotLoaded as error:  # its configuration may ask that the hidden size be a multiple of the heads
        raise ModelError(f"a stock model of this class cannot have {heads} heads: choose another --groups") from error
