"""The same job with several configurations, seeds and both privacy modes: one table.

Runs go through ``in_process`` (the same messages, encoded and decoded, without Flower), each in a
process of its own on one core, as many at once as there are cores. A run whose folder holds a
good result of the same settings and number of sites is not run again, so a comparison that was cut short
goes on where it stopped; a result of others stops the comparison before anything is run.
"""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing.synchronize import Event
from pathlib import Path

from common.config.sections import Scalar
from common.config.text import parse_settings
from common.data.partition import check_partition
from common.errors import ConfigError, DataError, RunFailed
from common.model.device import own_cores
from common.paths import run_folder
from common.privacy import MECHANISMS
from common.privacy.figures import NO_CLAIM, epsilon_text
from common.run_lines import ConfigFile, ResultFile, RoundLine, read_file, read_if_there, read_lines
from experiments.recipes import check_recipes, names_recipe, recipes_said
from experiments.site_count import record_sites, recorded_sites
from experiments.sweep.processes import with_threads
from server.lock import only_writer
from strategies.job import Job, configure, with_recipe

SHIPPED = Path(__file__).parent / "configs"
DEFAULT = tuple(SHIPPED / f"{name}.toml" for name in ("fedavg-lora", "ffa-lora", "fed-sb", "fed-svd"))
MODES = tuple(name for name, row in MECHANISMS.items() if not row.needs)
"""The privacy modes that a configuration has whatever else it says."""


@dataclass(frozen=True)
class Outcome:
    """One finished run."""

    name: str
    """Of the configuration."""
    mode: str
    """``privacy.mode``."""
    seed: int
    accuracy_before: float
    accuracy: float
    epsilon: float | None
    """The worst site's; None without a claim."""
    bytes_down: int
    """Adapter payload of all rounds and sites."""
    bytes_up: int
    seconds: float
    """Of all rounds, on one core."""
    recipe: str


def compare(
    configs: Sequence[Path],
    seeds: Sequence[int],
    sites: int,
    overrides: Mapping[str, Scalar],
    output: Path,
    done: Callable[[Outcome, int, int], None],
    say: Callable[[str], None] = lambda _: None,
) -> list[Outcome]:
    """Run every configuration in both privacy modes under every seed.

    Args:
        configs: TOML files of settings; a row of the table each.
        seeds: the run's ``seed`` (start of the adapter, batch order without privacy); sampling and noise
            of private runs come from the operating system and are never seeded.
        sites: simulated sites.
        overrides: settings laid over every configuration.
        output: folder of all runs.
        done: told after every run, with how many of how many there are.
        say: told the recipes, before the first run.

    Raises:
        ConfigError: a configuration is wrong, or ``output`` holds a result of other settings (named); nothing
            was started.
        RunFailed: a run failed; says which.
    """
    jobs: dict[tuple[str, str, int], tuple[dict[str, Scalar], str]] = {}
    recipes, named = dict[str, str](), set[str]()
    for path in configs:
        own = {**parse_settings([str(path)]), **overrides}
        named |= {path.stem} if names_recipe(own) else set()
        for mode in MODES:
            for seed in seeds:
                settings, _ = with_recipe({**own, "privacy.mode": MODES[0]}, sites=sites)
                recipes[path.stem] = str(settings["recipe"])
                settings |= {"privacy.mode": mode, "seed": seed, "output": str(output.absolute())}
                jobs[path.stem, mode, seed] = (settings, f"{path.stem}-{mode}-{seed}")
                job = configure(settings)
                check_partition(job.config)
                _check_kept(job, f"{path.stem}-{mode}-{seed}", sites)
    if len(jobs) != len(configs) * len(MODES) * len(seeds) or not jobs:
        raise ConfigError("a comparison needs configurations of different names and different seeds")
    check_recipes(recipes, named)
    say(recipes_said(recipes))
    outcomes = []
    context = multiprocessing.get_context("spawn")
    stopped = context.Event()
    with ProcessPoolExecutor(own_cores(), context, _begin_worker, (stopped,)) as pool:
        with with_threads(1):
            waiting: dict[Future[None], tuple[str, str, int]] = {
                pool.submit(_run, settings, sites, run): key for key, (settings, run) in jobs.items()
            }
        try:
            for future in as_completed(waiting):
                name, mode, seed = waiting[future]
                if (error := future.exception()) is not None:
                    raise RunFailed(f"{name}, privacy {mode}, seed {seed}: {error}") from error
                settings, run = jobs[name, mode, seed]
                outcomes.append(read_outcome(name, run_folder(configure(settings).config, run), mode, seed))
                done(outcomes[-1], len(outcomes), len(jobs))
        except BaseException:
            # Runs under way come to their end, and are kept; a pool has handed out more jobs than it runs.
            stopped.set()
            pool.shutdown(cancel_futures=True)
            raise
    order = {key: number for number, key in enumerate(jobs)}
    return sorted(outcomes, key=lambda o: order[o.name, o.mode, o.seed])


