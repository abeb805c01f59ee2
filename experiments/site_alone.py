"""A model that a site trains alone, at the noise of a run, paid from the same budget: what being in the run was worth.

Server and site are this one process. The site's own part is what it does in every run: policy, ledger, charge, noise.
"""

from __future__ import annotations

from pathlib import Path

from fedveil.client.budget import check_budget, plan_of
from fedveil.client.kept_states import KEEP
from fedveil.client.ledger.rows import Terms
from fedveil.client.node import ledger_of
from fedveil.client.site import check_job, open_site
from fedveil.common.config.flat import Scalar
from fedveil.common.data.in_memory import MARK, in_memory
from fedveil.common.data.sources import load_dataset
from fedveil.common.errors import ConfigError, DataError, RunFailed
from fedveil.common.messages.round import KeyTask
from fedveil.common.paths import run_folder
from fedveil.common.run_lines import ResultFile, read_file, read_if_there
from fedveil.common.tasks import TASKS
from fedveil.common.tasks.examples import Dataset, Example
from fedveil.common.tasks.roles import Column, columns_of
from fedveil.common.tasks.tables import Table
from fedveil.experiments.in_process import run_in_process
from fedveil.experiments.site_rows import SiteRows
from fedveil.strategies.job import Job, configure

FOLDER = "alone"
"""Where such runs lie: beside the ledger."""
HELD_OUT = f"{MARK}held-out"


def train_alone(rows: SiteRows, job: Job, run: str) -> Path:
    """Train a model by this site alone as a run trains one, unless that is done, and return the folder of it.

    The ledger calls it by the run's name with ``alone-`` before it, for which its steward can keep budget.

    Args:
        rows: the site's, of which the held-out ones are scored.
        job, run: the run with the others, and its name.

    Raises:
        ConfigError: its sites do not pay with their own noise, or its records cannot be held in memory as a table.
        BudgetExhausted: the ledger cannot pay for all of it, with what is kept for other runs; nothing was charged.
        PolicyRefusal: the steward's policy forbids it.
        RunFailed: it could not go on.
    """
    if not job.mechanism.charged or job.mechanism.summed:
        raise ConfigError(f"--alone: in a run of privacy.mode {job.config.privacy.mode!r} no site has noise of its own")
    name = f"alone-{run}"
    settings = _settings(rows, job)
    alone = configure(settings)
    check_job(rows.settings, alone, simulated=False)
    folder = run_folder(alone.config, name)
    if (result := read_if_there(ResultFile, folder)) and result.status == "completed":
        return folder
    table = {HELD_OUT: [_table(rows.data, columns_of(TASKS[job.config.model.task].roles, job.config.data))]}
    with in_memory(table):
        _check_same(rows.data, alone)
        site = open_site(rows.settings, alone.config, name, simulated=False)
        check_budget(site, alone, KeyTask(name, 1, 0), whole=True)
        node = {key: value for key, value in rows.settings.items() if key != KEEP}  # the states kept are of other runs
        folder = run_in_process(settings, [node], name)
    if (result := read_file(ResultFile, folder)).status != "completed":
        raise RunFailed(f"the run of this site alone ended early, and is not scored ({result.reason}): see {folder}")
    return folder


def _settings(rows: SiteRows, job: Job) -> dict[str, Scalar]:
    """Return a run's settings for one site, whose noise stays what it is in the run though the budget is the site's."""
    site = open_site(rows.settings, job.config, "alone", simulated=False)
    plan = plan_of(job, site, Terms(job.config.privacy.epsilon, job.config.privacy.delta))
    settings = job.settings() | {
        "privacy.noise-multiplier": plan.event.noise_multiplier,
        "privacy.epsilon": rows.policy.epsilon,
        "data.test": HELD_OUT,
        "data.slice": "",
        "min-sites": 1,
        "tracker": "none",
        "resume": "",
        "privacy.ledger": "",
        "output": str(ledger_of(rows.settings).parent / FOLDER),
    }
    if begun := job.origin.release(rows.policy.min_noise_multiplier):
        settings["start.noise-multiplier"] = begun.event.noise_multiplier
    return settings


def _table(data: Dataset, columns: tuple[Column, ...]) -> Table:
    """Return records as the table that they could have been read from."""

    def cell(example: Example, column: Column) -> object:
        value = getattr(example, column.role.field)
        return column.role.labels.named(value, data.label_names) if column.role.labels else value

    return Table("held-out rows", {c.name: [cell(example, c) for example in data.examples] for c in columns})


def _check_same(data: Dataset, job: Job) -> None:
    """Raise ConfigError unless a table in memory reads as the records that it was made of."""
    try:
        read = load_dataset(job.config.data, job.config.model.task, HELD_OUT).canonical_records()
    except DataError:
        read = []
    if read != data.canonical_records():
        raise ConfigError(f"--alone: records of task {job.config.model.task!r} cannot be held in memory as a table")
