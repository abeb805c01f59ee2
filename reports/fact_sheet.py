"""The fact sheet of a run: one printed page for people who are no specialists, in questions and answers.

Every figure is the report's. Rates are said as people count, in 1,000, rounded against whoever makes the claim.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from common.privacy.figures import epsilon_text
from common.privacy.meaning import Meaning
from common.privacy.units import PERSON
from common.words import counted, number_text, percent_text
from reports.audits import bound_note
from reports.claim import server_is_trusted
from reports.data import ReportData, cares_of, cut_test, setting_of
from reports.meaning import condition
from reports.scores import share_text
from reports.sharing import NOT_ADDED, THIS_RUN, at_h, others_of, rests_on

NAME = "facts.html"
MOST_CARES, MOST_LABELS = 3, 7
"""What a page has room for."""


@dataclass(frozen=True)
class Fact:
    """One question, answered in a paragraph or two."""

    question: str
    answers: list[str]


def facts_of(data: ReportData) -> list[Fact]:
    """Return the questions of a fact sheet with their answers."""
    return [_made(data), _records(data), _promise(data), *_meaning(data), _left_out(data), _use(data), _checks(data)]


def in_thousand(share: float) -> str:
    """Return an upper bound of a share as a number in 1,000, never rounded down.

    >>> in_thousand(0.0405), in_thousand(1.0)
    ('41 in 1,000', '1,000 in 1,000')
    """
    return f"{math.ceil(1000 * share - 1e-9):,} in 1,000"


def _made(data: ReportData) -> Fact:
    head, base = data.headline, str(setting_of(data, "model.name")).rstrip("/").rpartition("/")[2]
    ended = {"completed": "It came to its planned end.", "unfinished": "It still goes on, or was cut off."}
    most = "at most " if server_is_trusted(data.claim.privacy_mode) else ""
    answer = (
        f"A computer model, {base}, was trained further by {most}{counted(head.sites, 'site')} together, in "
        f"{counted(head.rounds_done, 'round')} of {head.rounds_planned} planned. "
    )
    if 0 < head.last_sites < head.sites:
        answer += f"The last was of {counted(head.last_sites, 'site')} alone. "
    return Fact("What was made?", [answer + ended.get(data.status, f"It ended early ({data.status}).")])


def _records(data: ReportData) -> Fact:
    sizes = [site.public_size for site in data.sites if site.public_size is not None]
    whose = f" {data.claim.per}s" if data.claim.per == PERSON.name else ""
    noised = "with chance numbers (noise) added" if data.claim.made else "as they are"
    answer = (
        f"Those of the sites, {number_text(sum(sizes))}{whose} in all as the sites declare them. The records stayed "
        f"where they are. What left a site are numbers computed from its records, {noised}."
    )
    if server_is_trusted(data.claim.privacy_mode):
        answer = (
            f"Those of at most {number_text(sum(sizes))} sites; how many records they have, nobody says. The records "
            "stayed where they are. What left a site are numbers computed from its records, without noise, "
            "for the server alone. It is trusted with them, and added chance numbers (noise) to their sum before "
            "anybody else got it."
        )
    cut = (
        "The records on which the model was tested were taken from the same source and are not protected."
        if cut_test(data)
        else "The model was tested on other records, which are public."
    )
    return Fact("Whose records were used?", [answer, cut])


def _promise(data: ReportData) -> Fact:
    claim, head = data.claim, data.headline
    question = "What is promised to the people in the records?"
    if not claim.made or (head.epsilon is not None and math.isinf(head.epsilon)):
        return Fact(question, [claim.sentence])
    answer = (
        f"There is a limit on how much any one {claim.per} can change all that left a site, and the finished model. It "
        "holds whatever anybody else knows, and it was counted at every step before a record was used."
    )
    if server_is_trusted(claim.privacy_mode):
        answer = (
            "There is a limit on how much any one site, with all people in its records, can change what the server "
            "gave away, and the finished model. It holds whatever anybody else knows. It does not hold against the "
            "server: that one saw what each site sent, and nothing is promised about what it could find out."
        )
    on, told = rests_on(data.sharing), ""
    if data.sharing is not None:
        others = "They add their part of the chance numbers, and tell nobody of it or of their keys. "
        answer = (
            f"There is a limit on how much any one {claim.per} can change all that left a site, and the finished "
            f"model. It holds {on}. {'' if data.sharing.honest_sites == 1 else others}It was counted at every step "
            "before a record was used."
        )
        # The page has room for one more claim: what is left without the others, or what they add.
        told = "".join(f" {other[:1].upper()}{other[1:]}, {THIS_RUN}." for other in others_of(data.sharing)[:1])
    whose = "it" if server_is_trusted(claim.privacy_mode) else "the site with the largest"
    figure = (
        f"The limit is a number, ε (epsilon): {epsilon_text(head.epsilon)}{on and f', {on}'}; {whose} may "
        f"come to {number_text(head.epsilon_budget)}.{told} At 0 one {claim.per} would change nothing, and each "
        f"further 1 allows nearly three times the odds. Chances below δ = {head.delta:g} are left out of it."
    )
    if data.tuning is not None:
        figure += (
            f" The settings were chosen among {data.tuning.trials} trials with the same records, and each of them "
            f"counts: over all, the limit is {epsilon_text(data.tuning.epsilon)} (δ = {data.tuning.delta:g})."
        )
    return Fact(question, [answer, figure])


def _meaning(data: ReportData) -> list[Fact]:
    meaning, question = data.meaning, "What could somebody find out about one person?"
    if meaning is None:
        return [Fact(question, [data.unbounded])] if data.unbounded else []
    per = meaning.per
    on = condition(meaning)
    answers = [
        f"Say somebody saw {meaning.seen} and knows all {per}s but one. The best method that there can be to "
        f"find out whether that {per} was used does no more than this{on and f', {on}'}: {_tries(meaning.bounds)}."
    ]
    if meaning.honest_sites > 1:
        bare = meaning.alone
        least = " and ".join(in_thousand(attack.true_positives) for attack in bare.attacks) if bare else "all of them"
        answers.append(f"I{NOT_ADDED[1:]} (alone), it finds at most {least}.")
    if meaning.bounds.several:
        figures = ", ".join(
            f"{several.units} {meaning.counted}: {epsilon_text(several.epsilon)}" for several in meaning.bounds.several
        )
        at = at_h(data.sharing)
        answers.append(f"{meaning.whose} is protected less. Their ε is{at}, for {figures}.")
    caution = [meaning.caution] if meaning.caution else []
    return [Fact(question, [*answers, *caution])]


def _tries(bounds: Meaning) -> str:
    return "; ".join(
        f"if it wrongly names {in_thousand(attack.false_positives)} that were not used, it finds at most "
        f"{in_thousand(attack.true_positives)} that were"
        for attack in bounds.attacks
    )


def _left_out(data: ReportData) -> Fact:
    left = "; ".join(data.claim.not_covered)
    answer = f"{left[:1].upper()}{left[1:]}." if data.claim.made else "Everything: nothing is promised."
    cares = cares_of(data)
    more = [f"Take care: {len(cares) - MOST_CARES} more such sentences stand in the report."]
    told = [*(f"Take care: {text}" for text in cares[:MOST_CARES]), *(more if len(cares) > MOST_CARES else [])]
    return Fact("What is not promised?", [answer, *told])


def _use(data: ReportData) -> Fact:
    head = data.headline
    answer = (
        f"On test records it was right in {percent_text(head.accuracy_before)} before and "
        f"{percent_text(head.accuracy_after)} after training."
    )
    scored = [(row.after.value, row.label, row.after) for row in data.accuracy if row.after is not None]
    if len(scored) > MOST_LABELS:
        # The page has room for all records, and for the labels that it does worst and best by.
        scored = [scored[0], min(scored[1:], key=lambda row: row[0]), max(scored[1:], key=lambda row: row[0])]
    rows = [f"{label}: {share_text(share)}" for _, label, share in scored]
    by_label = [f"After training, with the range that chance allows (95 %): {'; '.join(rows)}."] if rows else []
    return Fact("How well does the model do?", [answer, *by_label])


def _checks(data: ReportData) -> Fact:
    audited = [f"{counted(len(data.audit_results), 'audit')} of the code lie beside this run."]
    answer = (
        f"The report of run {data.run} has every figure and says how each was computed. Where it is signed, fedveil "
        "verify says by whom. Ask whoever gave you this page for it, and the steward of your site about your records."
    )
    found = " ".join([*audited, bound_note(data.audit_results)]).rstrip()
    return Fact("Who can check this?", [answer, *([found] if data.audit_results else [])])
