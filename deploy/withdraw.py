"""The end of a site's records in its ledger, by the steward's word: their name, and every record that is there now."""

from __future__ import annotations

from collections.abc import Callable

from fedveil.common.errors import DataError
from fedveil.deploy.site_check import pinned_settings
from fedveil.deploy.site_folder import SiteFolder, node_settings, policy_of_node


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
    from fedveil.client.ledger.ledger import Ledger
    from fedveil.client.ledger.record_hashes import record_hashes
    from fedveil.client.node import ledger_of
    from fedveil.common.data.sources import load_protected

    settings = node_settings(folder, more)
    policy = policy_of_node(settings)
    dataset = policy.dataset_of(settings, str(settings["site"]))
    with Ledger(ledger_of(settings)) as ledger:
        ledger.holds.withdraw(dataset, reason)
        say(f"{dataset}: withdrawn. From now on every round on it is refused, and on what was charged for it.")
        unread = "" if policy.task else "the policy does not say what they are for, so how they are read is not known"
        unread = unread if "data" in settings else "this site has no records of its own"
        if not unread:
            data, source = pinned_settings(policy), str(settings["data"])
            try:
                reading = load_protected(data, policy.task, source, line_breaks=policy.line_breaks)
                unread = "; ".join(reading.unreadable)
                ledger.remember(dataset, record_hashes(reading.dataset, ledger.key))
            except DataError as error:
                unread = str(error)
    if unread:
        say(f"No record was read now ({unread}): records that were never charged are known by this name alone.")
    else:
        say("The records that are there now are refused under any name.")
    say("What was sent before stays sent. Tell the coordinator, so that the site is waited for no longer.")
