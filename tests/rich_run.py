"""Folders of made runs for the eye: one that has all that a report can show, and one of a thousand unlike sites."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from made_run import DELTA, MadeRun, adapter_told, spent

from fedveil.common.findings import AuditFile, Finding
from fedveil.common.other_runs import BesideFile, BesideRow
from fedveil.common.run_lines import Absence, BaselineFile, LabelScore, PrivacyLine, RoundLine, read_lines
from fedveil.common.server_file import CheckLine, OwnCheck, ServerFile, ServerStart
from fedveil.common.strict_json import to_json
from fedveil.privacy.accounting import gaussian_release
from fedveil.privacy.privacy_filter import promised

LABELS = [f"topic {number:02} of the clinic's own list of reasons to call" for number in range(20)]
REGIONS = ["east", "north", "south", "west", "abroad"]
BESIDE = [
    BesideRow("default", "federated", 8.0, 0.678, 0.868, 0.011, 3),
    BesideRow("default", "local-only", 8.0, 0.678, 0.831, 0.021, 3),
    BesideRow("default", "federated", None, 0.678, 0.871, 0.008, 3),
    BesideRow("head-only", "federated", 8.0, 0.678, 0.862, 0.013, 3),
    BesideRow("head-only", "pooled", None, 0.678, 0.89, None, 1),
]
FIGURES: dict[str, Any] = {"epsilon claimed": 1.2, "epsilon is at least": 0.7}
MANY = 1000
ODD_NOISE, REFUSED = "site-7", "site-500"


def counts(names: list[str], right: int, records: int = 50) -> list[LabelScore]:
    """Return scores that differ from name to name: ``right`` and up to 12 more of so many records."""
    return [LabelScore(name, min(records, right + 5 * i % 13), records) for i, name in enumerate(names)]


def confused(scores: list[LabelScore]) -> list[LabelScore]:
    """Return scores with the matrix in which each wrong record is taken for the label that follows its own."""
    wrong, number = [score.records - score.right for score in scores], len(scores)
    return [
        replace(
            score,
            predicted=score.right + wrong[at - 1],
            confused=[score.right * (n == at) + wrong[at] * (n == (at + 1) % number) for n in range(number)],
        )
        for at, score in enumerate(scores)
    ]


def share(scores: list[LabelScore]) -> float:
    """Return the accuracy on the records of all labels."""
    return sum(score.right for score in scores) / sum(score.records for score in scores)


def write_lines(run: MadeRun, lines: Sequence[RoundLine] | Sequence[PrivacyLine]) -> None:
    """Write all lines of a file of the run anew."""
    text = "".join(json.dumps(to_json(line)) + "\n" for line in lines)
    (run.folder / lines[0].NAME).write_text(text, encoding="utf-8")


def rich(folder: Path) -> MadeRun:
    """Return a finished run with labels, slices, other runs, an audit, a server's check, refusals and an adapter."""
    sites = {"north": 2000, "south": 1500, "St. Mary's hospital, second ward": 800, "west": 640}
    settings = {"rounds": 6, "data.test": "public.csv", "data.name": "calls.csv", "data.slice": "region"}
    run = MadeRun(folder, {**settings, "recipe": "plain"}, sites, {"north": 0.9}).start()
    run.release(0, "north", gaussian_release(5.0, 0.1, 1, "initialisation"))
    for number in range(1, 7):
        away = {"west": ("budget", "ε 0.02 is left, and the round costs ε 0.4: raise the budget, or wait")}
        run.round(number, 0.7 + 0.01 * number, refusals=away if number in (3, 6) else None)
    write_lines(
        run,
        [
            replace(
                line,
                labels=(labels := confused(counts(LABELS, 30 + line.round_number))),
                accuracy=share(labels),
                slices=counts(REGIONS, 110 + 4 * line.round_number, 200),
            )
            for line in read_lines(RoundLine, folder)
        ],
    )
    run.write(BaselineFile(share(counts(LABELS, 28)), 0.581, confused(counts(LABELS, 28)), counts(REGIONS, 105, 200)))
    run.write(BesideFile(BESIDE))
    checks = [
        CheckLine(True, "disk", "9 GiB free"),
        CheckLine(True, "certificate", "valid for 350 days, for server.example and 10.0.0.7"),
        CheckLine(False, "clock", "is 90 s behind its time server: set it"),
    ]
    check = OwnCheck(True, True, "AB:CD:EF:" + ":".join(["12"] * 29), True, checks)
    run.write(ServerFile([ServerStart("2026-11-24T10:00:00+00:00", "ab" * 32, "network", check)]))
    findings = [
        Finding("canaries", "as it is", False, True, FIGURES),
        Finding("canaries", "noise halved", True, True, FIGURES),
        Finding("kills", "as it is", False, True, {}),
    ]
    versions = {"fedveil": "0.1.0", "torch": "2.13.0", "opacus": "1.6.0"}
    run.audited("audit.json", AuditFile(True, "2026-11-25T08:00:00+00:00", versions, findings))
    adapter = folder / "adapter"
    adapter.mkdir()
    made_of = adapter_told(base_model="all-MiniLM-L6-v2", bundle="cd" * 32)
    (adapter / "fedveil.json").write_text(json.dumps(made_of))
    for name in ("adapter_config.json", "adapter_model.safetensors", "head.safetensors"):
        (adapter / name).write_bytes(name.encode())
    return run.end()


