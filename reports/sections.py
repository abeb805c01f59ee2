"""The sections of a report as blocks; every figure comes from the data."""

from __future__ import annotations

from collections.abc import Sequence

from fedveil.common.check import plain_names
from fedveil.common.tasks import TASKS, roles_of_all
from fedveil.common.words import (
    UNKNOWN,
    capital,
    decimal_text,
    number_text,
    numbers_text,
    percent_text,
    seconds_text,
    value_text,
)
from fedveil.privacy.events import Event
from fedveil.privacy.figures import NO_CLAIM, bound_text, epsilon_text
from fedveil.reports.alike import Alike, alike_absences, alike_releases, alike_sites, participants_text
from fedveil.reports.audits import NONE_RUN, WHOSE, audit_words, bound_sentences
from fedveil.reports.claim import UNTOLD, none_refused
from fedveil.reports.connection import NOT_KNOWN, NOT_RECORDED, SITES_OWN
from fedveil.reports.data import ReportData, setting_of
from fedveil.reports.document import Bad, Block, Good, Items, Section, Table, Terms, Text
from fedveil.reports.meaning import attack_sentence, several_sentence, whose_sentence
from fedveil.reports.scores import BESIDE, RARE, Confusion, LabelReport, PartReport, beside_cells, share_text
from fedveil.reports.sharing import at_h
from fedveil.reports.sites import distinct

FIGURES = ("sample rate", "noise multiplier", "clip")
MODEL, PRIVACY, RUN = "The model", "Privacy", "The run"
"""Groups of the contents."""
COUNTS = (
    "The ledger's total counts. It is computed by PLD (privacy loss distributions). The report recomputes this run's "
    "share of it by PLD, and by RDP (Rényi differential privacy), a second bound that is nearly always larger. Both "
    "recomputations use σ (noise over clip), the sample rate and the {}, and no ledger."
)


def sections_of(data: ReportData) -> list[Section]:
    """Return the sections of a report that have anything to say, in order."""
    found = [
        Section("accuracy", f"{capital(data.judged_by)} on public data", MODEL, _accuracy(data)),
        Section("beside", "Compared with other runs", MODEL, _beside(data)),
        Section("promise", "What is promised", PRIVACY, _claim(data)),
        Section("meaning", "What ε means", PRIVACY, _meaning(data)),
        Section("trust", "Who is trusted with what", PRIVACY, _trust(data)),
        Section("sites", "The cohort" if data.claim.trusts_server else "Sites", PRIVACY, _sites(data)),
        Section("refusals", "Refusals and failures", PRIVACY, _refusals(data)),
        Section("releases", "Releases other than training", PRIVACY, _releases(data)),
        Section("audit", "Audit", PRIVACY, _audit(data)),
        Section("rounds", "Rounds", RUN, _rounds(data)),
        Section("server", "The server and its connections", RUN, _connection(data)),
        Section("settings", "Settings", RUN, _settings(data)),
        Section("versions", "Versions", RUN, [Text(", ".join(f"{k} {v}" for k, v in data.versions.items()))]),
        Section("origin", "Files and their hashes", RUN, _origin(data)),
    ]
    return [section for section in found if section.blocks]


def _claim(data: ReportData) -> list[Block]:
    claim = data.claim
    terms = [
        ("who is protected (unit)", claim.unit),
        ("what may differ (neighbours)", claim.neighbours),
        ("from whom (adversary)", claim.adversary),
        ("how records are drawn (sampler)", claim.sampler),
        ("how ε is counted (accountant)", claim.accountant),
    ]
    words = [("the last layer (head)", claim.head)]
    words += [("public text of the initialisation", claim.public_text)] if claim.public_text else []
    blocks: list[Block] = [Terms([*(terms if claim.made else []), *words])]
    lists = [Items("Covered:", claim.covered), Items("Not covered:", claim.not_covered)]
    return blocks + (lists if claim.made else [])


