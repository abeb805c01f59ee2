"""The score of a model on public records."""

from __future__ import annotations

from dataclasses import dataclass

MOST_CONFUSED = 20
"""Labels up to which it is counted which are taken for which."""


@dataclass(frozen=True)
class Score:
    """How the model does on public data."""

    accuracy: float
    """Share of right labels, or of right next tokens of the completion."""
    loss: float
    """Mean cross-entropy per record, or per token of the completion; in nats."""
    right: tuple[int, ...] = ()
    """Records that the model gets right, by label; empty where a record has no label."""
    records: tuple[int, ...] = ()
    """Records of each label."""
    predicted: tuple[int, ...] = ()
    """Records that the model gives each label."""
    confusion: tuple[tuple[int, ...], ...] = ()
    """Records by their label, and by the one that the model gives them; empty above ``MOST_CONFUSED`` labels."""
    slice_right: tuple[int, ...] = ()
    """Records that the model gets right, by slice of the test data; empty without slices."""
    slice_records: tuple[int, ...] = ()
    """Records of each slice."""

    def __post_init__(self) -> None:
        # A checkpoint's JSON has lists.
        for counts in ("right", "records", "predicted", "slice_right", "slice_records"):
            object.__setattr__(self, counts, tuple(getattr(self, counts)))
        object.__setattr__(self, "confusion", tuple(map(tuple, self.confusion)))
