"""The lifetime of what a site makes of its records: the run that it is for, an idle hour, and the worker at most."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from bundles import own_bundle
from runtime_api import SECRET, runtime_api

from audits.tiny_site import OneSite, clinic
from fedveil.client import app, budget, cache, lookout, process, runtime, worker
from fedveil.client import site as site_module
from fedveil.client.cache import RecordCache
from fedveil.client.ledger.ledger import Ledger
from fedveil.client.process import SiteProcess
from fedveil.common.errors import ProtocolError
from fedveil.common.messages.wire import encode_task
from fedveil.common.model.federated import FederatedModel
from fedveil.common.runtime import ANEW, NODE_TOO
from fedveil.common.tasks import Record
from fedveil.common.tasks.featured import FEATURES
from fedveil.experiments.in_process import run_in_process

HEAD = {"strategy": "fedavg-lora", "adapter.name": "none", "training.sample-rate": 1.0}
"""Records become features."""
LINEARISED = {"phases": "4 adapter on jacobians", "training.local-steps": 1, "training.sample-rate": 0.5}
"""They get derivatives."""
pytestmark = [pytest.mark.rough_prices, pytest.mark.usefixtures("fresh_process")]
each_kind = pytest.mark.parametrize("own", [HEAD, LINEARISED], ids=["features", "derivatives"])


def computed() -> set[str]:
    """Return the sites of which the process holds features or derivatives."""
    kept = {name for name, held in app.process.cache.records.items() if FEATURES in (held.records or [{}])[0]}
    return kept | {name for name, held in app.process.cache.vectors.items() if held.records}


def vectors() -> list[Record]:
    """Return all of them; whoever holds these keeps their ids from being given to others."""
    features = [
        record for held in app.process.cache.records.values() for record in held.records or () if FEATURES in record
    ]
    return features + [record for held in app.process.cache.vectors.values() for record in held.records]


def holds_anything() -> bool:
    """Return whether the process holds anything of a record, as read or computed."""
    return bool(computed() or app.process.cache.records or site_module._own_data.cache_info().currsize)


def does_nothing(*_: Any) -> None:
    """Stand for what was forgotten to be called."""


# --- runs -------------------------------------------------------------------------------------------------------------


def check_that_an_abandoned_run_leaves_nothing(site: OneSite) -> None:
    site.train(1, "abandoned")
    assert computed() == {"clinic"}
    before = vectors()
    site.train(1, "next")
    assert not {id(record) for record in before} & {id(record) for record in vectors()}, "vectors of another run"


@each_kind
def test_what_was_computed_for_one_run_serves_no_other(
    own: dict[str, Any], toy_settings: dict[str, Any], tmp_path: Path
) -> None:
    check_that_an_abandoned_run_leaves_nothing(clinic({**toy_settings, **own}, tmp_path))


def test_features_that_another_run_goes_on_with_are_found(
    toy_settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RecordCache, "forget_other_runs", does_nothing)
    with pytest.raises(AssertionError, match="vectors of another run"):
        check_that_an_abandoned_run_leaves_nothing(clinic({**toy_settings, **HEAD}, tmp_path))


def test_a_task_of_another_run_that_is_refused_ends_the_first_one_s_features_all_the_same(
    toy_settings: dict[str, Any], tmp_path: Path
) -> None:
    site = clinic({**toy_settings, **HEAD}, tmp_path)
    site.train(1, "abandoned")
    site.refuse(9, "next")  # a round that the run does not have
    assert not computed()


def test_a_last_round_that_is_refused_before_it_trains_leaves_nothing(
    toy_settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise ProtocolError("the task is none")

    site = clinic({**toy_settings, **HEAD}, tmp_path)
    site.train(3)
    assert computed() == {"clinic"}
    monkeypatch.setattr("fedveil.client.process.check_task", refuse)
    with monkeypatch.context() as planted:
        planted.setattr(RecordCache, "forget_computed", does_nothing)
        site.refuse(4)
        assert computed() == {"clinic"}, "planted: a last round after which nothing is dropped"
    site.refuse(4)
    assert not computed()


def order_of(site: OneSite, monkeypatch: pytest.MonkeyPatch, run: str) -> list[str]:
    """Return in which order a first round of ``run`` charges, tokenises and computes features."""
    seen: list[str] = []
    with monkeypatch.context() as patch:
        for owner, name in ((budget, "pay_round"), (cache, "prepared"), (FederatedModel, "_featurise")):
            real = getattr(owner, name)
            patch.setattr(owner, name, lambda *a, name=name, real=real: (seen.append(name), real(*a))[1])
        site.train(1, run)
    return list(dict.fromkeys(seen))


def test_work_that_is_done_again_is_paid_for_first(
    toy_settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its time tells of records: a server that asks in the name of ever another run must not get it for free."""
    site = clinic({**toy_settings, **HEAD}, tmp_path)
    assert order_of(site, monkeypatch, "first") == ["prepared", "pay_round", "_featurise"]
    assert order_of(site, monkeypatch, "second") == ["pay_round", "prepared", "_featurise"]
    monkeypatch.setattr(RecordCache, "forget_computed", lambda own, site: own.records.pop(site, None))
    assert order_of(site, monkeypatch, "third")[0] == "prepared", "planted: records that are dropped whole"