def _meaning(data: ReportData) -> list[Block]:
    meaning = data.meaning
    if meaning is None:
        return [Text(data.unbounded)] if data.unbounded else []
    said = (whose_sentence(central=data.claim.trusts_server), attack_sentence(meaning), several_sentence(meaning))
    blocks: list[Block] = [Text(text) for text in said if text]
    blocks += [Text(meaning.caution, "care")] if meaning.caution else []
    at = at_h(data.sharing)
    columns = ["false positives", f"true positives, at most{at}"]
    attacks = [[f"{100 * a.false_positives:g} %", bound_text(a.true_positives)] for a in meaning.bounds.attacks]
    if meaning.alone:
        columns.append("the same, alone")
        for row, bare in zip(attacks, meaning.alone.attacks, strict=True):
            row.append(bound_text(bare.true_positives))
    caption = f"Bounds on every attack that asks whether one {meaning.per} was trained on"
    blocks.append(Table(caption, columns, attacks, range(3)))
    if several := meaning.bounds.several:
        people = [("1", epsilon_text(meaning.epsilon)), *((str(s.units), epsilon_text(s.epsilon)) for s in several)]
        columns = [f"{meaning.counted} of one person", f"ε at δ {meaning.delta:g}{at}"]
        blocks.append(Table(f"ε of a person with several {meaning.counted}", columns, people, range(2)))
    return blocks


def _trust(data: ReportData) -> list[Block]:
    rows = [(actor.who, actor.sees, actor.trusted) for actor in data.actors]
    caption = "Each party of the run, in the words of NIST SP 800-226"
    return [
        Table(caption, ("who", "sees", "is trusted with"), rows),
        Items("Not protected by noise:", data.unprotected),
    ]


def _audit(data: ReportData) -> list[Block]:
    columns = ("audit", "outcome", "the code as it is", "planted faults found", "with", "when", "file")
    rows = []
    for result in data.audit_results:
        outcome, *more = audit_words(result)
        rows.append((result.audit, Good(outcome) if result.passed else Bad(outcome), *more, result.date, result.file))
    caption = "Attacks on the code, and on copies with planted faults, which they must find"
    blocks: list[Block] = [Table(caption, columns, rows)] if rows else [Text(NONE_RUN)]
    blocks += [Items("", bounds)] if (bounds := bound_sentences(data.audit_results)) else []
    files = [f"{name} (SHA-256 {digest})" for name, digest in data.audits.items()]
    return blocks + ([Items(WHOSE, files)] if files else [])


def _sites(data: ReportData) -> list[Block]:
    named = [Text(words)] if (words := _named(data)) else []
    if not data.sites:
        none = "No round has been charged yet." if data.claim.trusts_server else "No site has replied yet."
        return [*named, Text(none)]
    rows = alike_sites(data.sites)
    if data.claim.trusts_server:
        columns: tuple[str, ...] = ("whose", "sites", "rounds charged", "chance to be drawn", *FIGURES[1:])
        cohort = [(s.site, number_text(s.public_size), str(s.rounds_joined), *_figures(s.events)) for s in data.sites]
        caption = "What the server charged for all sites together"
        blocks: list[Block] = [Text(UNTOLD), Table(caption, columns, cohort, range(1, 6))]
    else:
        columns = ("site", "public size", "rounds joined", "refused", "steps", *FIGURES)
        cells = [(r.names, r.sizes, r.joined, r.refused, r.steps, r.rates, r.noises, r.clips) for r in rows]
        blocks = [Table("What each site did in this run", columns, cells, range(1, 8))]
    blocks = [*named, *blocks, _spent(data, rows)]
    whence = "rounds in the server's files" if data.claim.trusts_server else "steps that each site reported"
    return blocks + ([Text(COUNTS.format(whence))] if data.claim.made else [])


def _named(data: ReportData) -> str:
    """Return which sites the run was for, by the server's word, and whose project it was; empty: it says neither."""
    project, sites = setting_of(data, "project"), plain_names(setting_of(data, "named-sites"))
    whose = f"The run was for the project {project}, by the server's word. " if project else ""
    alone = f"It named the sites that it was for: {', '.join(sites)}. No other site got a task." if sites else ""
    return (whose + alone).strip()


