"""The floating-point operations of a run, and their share of what training its base model took.

Training takes about 6 N D operations for N weights and D tokens: 2 in the forward pass and 4 in the backward pass for
each weight and token (Kaplan et al. 2020, arXiv 2001.08361, sec. 2.1). A frozen weight has no gradient of its own,
which saves 2 of them and is not taken off, so that the figure is rather too large. With ``model.checkpointing`` each
layer passes forward twice, so it is 8 N D.

D counts each record as ``model.max-length`` tokens, and of every step as many as are drawn on average.
"""

from __future__ import annotations

from common.config.sections import PrivacyConfig
from reports.claim import server_is_trusted
from reports.data import ReportData, setting_of

EACH, AGAIN = 6, 2
"""Operations for each weight and token; more of them where layers are computed again."""


def operations(data: ReportData) -> float | None:
    """Return about how many operations the run's sites took together; None where this formula does not count them."""
    if data.origin is None or not data.origin.parameters or not data.sites:
        return None
    if setting_of(data, "training.linearised") or setting_of(data, "adapter.name") == "none":
        return None  # a record passes once for many steps there
    if server_is_trusted(data.claim.privacy_mode):
        return None  # how many records a site has is told to nobody
    drawn = 0.0
    for site in data.sites:
        if site.public_size is None:
            return None
        steps = site.rounds_joined * int(setting_of(data, "training.local-steps"))
        drawn += (steps if site.steps is None else site.steps) * site.public_size
    of_unit = 1
    if setting_of(data, "privacy.unit") == "person":
        of_unit = int(setting_of(data, "privacy.records-per-person") or PrivacyConfig().records_per_person)
    tokens = (
        drawn * float(setting_of(data, "training.sample-rate")) * of_unit * int(setting_of(data, "model.max-length"))
    )
    return (EACH + AGAIN * bool(setting_of(data, "model.checkpointing"))) * data.origin.parameters * tokens


def compute_words(data: ReportData, declared: str) -> list[str]:
    """Return sentences on the run's operations, and on their share of the base model's where that is declared.

    Args:
        data: the report.
        declared: the base model's operations, as the coordinator declares them; empty: nobody has.
    """
    own = operations(data)
    if own is None or data.origin is None:
        return []
    factor = EACH + AGAIN * bool(setting_of(data, "model.checkpointing"))
    said = [
        f"The sites together took about {own:.2g} floating-point operations: {factor} N D, with N = "
        f"{data.origin.parameters:,} weights of the base model, and D tokens: the records that the steps draw on "
        "average, each counted as the longest."
    ]
    if declared:
        share = own / float(declared)
        shown = f"{100 * share:.2g} %" if share >= 1e-6 else f"{share:.1g}"
        said.append(f"That is {shown} of the {declared} of the base model's training, as declared.")
    return said
