"""Counts of a job's own data, from which defaults follow where the data lie on this machine."""

from __future__ import annotations

from fedveil.common.config.sections import DataConfig
from fedveil.common.data.named import DATASETS
from fedveil.common.data.partition import public_size_of_part
from fedveil.common.data.sources import load_dataset
from fedveil.common.errors import ConfigError, DataError
from fedveil.common.tasks.examples import Dataset


def count_labels(config: DataConfig, task: str) -> int:
    """Return how many labels a file of a run has that is here; 0: no such file, or it cannot be read.

    It opens what the settings name, so it is for making a job, and for no site.
    """
    source = config.test or config.name
    dataset = None if source in DATASETS else _here(config, task, source)
    return len(dataset.label_names) if dataset else 0


def count_records(config: DataConfig, task: str) -> int:
    """Return about how many records simulated sites divide, cut to two digits as a site's public size is; 0: unknown.

    It opens what the settings name, so it is for making a job of a simulation.
    """
    dataset = _here(config, task, config.name)
    whole = len(dataset.examples) if dataset else 0
    records = whole if config.test else max(0, whole - config.test_size)
    return public_size_of_part(records) if records else 0


def _here(config: DataConfig, task: str, source: str) -> Dataset | None:
    """Return the records of a source that is here; None: it is not, or cannot be read."""
    if source.startswith("hub:"):
        return None
    try:
        return load_dataset(config, task, source)
    except (ConfigError, DataError, OSError):
        return None  # what needs the records says what is wrong
