"""The base class of recipes: settings that go together, and the runs that they suit."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from fedveil.common.config.asked import RunSettings, optimizers
from fedveil.common.config.sections import Scalar
from fedveil.common.tasks import TASKS


@dataclass(frozen=True)
class Asked:
    """What is asked of a run, before a recipe fills in what is left open. All of it is public."""

    settings: RunSettings
    """What is left open has its default here."""
    given: frozenset[str] = frozenset()
    """Keys of the settings that are written out, whatever their values."""
    labels: int = 0
    """How many there are; 0: not known, or the task has none."""
    sites: int = 0
    """How many sites the run has, where that is known before it; 0: not known."""

    @property
    def clips(self) -> bool:
        """Whether what one record adds to a step is clipped, so that steps are no longer than that times their rate."""
        mechanism = self.settings.privacy.mechanism
        return mechanism.charged or mechanism.central

    @property
    def told_noise(self) -> bool:
        """Whether what noise there is is the sites', who say how much: ``server.most-noise`` goes by that."""
        return not self.settings.privacy.mechanism.central

    @property
    def unlabelled(self) -> Mapping[str, Scalar]:
        """What stands for a task without labels: its model has its own head, and no labels divide its records."""
        task = TASKS.get(self.settings.model.task)
        return {} if task is None or task.labelled else {"head.policy": "frozen", "data.partition": "iid"}

    @property
    def optimizer(self) -> str:
        """The sites' optimiser, ``auto`` filled in."""
        return optimizers(self.settings)[0]


class Recipe(ABC):
    """Settings that were found together. One file and one row each."""

    name: ClassVar[str]
    """What ``recipe`` calls it."""
    trains: ClassVar[str] = ""
    """What is trained, for people who get this recipe in the place of another; empty: its name says it."""
    claims: ClassVar[bool] = True
    """Whether it is for runs that promise something, or else for those that promise nothing. The last is for all."""
    labelled: ClassVar[bool] = True
    """Whether it is for tasks with labels, or else for language models. The last is for all."""
    by_records: ClassVar[bool] = False
    """Whether it goes by how many records there are (``data.records``)."""

    @abstractmethod
    def unfit(self, asked: Asked) -> str:
        """Return why it does not suit a run, as the end of a sentence; empty: it does."""

    @abstractmethod
    def settings(self, asked: Asked) -> Mapping[str, Scalar]:
        """Return what stands in the place of settings that are left open, by their keys."""
