"""The privacy report as people read it: one line a round, a table by site at the end, a page in the folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from common.privacy import claim
from server.rounds import RoundOutcome
from strategies import Job


def epsilon_words(outcome: RoundOutcome) -> str:
    """Return the federation's figure so far: the maximum over sites, because their records are disjoint."""
    spent = [result.spending for result in outcome.results if result.spending]
    if not spent:
        return "privacy OFF, no claim"
    worst = max(spent, key=lambda s: s.epsilon_total)
    return f"ε {worst.epsilon_total:.2f} of {worst.epsilon_budget:g} (δ {worst.delta:g}, record-level, worst site)"


def round_line(job: Job, outcome: RoundOutcome) -> str:
    """Return the terminal line of one round."""
    payload = (outcome.bytes_down + outcome.bytes_up) / 1e6
    line = (
        f"round {outcome.round_number}/{job.config.rounds}  accuracy {100 * outcome.score.accuracy:.1f} %  "
        f"loss {outcome.score.loss:.3f}  {epsilon_words(outcome)}  "
        f"{len(outcome.results)} sites  {payload:.2f} MB  {outcome.seconds:.0f} s"
    )
    return line + "".join(f"\n  {r.site} did not take part ({r.kind}): {r.reason}" for r in outcome.refusals)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a JSON-lines file; an absent file has none."""
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def site_rows(folder: Path) -> list[dict[str, Any]]:
    """Return each site's last privacy line, with the number of rounds it joined."""
    rows: dict[str, dict[str, Any]] = {}
    for line in read_lines(folder / "privacy.jsonl"):
        rows[line["site"]] = {**line, "rounds": rows.get(line["site"], {"rounds": 0})["rounds"] + 1}
    return [rows[site] for site in sorted(rows)]


def federation_epsilon(folder: Path) -> float | None:
    """Return the maximum of the sites' totals, or None when no claim is made."""
    totals = [row["epsilon_total"] for row in site_rows(folder) if row["epsilon_total"] is not None]
    return max(totals) if totals else None


def markdown_report(folder: Path) -> str:
    """Return the report of a run's folder as Markdown, from its files alone."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    baseline = json.loads((folder / "baseline.json").read_text(encoding="utf-8"))
    rounds, sites = read_lines(folder / "rounds.jsonl"), site_rows(folder)
    settings, total = config["settings"], federation_epsilon(folder)
    lines = [f"# Run {config['run']}: {settings['strategy']}", ""]
    if total is None:
        lines += ["**Privacy was OFF. This run promises nothing about any record.**", ""]
    else:
        accountants = ", ".join(sorted({row["accountant"] for row in sites}))
        lines += [
            f"**(ε, δ) = ({total:.3f}, {settings['privacy.delta']:g})** for {claim.UNIT} ({claim.ADJACENCY}), "
            f"against {claim.ADVERSARY}.",
            "",
            f"Sampling: {claim.SAMPLER}. Accountant: {accountants}. The figure is the maximum over sites: their "
            "records are disjoint. Not covered: several records of one person, choices of settings made by "
            "looking at earlier runs on the same records.",
            "",
        ]
    head = "| site | rounds | steps | sample rate | noise multiplier | clip | ε spent | ε budget | ε left |"
    lines += ["## Sites", "", head, "|" + "---|" * 9]
    for row in sites:
        cells = [row["site"], row["rounds"], row["steps_total"], row["sample_rate"], row["noise_multiplier"]]
        cells += [row["clip_norm"], row["epsilon_total"], row["epsilon_budget"], row["epsilon_remaining"]]
        lines.append("| " + " | ".join(_cell(cell) for cell in cells) + " |")
    lines += ["", "## Rounds", "", "| round | accuracy | loss | sites | refused | bytes down | bytes up | s |"]
    lines += ["|" + "---|" * 8, f"| 0 | {100 * baseline['accuracy']:.1f} % | {baseline['loss']:.4f} | | | | | |"]
    for line in rounds:
        refused = "; ".join(f"{r['site']}: {r['kind']}" for r in line["refusals"])
        lines.append(
            f"| {line['round']} | {100 * line['accuracy']:.1f} % | {line['loss']:.4f} | {len(line['participants'])} "
            f"| {refused} | {line['bytes_down']:,} | {line['bytes_up']:,} | {line['seconds']:.1f} |"
        )
    lines += ["", "## Settings", "", *(f"- `{key} = {value!r}`" for key, value in settings.items())]
    lines += ["", "## Versions", "", *(f"- {name} {number}" for name, number in config["versions"].items()), ""]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if value is None:
        return "no claim"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
