"""Questions that a hostile server asks by the settings of a run, and what it learns by their answers.

Each goes through the real client. The first six are a binary search for one postcode, as far as columns and labels of
the server's choice allow one; the others try the rest of what a policy pins. A server that names base models looks
about on the site's disks in the same way.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from audits.faults import SOUND, Fault
from audits.finding import judged
from audits.tiny_models import write_reviews
from audits.tiny_site import OneSite, tiny_site
from fedveil.client.policy import Policy
from fedveil.common.config.flat import Scalar
from fedveil.common.errors import ModelNotLoaded
from fedveil.common.findings import Finding
from fedveil.common.messages.round import Refusal, TrainTask
from fedveil.common.model.files import files_of

CODES = [f"code-{i:02}" for i in range(40)]
RARE = "code-99"
DIGITS = "0123456789abcdef" * 2
"""Of a fingerprint that no model has."""


def with_codes(path: Path, last: str) -> Path:
    """Write 41 reviews with a column of postcodes, of which ``last`` is the one of the last record."""
    with write_reviews(path, 41).open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["text", "label", "author", "postcode"])
        writer.writeheader()
        writer.writerows({**row, "postcode": code} for row, code in zip(rows, [*CODES, last], strict=True))
    return path


def questions() -> Iterator[dict[str, Scalar]]:
    """Yield twelve questions as settings: a binary search for a postcode, and one of every other kind."""
    asked = [*CODES, RARE]
    for _ in range(6):
        asked = asked[len(asked) // 2 :] if len(asked) > 3 else CODES[:2]
        yield {"data.label": "postcode", "data.labels": ",".join(asked)}
    yield {"data.labels": "good,bad"}
    yield {"data.labels": "bad,fair,good"}
    yield {"data.text": "postcode"}
    yield {"data.text-pair": "postcode"}
    yield {"model.max-length": 25}
    columns: dict[str, Scalar] = {"data.prompt": "postcode", "data.completion": "text"}
    yield {"model.task": "causal-lm", "head.policy": "frozen", **columns}


def replies(site: OneSite, task: TrainTask, folder: Path) -> list[list[Refusal]]:
    """Return what twelve questions are answered by a site without the rare record, with it, and without any file."""
    settings, found = dict(site.settings), list[list[Refusal]]()
    files = (with_codes(folder / "without.csv", CODES[0]), with_codes(folder / "with.csv", RARE), folder / "no.csv")
    for data in files:
        site.node["data"] = str(data)
        heard = []
        for question in questions():
            site.settings = {**settings, **question}
            reply = site.ask(task)
            heard.append(reply if isinstance(reply, Refusal) else Refusal("", 1, "", "trained", ""))
        found.append(heard)
    site.settings = settings
    return found


def learnt(site: OneSite, task: TrainTask, folder: Path) -> list[str]:
    """Return what a server learns that sends ``task`` with twelve questions that are not the steward's."""
    without, rare, absent = replies(site, task, folder)
    found = [f"question {i} is answered: {reply.kind}" for i, reply in enumerate(rare) if reply.kind != "policy"]
    found += ["the answers tell whether the rare record is there"] if without != rare else []
    return found + (["the answers tell that there is a file: it was read"] if absent != rare else [])


def places(folder: Path) -> list[str]:
    """Make what a server might look for on a site's disks, and return the paths: all words about them must be one."""
    empty, odd, broken, file = (folder / name for name in ("empty", "odd", "broken", "file.csv"))
    for made in (empty, odd, broken):
        made.mkdir()
    (odd / "config.json").write_text('{"model_type": "patients-of-ward-7"}')
    (broken / "config.json").write_text("[1, 2")
    file.write_text("text,label\n")
    return [str(place) for place in (folder / "absent", empty, "/etc", file, odd, broken)]


def heard(site: OneSite, task: TrainTask, names: Sequence[str]) -> list[Refusal | None]:
    """Return what a server hears that sends ``task`` in runs of these base models; None: the site trained."""
    own, found = site.settings["model.name"], list[Refusal | None]()
    for name in names:
        site.settings["model.name"] = name
        reply = site.ask(task)
        found.append(reply if isinstance(reply, Refusal) else None)
    site.settings["model.name"] = own
    return found


def looked_at(site: OneSite, task: TrainTask, names: Sequence[str]) -> list[str]:
    """Return which of these base models a site looks at whose policy names none of them."""
    loaded: list[str] = []

    def look(name: str) -> str:
        loaded.append(name)
        raise ModelNotLoaded("a model was looked at")

    with patch("fedveil.client.process.files_of", look):
        heard(site, task, names)
    return loaded


def trained_on_another_model(site: OneSite, task: TrainTask) -> bool:
    """Return whether a site takes part with a model that has an allowed name and another fingerprint."""
    name = str(site.settings["model.name"])
    site.rule(models=[f"{name}={DIGITS}+{files_of(name)}"])
    return not isinstance(site.ask(task), Refusal)


def nothing(*_: Any, **__: Any) -> None:
    """Check nothing."""


def pins_unheld() -> AbstractContextManager[Any]:
    """Any column, label and length that the server names."""
    return patch("fedveil.client.policy.check_pins", nothing)


def models_unasked() -> AbstractContextManager[Any]:
    """Any base model is loaded, and its fingerprint asked afterwards."""
    return patch.object(Policy, "check_model_name", nothing)


def fingerprints_unasked() -> AbstractContextManager[Any]:
    """A base model is what its name says."""
    return patch.object(Policy, "check_model", nothing)


PINS = Fault("pins not held", pins_unheld)
NAMES = Fault("models not asked before loading", models_unasked)
FINGERPRINTS = Fault("fingerprints not asked", fingerprints_unasked)


def audit_questions(folder: Path, fault: Fault = SOUND) -> Finding:
    """Return what a hostile server learns of a site's records and disks by twelve questions and six models.

    Args:
        folder: empty; models and records go there.
        fault: SOUND, PINS, NAMES or FINGERPRINTS.
    """
    site, names = tiny_site(folder), places(folder)
    task = site.task()
    with fault.plant():
        answers = learnt(site, task, folder)
        site.node["data"] = str(with_codes(folder / "own.csv", RARE))
        site.rule(models=None)
        looked = looked_at(site, task, names)
        another = trained_on_another_model(site, task)
    figures: dict[str, int | float | str] = {
        "questions of another's": len(list(questions())),
        "learnt by them": len(answers),
        "models of another's that were looked at": len(looked),
        "trained on another model of an allowed name": str(another),
    }
    return judged("questions by settings", fault.name, bool(answers or looked or another), figures)
