"""The charges that a run's files may lack: of a reply that never came, or a round that was cut off.

A site's total counts all that it was charged for, so what is lost stands in the next total that it tells. Looked for
are sites that had told one, and none since.
"""

from __future__ import annotations

from fedveil.common.run_lines import Absence
from fedveil.common.words import names_text, natural
from fedveil.reports.folder import RunFiles

LOST = {"late": "was late", "failed": "failed", "reply": "sent a reply that was refused"}
"""In words, the kinds of absence after which a site may have been charged for what no line tells."""
THEN = "told no charge after it: if it was charged, its own ledger alone says so, and ε is too low"


def unseen_charges(files: RunFiles) -> list[str]:
    """Return, a sentence each, which sites may have been charged for what no total in a run's files counts."""
    found: dict[str, list[str]] = {}
    for site in sorted({line.site for line in files.privacy if line.spent}, key=natural):
        if reason := _lost(site, files) or _cut_off(site, files):
            found.setdefault(reason, []).append(site)
    return [f"{names_text(sites)}: {reason}" for reason, sites in found.items()]


def _lost(site: str, files: RunFiles) -> str:
    """Return what came of a site's answer after the last charge that it told; empty: nothing that may have cost it."""
    told = _charges(site, files)
    lost = [one for one in _absences(site, files) if one.kind in LOST]
    within = [one for one in lost if one.round_number == told[-1]]
    joined = any(line.complete and line.round_number == told[-1] and site in line.participants for line in files.rounds)
    # A round's last attempt at a site is the one that counts; a reply that does not may have told its price.
    if joined or (len(within) <= told.count(told[-1]) and all(one.kind == "reply" for one in within)):
        within = []
    after = [*within, *(one for one in lost if one.round_number > told[-1])]
    return f"{LOST[after[-1].kind]} in round {after[-1].round_number} and {THEN}" if after else ""


def _cut_off(site: str, files: RunFiles) -> str:
    """Return after which round a run was resumed and the site told no more; empty: after none, or it had left before.

    Lines of a round that was cut off stay, so that its charges are lost only where none of them was written.
    """
    config, last = files.config, _charges(site, files)[-1]
    if last in config.resumed_after:
        return f"took part until the run was resumed after round {last} and {THEN}"
    return ""


def _charges(site: str, files: RunFiles) -> list[int]:
    """Return the rounds in which a site told a charge, in order, each as often as it did."""
    return sorted(line.round_number for line in files.privacy if line.site == site and line.spent)


def _absences(site: str, files: RunFiles) -> list[Absence]:
    """Return what went wrong with a site, in the order in which it did."""
    told = {one for line in files.rounds for one in (*line.failures, *line.refusals) if one.site == site}
    return sorted(told, key=lambda one: (one.round_number, one.attempt))
