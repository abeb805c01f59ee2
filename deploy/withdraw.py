"""The end of a site's records in its ledger, by the steward's word: their name, and every record that is there now."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from fedveil.common.errors import DataError
from fedveil.deploy.own_rows import pinned_settings
from fedveil.deploy.site_folder import SiteFolder, node_settings, policy_of_node

if TYPE_CHECKING:
    from fedveil.client.ledger.ledger import Ledger
    from fedveil.client.policy import Policy


def withdraw_site(folder: SiteFolder, reason: str, say: Callable[[str], None], more: str = "") -> None:
    """Withdraw the site's data set for good, under whatever name its records come later.

    The name is withdrawn before a record is read. Records that cannot be read are known by their earlier charges and by
    the name. A round that was charged before is answered still.

    Args:
        folder, more: the site's folder, and node settings that win over the folder's.
        reason: the steward's; it stays in the ledger.
        say: prints one line.

    Raises:
        ConfigError, LedgerError: settings, policy or reason are wrong; the ledger cannot be written.
    """
    from fedveil.client.held_out import FILE
    from fedveil.client.ledger.ledger import Ledger
    from fedveil.client.node import ledger_of

    settings = node_settings(folder, more)
    policy = policy_of_node(settings)
    dataset = policy.dataset_of(settings, str(settings["site"]))
    with Ledger(ledger_of(settings)) as ledger:
        ledger.holds.withdraw(dataset, reason)
        say(f"{dataset}: withdrawn. From now on every round on it is refused, and on what was charged for it.")
        said = "" if policy.task else "the policy does not say what they are for, so how they are read is not known"
        said = said if "data" in settings else "this site has no records of its own"
        # Held-out rows too: what was never used is not to be used under another name either.
        sources = [] if said else [str(settings[key]) for key in ("data", FILE) if key in settings]
        whys = [why for why in (said, *(_remembered(ledger, dataset, policy, source) for source in sources)) if why]
    if whys:
        why = "; ".join(whys)
        say(f"No record was read now ({why}): records that were never charged are known by this name alone.")
    else:
        say("The records that are there now are refused under any name.")
    say("What was sent before stays sent. Tell the coordinator, so that the site is waited for no longer.")


def _remembered(ledger: Ledger, dataset: str, policy: Policy, source: str) -> str:
    """Let a ledger know the records of a source under a name; return why some were not read, if any."""
    from fedveil.client.ledger.record_hashes import record_hashes
    from fedveil.common.data.sources import load_protected

    try:
        reading = load_protected(pinned_settings(policy), policy.task, source, line_breaks=policy.line_breaks)
    except DataError as error:
        return str(error)
    ledger.remember(dataset, record_hashes(reading.dataset, ledger.key))
    return "; ".join(reading.unreadable)
