"""One experiment tracker per file; ``TRACKERS`` is the table of them."""

from __future__ import annotations

from common.trackers.base import Tracker
from common.trackers.mlflow import MLflow
from common.trackers.tensorboard import TensorBoard
from common.trackers.trackio import Trackio
from common.trackers.wandb import WeightsAndBiases

NO_TRACKER = "none"
TRACKERS: dict[str, type[Tracker]] = {row.name: row for row in (TensorBoard, MLflow, WeightsAndBiases, Trackio)}

__all__ = ["NO_TRACKER", "TRACKERS", "Tracker"]
