"""A forecast as tables and sentences that fit 80 columns."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from fedveil.common.config.shipped import EXPERIMENTS
from fedveil.common.threads import site_cores
from fedveil.common.words import counted
from fedveil.experiments.planner.find import Found
from fedveil.experiments.planner.forecast import Forecast
from fedveil.experiments.planner.payers import payer_of
from fedveil.experiments.planner.price import LEAST_SIGNAL, MOST_ROUNDS, round_numbers, spread
from fedveil.experiments.sweep.arms import FEDERATED
from fedveil.experiments.sweep.file import epsilon_name
from fedveil.experiments.sweep.groups import Group, groups
from fedveil.experiments.sweep.rows import read_rows, results_file
from fedveil.privacy.accountant import INITIALISATION
from fedveil.privacy.figures import epsilon_text, remaining_text
from fedveil.privacy.secure_sum import least_sites
from fedveil.strategies.job import Job

LARGER, MEASURED = "mpnet", ("all-MiniLM-L6-v2", "classification")
"""The larger encoder's configuration, and the encoder and task that its rows are beside."""
ENCODERS = (("rotten-tomatoes", "mpnet"), ("sst2", "mpnet-sst2"))
"""Sweeps of both encoders on the same records."""
MOST_LINES = 10
"""Lines of the table of rounds; ``--json`` has them all."""
DEFINITION = (
    "signal: the length of the mean clipped gradient; noise: the expected length of the noise on the average over "
    "sites, √d · √Σ(p·σC/b)², with p a site's weight and b its expected batch; over T steps the ratio grows by √T. "
    f"Below {LEAST_SIGNAL:g} in a run, it will hardly train (docs/guides/planning.md)."
)


def print_forecast(console: Console, forecast: Forecast) -> None:
    """Print all parts of a forecast."""
    config = forecast.job.config
    console.print(
        f"{config.method} on {config.model.name} and {config.data.name}: "
        f"{counted(len(forecast.sizes), 'site')}, {counted(config.rounds, 'round')} of "
        f"{counted(config.training.local_steps, 'step')}. From settings and public sizes; "
        "a site's own policy may be stricter.",
    )
    _print_sites(console, forecast)
    _print_rounds(console, forecast)
    _print_bytes(console, forecast)
    _print_machine(console, forecast)
    _print_signal(console, forecast)
    if line := larger_encoder(forecast):
        console.print(line)
    for warning in forecast.warnings:
        console.print(f"WARNING: {warning}", style="bold")


def larger_encoder(forecast: Forecast) -> str:
    """Return what MPNet gained and cost in place of the run's encoder, by rows of the nearest ε; empty: none."""
    config, here = forecast.job.config, forecast.round_seconds
    found = list[tuple[str, Group, Group]]()
    for usual, larger in ENCODERS if (config.model.name, config.model.task) == MEASURED else ():
        both = [read_rows(results_file(EXPERIMENTS / "results", name)) for name in (usual, larger)]
        alike = set.intersection(
            *({(row.variant, row.arm, row.epsilon_asked, row.seed) for row in rows} for rows in both)
        )
        kept = ([row for row in rows if (row.variant, row.arm, row.epsilon_asked, row.seed) in alike] for rows in both)
        own, group = (
            {one.epsilon_asked: one for one in groups(rows) if (one.variant, one.arm) == (config.recipe, FEDERATED)}
            for rows in kept
        )
        found += [(usual, own[asked], group[asked]) for asked in own if asked and group[asked].processor_seconds]
    if not found:
        return ""
    name, small, large = min(found, key=lambda one: abs(math.log((one[1].epsilon_asked or 1) / config.privacy.epsilon)))
    times = (large.processor_seconds or 0.0) / (small.processor_seconds or math.nan)
    minutes = f", here some {times * here[0] * config.rounds / 60:.0f} minutes in one process" if here else ""
    return (
        f"A larger encoder (-c {LARGER}): {100 * large.accuracy.mean:.1f} % where this one has "
        f"{100 * small.accuracy.mean:.1f} % ({name}, ε {epsilon_name(large.epsilon_asked)}, "
        f"{counted(len(large.values), 'run')} of each), {times:.1f} times the processor's time{minutes}, "
        f"{(large.payload or 0) / (small.payload or 1):.1f} times the bytes{_memory_words(small, large)}."
    )


