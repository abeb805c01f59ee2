"""Checks of a site's folder, for ``fedveil doctor``."""

from __future__ import annotations

import math
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

from fedveil.client.ledger.ledger import Ledger
from fedveil.client.policy import NO_BUDGET
from fedveil.common.bundle import own_digest
from fedveil.common.errors import PolicyRefusal
from fedveil.common.files import expanded
from fedveil.common.words import counted
from fedveil.deploy import shared_checks as shared
from fedveil.deploy.check_results import CheckResult, examine, in_silence
from fedveil.deploy.files import read_bytes
from fedveil.deploy.fleet import ask_to_join
from fedveil.deploy.fleet_answers import Answer
from fedveil.deploy.node_keys import read_node_key
from fedveil.deploy.refusal import why_refused, why_unreachable
from fedveil.deploy.server_checks import authority_checks
from fedveil.deploy.site_folder import ANY_PORT, SiteFolder, check_name, check_pinned, node_settings, policy_of_node
from fedveil.deploy.start import check_own_port, is_running, secret_file
from fedveil.privacy import trusting_the_server
from fedveil.privacy.figures import epsilon_text, honest_text
from fedveil.privacy.units import RECORD


def examine_site(folder: SiteFolder, step: Callable[[str], None] = in_silence) -> Iterator[CheckResult]:
    """Check a site's folder; the server is queried, and the site stays offline."""
    return examine(
        [
            ("versions", shared.versions),
            ("advisories", shared.advisories),
            ("authority", lambda: authority_checks(folder.path)),
            ("site's key", lambda: shared.private_file(folder.path / "node.key", "site's key")),
            ("key pair", lambda: _pair(folder)),
            ("node settings", lambda: _settings(folder)),
            ("policy", lambda: _policy(folder)),
            ("persons", lambda: _persons(folder)),
            ("pins", lambda: _pins(folder)),
            ("mechanisms", lambda: _mechanisms(folder)),
            ("models", lambda: _models(folder)),
            ("secure sums", lambda: _peers_of(folder)),
            ("bundles", lambda: _bundles(folder)),
            ("worker's secret", lambda: _secret(folder)),
            ("ledger", lambda: _ledger(folder)),
            ("disk", lambda: shared.disk(_ledger_file(folder), "disk")),
            ("base model", lambda: _base_model(folder)),
            ("runtime port", lambda: _runtime_port(folder)),
            ("server", lambda: _server(folder)),
            ("clock", lambda: _clock(folder)),
            ("registration", lambda: _registration(folder)),
        ],
        step,
    )


def _pair(folder: SiteFolder) -> Iterator[CheckResult]:
    check_name(folder, node_settings(folder))
    yield CheckResult(True, "key pair", "node.pub belongs to node.key")


def _settings(folder: SiteFolder) -> Iterator[CheckResult]:
    settings = node_settings(folder)
    yield CheckResult(True, "node settings", ", ".join(f"{key} {value}" for key, value in settings.items()))


def _policy(folder: SiteFolder) -> Iterator[CheckResult]:
    settings = node_settings(folder)
    policy = policy_of_node(settings)
    lacking = "data" in settings and policy.lacks_budget
    budget = NO_BUDGET if lacking else "no budget: what a run costs is the run's to say"
    if math.isfinite(policy.epsilon):
        budget = f"ε ≤ {policy.epsilon} at δ = {policy.delta} over all runs"
    yield CheckResult(not lacking, "policy", budget)


def _persons(folder: SiteFolder) -> Iterator[CheckResult]:
    settings, what = node_settings(folder), "persons"
    policy = policy_of_node(settings)
    if policy.unit != RECORD.name:
        yield CheckResult(True, what, "the unit of all runs is one person")
        return
    most, ceiling = policy.person_terms(RECORD.name)
    if most == 1 and math.isinf(ceiling):
        found = "the unit is a record; with records-per-person in the policy, ε of a person with the most is shown here"
        yield CheckResult(True, what, found)
        return
    dataset, spent, at = policy.dataset_of(settings, str(settings["site"])), 0.0, policy.delta
    honest, file = 0, _ledger_file(folder)
    if file.exists():
        with Ledger(file) as ledger:
            at = min(at, ledger.terms(dataset).delta)
            spent, honest = ledger.epsilon_of_person(dataset, most, min(at, 1.0)), ledger.honest_sites(dataset)
    said = f"a person with {counted(most, 'record')} in {dataset} has ε {epsilon_text(spent)}"
    said += f" at δ {at:g}" if math.isfinite(at) else ""
    said += honest_text(honest)
    limit = f", of at most {ceiling:g}" if math.isfinite(ceiling) else "; epsilon-person would limit it"
    yield CheckResult(spent <= ceiling, what, said + limit)


def _pins(folder: SiteFolder) -> Iterator[CheckResult]:
    from fedveil.client.pins import spoken

    pinned = spoken(check_pinned(folder, node_settings(folder)))
    yield CheckResult(True, "pins", pinned or "none: this site plays parts of FedVeil's own data sets alone")


