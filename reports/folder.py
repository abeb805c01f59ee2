"""What a run's folder holds, read so that a run that still goes on, or was killed, can be reported too.

A file that is absent says nothing; one that is damaged becomes a sentence in ``problems``, which
every form of the report shows first. Only ``config.json`` must be there.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.errors import DataError

Line = dict[str, Any]
Fields = Mapping[str, type | tuple[type, ...]]
"""Names of a line's fields with what they may be."""

ROUND_FIELDS: Fields = {
    "round": int,
    "accuracy": (int, float, type(None)),
    "loss": (int, float, type(None)),
    "participants": list,
    "bytes_down": int,
    "bytes_up": int,
    "seconds": (int, float),
    "refusals": list,
}
SPENT_FIELDS: Fields = {
    "kind": str,
    "accountant": str,
    "steps_round": int,
    "steps_total": int,
    **dict.fromkeys(
        (
            "sample_rate",
            "noise_multiplier",
            "clip_norm",
            "delta",
            "epsilon_round",
            "epsilon_total",
            "epsilon_budget",
            "epsilon_remaining",
        ),
        (int, float),
    ),
}
AUDITS = "audit*"
"""Names of the files in which audits leave their findings."""
RESULTS = ("completed", "stopped", "failed")
"""The ends that ``result.json`` can tell of."""


@dataclass(frozen=True)
class RunFiles:
    """The readable part of a run's folder."""

    config: Line
    baseline: Line | None
    """Score before round 1; None when it is not there yet."""
    rounds: list[Line]
    privacy: list[Line]
    """One line per release of a site; numbers are None where no claim is made."""
    result: Line | None
    """None while the run goes on, or when it was killed."""
    audits: dict[str, str]
    """Files named ``audit*`` in the folder, with their SHA-256."""
    findings: dict[str, Line] = field(default_factory=dict)
    """Content of those that are JSON."""
    problems: list[str] = field(default_factory=list)


def read_lines(path: Path) -> list[Line]:
    """Return the lines of a JSON-lines file; an absent file has none."""
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def read_run(folder: Path) -> RunFiles:
    """Return what the folder of a run holds.

    Raises:
        DataError: there is no readable ``config.json``, so this is not the folder of a run.
    """
    problems: list[str] = []
    config = _object(folder / "config.json", problems)
    if config is None:
        why = problems[0] if problems else "it has no config.json"
        raise DataError(f"{folder} is not the folder of a run: {why}")
    if not all(isinstance(config.get(name), dict) for name in ("settings", "versions")):
        raise DataError(f"{folder} is not the folder of a run: its config.json holds no settings and versions")
    baseline, result = _object(folder / "baseline.json", problems), _object(folder / "result.json", problems)
    if baseline is not None and _fault(baseline, {"accuracy": (int, float), "loss": (int, float)}):
        problems.append("baseline.json holds no accuracy and loss, and is left out")
        baseline = None
    if result is not None and result.get("status") not in RESULTS:
        problems.append("result.json does not say how the run ended, and is left out")
        result = None
    audits = [path for path in sorted(folder.glob(AUDITS)) if path.is_file()]
    return RunFiles(
        config,
        baseline,
        list(_checked(folder / "rounds.jsonl", _round_fault, problems)),
        _once(_checked(folder / "privacy.jsonl", _privacy_fault, problems)),
        result,
        {path.name: _sha256(path) for path in audits},
        {path.name: content for path in audits if path.suffix == ".json" and (content := _object(path, problems))},
        problems,
    )


def _object(path: Path, problems: list[str]) -> Line | None:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except OSError as error:
        problems.append(f"{path.name} cannot be read ({error.strerror})")
        return None
    except ValueError:
        value = None
    if not isinstance(value, dict):
        problems.append(f"{path.name} is damaged, and is left out")
        return None
    return value


def _checked(path: Path, fault_of: Callable[[Line], str], problems: list[str]) -> Iterator[Line]:
    """Yield the sound lines of a JSON-lines file, and say which are not."""
    try:
        texts = path.read_bytes().decode("utf-8", errors="replace").split("\n")
    except FileNotFoundError:
        return
    except OSError as error:
        problems.append(f"{path.name} cannot be read ({error.strerror})")
        return
    for number, text in enumerate(texts, start=1):
        if not text.strip():
            continue
        try:
            line = json.loads(text)
            fault = fault_of(line) if isinstance(line, dict) else "is not an object"
        except ValueError:
            fault = "is not whole"
        if fault:
            problems.append(f"line {number} of {path.name} {fault}, and is left out: what it held is missing here")
        else:
            yield line


def _once(lines: Iterable[Line]) -> list[Line]:
    """Leave out a release that is told twice: a repeated round is answered with what was released and paid before."""
    told = {(x["site"], x["round"], x.get("kind"), x.get("steps_total"), x.get("epsilon_total")): x for x in lines}
    return list(told.values())


def _fault(line: Line, wanted: Fields) -> str:
    for name, kind in wanted.items():
        if not isinstance(line.get(name), kind) or isinstance(line.get(name), bool):
            return f"has no usable field {name!r}"
    return ""


def _round_fault(line: Line) -> str:
    words = {"site": str, "kind": str, "reason": str}
    counts: Fields = {"site": str, "value": (int, float), "noise_std": (int, float)}
    failures: Fields = {"site": str, "kind": str, "message": str, "round": int, "attempt": int}
    fault = _fault(line, ROUND_FIELDS)
    if not fault and not all(isinstance(site, str) for site in line["participants"]):
        fault = "names participants that are not text"
    if not fault and any(not isinstance(r, dict) or _fault(r, words) for r in line["refusals"]):
        fault = "holds a refusal without site, kind and reason"
    for name, fields in (("noised_correct", counts), ("failures", failures)):
        held = line.setdefault(name, [])
        if not fault and (
            not isinstance(held, list) or any(not isinstance(x, dict) or _fault(x, fields) for x in held)
        ):
            fault = f"has no usable field {name!r}"
    return fault


def _privacy_fault(line: Line) -> str:
    if line.get("epsilon_total") == "inf":
        line["epsilon_total"] = math.inf
    fault = _fault(line, {"round": int, "site": str})
    makes_no_claim = all(line.get(name) is None for name in SPENT_FIELDS if name != "accountant")
    return fault or ("" if makes_no_claim else _fault(line, SPENT_FIELDS))


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
