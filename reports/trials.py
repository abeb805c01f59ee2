"""The price of all trials of a tuning, beside that of the one run that a report is about.

Trials are charged in order, so the chosen one's own ε leaves out whatever was tried after it. The server saw every
trial; no form of a report may show the one figure without the other.
"""

from __future__ import annotations

from dataclasses import replace

from fedveil.common.other_runs import TuningFile
from fedveil.privacy.figures import epsilon_text

TRIAL_ALONE = (
    "These figures cover this trial's releases alone. The server saw those of every other trial too, and an attacker "
    "may use them all."
)
CHOSEN = {True: " and was chosen by its score", False: "; another one was chosen", None: ""}


def at_least(tuning: TuningFile | None, epsilon: float | None) -> TuningFile | None:
    """Return the trials with an ε that is at least the run's own."""
    return tuning if tuning is None or epsilon is None else replace(tuning, epsilon=max(tuning.epsilon, epsilon))


def trials_figure(tuning: TuningFile) -> str:
    """Return the figure beside the headline's.

    >>> trials_figure(TuningFile(trials=3, chosen=True, epsilon=5.2, delta=1e-5))
    'all 3 trials together: ε 5.200 at δ 1e-05'
    """
    return f"all {tuning.trials} trials together: ε {epsilon_text(tuning.epsilon)} at δ {tuning.delta:g}"


def trials_sentence(tuning: TuningFile, per: str) -> str:
    """Return what a claim must say of a run that is one of several trials; ``per``: the unit in one word."""
    charged = "will be released and charged" if tuning.chosen is None else "was released and charged"
    return (
        f"The run is one of {tuning.trials} trials of settings on the same records{CHOSEN[tuning.chosen]}. Each "
        f"{charged}: all {tuning.trials} together are (ε, δ) = ({epsilon_text(tuning.epsilon)}, "
        f"{tuning.delta:g}) per {per}, in a site that joined every round."
    )
