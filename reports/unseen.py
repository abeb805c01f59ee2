"""Charges that a run's files may lack: of a lost reply, or of a round that was cut off.

A site's next total includes every lost charge, so only sites that reported no total since are named.
"""

from __future__ import annotations

from fedveil.common.run_lines import Absence
from fedveil.common.words import names_text, natural
from fedveil.reports.folder import RunFiles

LOST = {"late": "was late", "failed": "failed", "reply": "sent a reply that was refused"}
"""In words, the kinds of absence after which a site may have an unreported charge."""
THEN = "reported no charge after it: if it was charged, only its own ledger shows that, and ε here is too low"


def unseen_charges(files: RunFiles) -> list[str]:
    """Return a sentence for each group of sites that may have unreported charges."""
    found: dict[str, list[str]] = {}
    for site in sorted({line.site for line in files.privacy if line.spent}, key=natural):
        if reason := _lost(site, files) or _cut_off(site, files):
            found.setdefault(reason, []).append(site)
    return [f"{names_text(sites)}: {reason}" for reason, sites in found.items()]


def _lost(site: str, files: RunFiles) -> str:
    """Return how a site's reply after its last reported charge was lost; empty if none was."""
    charged = _charges(site, files)
    lost = [one for one in _absences(site, files) if one.kind in LOST]
    within = [one for one in lost if one.round_number == charged[-1]]
    joined = any(line.complete and line.round_number == charged[-1] for line in files.by_site[site].joined)
    # A round's last attempt at a site is the one that counts; a reply that does not may have reported its price.
    if joined or (len(within) <= charged.count(charged[-1]) and all(one.kind == "reply" for one in within)):
        within = []
    after = [*within, *(one for one in lost if one.round_number > charged[-1])]
    return f"{LOST[after[-1].kind]} in round {after[-1].round_number} and {THEN}" if after else ""


def _cut_off(site: str, files: RunFiles) -> str:
    """Return after which resumed round the site reported nothing; empty if after none, or if it had left before.

    Lines of a cut-off round stay, so its charges are lost only if none of them was written.
    """
    config, last = files.config, _charges(site, files)[-1]
    if last in config.resumed_after:
        return f"took part until the run was resumed after round {last} and {THEN}"
    return ""


def _charges(site: str, files: RunFiles) -> list[int]:
    """Return the rounds of a site's reported charges in order, repeated rounds repeated."""
    return sorted(line.round_number for line in files.by_site[site].privacy if line.spent)


def _absences(site: str, files: RunFiles) -> list[Absence]:
    """Return a site's absences in order."""
    lines = files.by_site[site]
    return sorted({*lines.failures, *lines.refusals}, key=lambda one: (one.round_number, one.attempt))
