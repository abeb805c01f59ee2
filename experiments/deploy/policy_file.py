"""The policy file that ``fedveil site init`` writes."""

from __future__ import annotations

from common.config import Scalar
from experiments.settings import to_toml

HEAD = """\
# What the data steward of this site allows. Where a job's figures are laxer, the site takes these; what it forbids
# it refuses before a record is read.
# The budget counts all runs on these records, whoever asks for them.
"""


def policy_text(dataset: str, public_size: int, epsilon: float, delta: float) -> str:
    """Return a policy's text: the budget of one data set.

    Args:
        dataset: what the ledger calls the records.
        public_size: number of records declared as public; 0 leaves it to the node's settings.
        epsilon: budget over all runs.
        delta: the delta that it holds at.

    Raises:
        ConfigError: a site with this policy would refuse every round: a figure is out of range, or delta
            above one over the public size.
    """
    from client.policy import Policy  # imports torch: seconds that only this needs

    policy = Policy(dataset_id=dataset, public_size=public_size, epsilon=epsilon, delta=delta)
    if public_size:
        policy.check_size(public_size)
    settings: dict[str, Scalar] = {"dataset-id": dataset, "epsilon": epsilon, "delta": delta}
    if public_size:
        settings["public-size"] = public_size
    return HEAD + to_toml(settings)
