"""The checkpoint of a run: one file, replaced in one step after every round, from which a killed server's run goes on.

It holds the server's state (adapter, memory, the optimiser's moments, rounds done), what the server remembers of every
site, the scores so far, and how long the run's line files were: whatever a crash appended after the
last checkpoint is cut off again, so at most the round in flight is lost. What sites spent in it
stays charged to their ledgers, and in ``privacy.jsonl`` as far as it was written there.

No random stream is stored, because none runs on from round to round: every public stream is named
by seed, site and round (``privacy.randomness``), and noise and sampling are the sites' own entropy.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from fedveil.common.config.flat import Scalar
from fedveil.common.errors import ConfigError, DataError
from fedveil.common.files import length, replace_file
from fedveil.common.messages.state import AdapterState
from fedveil.common.messages.tensors import entries
from fedveil.common.model.score import Score
from fedveil.common.run_lines import ConfigFile, ResultFile, read_if_there
from fedveil.common.strict_json import from_json, to_json
from fedveil.server.members import Member
from fedveil.strategies.job import Job
from fedveil.strategies.state import Moments, ServerState

NAME = "checkpoint.safetensors"
FORMAT = "7"
PARTS = ("adapter", "memory", "first moments", "second moments", "clocks")
"""Where a stored tensor belongs."""
MAY_CHANGE = ("recipe", "data.records", "resume", "output", "tracker", "round-timeout", "round-retries", "min-sites")
"""Settings in which a resumed run may differ from its start: none of them enters the model. What a recipe has filled in
is compared itself."""


@dataclass(frozen=True)
class Checkpoint:
    """A run after a complete round (or before round 1)."""

    run: str
    settings: Mapping[str, Scalar]
    state: ServerState
    members: Mapping[str, Member]
    """By the mark of the node."""
    baseline: Score
    score: Score | None
    """Of ``state``; None if its round was not scored."""
    lengths: Mapping[str, int]
    """Bytes of the run's line files, by name."""
    renewed: bool = False
    """Whether what the run's start has of the head after its rounds is in ``state``; said of no other round."""
    resumes: int = 0
    """How often the run goes on from a checkpoint, this time included, by its folder; 0 while it is written."""


def save_checkpoint(folder: Path, checkpoint: Checkpoint) -> None:
    """Write the checkpoint of a run's folder over the one before it, atomically and durably."""
    order: list[tuple[str, str, str]] = []
    tensors = {}
    held = checkpoint.state
    parts = (held.adapter, held.memory, held.optimizer.first, held.optimizer.second, held.optimizer.clocks)
    for part, state in zip(PARTS, parts, strict=True):
        for layer, factor, tensor in entries(state):
            tensors[str(len(order))] = tensor.detach().cpu().contiguous().clone()
            order.append((part, layer, factor))
    about = {
        "run": checkpoint.run,
        "round": held.round_number,
        "renewed": checkpoint.renewed,
        "trained": held.trained,
        "steps": dict(held.optimizer.steps),
        "settings": dict(checkpoint.settings),
        "members": {mark: to_json(member) for mark, member in checkpoint.members.items()},
        "baseline": asdict(checkpoint.baseline),
        "score": asdict(checkpoint.score) if checkpoint.score else None,
        "lengths": dict(checkpoint.lengths),
        "tensors": order,
    }
    replace_file(folder / NAME, save(tensors, metadata={"format": FORMAT, "about": json.dumps(about)}))