def unlike(folder: Path, rounds: int = 3) -> MadeRun:
    """Return a run of a thousand sites no two of which have one history: budgets and rounds joined differ.

    ``ODD_NOISE`` added less noise than all others; ``REFUSED`` never took part.
    """
    names = [f"site-{i}" for i in range(MANY)]
    own = {"data.name": "/srv/records_of_cardiology/discharge_letters_of_2026_without_names.csv"}
    run = MadeRun(folder, {"rounds": rounds, **own}, {"site-0": 700, ODD_NOISE: 700}, {ODD_NOISE: 0.8}).start()
    run.round(1, 0.7)
    usual, odd = read_lines(PrivacyLine, folder)
    (round_line,) = read_lines(RoundLine, folder)
    paid: list[PrivacyLine] = []
    lines: list[RoundLine] = []
    joined_before = dict.fromkeys(names, 0)
    prices = {
        (noise, count): promised([gaussian_release(noise, 0.05, 5 * count)], DELTA)[0] if count else 0.0
        for noise in (0.8, 1.2)
        for count in range(rounds + 1)
        if noise == 1.2 or count in (0, rounds)
    }
    prices |= {(0.8, c): prices[0.8, rounds] * c / rounds for c in range(1, rounds)}
    for number in range(1, rounds + 1):
        refusals = [Absence(number, 1, REFUSED, "budget", "nothing is left")]
        here = []
        for i, name in enumerate(names):
            # Each site sits out the rounds that its number says; none all of them.
            if name == REFUSED or (name != ODD_NOISE and number > 1 and i >> number & 1):
                continue
            here.append(name)
            joined_before[name] += 1
            told, noise = (odd, 0.8) if name == ODD_NOISE else (usual, 1.2)
            figures, total = spent(told), prices[noise, joined_before[name]]
            budget = 8.0 + i / 1000
            figures = replace(
                figures,
                steps_total=5 * joined_before[name],
                epsilon_round=total - prices[noise, joined_before[name] - 1],
                epsilon_total=total,
                epsilon_budget=budget,
                epsilon_remaining=budget - total,
            )
            paid.append(replace(told, round_number=number, site=name, public_size=700 + i, spent=figures))
        lines.append(
            replace(
                round_line,
                round_number=number,
                participants=here,
                accuracy=0.7 + 0.01 * number,
                bytes_down=150_528 * len(here),
                bytes_up=150_400 * len(here),
                refusals=refusals,
                failures=refusals,
            )
        )
    write_lines(run, paid)
    write_lines(run, lines)
    return run.end()
