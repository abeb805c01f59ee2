"""The last states that a site was sent, kept in its own folder so that its steward can score them.

A state is what every site of the run got, so it says nothing of this site's records; which rounds are there says for
which ones the site was asked.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from fedveil.client.node import ledger_of
from fedveil.common.check import at_least
from fedveil.common.config.flat import Scalar
from fedveil.common.errors import ConfigError, DataError
from fedveil.common.files import replace_file
from fedveil.common.log import about
from fedveil.common.messages.round import TrainTask
from fedveil.common.messages.state import AdapterState
from fedveil.common.messages.tensors import entries, merge
from fedveil.common.model.federated import FederatedModel
from fedveil.strategies.job import Job

log = logging.getLogger("fedveil.site")
KEEP = "keep-states"
"""The node's setting."""
FOLDER = "states"
"""Beside the ledger, which is in the one folder that a site writes to."""
ENDING = ".safetensors"


@dataclass(frozen=True)
class AboutState:
    """What a kept state is of."""

    run: str
    round_number: int
    """The round that began with it."""
    settings: Mapping[str, Scalar]
    """Of the run, flat."""
    base_fingerprint: str
    """Of the base model that the state belongs to."""


def kept_states_of(node: Mapping[str, Scalar]) -> int:
    """Return how many states a node's site keeps; 0: none.

    Raises:
        ConfigError: the setting ``keep-states`` is no whole number from 0.
    """
    number = node.get(KEEP, 0)
    if not isinstance(number, int) or isinstance(number, bool):
        raise ConfigError(f"node setting {KEEP!r} is {number!r}: give a whole number of states, or leave it out")
    at_least(0, keep_states=number)
    return number


def states_folder(node: Mapping[str, Scalar]) -> Path:
    """Return where a node's site keeps states; errors as for ``ledger_of``."""
    return ledger_of(node).parent / FOLDER


def keep_state(node: Mapping[str, Scalar], job: Job, model: FederatedModel, task: TrainTask) -> None:
    """Keep the state of a training round, and no more than the site keeps; a full disk is no reason to refuse a round.

    Args:
        node: the site's settings.
        job, model: of the run.
        task: as received and checked, of a round from 1 on.
    """
    if not (most := kept_states_of(node)) or not task.round_number:
        return
    said = AboutState(task.run, task.round_number, job.settings(), model.base.fingerprint)
    received = job.strategy.install(merge(model.start, task.basis), task.state)
    tensors = {f"{layer}/{name}": tensor.detach().cpu().clone() for layer, name, tensor in entries(received)}
    folder = states_folder(node)
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.chmod(0o700)
        path = folder / f"{task.run}-{task.round_number:06}{ENDING}"
        replace_file(path, save(tensors, {"about": json.dumps(asdict(said))}), 0o600)
        for old in _by_age(folder)[:-most]:
            old.unlink(missing_ok=True)
    except OSError as error:
        where = about(task.run, task.round_number)
        log.warning("the state that was sent is not kept (%s): free space, or mend the folder", error, extra=where)


def kept_states(folder: Path) -> list[Path]:
    """Return the files of the states in a folder, the first that was sent first."""
    return _by_age(folder) if folder.is_dir() else []


def read_about(path: Path) -> AboutState:
    """Return what a kept state is of, without its tensors.

    Raises:
        DataError: the file is damaged.
    """
    with _one_line(path), safe_open(str(path), framework="pt") as file:
        return AboutState(**json.loads(file.metadata()["about"]))


def read_state(path: Path) -> AdapterState:
    """Return the adapter that a site was sent, float32, on the CPU; errors as for ``read_about``."""
    state: dict[str, dict[str, Tensor]] = {}
    with _one_line(path), safe_open(str(path), framework="pt") as file:
        for key in sorted(file.keys()):
            layer, _, name = key.rpartition("/")
            state.setdefault(layer, {})[name] = file.get_tensor(key).to(torch.float32)
    return state


@contextmanager
def _one_line(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError, ValueError, TypeError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{path} is no state that this site kept ({reason}): remove the file") from error


def _by_age(folder: Path) -> list[Path]:
    return sorted(folder.glob(f"*{ENDING}"), key=lambda path: (path.stat().st_mtime_ns, path.name))
