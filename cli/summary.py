"""The end of a run in six lines; what else there is to say stands in its report."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

if TYPE_CHECKING:
    from fedveil.reports.data import ReportData

console = Console(highlight=False, soft_wrap=True, emoji=False, markup=False)


def print_summary(folder: Path, data: ReportData | None = None, seconds: float | None = None) -> None:
    """Print what a run has come to, what it has spent, what was trained, where it lies, and three ways on.

    What weakens the claim stands before it, and how the run ended where it did not come to its planned end.

    Args:
        folder: of the run.
        data: its report; None: it is made from the folder's files.
        seconds: how long the run took; None: that is not said.
    """
    from fedveil.common.words import visible
    from fedveil.reports import report_of
    from fedveil.reports.data import cares_of

    data = data or report_of(folder)
    for text in cares_of(data):
        if text in data.alarms:
            console.print(Text(f"AUDIT FAILED: {visible(text)}", style="bold red"))
        else:
            console.print(f"WARNING: {visible(text)}")
    if data.status != "completed":
        console.print(visible(f"{data.status}: {data.reason or 'no result yet'}"))
    took = "" if seconds is None else f" in {seconds:.0f} s"
    for line in (_accuracy_line(data), _privacy_line(data), _trained_line(data) + took):
        console.print(visible(line))
    console.print(f"folder: {folder} (report.html has all figures)")
    console.print(f"next: {'; '.join(_next_commands(data, folder))}")


def _accuracy_line(data: ReportData) -> str:
    from fedveil.common.words import counted, percent_text
    from fedveil.reports.scores import share_text

    head = data.headline
    before, after, on = percent_text(head.accuracy_before), percent_text(head.accuracy_after), "public data"
    figures = {figure.name: figure for figure in data.figures}
    if headline := figures.pop(data.judged_by, None):
        before, after = share_text(headline.before), share_text(headline.after)
        on = f"{on}, with 95 % intervals"
    elif data.accuracy:
        score = data.accuracy[0]
        on = f"{counted(score.records, 'public record')}, with 95 % intervals"
        before = share_text(score.before) if score.before else before
        after = share_text(score.after) if score.after else after
    last = {name: one.after.value if one.after else None for name, one in figures.items()}
    beside = "".join(f"; {name} {percent_text(value)}" for name, value in last.items())
    control = data.control and f" ({data.control})"
    return f"{data.judged_by}: {after}, from {before} before training{control}, on {on}{beside}"


def _privacy_line(data: ReportData) -> str:
    """Return the federation's ε with its conditions and one clause on what it means, or why there is none."""
    from fedveil.privacy.figures import bound_text, epsilon_text
    from fedveil.reports.audits import bound_note
    from fedveil.reports.meaning import condition
    from fedveil.reports.sharing import beside
    from fedveil.reports.trials import trials_figure

    head, meaning = data.headline, data.meaning
    if head.epsilon is None:
        return f"privacy: {data.claim.sentence}"
    whose = "of the cohort" if data.claim.trusts_server else "the maximum over sites"
    said = f"ε = {epsilon_text(head.epsilon)} at δ = {head.delta:g} per {data.claim.per}, {whose}{beside(data.sharing)}"
    notes = [trials_figure(data.tuning)] if data.tuning else []
    if meaning is not None and meaning.bounds.attacks:
        attack, on = meaning.bounds.attacks[0], condition(meaning)
        finds = f"finds at most {bound_text(attack.true_positives)} of the {meaning.per}s"
        who = f"{on and f'{on}, '}an attacker who sees {meaning.seen}"
        notes.append(f"{who} {finds} at {100 * attack.false_positives:g} % false alarms")
    notes += [note for note in (bound_note(data.audit_results), data.unbounded) if note]
    return "; ".join([f"privacy: {said}", *notes])


def _trained_line(data: ReportData) -> str:
    from fedveil.common.config.sections import NO_ADAPTER
    from fedveil.common.words import counted
    from fedveil.reports.data import setting_of

    head, base = data.headline, str(setting_of(data, "model.name")).rstrip("/").rpartition("/")[2]
    if setting_of(data, "adapter.name") == NO_ADAPTER:
        what = "the classification head only, no LoRA adapter"
    else:
        what = f"an adapter of rank {setting_of(data, 'adapter.rank')} by {data.method}"
    sites = "at most " * data.claim.trusts_server + counted(head.sites, "site")
    last = f" (the last by {head.last_sites})" * (0 < head.last_sites < head.sites)
    return f"trained: {what}, on {base}, by {sites} in {head.rounds_done} of {head.rounds_planned} rounds{last}"


def _next_commands(data: ReportData, folder: Path) -> list[str]:
    from fedveil.common.tasks import TASKS
    from fedveil.reports.data import setting_of

    place = shlex.quote(str(folder))
    report = f"fedveil report {place}"
    if data.origin is None:
        return [report]
    what = "a text" if TASKS[str(setting_of(data, "model.task"))].wording else "a file"
    return [f'fedveil ask {place} "{what}"', f"fedveil merge {place} model", report]