def _spent(data: ReportData, rows: Sequence[Alike]) -> Table:
    bare = bool(data.sharing and data.sharing.on_others)
    at, more = at_h(data.sharing), ("ε alone, this run",) if bare else ()
    again = (f"this run recomputed, PLD{at}", f"this run, RDP{at}", *more)
    who = "whose" if data.claim.trusts_server else "site"
    columns = (who, f"ε spent{at}", "at δ", "ε budget", f"ε left{at}", *again, "agreement")
    cells = []
    for row in rows:
        note = Good(row.note) if row.agreement == "agrees" else row.note
        note = Bad(note) if row.agreement in ("smaller", "unknown") else note
        figures = (row.spent, row.deltas, row.budgets, row.left, row.again, row.rdp)
        cells.append((row.names, *figures, *((row.alone,) if bare else ()), note))
    whose = "the cohort has spent, by the server's" if data.claim.trusts_server else "each site has spent, by its own"
    caption = f"What {whose} ledger, and this run's part recomputed"
    return Table(caption, columns, cells, range(1, len(columns) - 1))


def _figures(events: Sequence[Event]) -> list[str]:
    return [numbers_text(distinct(events, name)) for name in ("sample_rate", "noise_multiplier", "clip_norm")]


def _refusals(data: ReportData) -> list[Block]:
    rows = [
        (str(absence.round_number), str(absence.attempt), names, absence.kind, absence.reason)
        for names, absence in alike_absences(data.refusals, len(data.sites))
    ]
    columns = ("round", "attempt", "site", "kind", "reason")
    table = Table("Sites that did not take part in a round, and why", columns, rows, range(2))
    blocks: list[Block] = [table] if rows else [Text(none_refused(central=data.claim.trusts_server))]
    return blocks + ([Text(data.shortened)] if data.shortened else [])


def _releases(data: ReportData) -> list[Block]:
    rows = [
        (str(r.round_number), r.names, r.purpose, r.count, r.noises, r.rates, r.clips, r.added, r.value)
        for r in alike_releases(data.other_releases, len(data.sites))
    ]
    columns = ("round", "site", "kind", "releases", "noise multiplier", "sample rate", "clip", "ε added", "value")
    table = Table("Each was charged to the same budget", columns, rows, (0, *range(3, 9)))
    return [table if rows else Text("None.")]


def _connection(data: ReportData) -> list[Block]:
    blocks: list[Block] = []
    for report in data.connections:
        said = [*report.said, *(f"{NOT_KNOWN} {text}." for text in report.unknown)]
        began = ", ".join(report.began)
        said.append(f"Bundle, the server's code: SHA-256 {report.bundle}.")
        blocks.append(Items(f"When the server started ({began}):", said))
        rows = [(check.what, Good("ok") if check.ok else Bad("FAILED"), check.found) for check in report.checks]
        if rows:
            blocks.append(Table(f"The server's own check at {began}", ("what", "outcome", "found"), rows))
    return [*blocks, Text(SITES_OWN if data.connections else NOT_RECORDED)]


def _accuracy(data: ReportData) -> list[Block]:
    caption = "Accuracy on the test set, in all and by label, with Wilson's 95 % interval beside it"
    blocks: list[Block] = [_scores(caption, "label", data.accuracy)] if data.accuracy else []
    if data.headline.macro_f1_after is not None:
        macro = [percent_text(value) for value in (data.headline.macro_f1_before, data.headline.macro_f1_after)]
        blocks.append(Text(f"{macro[0]} before training, {macro[1]} after", label="Macro-F1 (mean of the labels' F1):"))
    blocks += [_confused(data.confusion)] if data.confusion else []
    blocks += [*_figures_beside(data), *_by_part(data.parts)]
    what = "Accuracy" if data.judged_by == "accuracy" else "Records whose whole answer is right,"
    if data.slices and (name := str(setting_of(data, "data.slice"))):
        blocks.append(_scores(f"{what} by {name}, a column of the public test file", name, data.slices))
    elif data.slices:
        blocks.append(_scores(f"{what} by the site that test records are of", "site", data.slices))
    return blocks


def _figures_beside(data: ReportData) -> list[Block]:
    """Return the named figures of the score; empty where the task has none."""
    rows = [(figure.name, share_text(figure.before), share_text(figure.after)) for figure in data.figures]
    caption = "On the test set, with the normal 95 % interval over its records; macro F1 has none"
    return [Table(caption, ("figure", "before", "after"), rows, range(1, 3))] if rows else []