def _mechanisms(folder: SiteFolder) -> Iterator[CheckResult]:
    policy = policy_of_node(node_settings(folder))
    without = "; and runs without privacy" if policy.allow_no_privacy else ""
    trusting = trusting_the_server(policy.allowed_mechanisms)
    seen = f"; in those of {', '.join(trusting)} no record is protected from the server" if trusting else ""
    yield CheckResult(True, "mechanisms", f"runs of {', '.join(policy.allowed_mechanisms)}{seen}{without}")


def _models(folder: SiteFolder) -> Iterator[CheckResult]:
    policy = policy_of_node(node_settings(folder))
    try:
        policy.check_model_name(folder.model)
    except PolicyRefusal:
        yield CheckResult(False, "models", f"site.toml names {folder.model}, the policy allows {policy.allowed_models}")
        return
    yield CheckResult(True, "models", policy.allowed_models)


def _base_model(folder: SiteFolder) -> Iterator[CheckResult]:
    from fedveil.common.model.files import files_of

    files, policy = files_of(folder.model), policy_of_node(node_settings(folder))
    policy.check_model_name(folder.model)
    policy.check_files(folder.model, files)
    yield from shared.base_model(folder.model, folder.task, folder.fingerprint)


def _peers_of(folder: SiteFolder) -> Iterator[CheckResult]:
    from fedveil.client.party import party_of, roster_file
    from fedveil.privacy.secure_sum.roster import load_roster

    settings = node_settings(folder)
    policy, what = policy_of_node(settings), "secure sums"
    if not policy.honest_sites:
        yield CheckResult(True, what, "the policy lets this site join none")
        return
    key = expanded(str(settings.get("identity", folder.path / "identity.key")))
    yield from shared.private_file(key, "signing key")
    load_roster(roster_file(settings, policy))  # an error says where the file is, which a party's keeps to itself
    roster = party_of(str(settings["site"]), settings, policy, "", simulated=False).roster
    yield CheckResult(
        True,
        what,
        f"{policy.honest_sites} of the {len(roster.keys)} sites {', '.join(roster.keys)} count as honest, ε alone at "
        f"most {policy.epsilon_alone:g}; every steward must see the roster {roster.digest}",
    )


def _bundles(folder: SiteFolder) -> Iterator[CheckResult]:
    own = own_digest()
    allowed = policy_of_node(node_settings(folder)).allowed_bundles(own)
    note = f"{own} (the installed version's own)"
    named = ", ".join(note if digest == own else digest for digest in allowed)
    yield CheckResult(True, "bundles", named if own in allowed else f"{named}; not {note}")


def _secret(folder: SiteFolder) -> Iterator[CheckResult]:
    file, what = secret_file(folder), "worker's secret"
    if file.exists():
        yield from shared.private_file(file, what)
    else:
        yield CheckResult(True, what, "new at every start, for this user alone")


def _ledger(folder: SiteFolder) -> Iterator[CheckResult]:
    file = _ledger_file(folder)
    if not file.exists():
        yield CheckResult(True, "ledger", f"{file} is not there yet: the first round makes it")
        return
    with Ledger(file) as ledger:
        entries = len(ledger.entries())
    mode = stat.S_IMODE(os.stat(file).st_mode)
    private = not mode & 0o077
    advice = "" if private else f"; others can read it: chmod 600 {file}"
    yield CheckResult(private, "ledger", f"{file} opens, {entries} charges, mode {mode:04o}{advice}")


def _ledger_file(folder: SiteFolder) -> Path:
    """Return the ledger that rounds are charged to, which the node's settings may name."""
    from fedveil.client.node import ledger_of

    return ledger_of(node_settings(folder))


def _runtime_port(folder: SiteFolder) -> Iterator[CheckResult]:
    what, port = "runtime port", folder.runtime_port
    if port == ANY_PORT:
        yield CheckResult(True, what, "a free one of the loopback at each start")
    elif is_running(folder):
        yield CheckResult(True, what, f"{port}; this site is running")
    else:
        check_own_port(folder)
        yield CheckResult(True, what, f"{port} is free")


def _server(folder: SiteFolder) -> Iterator[CheckResult]:
    reason, road = why_unreachable(folder), folder.road
    through = f"; through the proxy {road.proxy} ({road.source}), TLS ends at the server" if road.proxy else ""
    found = f"{folder.server} answers, with a certificate of the authority{through}"
    yield CheckResult(not reason, "server", reason or found)


def _clock(folder: SiteFolder) -> Iterator[CheckResult]:
    if why_unreachable(folder):
        yield CheckResult(False, "clock", "cannot be compared before the server answers")
        return
    key = read_node_key(read_bytes(folder.path / "node.key", "the site's private key"))
    authority = read_bytes(folder.path / "ca.crt", "the authority's certificate")
    reply = ask_to_join(folder.server, authority, key, folder.road)
    if reply.answer in (Answer.REGISTERED, Answer.UNKNOWN_KEY):  # it looks at the time before it looks for the key
        yield CheckResult(True, "clock", "the server accepts this machine's time")
        return
    more = "set it by NTP" if reply.answer is Answer.CLOCK else f"nothing is known of its time ({reply.words})"
    yield CheckResult(False, "clock", f"{reply.answer.value}; {more}")


def _registration(folder: SiteFolder) -> Iterator[CheckResult]:
    reason = why_refused(folder)
    yield CheckResult(not reason, "registration", reason or "the server knows this site's key and would let it in")