_stopped: Event
"""In a worker process: whether the comparison has failed, so that nothing more begins."""


def _begin_worker(stopped: Event) -> None:
    global _stopped
    _stopped = stopped


def _run(settings: dict[str, Scalar], sites: int, run: str) -> None:
    from experiments.in_process import run_in_process

    if _stopped.is_set():
        return
    folder = run_folder(configure(settings).config, run)
    if not _ended_well(folder):
        if folder.exists():
            with only_writer(folder):
                folder.rename(folder.with_name(f"{folder.name}.cut-short-{time.time_ns()}"))
        record_sites(folder, sites)
        run_in_process(settings, sites, run)


def _ended_well(folder: Path) -> bool:
    result = read_if_there(ResultFile, folder)
    return result is not None and result.status != "failed"


def _check_kept(job: Job, run: str, sites: int) -> None:
    """Refuse a kept result of another job: it would stand in the table as the result of this one."""
    folder = run_folder(job.config, run)
    if not _ended_well(folder):
        return
    # Folders may be moved; where a run was written is no part of its result.
    # What a recipe has filled in is compared itself.
    wanted = job.settings()
    had = {
        **read_file(ConfigFile, folder).settings,
        **{key: wanted[key] for key in ("output", "recipe", "data.records")},
    }
    differing = [(key, had.get(key), wanted.get(key)) for key in sorted({*had, *wanted})]
    for key, before, now in [*differing, ("--sites", recorded_sites(folder) or "unknown", sites)]:
        if before != now:
            raise ConfigError(
                f"{folder} holds a result with {key} = {before!r}, not {now!r}: give another --output, "
                "or move that folder away to run it anew"
            )


def read_outcome(name: str, folder: Path, mode: str, seed: int) -> Outcome:
    """Return what the folder of a run that ended well says; DataError if it does not."""
    reached, rounds = read_file(ResultFile, folder).reached, read_lines(RoundLine, folder)
    if reached is None:
        raise DataError(f"{folder / ResultFile.NAME} does not say what the run has come to: move that folder away")
    return Outcome(
        name,
        mode,
        seed,
        reached.accuracy_before,
        reached.accuracy,
        reached.epsilon,
        sum(line.bytes_down for line in rounds),
        sum(line.bytes_up for line in rounds),
        sum(line.seconds or 0.0 for line in rounds),
        str(read_file(ConfigFile, folder).settings["recipe"]),
    )


def table(outcomes: Sequence[Outcome]) -> str:
    """Return a Markdown table, one row per configuration and privacy mode, means over seeds."""
    lines = [
        "| configuration | recipe | privacy | accuracy, % (each seed) | start, % | ε | down, kB | up, kB "
        "| seconds, one core |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, mode in dict.fromkeys((o.name, o.mode) for o in outcomes):
        group = [o for o in outcomes if (o.name, o.mode) == (name, mode)]
        scores = [100 * o.accuracy for o in group]
        spread = f" ± {statistics.stdev(scores):.1f}" if len(scores) > 1 else ""
        each = ", ".join(f"{score:.1f}" for score in scores)
        epsilon = epsilon_text(max(o.epsilon or 0.0 for o in group)) if MECHANISMS[mode].claims else NO_CLAIM
        lines.append(
            f"| {name} | {group[0].recipe} | {mode} | **{statistics.mean(scores):.1f}**{spread} ({each}) "
            f"| {100 * statistics.mean(o.accuracy_before for o in group):.1f} | {epsilon} "
            f"| {statistics.mean(o.bytes_down for o in group) / 1000:,.0f} "
            f"| {statistics.mean(o.bytes_up for o in group) / 1000:,.0f} "
            f"| {statistics.mean(o.seconds for o in group):.0f} |"
        )
    return "\n".join(lines) + "\n"