def load_checkpoint(folder: Path, job: Job, run: str) -> Checkpoint:
    """Return the checkpoint in ``folder`` that ``job`` resumes, as the run called ``run``.

    Raises:
        ConfigError: there is nothing to resume, the run is complete, or a setting differs from the
            run's start (named).
        DataError: the checkpoint is damaged, of another format, or the folder lacks lines it had.
    """
    path = folder / NAME
    if not path.is_file():
        raise ConfigError(f"resume: {folder} holds no checkpoint: name a run that finished a round, or start a new one")
    about, state = _read(path)
    began = read_if_there(ConfigFile, folder)
    with _refusing_damage(path):
        checkpoint = Checkpoint(
            run=about["run"],
            settings=dict(about["settings"]),
            state=state,
            members={mark: from_json(Member, line, "a member") for mark, line in about["members"].items()},
            baseline=Score(**about["baseline"]),
            score=Score(**about["score"]) if about["score"] else None,
            lengths={name: int(size) for name, size in about["lengths"].items()},
            renewed=about["renewed"],
            resumes=1 + len(began.resumed if began else ()),
        )
    if checkpoint.run != run:
        raise ConfigError(
            f"resume: the checkpoint in {folder} is of run {checkpoint.run!r}: give the folder its name back"
        )
    _same_settings(checkpoint.settings, job.settings())
    ended = read_if_there(ResultFile, folder)
    if ended and ended.status == "completed":
        raise ConfigError(f"resume: run {run!r} is complete, there is no round left: start a new one")
    for name, size in checkpoint.lengths.items():
        if length(folder / name) < size:
            raise DataError(f"{folder / name} is shorter than it was at the checkpoint: restore it, or start a new run")
    return checkpoint


def memory_of(folder: Path) -> tuple[AdapterState, str]:
    """Return what a run's server remembered after its last round, and the base model of the run's settings.

    Raises:
        DataError: the folder holds no checkpoint that can be read.
    """
    about, state = _saved(folder)
    with _refusing_damage(folder / NAME):
        return state.memory, str(about["settings"]["model.name"])


def saved_state(folder: Path) -> ServerState:
    """Return the state that a run's last complete round left.

    Raises:
        DataError: no round is complete, or the checkpoint is damaged or of another format.
    """
    return _saved(folder)[1]


def _saved(folder: Path) -> tuple[dict[str, Any], ServerState]:
    if not (folder / NAME).is_file():
        raise DataError(f"{folder} holds no checkpoint: give the folder of a run that finished a round")
    return _read(folder / NAME)


def _read(path: Path) -> tuple[dict[str, Any], ServerState]:
    with _refusing_damage(path), safe_open(str(path), framework="pt") as file:
        metadata = file.metadata() or {}
        if metadata.get("format") != FORMAT:
            raise DataError(f"{path} has format {metadata.get('format')}, not {FORMAT}: use the FedVeil that wrote it")
        about: dict[str, Any] = json.loads(metadata["about"])
        parts: dict[str, AdapterState] = {part: {} for part in PARTS}
        for place, (part, layer, factor) in enumerate(about["tensors"]):
            parts[part].setdefault(layer, {})[factor] = file.get_tensor(str(place))
        adapter, memory, first, second, clocks = (parts[part] for part in PARTS)
        moments = Moments(first, second, about["steps"], clocks)
        return about, ServerState(about["round"], adapter, tuple(about["trained"]), memory, moments)


@contextmanager
def _refusing_damage(path: Path) -> Iterator[None]:
    """Turn what a damaged checkpoint raises into a DataError of one line."""
    try:
        yield
    except (SafetensorError, KeyError, TypeError, AttributeError, ValueError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise DataError(f"{path} is damaged ({reason}): start a new run") from error


def _same_settings(before: Mapping[str, Scalar], now: Mapping[str, Scalar]) -> None:
    for key in sorted(({*before} & {*now}) - {*MAY_CHANGE}):
        if before[key] != now[key]:
            raise ConfigError(
                f"resume: {key} is {now[key]!r}, the run was started with {before[key]!r}: "
                "a run goes on with the settings it began with"
            )
    if missing := sorted(({*before} ^ {*now}) - {*MAY_CHANGE}):
        raise ConfigError(
            f"resume: the run was started by a FedVeil that has other settings than this one ({missing[0]}): resume it "
            "with the FedVeil that began it, or start a new run"
        )
