"""The adapter of a run on a pruned model, on the large one."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from fedveil.common.adapters.layers import PEFT_PREFIX
from fedveil.common.errors import DataError, ModelError
from fedveil.common.files import with_usual_mode
from fedveil.common.model.base import load_base_model
from fedveil.common.model.files import check_files
from fedveil.common.model.score import Score
from fedveil.common.run_lines import read_file, read_json
from fedveil.common.strict_json import to_json
from fedveil.common.tensor_file import read_tensors
from fedveil.contrib.experiments.pruning.files import RecoveredFile, put_json, read_pruned
from fedveil.contrib.experiments.pruning.units import recovered, units_of
from fedveil.experiments.evaluate import about_of, base_of, result_of, score_of

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def recover_run(run: Path, target: Path, pruned: Path | None = None) -> str:
    """Write a run's adapter for the large model into a new folder, as stock PEFT loads it; return the large model.

    Both models are known by their fingerprints: the small one must be what the run trained on, the large one what it
    was pruned from.

    Args:
        run: a run's folder.
        target: a folder that does not exist yet.
        pruned: the folder of the small model; None: where the run says that it lay.

    Raises:
        DataError: ``target`` exists, or something cannot be read or written.
        ModelError: a model is another than the run's, or the adapter is no plain LoRA.
    """
    if target.exists():
        raise DataError(f"{target} exists already, and nothing is written over: name a new folder")
    adapter = run / "adapter"
    try:
        about = about_of(adapter)
        config = read_json(adapter / CONFIG)
        tensors = read_tensors(adapter / WEIGHTS)
    except (OSError, ValueError, DataError) as error:
        raise DataError(f"{adapter} holds no adapter of a run that can be read: name a run's folder") from error
    small = read_pruned(pruned or Path(about.base_model))
    if small.small_fingerprint != about.base_fingerprint:
        raise ModelError(
            f"the run trained on a model of fingerprint {about.base_fingerprint[:12]}, and this pruned model is "
            f"{small.small_fingerprint[:12]}: name the one of the run with --pruned"
        )
    check_files(small.large, small.large_files)
    large = load_base_model(small.large, small.task, files=small.large_files)
    if large.fingerprint != small.large_fingerprint:
        raise ModelError(
            f"{small.large!r} is {large.fingerprint[:12]} on this machine, and the pruned model was made of "
            f"{small.large_fingerprint[:12]}: install the same weights"
        )
    units, weights = units_of(large.module), large.module.state_dict()
    made = {}
    for layer, pair in _pairs(tensors).items():
        shape = tuple(weights[f"{layer}.weight"].shape)
        whole = recovered(pair, shape, *small.kept.sides(layer, units))
        for letter, tensor in whole.items():
            made[f"{PEFT_PREFIX}{layer}.lora_{letter}.weight"] = tensor.contiguous()
    try:
        target.mkdir(parents=True)
        put_json(target / CONFIG, {**config, "base_model_name_or_path": small.large})
        save_file(made, str(target / WEIGHTS), metadata={"format": "pt"})
        with_usual_mode(target)
        made_of = RecoveredFile(small.large, small.small_fingerprint, small.large_fingerprint, small.large_files)
        put_json(target / RecoveredFile.NAME, to_json(made_of))
    except OSError as error:
        shutil.rmtree(target, ignore_errors=True)
        raise DataError(f"{target} cannot be written ({error.strerror}): check permissions and space") from error
    return small.large


def score_recovered(folder: Path, recovered: Path) -> tuple[Score, Score]:
    """Return two scores of a large model on a run's public test data: as it is, and with the recovered adapter.

    Both have the run's head, where its task has one.

    Args:
        folder: a run on a pruned model.
        recovered: what ``recover_run`` made of that run.

    Raises:
        DataError: a folder holds nothing of the kind.
        ModelError: the adapter is of a run on another model, or the large model has other weights.
    """
    adapter = folder / "adapter"
    about = about_of(adapter)
    if not (recovered / RecoveredFile.NAME).is_file():
        raise DataError(f"{recovered} holds no recovered adapter: give the folder that `recover` made")
    source = read_file(RecoveredFile, recovered)
    if source.trained_on != about.base_fingerprint:
        raise ModelError(
            f"{recovered} is of a run on a model of fingerprint {source.trained_on[:12]}, and {folder} trained on "
            f"{about.base_fingerprint[:12]}: name the run that it was recovered from"
        )

    def scored(tuned: Path | None) -> Score:
        base = base_of(about, source.large, source.files)  # anew: PEFT changes the module that it is given
        if base.fingerprint != source.recovered_onto:
            raise ModelError(f"{base.name!r} here has other weights than the model that the adapter was recovered onto")
        return score_of(result_of(about, base, adapter, tuned))

    return scored(None), scored(recovered)


def _pairs(tensors: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return A and B of every layer of a plain LoRA adapter."""
    pairs: dict[str, dict[str, Any]] = {}
    for name, tensor in tensors.items():
        layer, found, letter = name.removeprefix(PEFT_PREFIX).removesuffix(".weight").rpartition(".lora_")
        if not found or letter not in ("A", "B"):
            raise ModelError(
                f"the adapter holds {name!r}, which is no factor of a plain LoRA: its change has no zeros to be "
                "recovered with; train an adapter that is exported as A and B"
            )
        pairs.setdefault(layer, {})[letter] = tensor
    return pairs