def _memory_words(usual: Group, larger: Group) -> str:
    """Return how much more memory runs took, where both encoders' rows say; else where a plan says it."""
    most = [max((costs.memory or 0 for costs in group.costs), default=0) for group in (usual, larger)]
    return f", {most[1] / most[0]:.1f} times the memory" if all(most) else f"; its memory: fedveil plan -c {LARGER}"


def print_found(console: Console, job: Job, sizes: Sequence[int], found: Found) -> None:
    """Print the answer of ``--find``, its check, and how to use it."""
    console.print(f"{found.setting} = {found.value}", style="bold")
    honest = job.config.privacy.honest_sites
    condition = f", {_on(honest)}" if honest else ""
    spent = epsilon_text(found.epsilon)
    console.print(f"  costs ε {spent} of {found.budget:g} at δ {job.config.privacy.delta:g}{condition}")
    if found.next_value is None or found.next_epsilon is None:
        console.print("  the search ends here; the budget would allow more")
    else:
        dearer = f"ε {epsilon_text(found.next_epsilon)}{condition}"
        console.print(f"  one step further, {found.next_value:.6g}, would cost {dearer}")
    rate = job.config.training.sample_rate
    batches = ", ".join(f"{rate * size:.1f} of {size}" for size in sizes)
    console.print(f"  {job.config.total_steps} steps; expected batch by site: {batches}")
    # By itself the setting might bring another recipe.
    used = f'recipe="{job.config.recipe}" {found.setting}={found.value}'
    console.print(f"use it: fedveil run -c '{used}' after your other settings")


def _print_sites(console: Console, forecast: Forecast) -> None:
    table = Table(title="sites")
    for column in ("site", "public size", "sample rate", "expected batch", "steps", "noise σ"):
        table.add_column(column, justify="left" if column == "site" else "right")
    config = forecast.job.config
    for k, (size, batch) in enumerate(zip(forecast.sizes, forecast.expected_batches, strict=True)):
        noise = "none" if forecast.noises[k] is None else f"{forecast.noises[k]:.5g}"
        rate = f"{config.training.sample_rate:.4g}"
        table.add_row(forecast.site_names[k], f"{size:,}", rate, f"{batch:.1f}", str(config.total_steps), noise)
    console.print(table)


def _print_rounds(console: Console, forecast: Forecast) -> None:
    if not forecast.job.claim.per:
        return
    budget, delta = forecast.plans[0].max_epsilon, forecast.plans[0].delta
    payer, honest = payer_of(forecast.job), forecast.job.config.privacy.honest_sites
    at = f", h = {honest}" if honest else ""
    table = Table(title=f"ε {payer.whose}{at}, budget {budget:g} at δ {delta:g}")
    for column in ("after round", payer.counts, "ε (PLD)", "ε (RDP)", "left"):
        table.add_column(column, justify="right")
    numbers = round_numbers(forecast.job)
    shown = forecast.priced([numbers[i - 1] for i in spread(len(numbers), MOST_LINES)])
    for priced in shown:
        name = str(priced.round_number) if priced.round_number else INITIALISATION
        spent = epsilon_text(priced.epsilon) + ("" if priced.accountant.method == "pld" else "*")
        left = remaining_text(budget - priced.epsilon) if priced.epsilon <= budget else "refused"
        table.add_row(name, str(priced.steps), spent, epsilon_text(priced.epsilon_rdp), left)
    console.print(table)
    others = sorted({str(p.accountant) for p in shown if p.accountant.method != "pld"})
    for accountant in others:
        console.print(f"* {accountant}")
    if honest:
        console.print(_conditions(forecast))
    if note := payer.note(forecast.job, forecast.plans):
        console.print(note)
    _print_lost(console, forecast)
    _print_thrown_away(console, forecast)
    lasts = forecast.rounds_within
    more = "at least " if lasts == MOST_ROUNDS else ""
    lasting = "A fresh budget"
    if forecast.history.releases:
        lasting = f"Earlier runs have spent ε {epsilon_text(forecast.spent)}, which is counted here. What is left"
    console.print(f"{lasting} lasts {more}{lasts:,} rounds at this noise.")


