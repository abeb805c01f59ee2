"""The annex of a run for those who check it against the law: what its files show, and what somebody else must answer.

Three texts: the GDPR with Opinion 28/2024 of the European Data Protection Board (adopted 17 December 2024), the EU's AI
Act (Regulation (EU) 2024/1689), and HIPAA's Privacy and Security Rules (45 CFR 164). A row has the question as those
texts put it, in our words, and the fact of this run beside it. It judges nothing: whether a model is anonymous, a
system of high risk, or data de-identified is for people. What no file of a run can know is named as such.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from common.privacy.figures import epsilon_text
from common.words import counted, number_text
from reports.audits import bound_sentences
from reports.claim import server_is_trusted
from reports.compute import compute_words
from reports.connection import NOT_KNOWN, connection_sentences
from reports.data import ReportData, cares_of, cut_test, setting_of
from reports.declared import Declared
from reports.markdown import plain
from reports.meaning import attack_sentence, condition, several_sentence
from reports.scores import share_text
from reports.sharing import beside
from reports.statements import QUESTIONS, Statement
from reports.trials import trials_figure

NAME = "annex.md"
OPEN = "Not known to this run's files:"
"""Before what somebody must answer."""
LEFT_OPEN = "**The steward has left it open.**"


@dataclass(frozen=True)
class Row:
    """One question of a text, and what the run's files say to it. A fact that begins with ``OPEN`` is none."""

    where: str
    question: str
    facts: list[str]


