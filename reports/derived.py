"""The report and the model card of a model that was made from finished runs without reading a record."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from fedveil.common.config.flat import task_of
from fedveil.common.derived import DerivedFile, EarlierFile, Source
from fedveil.common.errors import DataError
from fedveil.common.files import finite, replace_file, sha256_of, with_usual_mode
from fedveil.common.model.named import NAMED_MODELS
from fedveil.common.run_lines import AdapterFile, read_file, read_if_there
from fedveil.common.strict_json import to_json
from fedveil.common.words import capital, counted, number_text, percent_text, visible
from fedveil.privacy.figures import epsilon_text
from fedveil.reports.card import HUB_ID, UNKNOWN_LICENSE, Form, privacy_section
from fedveil.reports.card import NAME as CARD
from fedveil.reports.data import report_of
from fedveil.reports.markdown import plain

HEADING = "## Privacy\n\n"
NO_RECORD = "No record of a site was read to make it."
NO_SUM = (
    "A record that was in several of these runs has no ε for all of them: one has no claim, or their claims are of "
    "different units."
)


def sources_of(run: Path, weight: float = 1.0) -> list[Source]:
    """Return a finished run as a source, with its claim, and the runs that it began with or was derived from.

    Raises:
        DataError: the folder is of neither, or has no adapter.
    """
    if (known := read_if_there(DerivedFile, run)) is not None:
        return [replace(source, weight=weight * source.weight) for source in known.sources]
    about, data = read_file(AdapterFile, run / "adapter"), report_of(run)
    trials, earlier = data.tuning, read_if_there(EarlierFile, run)
    return [
        *(replace(source, weight=weight * source.weight) for source in (earlier.sources if earlier else ())),
        Source(
            run=data.run,
            method=data.method,
            base=about.base_fingerprint,
            files={Path(name).name: digest for name, digest in (data.origin.files if data.origin else {}).items()},
            claim=data.claim.sentence,
            epsilon=(trials.epsilon if trials else data.headline.epsilon) if data.claim.made else None,
            delta=(trials.delta if trials else data.headline.delta) if data.claim.made else None,
            unit=data.claim.unit,
            terms=privacy_section(data).removeprefix(HEADING).strip(),
            weight=weight,
        ),
    ]


def write_derived(folder: Path, made: DerivedFile) -> None:
    """Write ``derived.json``, ``report.md`` and the adapter's card beside the ``adapter/`` that they are about."""
    content = json.dumps(finite(to_json(made)), indent=2, ensure_ascii=False) + "\n"
    replace_file(folder / made.NAME, content.encode())
    replace_file(folder / "report.md", f"# {capital(plain(_title(made)))}\n\n{_body(made)}".encode())
    adapter = folder / "adapter"
    about = read_file(AdapterFile, adapter)
    files = {path.name: sha256_of(path) for path in sorted(adapter.iterdir()) if path.name != CARD}
    settings: dict[str, Any] = dict(about.settings)
    export = task_of(settings).with_pool(str(settings.get("head.pool", "mean"))).export
    code = export.adapter_code(_shown(about.base_model), settings, tuned=True)
    replace_file(adapter / CARD, derived_card(made, Form("adapter", "peft", code, files)).encode())


def write_folder(target: Path, made: DerivedFile, write: Callable[[Path], None]) -> None:
    """Write a derived model's folder, whole or not at all; ``write`` fills its ``adapter/``."""
    partial = target.absolute().with_name(f".{target.absolute().name}.{os.getpid()}.tmp")
    try:
        (partial / "adapter").mkdir(parents=True)
        write(partial / "adapter")
        with_usual_mode(partial)
        write_derived(partial, made)
        os.replace(partial, target)
    except OSError as error:
        raise DataError(f"{target} cannot be written ({error.strerror}): check permissions and space") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def derived_card(made: DerivedFile, form: Form) -> str:
    """Return the card of a derived model in one of its forms."""
    base = _shown(made.base_model)
    meta: dict[str, Any] = {"license": UNKNOWN_LICENSE, "library_name": form.library}
    if HUB_ID.fullmatch(base) and not made.local:
        meta |= {"base_model": base, "base_model_relation": form.relation}
    meta |= {"tags": ["federated-learning", "differential-privacy", "fedveil"], "differential_privacy": _claimed(made)}
    parts = [
        f"---\n{yaml.safe_dump(meta, sort_keys=False, allow_unicode=True, width=100)}---",
        f"# {plain(base)}, {plain(_title(made))}",
        f"## Load it\n\n```python\n{form.code}```",
        _body(made),
        _hashes("file", form.files),
    ]
    return "\n\n".join(part.rstrip() for part in parts) + "\n"


def _title(made: DerivedFile) -> str:
    return f"made by {made.operation} from {counted(len(made.sources), 'run')}"


def _shown(name: str) -> str:
    """Return the base model's id on the hub where it has one, of a path the last part alone."""
    known = NAMED_MODELS[name].published if name in NAMED_MODELS and not Path(name).exists() else None
    if known:
        return known.hub
    return visible(name if HUB_ID.fullmatch(name) else name.rstrip("/").rpartition("/")[2])


def _claimed(made: DerivedFile) -> dict[str, Any]:
    if made.epsilon is None:
        return {"claim": "none" if len(made.sources) == 1 else "of each run alone"}
    epsilon = float(epsilon_text(made.epsilon).replace("∞", "inf"))
    return {"epsilon": epsilon, "delta": made.delta, "unit": made.sources[0].unit, "runs": len(made.sources)}


def _body(made: DerivedFile) -> str:
    public = [
        f"- {number_text(one.texts)} texts of {plain(one.name)}, public by the word of who made this model (SHA-256 "
        f"`{one.sha256}`)"
        for one in made.public
    ]
    figures = [f"- {plain(figure.name)}: {_figure(figure.value, figure.half)}" for figure in made.figures]
    parts = [
        f"{NO_RECORD} It was computed from what the runs below released{', and from public texts' * bool(public)}.",
        "\n".join([*public, *figures, *(f"- {plain(note)}" for note in made.notes)]),
        "## Privacy",
        together_sentence(made),
    ]
    for source in made.sources:
        parts += [f"### Run {plain(source.run)}, {plain(source.method)}", source.terms]
        parts += [_hashes("file of its adapter", source.files)] if source.files else []
    return "\n\n".join(part.rstrip() for part in parts if part) + "\n"


def together_sentence(made: DerivedFile) -> str:
    """Return in one sentence what a record has that was in all of the runs."""
    if len(made.sources) == 1:
        return f"The claim of run {plain(made.sources[0].run)} holds for this model."
    if made.epsilon is None:
        return NO_SUM
    each = " + ".join(epsilon_text(source.epsilon) for source in made.sources)
    return (
        f"A record that was in one of the runs has the promise of that run. One that was in all {len(made.sources)} "
        f"has ε {epsilon_text(made.epsilon)} ({each}) at δ {made.delta:g}."
    )


def _figure(value: float, half: float | None) -> str:
    return percent_text(value) + (f" ± {100 * half:.1f}" if half else "")


def _hashes(what: str, files: Mapping[str, str]) -> str:
    rows = "\n".join(f"| `{name}` | `{digest}` |" for name, digest in files.items())
    return f"| {what} | SHA-256 |\n|---|---|\n{rows}"