def _conditions(forecast: Forecast) -> str:
    """Say on how many honest sites the price of a sum counts, and what holds with fewer and with more."""
    honest = forecast.job.config.privacy.honest_sites
    others = []
    if forecast.epsilon_alone is not None:
        others.append(f"if no other site adds its noise (alone): ε {epsilon_text(forecast.epsilon_alone)}")
    for sites, spent in forecast.more_honest.items():
        which = "all " if sites == len(forecast.sizes) else ""
        others.append(f"if {which}{sites} sites of each sum are honest (h = {sites}): ε {epsilon_text(spent)}")
    beside = f" After the run, {'; '.join(others)}." if others else ""
    return f"That is the price of the sum, {_on(honest)}.{beside}"


def _on(honest: int) -> str:
    """Return on how many honest sites a price of a sum counts.

    >>> _on(1), _on(2)
    ('whatever other sites do (h = 1)', 'if 2 sites of each sum are honest (h = 2)')
    """
    who = "whatever other sites do" if honest == 1 else f"if {honest} sites of each sum are honest"
    return f"{who} (h = {honest})"


def _print_lost(console: Console, forecast: Forecast) -> None:
    """Say what it costs that sites may be lost from a sum: its noise is that of the fewest which are left."""
    config, sites = forecast.job.config, len(forecast.sizes)
    privacy = config.privacy
    if not privacy.drop_outs:
        return
    begins = least_sites(privacy.honest_sites, privacy.colluders, privacy.drop_outs)
    least = max(config.min_sites + privacy.drop_outs, begins)
    loss = f"{counted(privacy.drop_outs, 'site')} may be lost from a sum, and a run begins with {least} sites or more"
    if sites < least:
        console.print(f"{loss}: {counted(sites, 'site')} are too few.")
        return
    honest, fewest = sites - privacy.colluders, max(config.min_sites, privacy.honest_sites + privacy.colluders)
    console.print(
        f"{loss}. The noise of a sum is that of {counted(privacy.honest_sites, 'site')}: "
        f"√({honest} / {privacy.honest_sites}) = {math.sqrt(honest / privacy.honest_sites):.3g} times "
        f"what {honest} honest ones would need if none is lost. "
        f"Sites that are gone for good end the run once fewer than {fewest} are left."
    )


def _print_thrown_away(console: Console, forecast: Forecast) -> None:
    if not forecast.thrown_away:
        return
    rounds, lasts = forecast.job.config.rounds, forecast.rounds_within or 0
    table = Table(title="attempts at a sum that are thrown away, each charged as a round")
    honest = forecast.job.config.privacy.honest_sites
    alone = ["ε alone"] if honest > 1 else []
    for column in ("attempts", f"ε of the sum, h = {honest}", *alone, "noise σ that pays for them"):
        table.add_column(column, justify="right")
    for one in forecast.thrown_away:
        spent = [epsilon_text(one.epsilon), *(epsilon_text(one.epsilon_alone) for _ in alone)]
        table.add_row(str(one.attempts), *spent, f"{one.noise_multiplier:.5g}")
    console.print(table)
    console.print(
        f"At this noise the budget pays for {counted(max(0, lasts - rounds), 'such attempt')} beside the "
        f"{counted(rounds, 'round')}; privacy.noise-multiplier makes room for more."
    )


