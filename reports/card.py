"""The model card (``README.md``) of an adapter or a merged model: YAML for the hub, and Markdown for people.

It quotes the run's report, claim included, and what the coordinator declares, and says what has not been declared.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from fedveil.common.config.flat import task_of
from fedveil.common.config.run import HEAD_ONLY
from fedveil.common.config.sections import NO_ADAPTER
from fedveil.common.data.named import DATASETS
from fedveil.common.errors import DataError
from fedveil.common.model.named import NAMED_MODELS, Published
from fedveil.common.starts.public_text import OF_NO_ONE, SHIPPED
from fedveil.common.tasks import Task
from fedveil.common.words import UNKNOWN, capital, counted, number_text, percent_text, visible
from fedveil.privacy.figures import epsilon_text
from fedveil.privacy.units import PERSON
from fedveil.reports.data import ReportData, cares_of, cut_test, setting_of
from fedveil.reports.declared import Declared
from fedveil.reports.markdown import plain
from fedveil.reports.meaning import attack_sentence, several_sentence
from fedveil.reports.scores import share_text
from fedveil.reports.sharing import Sharing

NAME = "README.md"
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
"""A base model of this form may be one of the hub's; a path never is, and says nothing to others."""
OWN_LIBRARY = "fedveil"
"""What loads a head that lies by itself: no library of the hub does."""
UNKNOWN_LICENSE = "unknown"
"""The hub's word for an undeclared licence."""


@dataclass(frozen=True)
class Form:
    """What a card is of."""

    relation: str
    """Of the model to its base, as the hub has it: ``adapter``, or ``finetune`` where the files are not PEFT's."""
    library: str
    """Library that loads it, as the hub has it."""
    code: str
    """Python code that loads it."""
    files: Mapping[str, str]
    """SHA-256 of its files."""
    pipeline: str = ""
    """The pipeline of transformers that computes it, which is what the hub calls it; empty: none does."""


def _task_of(data: ReportData) -> Task:
    """Return the run's task, with its options."""
    return task_of({setting.key: setting.value for setting in data.settings if setting.value is not None})


def adapter_form(data: ReportData) -> Form:
    """Return the form of a run's ``adapter/``.

    Raises:
        DataError: the run has saved none.
    """
    if data.origin is None:
        raise DataError("the run has saved no adapter, so there is nothing to write a model card of")
    task = _task_of(data)
    files = {name.rpartition("/")[2]: digest for name, digest in data.origin.files.items()}
    tuned = "adapter_config.json" in files
    settings: dict[str, Any] = {setting.key: setting.value for setting in data.settings}
    code = task.with_pool(settings["head.pool"]).export.adapter_code(shown_base(data), settings, tuned=tuned)
    if not tuned:
        return Form("finetune", OWN_LIBRARY, code, files)
    return Form("adapter", "peft", code, files, "" if task.labelled else task.export.hub_task)


def card_of(data: ReportData, declared: Declared, form: Form, report: bytes) -> str:
    """Return the card's text.

    Args:
        data: the report of the run.
        declared: what the coordinator declares about it.
        form: what the card is of.
        report: ``report.json``, which the card names by its hash.
    """
    head = yaml.safe_dump(_metadata(data, declared, form), sort_keys=False, allow_unicode=True, width=100)
    task = _task_of(data)
    sites = f"{'at most ' * data.claim.trusts_server}{counted(data.headline.sites, 'site')}"
    base = plain(shown_base(data))
    alone = data.method == HEAD_ONLY
    what = f"a classification head on the frozen {base}" if alone else f"an adapter of {base}"
    parts = [
        f"---\n{head}---",
        f"# {base}, {'with a trained classification head' if alone else f'fine-tuned by {plain(data.method)}'}",
        f"A FedVeil run trained {what} on the records of {sites}. No record left its site. Trained: {_trained(data)}. "
        f"Task: {task.name}. The run {plain(data.status)} after {counted(data.headline.rounds_done, 'round')}.",
        f"Intended use: {plain(declared.intended_use)}" if declared.intended_use else "",
        f"## Load it\n\n```python\n{form.code}```",
        _head_words(form),
        _results(data),
        privacy_section(data),
        _records(data),
        _licences(data, declared),
        _hashes(data, declared, form, report),
    ]
    return "\n\n".join(part.rstrip() for part in parts if part) + "\n"


def _trained(data: ReportData) -> str:
    """Return what was trained and how it was averaged, in words."""
    adapter = str(setting_of(data, "adapter.name"))
    if adapter == NO_ADAPTER:
        return "the classification head alone"
    return f"the adapter {plain(adapter)}, by {plain(data.strategy)}"


def _base(data: ReportData) -> str:
    return data.origin.base_model if data.origin else str(setting_of(data, "model.name"))


