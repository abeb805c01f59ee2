"""All audits, two tables, and ``audit.json`` in a run's folder, where its report looks for it.

make audit
make audit RUN=runs/my-run
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console

from audits import faults
from audits.account import audit_account
from audits.canary import probe_all
from audits.class_means import EACH_CLIPPED, audit_class_means
from audits.concurrent import bouts_of_all
from audits.connections import FAULTS as ASKING
from audits.connections import LONG, SIMULATED, audit_connections
from audits.faults import SOUND
from audits.finding import audit_file, quiet, show
from audits.front_door import audit_front_doors
from audits.hostile_server import hostile_server
from audits.judges import audit_judges
from audits.kills import kills_of_all
from audits.noise_law import audit_noise
from audits.persons import audit_persons, probe_persons_all
from audits.rollouts import FAULTS as WRITTEN
from audits.rollouts import audit_rollouts, rollout_world
from audits.sensitivity import audit_sensitivity
from audits.several import ANY_COUNTED, LABEL_CLIPPED, LABELS_COUNTED, audit_count, several_world
from audits.shown_rounds import audit_shown_rounds
from audits.simulation import probe_runs
from audits.site_rounds import audit_sites
from audits.step_canaries import audit_steps, audited
from audits.summed import audit_sums
from audits.tiny_models import save_tiny_model
from audits.tiny_site import tiny_run
from audits.unfolded import FAULTS as UNFOLDED
from audits.unfolded import audit_unfolding, compared
from audits.vectors import audit_vectors
from audits.votes import BY_NEIGHBOURS, COUNTED_TWICE, audit_votes
from audits.whole_sites import audit_whole_sites
from audits.worlds import World, fresh_world
from fedveil.common.findings import Finding
from fedveil.common.run_lines import ConfigFile
from fedveil.common.strict_json import to_json
from fedveil.server.records import package_versions, write_json

FAMILIES = (("bert", "lora", "trained"), ("gpt2", "lora", "frozen"), ("llama", "lora-frozen-a", "frozen"))
"""Model family, adapter and head policy of the models that noise and sensitivity are looked at on."""


def noise_and_sensitivity(folder: Path) -> list[Finding]:
    """Return the findings about the mechanism's noise and clip."""
    worlds = [world_of(folder / family, family, adapter, head) for family, adapter, head in FAMILIES]
    names = save_tiny_model("bert", folder / "names")
    worlds.append(fresh_world(names, "bert", "lora", "trained", task="token-classification"))
    seen = [
        audit_noise(worlds[0], f)
        for f in (SOUND, faults.HALVED, faults.EVERY_SECOND, faults.FLOATING, faults.SHARED_SEED)
    ]
    for world in worlds:
        couples = () if world.model.head and not world.model.task.by_token else (faults.TOKEN_MEAN,)
        seen += [audit_sensitivity(world, fault) for fault in (SOUND, faults.DOUBLED, faults.FLOAT_SUM, *couples)]
        if world.model.head:
            each = (SOUND, faults.DOUBLED, EACH_CLIPPED)
            seen += [audit_class_means(world.model, world.records, fault) for fault in each]
        cast = (SOUND, COUNTED_TWICE, BY_NEIGHBOURS)
        seen += [audit_votes(world, fault) for fault in cast]
        seen += [audit_persons(world, fault) for fault in (SOUND, faults.ROW_CLIPPED, faults.PERSON_DIVIDED)]
    # Of both factors the two rows nearly cancel: each clipped by itself, they are no longer than one clip together.
    decoder = compared(world_of(folder / "unfolded", "llama", "lora-frozen-a", "frozen"))
    seen += [audit_unfolding(decoder, fault) for fault in (SOUND, *UNFOLDED)]
    prompts = rollout_world(save_tiny_model("llama", folder / "rollouts"))
    seen += [audit_rollouts(prompts, fault) for fault in (SOUND, *WRITTEN)]
    several = several_world(save_tiny_model("bert", folder / "several"))
    means = (SOUND, EACH_CLIPPED, LABEL_CLIPPED)
    seen += [audit_class_means(several.model, several.records, fault) for fault in means]
    counts = (SOUND, LABELS_COUNTED, ANY_COUNTED)
    return seen + [audit_count(several.model, several.records, fault) for fault in counts]