def _print_bytes(console: Console, forecast: Forecast) -> None:
    config, sites = forecast.job.config, len(forecast.sizes)
    title = f"adapter bytes at rank {config.adapter.rank}, with the head where it is trained"
    if config.adapter.name == "none":
        title = f"bytes of the head alone *, and with other adapters at rank {config.adapter.rank}"
    table = Table(title=title)
    table.add_column("strategy")
    for column in ("down", "up", "down, run", "up, run"):
        table.add_column(column, justify="right")
    for name, (down, up) in forecast.payloads.items():
        own = name == forecast.job.strategy.name
        if own:
            down, up = forecast.traffic.down, forecast.traffic.up
        total = forecast.traffic.run(sites) if own else tuple(config.rounds * sites * n for n in (down, up))
        table.add_row(
            name + (" *" if own else ""), *(f"{n:,}" for n in (down, up, *total)), style="bold" if own else ""
        )
    console.print(table)
    traffic = forecast.traffic
    lighter = " in which the adapter moves" if traffic.up_run != config.rounds * traffic.up else ""
    console.print(
        f"down and up: one site and round{lighter}; run: {sites} sites, {config.rounds} rounds. * whole messages: "
        f"{traffic.message_down:,} down, {traffic.message_up:,} up."
    )
    if traffic.once_down or traffic.once_up:
        console.print(f"once for each site: {traffic.once_down:,} bytes down, {traffic.once_up:,} up (initialisation).")


def _print_machine(console: Console, forecast: Forecast) -> None:
    measured, seconds, features = forecast.calibration, forecast.round_seconds, forecast.feature_seconds
    if measured is None or seconds is None or features is None:
        console.print("Time and memory: not measured, as asked.")
        return
    rounds = forecast.job.config.rounds
    table = Table(title=f"time and memory, measured on {measured.records} public records on {measured.device}")
    for column in ("", "a round", f"{rounds} rounds"):
        table.add_column(column, justify="left" if not column else "right")
    here = f"simulated here, {forecast.workers} workers of {measured.threads} threads"
    for name, each, once in zip((here, "a machine like this for each site"), seconds, features, strict=True):
        table.add_row(name, f"{each:.1f} s", f"{each * rounds + once:.0f} s")
    console.print(table)
    if any(features):
        schedule = forecast.job.config.timeline
        jacobians = schedule.with_inputs("jacobians")
        what = "Jacobians" if jacobians else "features"
        every = jacobians[0].every or jacobians[0].rounds if jacobians else 0
        when = f"once in {counted(every, 'round')}" if every else "once, in the first round"
        heads = len(schedule.with_inputs("features")) if schedule.has_adapter else 0
        when += f", features {counted(heads, 'time')} more for the head" if heads else ""
        console.print(
            f"Of that, the {what} of all records are {features[0]:.1f} s here and {features[1]:.1f} s with a "
            f"machine for each site. They are computed {when}, and again by a new process."
        )
    more = f", {measured.accelerator_mib:,.0f} MiB on the GPU" if measured.accelerator_mib else ""
    console.print(
        f"Memory: about {measured.peak_mib:,.0f} MiB for each worker and for the server{more}. Time is training and "
        f"scoring; start-up comes on top. While it was measured the machine's load was {measured.load:.1f} on "
        f"{counted(site_cores(), 'core')}."
    )


def _print_signal(console: Console, forecast: Forecast) -> None:
    signal = forecast.signal
    if signal is None:
        return
    table = Table(title=f"signal-to-noise, d = {signal.trained_numbers:,} trained numbers, {signal.steps} steps")
    for column in ("", "a step", "the run"):
        table.add_column(column, justify="left" if not column else "right")
    if signal.alignment is not None and signal.step is not None and signal.run is not None:
        row = f"measured: alignment {signal.alignment[0]:.3f} (up to {signal.alignment[1]:.3f})"
        table.add_row(row, f"{signal.step:.3f}", f"{signal.run[0]:.2f} (up to {signal.run[1]:.2f})")
    table.add_row("limit: all records aligned", f"{signal.step_bound:.3f}", f"{signal.run_bound:.2f}")
    console.print(table)
    console.print(DEFINITION)
