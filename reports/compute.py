"""The floating-point operations of a run, and their share of what training its base model took.

A pass of a record through a base model of N weights takes about 2 N operations for each of its tokens, and its
gradient 4 N more (Kaplan et al. 2020, arXiv 2001.08361, sec. 2.1). A frozen weight has no gradient of its own, which
saves 2 N of them and is not taken off, so that the figure is rather too large. With ``model.checkpointing`` each layer
passes forward twice where there is a gradient: 8 N in all. Each record is counted as ``model.max-length`` tokens, and
of every step as many as are drawn on average.

With P numbers that are trained below the head, H of the head and C labels, sites take for each record

* 6 N a token in each step on the model itself;
* for derivatives (``client.linearised``), once in ``training.linearised`` rounds: 6 N (C - 1) a token, since each label
  after the first is a pass of its own; and then 4 (C - 1) P + 2 H in a step;
* for features of a head alone (``adapter.name = "none"``, ``client.refit``), once: 2 N a token; and then 6 H in a step;
* for a probe (``contrib.starts.probe``): features, of ``MADE`` made-up texts too, and 6 H in each of its steps;
* for any other start that is made from records: 6 N a token.

What a site makes anew after its process was started anew is not known here and not counted.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from common.accountant import INITIALISATION
from common.config.sections import PrivacyConfig, Scalar
from common.starts import STARTS
from common.starts.base import PaidStart
from common.starts.public_metric import MADE
from reports.claim import server_is_trusted
from reports.sites import ReleaseReport, SiteReport

FORWARD, GRADIENT = 2, 4
"""Operations for each weight and token: of a pass, and of the gradient after it."""
STEPS, PASS, CHEAP, REFIT, PROBE, START = (
    "steps on the model",
    "derivatives of every record",
    "steps on the derivatives",
    "the head alone, on features",
    "the probe",
    "the start",
)
"""What operations are for."""
NEEDED = ("rounds", "training.local-steps", "training.sample-rate", "model.max-length")
"""Settings without which nothing can be counted; each a number."""


@dataclass(frozen=True)
class Sizes:
    """Numbers of a model; 0: an earlier FedVeil did not record it."""

    base: int
    """Weights of the base model."""
    adapter: int
    """Numbers that sites train below the head."""
    head: int
    labels: int


@dataclass(frozen=True)
class ComputeReport:
    """About how many floating-point operations the sites of a run took together."""

    operations: float
    parts: dict[str, float]
    """The same by what they were for; only what there was."""
    weights: int
    """Of the base model."""
    factor: int
    """Operations for each weight and token of a step on the model."""
    base_training: float | None
    """The base model's, as the coordinator declares it; None: nobody has."""

    @property
    def share(self) -> float | None:
        """The run's operations as a share of the base model's."""
        return None if self.base_training is None else self.operations / self.base_training


def compute_report(
    settings: Mapping[str, Scalar],
    sizes: Sizes,
    sites: Sequence[SiteReport],
    joined: Mapping[str, Collection[int]],
    releases: Sequence[ReleaseReport],
    base_training: float | None,
) -> ComputeReport | None:
    """Return the operations of a run; None where they do not follow from its files.

    Args:
        settings: of the run.
        sizes: of its model.
        sites: of the report.
        joined: rounds in which each site took part, from 1 on.
        releases: beside training.
        base_training: operations of the base model's training, as declared.
    """
    if not sizes.base or not sites or any(site.public_size is None for site in sites if site.rounds_joined):
        return None
    if server_is_trusted(str(settings.get("privacy.mode", ""))):
        return None  # how many records a site has is told to nobody
    if any(isinstance(settings.get(key, ""), str) for key in NEEDED):
        return None  # of another version
    probed = {release.site for release in releases if release.purpose == INITIALISATION}
    phases = ("training.linearised", "training.head-first", "training.refit")
    on_vectors = any(settings.get(key) for key in phases) or _on_features(settings)
    if (on_vectors or settings.get("adapter.name") == "none") and not sizes.head:
        return None
    found: dict[str, float] = {}
    for site in sites:
        for what, count in _of_site(settings, sizes, site, joined.get(site.site, ()), site.site in probed).items():
            found[what] = found.get(what, 0.0) + count
    parts = {what: count for what, count in found.items() if count}
    return ComputeReport(sum(parts.values()), parts, sizes.base, _factor(settings), base_training)