def _published(data: ReportData) -> Published | None:
    """Return the publication of a packaged base model; None for any other, a folder of that name included."""
    origin = data.origin
    named = origin is not None and not origin.local and origin.base_model in NAMED_MODELS
    return NAMED_MODELS[origin.base_model].published if origin and named else None


def shown_base(data: ReportData) -> str:
    """Return the base model's id on the hub where it has one, of a path the last part alone."""
    name, known = _base(data), _published(data)
    if known:
        return known.hub
    return visible(name if HUB_ID.fullmatch(name) else name.rstrip("/").rpartition("/")[2])


def _metadata(data: ReportData, declared: Declared, form: Form) -> dict[str, Any]:
    task, known = _task_of(data), _published(data)
    own = data.origin is None or data.origin.local or Path(data.origin.base_model).exists()
    base = known.hub if known else "" if own else _base(data)
    meta: dict[str, Any] = {"license": declared.license or UNKNOWN_LICENSE, "library_name": form.library}
    if HUB_ID.fullmatch(base):
        meta |= {"base_model": base, "base_model_relation": form.relation}
    meta |= {"pipeline_tag": form.pipeline} if form.pipeline else {}
    meta |= {"tags": ["federated-learning", "differential-privacy", data.method, "fedveil"]}
    head = data.headline
    meta["differential_privacy"] = claimed(data)
    if head.accuracy_after is not None:
        metric = {"type": data.judged_by, "value": round(head.accuracy_after, 4)}
        data_set = {"name": "the run's public test set", "type": "public-test-set"}
        result = {"task": {"type": task.export.hub_task}, "dataset": data_set, "metrics": [metric]}
        meta["model-index"] = [{"name": f"run {visible(data.run)}", "results": [result]}]
    return meta


def claimed(data: ReportData) -> dict[str, Any]:
    """Return a run's claim as the metadata of a card has it."""
    claim, head = data.claim, data.headline
    if not claim.made:
        return {"claim": "none"}
    return {
        "epsilon": float(epsilon_text(head.epsilon).replace("∞", "inf")),
        "delta": head.delta,
        **_trials(data),
        "unit": claim.unit,
        "neighbours": claim.neighbours,
        "adversary": claim.adversary,
        "mechanism": claim.privacy_mode,
        "accountant": claim.accountant,
        **_honest(data.sharing),
    }


def _honest(sharing: Sharing | None) -> dict[str, Any]:
    """Return the honest sites that ε counts on, and ε without them; empty where sites share no noise."""
    if sharing is None:
        return {}
    bare = sharing.epsilon_alone
    alone = {} if bare is None else {"epsilon_alone": float(epsilon_text(bare).replace("∞", "inf"))}
    return {"honest_sites": sharing.honest_sites, **alone}


def _trials(data: ReportData) -> dict[str, Any]:
    """Return the ε of all trials, of which the run is one; empty for a single run."""
    if data.tuning is None:
        return {}
    epsilon = float(epsilon_text(data.tuning.epsilon).replace("∞", "inf"))
    return {"trials": data.tuning.trials, "epsilon_all_trials": epsilon, "delta_all_trials": data.tuning.delta}


def _head_words(form: Form) -> str:
    if "head.safetensors" not in form.files:
        return ""
    return (
        "The classification head lies beside it (`head.safetensors`: `weight`, `bias`). `fedveil merge` makes one "
        "plain model of base model, adapter and head, which needs no FedVeil."
    )


def _results(data: ReportData) -> str:
    head = data.headline
    rows = [
        (row.label, number_text(row.records), share_text(row.before), share_text(row.after)) for row in data.accuracy
    ]
    rows += [(figure.name, UNKNOWN, share_text(figure.before), share_text(figure.after)) for figure in data.figures]
    rows += [
        (
            f"{part.label}, F1{', rare' * part.rare}",
            number_text(part.records),
            share_text(part.before),
            share_text(part.after),
        )
        for part in data.parts
    ]
    if not rows:
        rows = [("all", UNKNOWN, percent_text(head.accuracy_before), percent_text(head.accuracy_after))]
    table = "\n".join("| " + " | ".join(plain(cell) for cell in row) + " |" for row in rows)
    control = data.control and f"\n\nFor comparison, {data.control}."
    return (
        f"## Results\n\n{capital(data.judged_by)} on the run's public test set, with 95 % intervals where records have "
        "labels:\n\n"
        f"| label | records | before training | after |\n|---|---|---|---|\n{table}{control}"
    )


