"""Initialisations of an adapter's factors, and what each costs: one a file, and ``STARTS``, the table of them.

A start is an axis of its own: any adapter begins in any start that gives the directions which it asks
for. A new one is one file and one row. Its options are the fields of its dataclass, and are set in the
run configuration under ``start``: ``start.records = 64``. Options of one name have one default in all rows.
"""

from __future__ import annotations

from fedveil.common.adapters import Adapter
from fedveil.common.errors import ConfigError
from fedveil.common.rows import Table
from fedveil.common.starts.base import Labels, Start
from fedveil.common.starts.class_means import ClassMeans
from fedveil.common.starts.dp_gradient import DPGradient
from fedveil.common.starts.kaiming import Kaiming
from fedveil.common.starts.orthonormal import Orthonormal
from fedveil.common.starts.paid import PaidStart, UnpaidStart
from fedveil.common.starts.public_metric import PublicMetric

STARTS: Table[type[Start]] = Table("starts", (Orthonormal, Kaiming, PublicMetric, ClassMeans, DPGradient))


def check_directions(start: Start, adapter: type[Adapter]) -> None:
    """Raise ConfigError unless a start gives all directions that an adapter asks for; it names the starts that do.

    Of what the adapter asks for, something must come from the statistic of round 0, where there is one.
    """
    lacking = sorted(set(adapter.directions) - set(start.gives))
    if lacking:
        fits = [name for name, other in STARTS.core.items() if set(adapter.directions) <= set(other.gives)]
        beside = [name for name, other in STARTS.items() if set(adapter.directions) <= set(other.gives)]
        fitting = ", ".join(fits or beside)
        raise ConfigError(
            f"adapter.start {start.name!r} gives no {' and '.join(lacking)}, which the adapter {adapter.name!r} begins "
            f"with: set adapter.start to one that does ({fitting})"
        )
    if start.asked != "nobody" and adapter.directions and set(adapter.directions) <= set(start.from_seed):
        raise ConfigError(
            f"adapter.start {start.name!r} asks the {start.asked} where {_others(start)} begins, and the adapter "
            f"{adapter.name!r} begins with {' and '.join(adapter.directions)} alone, which is from the seed there: "
            "leave adapter.start at 'orthonormal', which gives the same"
        )


def _others(start: Start) -> str:
    return " and ".join(direction for direction in start.gives if direction not in start.from_seed)


__all__ = ["STARTS", "Labels", "PaidStart", "Start", "UnpaidStart", "check_directions"]
