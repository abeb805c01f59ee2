"""The sites that a run names: no other one gets a task, and no other one can be drawn."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Container, Mapping

from fedveil.common.check import nearest
from fedveil.common.errors import ConfigError
from fedveil.common.messages.round import Task
from fedveil.server.replies import refusal
from fedveil.server.sites import Exchange, Transport
from fedveil.strategies.job import Job

log = logging.getLogger("fedveil.server")
FRESH_SECONDS = 0.5
"""How long the register of names is believed: sites come and go while a run waits for them."""


def to_named(job: Job, transport: Transport) -> Transport:
    """Return a transport that reaches the sites which a run names alone; the same one if it names none.

    Raises:
        ConfigError: a name is no registered site's; nothing was sent.
    """
    if not job.config.site_names:
        return transport
    check_named(job, transport.registered())
    return NamedTransport(job.config.site_names, transport)


def check_named(job: Job, registered: Mapping[int, str] | None) -> None:
    """Raise ConfigError unless every site that a run names is registered; one that left a resumed run is logged.

    Args:
        job: the run.
        registered: names by node; None: there is no register.
    """
    if job.config.site_names and registered is None:
        raise ConfigError(
            "named-sites is for registered sites, and neither Flower's simulation nor a server without a folder has a "
            "register of names: leave it out"
        )
    if not (words := unregistered(job.config.site_names, (registered or {}).values())):
        return
    if not job.config.resume:
        raise ConfigError(words)
    log.warning("the run goes on without a site: %s", words)


def unregistered(names: Collection[str], registered: Collection[str], groups: Collection[str] = ()) -> str:
    """Return which names are neither a registered site's nor a group's, in one line; empty: all are.

    >>> unregistered(["clinic", "wrad"], ["clinic", "ward"])
    "named-sites names 'wrad' (did you mean 'ward'?), which is not registered; registered are: clinic, ward"
    """
    all_names = [*registered, *groups]
    unknown = [f"{name!r}{nearest(name, all_names)}" for name in names if name not in all_names]
    known = (", ".join(sorted(registered)) or "none") + (f"; groups are: {', '.join(sorted(groups))}" if groups else "")
    verb = "which is not" if len(unknown) == 1 else "which are not"
    return f"named-sites names {', '.join(unknown)}, {verb} registered; registered are: {known}" if unknown else ""


class NamedTransport:
    """A transport to the sites that a run names, by the names under which their keys are registered."""

    def __init__(self, sites: Collection[str], transport: Transport) -> None:
        self._sites, self._transport = frozenset(sites), transport
        self.registered = transport.registered

    def nodes(self, wanted: int, besides: Container[int]) -> list[int]:
        """Return the named nodes online other than ``besides``; waits for ``wanted`` of them."""
        others = _Others(besides, self._named)
        return [node for node in self._transport.nodes(wanted, others) if node not in others]

    def exchange(self, tasks: Mapping[int, Task], timeout: float) -> Exchange:
        """Send the named nodes' tasks; another node's is not sent, whatever asked for it, and fails here."""
        named = self._named()
        sent = {node: task for node, task in tasks.items() if node in named}
        got = self._transport.exchange(sent, timeout) if sent else Exchange({}, 0, 0)
        unsent = {
            node: refusal(task, node, "failed", "the run names no site of this key (any more): no task was sent")
            for node, task in tasks.items()
            if node not in named
        }
        return Exchange({**got.replies, **unsent}, got.bytes_down, got.bytes_up)

    def _named(self) -> frozenset[int]:
        return frozenset(node for node, name in (self.registered() or {}).items() if name in self._sites)


class _Others(Container[int]):
    """The nodes that a look-up leaves out: those that are no named site's, and some more."""

    def __init__(self, besides: Container[int], named: Callable[[], Container[int]]) -> None:
        self._besides, self._read = besides, named
        self._named, self._since = named(), time.monotonic()

    def __contains__(self, node: object) -> bool:
        if time.monotonic() - self._since > FRESH_SECONDS:
            self._named, self._since = self._read(), time.monotonic()
        return node in self._besides or node not in self._named
