"""Redact errors before they leave a site: rules and public figures stay, a record's content and local paths go."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path

from fedveil.client.node import name_of, user_folder
from fedveil.common.config.flat import Scalar
from fedveil.common.errors import (
    BudgetExhausted,
    ConfigError,
    DataError,
    FedVeilError,
    LackingTensors,
    LedgerError,
    ModelError,
    ModelNotLoaded,
    PolicyRefusal,
    PrivacyError,
    ProtocolError,
)
from fedveil.common.log import about, place_of
from fedveil.common.messages.round import Refusal
from fedveil.common.words import pathless

log = logging.getLogger("fedveil.site")
refusals = logging.getLogger("fedveil.site.refusals")
"""Of their own, because a simulation says them in its rounds' lines."""

PATH_KEYS = ("ledger", "policy", "data", "identity")
"""Node settings that hold a path."""
TOLD = (
    BudgetExhausted,
    ConfigError,
    LackingTensors,
    LedgerError,
    ModelError,
    PolicyRefusal,
    PrivacyError,
    ProtocolError,
)
"""Errors whose words follow from settings, rules and the ledger alone; a subclass is not told until it stands here."""
UNTOLD = "the site failed; its own log says where"
"""What the server hears of any other error: even the place of one can tell which record it was, or how many."""
UNLOADED = "this site cannot load the base model that the run names; its own log says why"
"""And of a base model that was not loaded: why not would tell which folders there are, and what is in them."""


def own_words(error: Exception) -> str:
    """Return what the site's own log may say: errors about data and unforeseen ones can quote records."""
    quotable = isinstance(error, FedVeilError) and not isinstance(error, DataError)
    return str(error) if quotable else place_of(error)


def public_reason(error: Exception, node: Mapping[str, Scalar], *, simulated: bool) -> str:
    """Return what the server learns of an error: the words of ``TOLD``; in a simulation everything.

    But for paths in either case: reasons stand in reports, which are given away.
    """
    if simulated:
        return without_paths(
            str(error) if isinstance(error, FedVeilError) else f"{type(error).__name__}: {error}", node
        )
    if isinstance(error, ModelNotLoaded):
        return UNLOADED
    return without_paths(str(error), node) if type(error) in TOLD else UNTOLD


def without_paths(text: str, node: Mapping[str, Scalar]) -> str:
    """Return ``text`` with the node's own paths and the user's folders by what they are, and any other as ``<path>``.

    A path with a blank in it is known by its name alone; of any other one the part after the blank would remain.

    >>> without_paths("see /srv/my data/l.sqlite and /etc/x; 1/50 stays", {"ledger": "/srv/my data/l.sqlite"})
    'see <ledger> and <path>; 1/50 stays'
    """
    names: dict[str, str] = {}
    for key in PATH_KEYS:
        if key in node:
            # As it stands, where there is no such user: an error that is told may not end in another.
            path = Path(os.path.expanduser(str(node[key])))  # noqa: PTH111
            forms = (node[key], path, path.absolute(), os.path.realpath(path))
            names |= {str(form): f"<{key}>" for form in forms if "/" in str(form)}
    for form in sorted(names, key=len, reverse=True):
        text = text.replace(form, names[form])
    for folder, name in ((user_folder(), "<ledgers>"), (Path.home(), "<home>")):
        for form in (str(folder), os.path.realpath(folder)):
            if form != "/":
                text = re.sub(re.escape(form) + r"(?![^/\s'\"`,;:()])", name, text)
    return pathless(text)


def refused(error: Exception, node: Mapping[str, Scalar], run: str, number: int, *, simulated: bool = False) -> Refusal:
    """Return what the server learns of an error in round ``number``, and log it at the site, which may name paths."""
    refusal = Refusal(run, number, name_of(node), _kind_of(error), public_reason(error, node, simulated=simulated))
    where = about(refusal.run, refusal.round_number, refusal.site)
    if refusal.kind == "failed":
        log.error("failed: %s", own_words(error), extra=where)
    else:
        refusals.warning("refused (%s): %s", refusal.kind, own_words(error), extra=where)
    return refusal


def _kind_of(error: Exception) -> str:
    kinds = {BudgetExhausted: "budget", PolicyRefusal: "policy", LackingTensors: "tensors", ProtocolError: "task"}
    return next((kind for error_type, kind in kinds.items() if isinstance(error, error_type)), "failed")