def annex_of(data: ReportData, declared: Declared, statements: Sequence[Statement], report_sha256: str) -> str:
    """Return the annex as Markdown.

    Args:
        data: the run's report.
        declared: what the coordinator has declared.
        statements: the stewards', as they were handed over.
        report_sha256: of ``report.json``, which has every figure.
    """
    parts = [
        f"# Annex to run {plain(data.run)}",
        "Facts of this run, beside the questions of three texts. It is no legal advice and judges nothing. What is "
        f"“{OPEN.lower().rstrip(':')}” is for people to answer. Every figure stands in `report.json`, SHA-256 "
        f"`{report_sha256}`.",
        *[f"> Take care: {plain(text)}" for text in cares_of(data)],
        _table("GDPR, and EDPB Opinion 28/2024", _gdpr(data, declared, statements)),
        _table("EU AI Act (Regulation (EU) 2024/1689)", _ai_act(data, declared)),
        _table("HIPAA (45 CFR 164)", _hipaa(data)),
        _said(statements),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _table(title: str, rows: Sequence[Row]) -> str:
    lines = [f"| {row.where} | {row.question} | {'<br>'.join(map(_fact, row.facts))} |" for row in rows]
    return "\n".join([f"## {title}", "", "| where | question | this run |", "|---|---|---|", *lines])


def _fact(text: str) -> str:
    return f"**{OPEN}** {plain(text.removeprefix(OPEN).strip())}" if text.startswith(OPEN) else plain(text)


def _claim(data: ReportData) -> list[str]:
    if not data.claim.made:
        return [data.claim.sentence]
    head = data.headline
    basis = "by the server's ledger" if server_is_trusted(data.claim.privacy_mode) else "the maximum over sites"
    basis += beside(data.sharing)
    figure = f"(ε, δ) = ({epsilon_text(head.epsilon)}, {head.delta:g}) per {data.claim.per}, {basis}"
    figure += f"; {trials_figure(data.tuning)}" if data.tuning else ""
    return [data.claim.sentence, figure, f"against: {data.claim.adversary}", f"neighbours: {data.claim.neighbours}"]


def _membership(data: ReportData) -> list[str]:
    """Return the bounds on finding out whether a record was used, proven and tried."""
    if data.meaning is None:
        return [data.unbounded or "No bound: there is no finite claim to derive one from."]
    told = [attack_sentence(data.meaning), several_sentence(data.meaning), data.meaning.caution]
    return [text for text in told if text]


def _queries(data: ReportData) -> list[str]:
    if data.meaning is None:
        return []
    on = condition(data.meaning)
    return [
        f"The bound holds{on and f', {on},'} for {data.meaning.seen} and for the model, whatever is asked of it. "
        "Whether it makes the likelihood insignificant is for the authority, case by case."
    ]


def _tests(data: ReportData) -> list[str]:
    if not data.audit_results:
        return [f"{OPEN} No audit lies beside this run: FedVeil's repository has them (docs/privacy-checked.md)."]
    rows = [f"{row.audit}: {'passed' if row.passed else 'FAILED'}" for row in data.audit_results]
    return [*rows, *bound_sentences(data.audit_results)]


def _measures(data: ReportData) -> list[str]:
    left = "clipped and noised before they left" if data.claim.made else "as they were computed, without noise"
    declared, most = f"{number_text(_declared_records(data))}, as the sites declare", ""
    if data.claim.made and data.sharing is not None:
        left = "clipped, with a part of the noise of their sum, and masked, so that the server sees the sum alone"
    if server_is_trusted(data.claim.privacy_mode):
        left = "clipped, and without noise: the server, which is trusted, noised their sum"
        declared, most = "their number is told to nobody", "at most "
    return [
        f"Records of {most}{counted(data.headline.sites, 'site')} ({declared}) stayed at the sites; what left are "
        f"numbers computed from them, {left}.",
        f"Trained were the adapter's factors{' and the head' if setting_of(data, 'head.policy') == 'trained' else ''}; "
        "the base model stayed as it was.",
        *[f"Not protected: {text}." for text in data.unprotected],
    ]


def _declared_records(data: ReportData) -> int:
    return sum(site.public_size for site in data.sites if site.public_size is not None)


def _gdpr(data: ReportData, declared: Declared, statements: Sequence[Statement]) -> list[Row]:
    said = [f"{row.site} says: see below (SHA-256 {row.sha256[:16]}…)." for row in statements]
    silent = sorted({site.site for site in data.sites} - {row.site for row in statements})
    missing = [f"{OPEN} No steward's statement of {_several(silent)} lies beside this run."] if silent else []
    central = server_is_trusted(data.claim.privacy_mode)
    if central:
        missing = [f"{OPEN} Of which sites no steward's statement lies beside this run: it does not say who took part."]
    ledgers = (
        "the server's ledger of the cohort"
        if central
        else "a ledger at each site that no run can change; fedveil ledger receipt hands out a run's part of it"
    )
    purpose = [f"The coordinator declares: {declared.intended_use}"] if declared.intended_use else []
    return [
        Row("Art. 5(1)(a), 6, 9", "Which legal basis do the sites have?", said + missing),
        Row(
            "Art. 5(1)(b)",
            "What is the model for, and is that what the records were collected for?",
            [*(purpose or [f"{OPEN} Nobody has declared a use."]), f"{OPEN} What the records were collected for."],
        ),
        Row("Art. 5(1)(c), 25", "What limits what is used and what leaves a site?", _measures(data)),
        Row("Art. 5(1)(e)", "How long are records kept?", [*said, *missing, "The run's folder holds no record."]),
        Row(
            "Art. 5(2), 30",
            "What documents the processing?",
            [
                f"report.json ({data.schema}), each round in rounds.jsonl and privacy.jsonl, and {ledgers}.",
                f"{OPEN} The controllers' records of processing.",
            ],
        ),
        Row("Art. 26", "Who is a controller, alone or with others?", [f"{OPEN} Contracts between the sites say it."]),
        Row(
            "Art. 32",
            "Who could see what?",
            [
                *[f"{actor.who} sees {actor.sees}; it is trusted {actor.trusted}." for actor in data.actors],
                f"{OPEN} How machines and keys were kept. fedveil doctor checks what a machine can tell.",
            ],
        ),
        Row("Art. 35", "Was the impact assessed?", [f"{OPEN} Whether an assessment is due, and what it found."]),
        Row(
            "Opinion 28/2024, on anonymity",
            "How likely is it that personal data are extracted from the model, or obtained by queries to it, with all "
            "means reasonably likely to be used?",
            [
                *_claim(data),
                *_membership(data),
                *_queries(data),
                *[f"Not covered: {text}." for text in data.claim.not_covered],
            ],
        ),
        Row("Opinion 28/2024, on tests", "Which attacks were tried?", _tests(data)),
        Row(
            "Opinion 28/2024, on deployment",
            "What limits what the model gives out?",
            [f"{OPEN} Filters, access and logging where the model is used."],
        ),
    ]


def _ai_act(data: ReportData, declared: Declared) -> list[Row]:
    base = data.origin.base_model if data.origin else str(setting_of(data, "model.name"))
    scored = [row for row in data.accuracy if row.after is not None]
    rows = [f"{row.label}: {share_text(row.after)}" for row in scored if row.after is not None]
    cut = [cut_test(data)] if cut_test(data) else []
    return [
        Row("Art. 6", "Is it a system of high risk?", [f"{OPEN} It follows from the use, which the run does not see."]),
        Row(
            "Art. 10",
            "Which data, and what is known of their gaps and bias?",
            [
                f"Task {setting_of(data, 'model.task')}; "
                + (
                    "nobody but the sites knows how many records."
                    if server_is_trusted(data.claim.privacy_mode)
                    else f"{number_text(_declared_records(data))} records, as declared."
                ),
                f"{OPEN} How the records were chosen and labelled: nobody but the sites has seen one.",
            ],
        ),
        Row(
            "Art. 11 and 12, Annex IV",
            "What is the technical documentation and the log?",
            [
                "All settings, versions and hashes stand in report.json; each round in rounds.jsonl, each release in "
                "privacy.jsonl.",
                *([f"Code: SHA-256 {data.origin.bundle}."] if data.origin and data.origin.bundle else []),
            ],
        ),
        Row(
            "Art. 15",
            "How accurate is it, and for whom?",
            [
                *(rows or [f"{OPEN} No score by label was kept."]),
                *cut,
                "Noise costs small groups more.",
            ],
        ),
        Row(
            "Art. 53, and the Commission's guidelines of July 2025",
            "Is this a new general-purpose model? They ask it of a change that took more than a third of the base "
            "model's training compute.",
            [
                f"Base model: {base}, not trained further but for the adapter; {data.headline.rounds_done} rounds of "
                f"{setting_of(data, 'training.local-steps')} steps at each site.",
                *(compute_words(data.compute, declared.base_training_flop) or [f"{OPEN} The run's training compute."]),
                *([] if declared.base_training_flop else [f"{OPEN} The base model's training compute."]),
                *([f"Its licence, as declared: {declared.base_license}"] if declared.base_license else []),
            ],
        ),
    ]


def _as_fact(text: str) -> str:
    """Return a sentence on connections; what the server app does not know, no file of the run knows."""
    return f"{OPEN}{text.removeprefix(NOT_KNOWN)}" if text.startswith(NOT_KNOWN) else text


def _hipaa(data: ReportData) -> list[Row]:
    central = server_is_trusted(data.claim.privacy_mode)
    return [
        Row(
            "164.514(b)(1)",
            "What can an expert rest on who determines that the risk of identification is very small?",
            [*_claim(data), *_membership(data)],
        ),
        Row(
            "164.514(b)(2)",
            "Were the eighteen identifiers removed?",
            [f"{OPEN} The run changes no record, and reads the columns that each site's policy pins."],
        ),
        Row(
            "164.312(b)",
            "What records the activity?",
            [
                "Each site's ledger, written before a record is used and never changed; the server's rounds.jsonl.",
                *(["The server's own ledger, written before a site is asked."] if central else []),
            ],
        ),
        Row(
            "164.312(d) and (e)",
            "Who could take part, and how was it transmitted?",
            [_as_fact(text) for text in connection_sentences(data.connections)],
        ),
        Row(
            "164.502(e), 164.504(e)",
            "Are there agreements with business associates?",
            [f"{OPEN} Contracts between the sites and the coordinator."],
        ),
    ]


def _said(statements: Sequence[Statement]) -> str:
    if not statements:
        return ""
    parts = ["## The stewards' own statements", "Quoted as they were handed over. Nobody here has checked them."]
    for row in statements:
        answers = [f"* {question} {plain(row.answers[key]) or LEFT_OPEN}" for key, question in QUESTIONS.items()]
        parts += [f"### {row.site}", f"Data set {plain(row.dataset)}; SHA-256 `{row.sha256}`.", "\n".join(answers)]
    return "\n\n".join(parts)


def _several(names: Sequence[str]) -> str:
    shown = ", ".join(names[:5])
    return f"{shown} and {len(names) - 5} more" if len(names) > 5 else shown