def world_of(folder: Path, family: str, adapter: str, head: str) -> World:
    """Return the world of a model of the family, saved to ``folder``."""
    return fresh_world(save_tiny_model(family, folder), family, adapter, head)


def steps_of_all(folder: Path) -> list[Finding]:
    """Return the findings about single steps on what each strategy trains."""
    cases = (SOUND, faults.HALVED, faults.EVERY_SECOND, faults.DOUBLED)
    return [audit_steps(strategy, folder, fault) for strategy in audited() for fault in cases]


def rounds_of_all(folder: Path) -> list[Finding]:
    """Return the findings about whole rounds of sites: batches, noise, and what was charged for them."""

    def own(name: str) -> Path:
        (folder / name).mkdir()
        return folder / name

    settings = tiny_run(own("run"))
    sites = [audit_sites(settings, own(f"sites {f.name}"), f) for f in (SOUND, faults.SHUFFLED, faults.SHARED_SEED)]
    cases = (SOUND, faults.RESET, faults.SHUFFLED, faults.PRIVATE_SIZE, *faults.ROWS)
    return [*sites, *(audit_account(own(f"account {fault.name}"), fault) for fault in cases)]


def connections_of_all(folder: Path) -> list[Finding]:
    """Return the findings about what processes connect to."""
    cases = [(SOUND, LONG), *((fault, SIMULATED) for fault in ASKING)]
    for number in range(len(cases)):
        (folder / str(number)).mkdir()
    return [audit_connections(folder / str(n), fault, commands) for n, (fault, commands) in enumerate(cases)]


def every_audit(folder: Path, kills: int, bouts: int) -> Iterator[list[Finding]]:
    """Run all audits in turn, each in a folder of its own; those that fork come before any that starts a thread."""
    parts: tuple[Callable[[Path], Sequence[Finding]], ...] = (
        lambda own: kills_of_all(own, kills),
        lambda own: bouts_of_all(own, bouts),
        noise_and_sensitivity,
        steps_of_all,
        rounds_of_all,
        lambda own: list(hostile_server(own)),
        lambda _: audit_front_doors(),
        connections_of_all,
        audit_judges,
        audit_sums,
        probe_all,
        probe_persons_all,
        audit_vectors,
        audit_whole_sites,
        audit_shown_rounds,
        probe_runs,
    )
    for number, audit in enumerate(parts):
        own = folder / str(number)
        own.mkdir()
        yield list(audit(own))


def main() -> None:
    """Run from a shell; the exit code is 1 if anything failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--bouts", type=int, default=20)
    parser.add_argument("--run", type=Path, help="folder of a run: audit.json goes there")
    wanted = parser.parse_args()
    if wanted.run and not (wanted.run / ConfigFile.NAME).is_file():
        parser.error(f"{wanted.run} is not the folder of a run: it has no config.json")
    console = Console(highlight=False, emoji=False)
    quiet()
    findings: list[Finding] = []
    with tempfile.TemporaryDirectory() as name:
        for found in every_audit(Path(name), wanted.kills, wanted.bouts):
            findings += found
    show(console, findings)
    if wanted.run:
        content = audit_file(findings, datetime.now(UTC).isoformat(timespec="seconds"), package_versions())
        path = wanted.run / "audit.json"
        write_json(path, to_json(content))
        console.print(f"written to {path}; 'fedveil report' names it from now on", markup=False, soft_wrap=True)
    sys.exit(not all(finding.passed for finding in findings))


if __name__ == "__main__":
    main()
