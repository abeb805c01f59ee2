"""The report as Markdown. Every word from elsewhere is escaped, every figure comes from the data."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence

from common.privacy.events import Event
from common.privacy.figures import NO_CLAIM, bound_text, epsilon_text
from common.words import (
    UNKNOWN,
    bytes_text,
    counted,
    decimal_text,
    number_text,
    numbers_text,
    percent_text,
    seconds_text,
    value_text,
    visible,
)
from reports.alike import Alike, alike_absences, alike_releases, alike_sites, participants_text
from reports.audits import NONE_RUN, WHOSE, audit_words, bound_sentences
from reports.claim import UNTOLD, none_refused, server_is_trusted
from reports.connection import NOT_KNOWN, NOT_RECORDED, SITES_OWN
from reports.data import ReportData, setting_of
from reports.meaning import attack_sentence, several_sentence, whose_sentence
from reports.scores import BESIDE, beside_cells, share_text
from reports.sharing import Sharing, at_h, beside
from reports.sites import distinct
from reports.trials import trials_figure

LINKED = re.compile(r"(?i)(?<=w)w(?=w\.)|:(?=//)|(?<=mailto):|(?<=xmpp):|@")
"""The character by which readers of Markdown know a bare address; written as its number it makes no link."""


def plain(text: str) -> str:
    """Return ``text`` so that Markdown shows it as it is, in a table too, and makes no link of an address in it.

    >>> plain("a|b <script> *c* https://d.example")
    'a\\\\|b &lt;script&gt; \\\\*c\\\\* https&#58;//d.example'
    """
    escaped = re.sub(r"([\\`*_\[\]|#~$])", r"\\\1", html.escape(visible(text), quote=False))
    return LINKED.sub(lambda match: f"&#{ord(match.group())};", escaped)


def to_markdown(data: ReportData) -> str:
    """Return the whole report."""
    parts = [
        [f"# Run {plain(data.run)}: {plain(data.method)}"],
        _notices(data),
        _result(data),
        _claim(data),
        _meaning(data),
        _trust(data),
        _connection(data),
        _accuracy(data),
        _beside(data),
        _sites(data),
        _rounds(data),
        _others(data),
        _origin(data),
    ]
    return "\n\n".join("\n".join(lines) for lines in parts if lines) + "\n"


def _notices(data: ReportData) -> list[str]:
    alarms = [f"> **AUDIT FAILED:** {plain(text)}\n" for text in data.alarms]
    return alarms + [f"> **Take care:** {plain(text)}\n" for text in [*data.problems, *data.claim.gaps]]


def _result(data: ReportData) -> list[str]:
    head = data.headline
    ended = data.status + (f": {data.reason}" if data.reason else "")
    central = server_is_trusted(data.claim.privacy_mode)
    basis = "by the server's ledger" if central else f"worst site: {plain(head.worst_site)}"
    accuracy = f"{percent_text(head.accuracy_before)} before → {percent_text(head.accuracy_after)} after"
    most = "at most " if central else ""
    in_last = "" if central or not head.rounds_done else f", {head.last_sites} in the last round"
    lines = [
        f"- status: {plain(ended)}",
        f"- accuracy on public data: {accuracy}",
        f"- rounds: {head.rounds_done} of {head.rounds_planned}, {most}{counted(head.sites, 'site')}{in_last}",
        f"- adapter payload: {bytes_text(head.bytes_down)} down, {bytes_text(head.bytes_up)} up"
        + (", of the usual draw" if central else f"; {seconds_text(head.seconds)}"),
    ]
    if head.epsilon is not None and head.delta is not None:
        lines.insert(
            1,
            f"- ε {epsilon_text(head.epsilon)} of {number_text(head.epsilon_budget)} at δ {head.delta:g} ({basis})"
            f"{beside(data.sharing)}" + (f"; {trials_figure(data.tuning)}" if data.tuning else ""),
        )
    return lines + [f"- {plain(text)}" for text in bound_sentences(data.audit_results)]


def _claim(data: ReportData) -> list[str]:
    claim = data.claim
    lines = ["## The claim", "", f"**{claim.sentence}**", ""]
    if claim.made:
        lines += _table(
            ("", ""),
            [
                ("unit", claim.unit),
                ("neighbours", claim.neighbours),
                ("adversary", claim.adversary),
                ("sampler", claim.sampler),
                ("accountant", claim.accountant),
            ],
        )
        lines += ["", "Covered:", "", *(f"- {text}" for text in claim.covered)]
        lines += ["", "Not covered:", "", *(f"- {text}" for text in claim.not_covered), ""]
    text = [f"\nPublic text of the start: {plain(claim.public_text)}."] if claim.public_text else []
    return [*lines, f"Head: {plain(claim.head)}.", *text]


def _meaning(data: ReportData) -> list[str]:
    meaning = data.meaning
    if meaning is None:
        return ["## What ε means", "", plain(data.unbounded), ""] if data.unbounded else []
    sentences = (attack_sentence(meaning), several_sentence(meaning), meaning.caution)
    spoken = [text for sentence in sentences if sentence for text in (plain(sentence), "")]
    at = at_h(data.sharing)
    columns = ["false positives", f"true positives, at most{at}"]
    attacks = [[f"{100 * a.false_positives:g} %", bound_text(a.true_positives)] for a in meaning.bounds.attacks]
    people = [(str(several.units), epsilon_text(several.epsilon)) for several in meaning.bounds.several]
    if meaning.alone:
        columns.append("the same, alone")
        for row, bare in zip(attacks, meaning.alone.attacks, strict=True):
            row.append(bound_text(bare.true_positives))
    if people:
        people = [("1", epsilon_text(meaning.epsilon)), *people]
    return [
        "## What ε means",
        "",
        plain(whose_sentence(central=server_is_trusted(data.claim.privacy_mode))),
        "",
        *spoken,
        *_table(columns, attacks),
        "",
        *(_table((f"{meaning.counted} of one person", f"ε at δ {meaning.delta:g}{at}"), people) if people else []),
    ]


def _trust(data: ReportData) -> list[str]:
    rows = [(actor.who, actor.sees, actor.trusted) for actor in data.actors]
    return [
        "## Who is trusted with what",
        "",
        *_table(("who", "sees", "is trusted"), rows),
        "",
        "No noise protects:",
        "",
        *(f"- {plain(text)}" for text in data.unprotected),
    ]


def _connection(data: ReportData) -> list[str]:
    lines = ["## The server and its connections", ""]
    if not data.connections:
        return [*lines, NOT_RECORDED]
    for report in data.connections:
        lines += [f"When the server began ({', '.join(report.began)}):", ""]
        lines += [f"- {plain(text)}" for text in report.said]
        lines += [f"- {NOT_KNOWN} {plain(text)}." for text in report.unknown]
        lines += [f"- Bundle, the server's code: SHA-256 `{report.bundle}`.", ""]
        if report.checks:
            rows = [("ok" if check.ok else "FAILED", check.what, check.found) for check in report.checks]
            lines += [*_table(("the server's own check", "of", "found"), rows), ""]
    return [*lines, SITES_OWN]


def _accuracy(data: ReportData) -> list[str]:
    if not data.accuracy:
        return []
    rows = [(r.label, number_text(r.records), share_text(r.before), share_text(r.after)) for r in data.accuracy]
    columns = ("label", "records", "before (95 % interval)", "after (95 % interval)")
    lines = ["## Accuracy on public data", "", *_table(columns, rows)]
    if data.slices:
        rows = [(r.label, number_text(r.records), share_text(r.before), share_text(r.after)) for r in data.slices]
        lines += ["", *_table((str(setting_of(data, "data.slice")), *columns[1:]), rows)]
    return lines


def _beside(data: ReportData) -> list[str]:
    if not data.beside:
        return []
    columns = ("variant", "arm", "ε", "runs", "before", "after")
    return ["## Beside other runs", "", BESIDE, "", *_table(columns, map(beside_cells, data.beside))]


def _sites(data: ReportData) -> list[str]:
    if server_is_trusted(data.claim.privacy_mode):
        return _cohort(data)
    columns = ("site", "public size", "rounds joined", "refused", "steps", "sample rate", "noise multiplier", "clip")
    rows = alike_sites(data.sites)
    return [
        "## Sites",
        "",
        *_table(
            columns,
            [(r.names, r.sizes, r.joined, r.refused, r.steps, r.rates, r.noises, r.clips) for r in rows],
        ),
        "",
        *_spent("site", rows, data.sharing),
    ]


def _cohort(data: ReportData) -> list[str]:
    """Return the one line of all sites of a trusted server."""
    columns = ("whose", "sites", "rounds charged", "chance to be drawn", "noise multiplier", "clip")
    rows = [(s.site, number_text(s.public_size), str(s.rounds_joined), *_figures(s.events)) for s in data.sites]
    return [
        "## The cohort",
        "",
        UNTOLD,
        "",
        *_table(columns, rows),
        "",
        *_spent("whose", alike_sites(data.sites), None),
    ]


def _spent(who: str, rows: Sequence[Alike], sharing: Sharing | None) -> list[str]:
    bare = bool(sharing and sharing.on_others)
    at, more = at_h(sharing), ("ε alone, this run",) if bare else ()
    again = (f"this run again, PLD{at}", f"this run, RDP{at}", *more)
    columns = (who, f"ε spent{at}", "at δ", "ε budget", f"ε left{at}", *again, "agreement")
    cells = [
        (r.names, r.spent, r.deltas, r.budgets, r.left, r.again, r.rdp, *((r.alone,) if bare else ()), r.note)
        for r in rows
    ]
    return _table(columns, cells)


def _figures(events: Sequence[Event]) -> list[str]:
    return [numbers_text(distinct(events, name)) for name in ("sample_rate", "noise_multiplier", "clip_norm")]


def _rounds(data: ReportData) -> list[str]:
    central = server_is_trusted(data.claim.privacy_mode)
    spent = "ε" if central else f"ε worst site{at_h(data.sharing)}"
    seconds = () if central else ("seconds",)
    return [
        "## Rounds",
        "",
        *_table(
            ("round", "accuracy", "loss", spent, "participants", "bytes down", "bytes up", *seconds),
            [
                (
                    str(r.round_number),
                    percent_text(r.accuracy),
                    decimal_text(r.loss, 4),
                    epsilon_text(r.epsilon_worst, NO_CLAIM if r.round_number or not data.claim.made else UNKNOWN),
                    participants_text(r.participants, data.sites) if r.counted else "did not count",
                    number_text(r.bytes_down),
                    number_text(r.bytes_up),
                    *(() if central else (seconds_text(r.seconds),)),
                )
                for r in data.rounds
            ],
        ),
    ]


def _others(data: ReportData) -> list[str]:
    lines = ["## Refusals and failures", ""]
    refusals = [
        (str(r.round_number), str(r.attempt), names, r.kind, r.reason)
        for names, r in alike_absences(data.refusals, len(data.sites))
    ]
    none = none_refused(central=server_is_trusted(data.claim.privacy_mode))
    lines += _table(("round", "attempt", "site", "kind", "reason"), refusals) if refusals else [none]
    if data.shortened:
        lines += ["", plain(data.shortened)]
    lines += ["", "## Releases other than training", ""]
    releases = [
        (str(r.round_number), r.names, r.purpose, r.count, r.noises, r.rates, r.clips, r.added, r.value)
        for r in alike_releases(data.other_releases, len(data.sites))
    ]
    columns = ("round", "site", "kind", "releases", "noise multiplier", "sample rate", "clip", "ε added", "value")
    return [*lines, *(_table(columns, releases) if releases else ["None."])]


def _origin(data: ReportData) -> list[str]:
    columns = ("audit", "outcome", "the code as it is", "faults built in", "with", "when", "file")
    rows = [(r.audit, *audit_words(r), r.date, r.file) for r in data.audit_results]
    audits = _table(columns, rows) if rows else [plain(NONE_RUN)]
    files = [f"- {plain(name)} (SHA-256 `{digest}`)" for name, digest in data.audits.items()]
    settings = [(s.key, value_text(s.value), value_text(s.default) if s.changed else "") for s in data.settings]
    return [
        "## Audit",
        "",
        *audits,
        *(["", WHOSE, "", *files] if files else []),
        "",
        "## Settings",
        "",
        *_table(("setting", "value", "default, where it differs"), settings),
        "",
        "## Versions",
        "",
        *(f"- {plain(name)} {plain(number)}" for name, number in data.versions.items()),
        *_hashes(data),
    ]


def _hashes(data: ReportData) -> list[str]:
    if data.origin is None:
        return []
    rows = [(data.origin.base_model, data.origin.base), *data.origin.files.items()]
    rows[1:1] = [("the server's code", data.origin.bundle)] if data.origin.bundle else []
    return ["", "## What the adapter is made of", "", *_table(("what", "SHA-256"), rows)]


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    head = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return head + ["| " + " | ".join(plain(cell) for cell in row) + " |" for row in rows]