def _by_part(parts: Sequence[PartReport]) -> list[Block]:
    """Return precision, recall and F1 of each kind of part, and which are rare; empty where answers have no parts."""
    rows = [
        (
            part.label + " (rare)" * part.rare,
            *(number_text(part.records), share_text(part.before)),
            *map(share_text, (part.precision, part.recall, part.after)),
        )
        for part in parts
    ]
    caption = (
        "By label on the test set: precision and recall after training with Wilson's 95 % interval, and F1 with that "
        "of the right ones among those that are there or given"
    )
    columns = ("label", "in the test set", "F1 before", "precision", "recall", "F1 after")
    rare = Text(f"Fewer than {RARE} are in the test set: the figures of such a label say little.", label="Rare:")
    table = Table(caption, columns, rows, range(1, 6))
    return [table, *([rare] if any(part.rare for part in parts) else [])] if rows else []


def _scores(caption: str, name: str, reports: Sequence[LabelReport]) -> Table:
    rows = [(r.label, number_text(r.records), share_text(r.before), share_text(r.after)) for r in reports]
    columns = (name, "records", "before", "after")
    return Table(caption, columns, rows, range(1, 4))


def _confused(confusion: Confusion) -> Table:
    """Return the matrix of labels and what they are taken for; the labels of its columns are by number."""
    numbers = range(1, len(confusion.labels) + 1)
    rows = [
        [f"{n} {label}", *(Good(count) if at == n else str(count) for at, count in enumerate(counts, start=1))]
        for n, label, counts in zip(numbers, confusion.labels, confusion.records, strict=True)
    ]
    caption = "Confusion matrix after training: records by their label (row) and by the model's answer (column)"
    return Table(caption, ["label", *map(str, numbers)], rows, numbers, matrix=True)


def _beside(data: ReportData) -> list[Block]:
    columns = ("variant", "trained by", "ε", "runs", "before", "after")
    caption = f"{capital(data.judged_by)} of other runs on the same base model and data"
    table = Table(caption, columns, [beside_cells(row) for row in data.beside], range(2, 6))
    return [Text(BESIDE), table] if data.beside else []


def _rounds(data: ReportData) -> list[Block]:
    central = data.claim.trusts_server
    spent = "ε" if central else f"ε worst site{at_h(data.sharing)}"
    columns = ["round", data.judged_by, "loss", spent, "participants", "bytes down", "bytes up", "seconds"]
    rows = [
        [
            str(r.round_number),
            percent_text(r.accuracy),
            decimal_text(r.loss, 4),
            epsilon_text(r.epsilon_worst, NO_CLAIM if r.round_number or not data.claim.made else UNKNOWN),
            participants_text(r.participants, data.sites) if r.counted else Bad("did not count"),
            number_text(r.bytes_down),
            number_text(r.bytes_up),
            seconds_text(r.seconds),
        ]
        for r in data.rounds
    ]
    if central:  # how long a round took tells who was drawn
        columns, rows = columns[:-1], [row[:-1] for row in rows]
    caption = "Scores on the public test set; bytes are the adapter payload of all messages in the round"
    table = Table(caption, columns, rows, {0, 1, 2, 3, 5, 6, 7})
    return [table if rows else Text("No round has finished yet.")]


def _settings(data: ReportData) -> list[Block]:
    task = TASKS.get(str(setting_of(data, "model.task")))
    unread = {f"data.{role.setting}" for role in roles_of_all() if task and role not in task.roles}
    changed = [(s.key, value_text(s.value), value_text(s.default)) for s in data.settings if s.changed]
    others = [(s.key, value_text(s.value)) for s in data.settings if not s.changed and s.key not in unread]
    blocks: list[Block] = []
    if changed:
        blocks.append(Table("Settings of this run's own", ("setting", "value", "default"), changed))
    folded = f"{len(others)} settings at their defaults or filled in by the recipe"
    return [*blocks, Table("All other settings that this task reads", ("setting", "value"), others, folded=folded)]


def _origin(data: ReportData) -> list[Block]:
    if data.origin is None:
        return []
    rows = [(data.origin.base_model, data.origin.base), *data.origin.files.items()]
    rows[1:1] = [("the server's code", data.origin.bundle)] if data.origin.bundle else []
    caption = "SHA-256 of base model, server code and adapter files"
    return [Table(caption, ("what", "SHA-256"), rows)]