def privacy_section(data: ReportData) -> str:
    """Return a run's claim as a section of a card, with its terms and what it does not cover."""
    claim = data.claim
    lines = ["## Privacy", "", f"**{claim.sentence}**", ""]
    if not claim.made:
        return "\n".join(lines)
    terms = (("Unit", claim.unit), ("Neighbours", claim.neighbours), ("Adversary", claim.adversary))
    lines += [f"- {name}: {plain(text)}" for name, text in (*terms, ("Sampling", claim.sampler))]
    lines += ["", "Not covered:", "", *(f"- {plain(text)}" for text in claim.not_covered), ""]
    if data.meaning is not None:
        said = (attack_sentence(data.meaning), several_sentence(data.meaning), data.meaning.caution)
        lines += [part for text in said if text for part in (plain(text), "")]
    lines += [plain(data.unbounded), ""] if data.unbounded else []
    lines += [part for text in cares_of(data) for part in (f"**Warning:** {plain(text)}", "")]
    return "\n".join(lines)


def _records(data: ReportData) -> str:
    sizes = sorted(site.public_size for site in data.sites if site.public_size is not None)
    text = "Trained on the records of sites, which are not published."
    whose = f"{data.claim.per}s " if data.claim.per == PERSON.name else ""
    if data.claim.trusts_server:
        most = number_text(sum(sizes))
        text += f" They were a cohort of at most {most} sites; how many records each has is kept secret."
    elif sizes:
        text += (
            f" The sites declare {number_text(sum(sizes))} {whose}in all, from {number_text(sizes[0])} to "
            f"{number_text(sizes[-1])} per site."
        )
    return f"## Records\n\n{text}\n\nTaken as public, and not protected: {'; '.join(_public(data))}."


def _public(data: ReportData) -> list[str]:
    """Return the data that the run took for public, by name; a path is not quoted."""
    name, test = str(setting_of(data, "data.name")), str(setting_of(data, "data.test"))
    found = ["the test set, a file of the coordinator's"]
    if cut_test(data):
        found = ["the test set, held out from the same source as the sites' records"]
    elif _is_name(test or name):
        found = [f"the test set, {plain(test)}" if test else f"the test set of {plain(name)}"]
    text, sha256 = (str(setting_of(data, key)) for key in ("start.text", "start.text-sha256"))
    if text in SHIPPED:
        found.append(f"the text that the initialisation was made from, `{text}` of FedVeil (SHA-256 `{sha256}`)")
    elif text and text not in OF_NO_ONE:
        whose = plain(text) if _is_name(text) else "a file of the coordinator's"
        found.append(f"the text that the initialisation was made from, {whose} (SHA-256 `{sha256}`)")
    if public := str(setting_of(data, "start.data")):
        whose = plain(public) if _is_name(public) else "a file of the coordinator's"
        found.append(f"the records that the initialisation was made from, {whose}")
    return found + ["the phrases of the settings"] * bool(setting_of(data, "head.phrases"))


def _is_name(source: str) -> bool:
    return source in DATASETS or source.startswith("hub:")


def _licences(data: ReportData, declared: Declared) -> str:
    own = plain(declared.license) if declared.license else "not declared"
    known = _published(data)
    base = plain(declared.base_license) if declared.base_license else "not declared"
    if known and not declared.base_license:
        base = f"{known.license}, as the hub has it for {known.hub}"
    used = f"\n- The weights that it was trained on are {known.differs}." if known and known.differs else ""
    return (
        f"## Licences\n\n- This model: {own}.\n- The base model: {base}. Its terms hold for what is made of it.{used}"
    )


def _hashes(data: ReportData, declared: Declared, form: Form, report: bytes) -> str:
    origin = data.origin
    rows = [("report of the run, `report.json`", hashlib.sha256(report).hexdigest())]
    if origin is not None:
        rows += [(f"base model {plain(shown_base(data))}, as `fedveil` computes it", origin.base)]
        rows += [("code that the server ran, `fedveil bundle`", origin.bundle)] if origin.bundle else []
    rows += [(f"`{name}`", digest) for name, digest in form.files.items()]
    text = f"Run {plain(data.run)}, started {plain(data.started)}. "
    if "fedveil.json" in form.files:
        text += _REPORT_BESIDE
    elif not declared.report_url:
        text += "Ask its publisher for the run's signed report."
    if declared.report_url:
        # The declaration holds no character that ends such a link.
        text += f" The publisher says that the run's signed report lies at <{declared.report_url}>."
    table = "\n".join(f"| {name} | `{digest}` |" for name, digest in rows)
    return f"## Where it comes from\n\n{text}\n\n| what | SHA-256 |\n|---|---|\n{table}"


_REPORT_BESIDE = (
    "Its report ([report.md](../report.md), [report.html](../report.html)) has every release of every site. Where "
    "`report.signed.json` lies beside it, `fedveil verify RUN_FOLDER --key PUBLIC.pem` says who vouches for it, and "
    "finds a file of report or adapter that was changed, taken away or added."
)