def test_records_that_no_head_alone_is_trained_on_are_tokenised_once(
    toy_settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = clinic(toy_settings, tmp_path)
    assert "prepared" in order_of(site, monkeypatch, "first")
    assert order_of(site, monkeypatch, "second") == ["pay_round"]


def test_records_that_were_read_anew_are_prepared_anew(toy_settings: dict[str, Any], tmp_path: Path) -> None:
    site, held = clinic(toy_settings, tmp_path), list[int]()
    path = Path(str(site.node["data"]))
    for number in (1, 2):
        site.train(number)
        held.append(len(app.process.cache.records["clinic"].records or ()))
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
        site_module.forget_readings()
    assert held == [40, 39]


# --- the last round ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("own", "fails"), [(HEAD, False), (HEAD, True), (LINEARISED, False)])
def test_nothing_is_left_after_the_last_round_whatever_became_of_it(
    own: dict[str, Any], fails: bool, toy_settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = clinic({**toy_settings, **own}, tmp_path)
    site.train(3)
    assert computed() == {"clinic"}
    if fails:
        site.rule(max_steps=1)
        site.refuse(4)
    else:
        site.train(4)
    assert not computed()
    monkeypatch.setattr(RecordCache, "forget_computed", does_nothing)
    site.rule()
    site.train(3, "2")
    site.ask(site.task(4, "2"))
    # Linearised rounds drop their own where they end well; features are dropped by this alone.
    assert bool(computed()) == (own is HEAD), "the planted fault is not what the check rests on"


def test_a_site_whose_steward_names_none_has_one_name_in_all_that_it_says_and_keeps(
    toy_settings: dict[str, Any], tmp_path: Path
) -> None:
    site = clinic({**toy_settings, **HEAD}, tmp_path)
    del site.node["site"]
    assert site.train(3).site == "site-0"
    assert computed() == {"site-0"}
    assert site.refuse(9).site == "site-0", "the server hears of two sites"
    site.train(4)
    assert not computed(), "what the last round leaves is dropped under another name"


def test_sites_of_one_process_keep_theirs_while_another_ends(
    toy_settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    passed, real = list[int](), FederatedModel.featurise

    def counting(self: FederatedModel, records: Sequence[Record], *words: Any) -> list[Record]:
        passed.append(sum(FEATURES not in record for record in records))
        return real(self, records, *words)

    monkeypatch.setattr(FederatedModel, "featurise", counting)
    run_in_process({**toy_settings, **HEAD, "rounds": 3, "privacy.mode": "none"}, 3)
    assert sum(number > 0 for number in passed) == 4, "three sites once, and the server's test part"
    assert not computed()


# --- a worker ---------------------------------------------------------------------------------------------------------


class Ends(runtime.Node):
    """Gives out one task, then none twice, and then is somebody else's node, which ends the worker."""

    meanwhile: Callable[[], object] = staticmethod(does_nothing)
    """Called as often as there is none."""
    empty = 2
    had = False

    def acquire(self) -> str:
        if not self.had:
            token = super().acquire()
            self.had = bool(token)
            return token
        self.meanwhile()
        self.empty -= 1
        if self.empty < 0:
            raise runtime.NotOurNode("enough")
        return ""


def worked(site: OneSite, monkeypatch: pytest.MonkeyPatch, meanwhile: Callable[[], object] = does_nothing) -> int:
    """Let a worker answer one task and wait for others; return how it ended."""
    monkeypatch.setattr(worker, "POLL_SECONDS", 0.0)
    with runtime_api() as api:
        api.give(encode_task(site.task()), own_bundle(), site.settings, site.node)
        with closing(Ends(api.port, SECRET)) as node:
            node.meanwhile = meanwhile
            return worker.work(node, site.node)


@pytest.fixture
def site(toy_settings: dict[str, Any], tmp_path: Path) -> OneSite:
    return clinic({**toy_settings, **HEAD}, tmp_path)


def test_a_worker_that_is_asked_nothing_for_long_drops_all_and_no_sooner(
    site: OneSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []
    assert worked(site, monkeypatch, lambda: seen.append(holds_anything())) == NODE_TOO
    assert seen == [True, True, True]
    monkeypatch.setattr(worker, "IDLE_SECONDS", -1.0)
    seen.clear()
    worked(site, monkeypatch, lambda: seen.append(holds_anything()))
    assert seen == [False, False, False]
    assert app.process.rehearsals.timings, "what is rehearsed is of nobody's records, and stays"


class Asked(Ends):
    """Gives out what there is after each ``meanwhile``, too."""

    def acquire(self) -> str:
        first = not self.had
        token = super().acquire()
        return token if first else runtime.Node.acquire(self)


def idle_beside_refused_tasks(site: OneSite, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Return what a worker held, each 2,000 s after the last, where each time a task came that it refuses."""
    held, now = list[bool](), [0.0]
    monkeypatch.setattr(worker, "POLL_SECONDS", 0.0)
    for module in (worker, process):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now[0], sleep=does_nothing))
    with runtime_api() as api:
        api.give(encode_task(site.task()), own_bundle(), site.settings, site.node)

        def later() -> None:
            held.append(holds_anything())
            now[0] += 2000.0
            api.give(encode_task(site.task()), b"another bundle", site.settings, site.node)

        with closing(Asked(api.port, SECRET)) as node:
            node.meanwhile = later
            worker.work(node, site.node)
    return held


def test_a_task_that_is_refused_keeps_nothing_longer(site: OneSite, monkeypatch: pytest.MonkeyPatch) -> None:
    assert idle_beside_refused_tasks(site, monkeypatch) == [True, True, False]


def test_a_worker_whose_hour_any_task_renews_is_found(site: OneSite, monkeypatch: pytest.MonkeyPatch) -> None:
    rounds = iter(range(1000))
    counting = property(lambda own: next(rounds), lambda own, value: None)
    monkeypatch.setattr(SiteProcess, "rounds_trained", counting, raising=False)
    assert idle_beside_refused_tasks(site, monkeypatch) == [True, True, True]


@each_kind
def test_a_drop_of_all_leaves_nothing_of_any_kind(
    own: dict[str, Any], toy_settings: dict[str, Any], tmp_path: Path
) -> None:
    clinic({**toy_settings, **own}, tmp_path).train(1)
    assert computed() == {"clinic"}
    app.process.forget()
    assert not holds_anything()


def test_a_worker_that_stops_holds_nothing(site: OneSite, monkeypatch: pytest.MonkeyPatch) -> None:
    worked(site, monkeypatch)
    assert not holds_anything()
    monkeypatch.setattr(RecordCache, "forget", does_nothing)
    worked(site, monkeypatch)
    assert holds_anything(), "the planted fault is not what the check rests on"


def withdraw(site: OneSite) -> None:
    with Ledger(site.ledger) as ledger:
        if not ledger.holds.withdrawals():
            ledger.holds.withdraw("clinic", "asked for")


def test_a_withdrawal_ends_the_worker_and_what_it_held(site: OneSite, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lookout, "LOOK_SECONDS", -1.0)
    assert worked(site, monkeypatch, lambda: withdraw(site)) == ANEW
    assert not holds_anything()


def test_a_task_after_a_withdrawal_has_no_record_read(site: OneSite, monkeypatch: pytest.MonkeyPatch) -> None:
    withdraw(site)
    site.refuse(1)
    assert not holds_anything()
    monkeypatch.setattr(site_module, "withdrawn_in", lambda _: frozenset())
    site.refuse(1)
    assert holds_anything(), "planted: a site that asks its ledger only when it is to pay"


def test_a_worker_that_looks_at_the_files_alone_is_found(site: OneSite, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lookout, "LOOK_SECONDS", -1.0)
    monkeypatch.setattr(lookout, "_withdrawn", lambda _: 0)
    assert worked(site, monkeypatch, lambda: withdraw(site)) == NODE_TOO


def test_a_charge_is_no_withdrawal_and_a_ledger_that_cannot_be_read_ends_a_worker_once(site: OneSite) -> None:
    before = lookout.Lookout(site.node)
    assert not before.look()
    site.train(1)
    assert not before.look()
    site.ledger.write_bytes(b"damaged")
    assert before.look()
    anew = lookout.Lookout(site.node)
    assert [anew.look(), anew.look()] == [False, False]
