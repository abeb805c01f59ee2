"""MLflow: a database in the run's folder, or the server that ``MLFLOW_TRACKING_URI`` names."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from fedveil.common.trackers import Tracker

EXPERIMENT, TAG = "fedveil", "fedveil.run"
UNTAKEN = re.compile(r"[^\w\-. /]")
"""Characters that a metric's name may not have; a label has any."""


class MLflow(Tracker):
    """A run of the experiment ``fedveil``; one that goes on is found again by its name."""

    name: ClassVar[str] = "mlflow"
    package: ClassVar[str] = "mlflow"
    where: ClassVar[str] = "mlflow.db"

    def __init__(self, folder: Path, run: str, settings: Mapping[str, str | int | float | bool]) -> None:
        # Unset, the package reports its own use to its makers.
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        from mlflow import MlflowClient

        place = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{(folder / self.where).absolute()}"
        self._client = MlflowClient(tracking_uri=place)
        known = self._client.get_experiment_by_name(EXPERIMENT)
        experiment = known.experiment_id if known else self._client.create_experiment(EXPERIMENT)
        found = self._client.search_runs([experiment], f"tags.`{TAG}` = '{run}'", max_results=1)
        if found:
            self._run = found[0].info.run_id
            self._client.update_run(self._run, status="RUNNING")
        else:
            self._run = self._client.create_run(experiment, run_name=run, tags={TAG: run}).info.run_id
            for key, value in settings.items():
                self._client.log_param(self._run, key, value)

    def log(self, round_number: int, figures: Mapping[str, float]) -> None:
        """Add each figure as a metric."""
        for name, value in figures.items():
            self._client.log_metric(self._run, UNTAKEN.sub("_", name), value, step=round_number)

    def close(self) -> None:
        """Say that the run has ended."""
        self._client.set_terminated(self._run)