def _on_features(settings: Mapping[str, Scalar]) -> bool:
    start = STARTS.get(str(settings.get("adapter.start", "")))
    return start is not None and issubclass(start, PaidStart) and start.on_features


def _factor(settings: Mapping[str, Scalar]) -> int:
    return FORWARD + GRADIENT + FORWARD * bool(settings.get("model.checkpointing"))


def _of_site(
    settings: Mapping[str, Scalar], sizes: Sizes, site: SiteReport, joined: Collection[int], probed: bool
) -> dict[str, float]:
    """Return the operations of one site, by what they were for."""
    keys = ("rounds", "training.linearised", "training.head-first", "training.refit")
    rounds, linear, first, last = (int(settings.get(key) or 0) for key in keys)
    local_steps, rate = int(settings["training.local-steps"]), float(settings["training.sample-rate"])
    records = (site.public_size or 0) * _records_each(settings)
    token_weights = float(sizes.base) * int(settings["model.max-length"])
    gradient, features = _factor(settings) * token_weights, FORWARD * token_weights
    head_step = (FORWARD + GRADIENT) * sizes.head
    contrasts = sizes.labels - 1
    moved = [number for number in joined if first < number <= rounds - last]
    refitted = len(joined) - len(moved)
    passes = any(number <= first for number in joined) + any(number > rounds - last for number in joined)
    found: dict[str, float] = {}
    if settings.get("adapter.name") == "none":
        steps = len(joined) * local_steps
        found[REFIT] = records * (features * bool(joined) + rate * steps * head_step)
    elif linear:
        found[PASS] = records * contrasts * gradient * len({(number - 1 - first) // linear for number in moved})
        step = 2 * FORWARD * contrasts * sizes.adapter + FORWARD * sizes.head
        found[CHEAP] = records * rate * len(moved) * local_steps * step
    else:
        # Rounds that were charged and did not count have taken steps, too.
        of_all = len(moved) * local_steps if first or last or site.steps is None else site.steps
        found[STEPS] = records * rate * of_all * gradient
    if refitted:
        found[REFIT] = records * (passes * features + rate * refitted * local_steps * head_step)
    start = STARTS.get(str(settings.get("adapter.start", "")))
    if start is None or not (probed or (joined and start.needs == "records, without privacy")):
        return found
    drawn = records * float(settings.get("start.sample-rate") or 1.0)
    if _on_features(settings):
        steps = int(settings.get("start.steps") or 0)
        found[PROBE if steps else START] = (records + MADE) * features + drawn * max(1, steps) * head_step
    else:
        found[START] = drawn * gradient
    return found


def _records_each(settings: Mapping[str, Scalar]) -> int:
    """Return the records of a unit, at most."""
    if settings.get("privacy.unit") != "person":
        return 1
    return int(settings.get("privacy.records-per-person") or PrivacyConfig().records_per_person)


def compute_words(report: ComputeReport | None, base_training: str = "") -> list[str]:
    """Return sentences on a run's operations, and on their share of the base model's where that is declared.

    Args:
        report: the operations; None: nothing is known.
        base_training: the base model's, as declared, in the coordinator's own figures; empty: those of the report.
    """
    if report is None:
        return []
    counted = f"N = {report.weights:,} weights of the base model"
    said = [
        f"The sites together took about {report.operations:.2g} floating-point operations: {report.factor} N D, with "
        f"{counted}, and D tokens: the records that the steps draw on average, each counted as the longest."
    ]
    if list(report.parts) != [STEPS]:
        parts = ", ".join(f"{count:.2g} for {what}" for what, count in report.parts.items())
        said = [
            f"The sites together took about {report.operations:.2g} floating-point operations, with {counted} and each "
            f"record counted as the longest: {parts}."
        ]
    declared = float(base_training) if base_training else report.base_training
    if declared is not None:
        share = report.operations / declared
        shown = f"{100 * share:.2g} %" if share >= 1e-6 else f"{share:.1g}"
        said.append(
            f"That is {shown} of the {base_training or f'{declared:g}'} of the base model's training, as declared."
        )
    return said
