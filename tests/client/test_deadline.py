"""A site with ``reply-after`` answers at a fixed time, whatever its records are; what cannot be in time sends noise."""

from __future__ import annotations

import itertools
import math
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from timed_site import Clock, Played, timing

from audits.tiny_site import OneSite, clinic
from fedveil.client import app, budget, cache, deadline, exact_shapes, process, rehearsal, rehearsals
from fedveil.client.cache import Prepared, RecordCache
from fedveil.client.deadline import TRAINED, Deadline, TooLate
from fedveil.client.process import SiteProcess
from fedveil.client.rehearsal import rehearse
from fedveil.client.site import open_site
from fedveil.client.timing import Timing, most_drawn
from fedveil.common.errors import PolicyRefusal
from fedveil.common.messages.round import Refusal, TrainResult
from fedveil.common.model import device
from fedveil.common.model.federated import FederatedModel
from fedveil.privacy import dpsgd
from fedveil.strategies.job import configure

pytestmark = pytest.mark.rough_prices


@pytest.fixture
def site(toy_settings: dict[str, Any], tmp_path: Path) -> OneSite:
    return clinic({**toy_settings, "training.sample-rate": 0.1, "training.local-steps": 10}, tmp_path)


TIMING = Timing(passes={8: 0.1, 24: 0.3}, rows={8: 40, 24: 10}, empty=0.5, score=0.01)


# --- the worst round --------------------------------------------------------------------------------------------------
def test_the_worst_round_has_the_most_records_in_the_slowest_shape_and_one_in_every_other() -> None:
    # 25 expected records: 64 at most. A pass of each length, and 63 records more at 0.03 seconds each.
    step = 0.1 + 0.3 + 63 * 0.03 + 0.5
    assert TIMING.reserve(steps=2) == pytest.approx(0.3 + 3 * 0.5)
    assert TIMING.worst(steps=2, batch=25.0, scored=0) == pytest.approx(2 * step + 1.8)
    assert TIMING.worst(steps=2, batch=25.0, scored=100) == pytest.approx(2 * step + 1.8 + 1.0)


def all_in_the_slowest(timing: Timing, most: int) -> float:
    """The planted fault: as if no other length occurred."""
    return max(math.ceil(most / timing.rows[length]) * seconds for length, seconds in timing.passes.items())


def bounded(timing: Timing, most: int) -> float:
    """What ``worst`` gives a step beside noise and reserve."""
    batch = next(b / 100 for b in itertools.count(1) if most_drawn(b / 100) >= most)
    assert most_drawn(batch) == most
    return timing.worst(1, batch, 0) - timing.empty - timing.reserve(1)


def test_no_way_to_spread_records_over_the_lengths_takes_longer_and_one_length_alone_is_found_out() -> None:
    draw, faulty = random.Random(1), 0
    for _ in range(60):
        lengths = range(8, 8 * draw.randint(2, 4), 8)
        timing = Timing(
            {length: draw.uniform(0.1, 2.0) for length in lengths},
            {length: draw.randint(1, 12) for length in lengths},
            *(0.0, 0.0),
        )
        most = draw.randint(15, 24)
        spread = (c for c in itertools.product(range(most + 1), repeat=len(lengths)) if sum(c) == most)
        slowest = max(
            sum(
                math.ceil(n / timing.rows[length]) * timing.passes[length] for n, length in zip(c, lengths, strict=True)
            )
            for c in spread
        )
        assert slowest <= bounded(timing, most) + 1e-9
        faulty += slowest > all_in_the_slowest(timing, most) + 1e-9
    assert faulty > 10


def test_more_records_than_a_round_has_time_for_are_drawn_once_in_a_thousand_million_times() -> None:
    for expected in (0.01, 1.0, 25.0, 2000.0):
        beyond = range(most_drawn(expected) + 1, most_drawn(expected) + 400)
        chance = sum(math.exp(n * math.log(expected) - expected - math.lgamma(n + 1)) for n in beyond)
        assert chance < 1e-9
    six_deviations = math.floor(1.0 + 6.0)
    assert sum(math.exp(-1.0 - math.lgamma(n + 1)) for n in range(six_deviations + 1, 100)) > 1e-6, "planted: as before"


def test_a_pass_is_timed_with_its_clip(site: OneSite, monkeypatch: pytest.MonkeyPatch) -> None:
    clip, clock = dpsgd.ClipAndNoise.clip_and_accumulate, Clock()

    def slow(mechanism: Any) -> None:
        if len(mechanism.grad_samples[0]):
            clock.sleep(0.2)
        clip(mechanism)

    for module in (rehearsal, exact_shapes):
        monkeypatch.setattr(module, "time", clock)
    monkeypatch.setattr(dpsgd.ClipAndNoise, "clip_and_accumulate", slow)
    timing = rehearse(site.model())
    ends = (min(timing.passes), max(timing.passes))
    assert sum(timing.passes[length] for length in ends) == pytest.approx(0.4)


# --- the clock --------------------------------------------------------------------------------------------------------
def test_a_time_below_the_worst_is_refused_and_none_is_as_fast_as_it_goes() -> None:
    worst = TIMING.worst(2, 25.0, 0)
    says = r"reply-after = 9, of which a round has 6\.75 seconds; by made-up records a round of this run may take 7\.4"
    with pytest.raises(PolicyRefusal, match=says):
        Deadline(9.0).allow(worst, 0.0)
    with pytest.raises(PolicyRefusal):
        Deadline(worst / TRAINED - 0.01).allow(worst, 0.0)
    Deadline(worst / TRAINED + 0.01).allow(worst, 0.0)
    free = Deadline(began=time.monotonic() - 1e6)
    free.allow(math.inf, 1e6)
    free.check_prepared()
    free.begin_round()
    free.check()
    assert free.left() == math.inf


def test_what_a_round_computes_before_its_steps_has_its_own_time_and_its_own_reserve(site: OneSite) -> None:
    ahead, on_features = Timing({8: 0.5}, {8: 4}, 0.25, 0.0), timing(long=1.0, empty=0.5)
    site.settings["phases"] = "1 head on features, 3 adapter on jacobians"
    job, model = configure(site.settings), site.model()
    ours, own = open_site(site.node, job.config, "1", simulated=False), rehearsals.Rehearsals(RecordCache())
    own.timings = {rehearsals.PLAIN: on_features, rehearsals.FEATURED: ahead, rehearsals.ON_FEATURES: on_features}
    worst, reserve = own.forecast(job, ours, model, 1, rehearsals.PLAIN)
    assert worst == pytest.approx(on_features.worst(10, 0.1 * 50, 0) + ahead.worst(1, 50.0, 0))
    assert reserve == pytest.approx(on_features.reserve(10) + ahead.reserve(1))
    assert TIMING.worst(2, 25.0, 0, 3, 10) > 1.5 * TIMING.worst(2, 25.0, 0), "of persons"


def test_how_long_records_took_is_held_against_the_policy_alone_and_against_no_figure_of_a_servers() -> None:
    for steps, gone, refused in ((2, 0.0, False), (2, 1.2, False), (1, 1.3, True), (2, 1.3, True)):
        late = Deadline(10.0, began=time.monotonic() - gone)
        late.allow(TIMING.worst(steps, 25.0, 0), 0.0)  # whatever is gone
        if refused:
            with pytest.raises(PolicyRefusal, match=r"its records have 1\.25 seconds to be read, prepared and hashed"):
                late.check_prepared()
        else:
            late.check_prepared()


def test_no_pass_is_begun_that_might_not_end_in_time_and_a_models_own_time_does_not_count() -> None:
    at = Deadline(16.0, began=time.monotonic() - 12.0, reserve=3.5)
    at.check()
    at.reserve = 4.5
    with pytest.raises(TooLate):
        at.check()
    before = at.began
    with at.extended():
        time.sleep(0.05)
    assert 0.05 <= at.began - before < 5.0


@pytest.mark.parametrize(("charged", "ends"), [(0.5, 12.5), (2.0, 14.0), (3.9, 15.9), (5.0, 16.0)])
def test_a_round_has_its_share_from_its_charge_on_and_no_longer_than_the_answer(
    charged: float, ends: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long the charge took, within the reserve a round that keeps to its forecast gives up no pass."""
    clock = Clock()
    monkeypatch.setattr(deadline, "time", clock)
    at = Deadline(16.0, began=clock.now, reserve=1.0)
    clock.now += charged
    at.begin_round()
    clock.now += ends - charged - 1.0
    at.check()
    clock.now += 0.01
    with pytest.raises(TooLate):
        at.check()


@pytest.mark.parametrize("long", [False, True], ids=["short records", "one long record"])
def test_the_answer_waits_for_its_time_whatever_the_records_are(long: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, slept = [100.0], list[float]()
    monkeypatch.setattr(deadline.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(deadline.time, "sleep", lambda seconds: slept.append(seconds))
    at = Deadline(10.0, began=clock[0])
    clock[0] += 7.0 if long else 0.2
    at.wait()
    assert clock[0] + slept[0] == pytest.approx(110.0)


def test_an_answer_behind_its_time_is_said_at_the_site(caplog: pytest.LogCaptureFixture) -> None:
    Deadline(1.0, began=time.monotonic() - 3.0).wait()
    assert "is not covered by the claim" in caplog.text


@pytest.mark.parametrize(("place", "name"), [(process, "open_site"), (cache, "prepared"), (budget, "record_hashes")])
@pytest.mark.parametrize(("seconds", "refused"), [(0.05, False), (0.6, True)])
def test_records_that_take_more_than_their_share_are_refused_before_the_charge(
    seconds: float, refused: bool, place: Any, name: str, site: OneSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.settings["training.local-steps"] = 1
    played = Played(site, timing(), monkeypatch)
    quick = getattr(place, name)

    def slowly(*words: Any, **more: Any) -> Any:
        played.clock.sleep(seconds)
        return quick(*words, **more)

    monkeypatch.setattr(place, name, slowly)
    reply, _ = played.at_its_time(2.4)
    if refused:
        assert isinstance(reply, Refusal)
        assert (reply.kind, "its records have 0.3 seconds" in reply.reason) == ("policy", True)
    assert isinstance(reply, Refusal) == (not site.charges()) == refused


# --- what is refused, and what is not ---------------------------------------------------------------------------------
def test_a_policy_whose_time_is_too_short_refuses_before_the_charge(site: OneSite) -> None:
    site.train(1, run="warm")
    site.rule(reply_after=1e-6)
    reply = site.refuse()
    assert (reply.kind, "reply-after = 1e-06" in reply.reason) == ("policy", True)
    assert len(site.charges()) == 1


HEAD_FIRST, HEAD_LAST = (
    "1 head on features, 2 adapter on jacobians every 1",
    "2 adapter on jacobians every 1, 1 head on features",
)


LATER = {"rehearse": HEAD_FIRST, "rehearse_linearised": HEAD_FIRST, "rehearse_head": HEAD_LAST}
"""What times the Jacobians of a round, its steps on them, and its steps on features; with phases that begin otherwise.
"""


def refused_for_a_later_round(slow: str, site: OneSite, monkeypatch: pytest.MonkeyPatch) -> None:
    site.settings |= {"rounds": 3, "phases": LATER[slow]}
    for name in LATER:
        took = timing(long=1000.0 if name == slow else 0.0)
        monkeypatch.setattr(rehearsals, name, lambda _, took=took: took)
    monkeypatch.setattr(app, "process", SiteProcess())
    site.rule(reply_after=400.0)
    reply = site.refuse()
    assert (reply.kind, "reply-after = 400" in reply.reason) == ("policy", True)
    assert not site.charges()


@pytest.mark.parametrize("slow", LATER)
def test_a_round_of_a_later_phase_that_would_be_late_is_refused_in_the_first(
    slow: str, site: OneSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused_for_a_later_round(slow, site, monkeypatch)


def test_a_site_that_looks_at_the_present_round_alone_is_found_out(
    site: OneSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    present = rehearsals.steps_of
    monkeypatch.setattr(rehearsals, "kinds_of_rounds", lambda *words: {words[-1].round_number: present(*words)})
    with pytest.raises(AssertionError, match="the site took part"):
        refused_for_a_later_round("rehearse", site, monkeypatch)


def test_a_round_keeps_to_its_own_reserve_and_not_to_that_of_a_later_phase(
    site: OneSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.settings |= {"rounds": 3, "phases": "1 head on features, 1 adapter on jacobians, 1 head on features"}
    for name in LATER:
        took = timing(long=100.0 if name == "rehearse_linearised" else 1.0)
        monkeypatch.setattr(rehearsals, name, lambda _, took=took: took)
    monkeypatch.setattr(app, "process", SiteProcess())
    job, model = configure(site.settings), site.model()
    ours = open_site(site.node, job.config, "1", simulated=False)
    held = Deadline(1e6)
    for worst, reserve in app.process.rehearsals.forecasts(job, ours, model, site.task(1)):
        held.allow(worst, reserve)
    (_, own), (_, later) = (app.process.rehearsals.forecast(job, ours, model, n, rehearsals.PLAIN) for n in (1, 2))
    assert held.reserve == own < later


def test_the_worst_round_has_every_record_scored_where_a_count_is_sent(
    site: OneSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rehearsals, "rehearse", lambda _: replace(timing(), score=1.0))
    monkeypatch.setattr(app, "process", SiteProcess())
    site.rule(send_noised_metrics=True, min_noise_multiplier=1.0, reply_after=60.0)
    assert "may take 50.0 seconds here" in site.refuse().reason, "fifty records, a second each"


def test_records_of_a_linearised_round_are_scored_as_they_are(site: OneSite, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its steps are on vectors, and their rehearsal scores nothing."""
    site.settings |= {"rounds": 2, "phases": "2 adapter on jacobians every 1", "training.local-steps": 1}
    monkeypatch.setattr(rehearsals, "rehearse", lambda _: replace(timing(), score=1.0))
    monkeypatch.setattr(rehearsals, "rehearse_linearised", lambda _: timing())
    monkeypatch.setattr(app, "process", SiteProcess())
    site.rule(send_noised_metrics=True, min_noise_multiplier=1.0, reply_after=60.0)
    assert "may take 50.0 seconds here" in site.refuse().reason


def test_nothing_that_one_model_rehearsed_counts_for_another(site: OneSite, monkeypatch: pytest.MonkeyPatch) -> None:
    own = SiteProcess()
    own.rehearsals.timings[rehearsals.PLAIN] = timing()
    monkeypatch.setattr(app, "process", own)
    job = configure(site.settings)
    ours = open_site(site.node, job.config, "1", simulated=False)
    own.cache.records["clinic"] = Prepared("1", ours.data, ("record", 1), [])
    assert app.process.model_of(job, ours) is own.model
    assert not own.rehearsals.timings
    assert not own.cache.records


@pytest.mark.parametrize("mode", ["dp-sgd", "none"])
def test_a_time_that_the_server_does_not_wait_for_is_refused(mode: str, site: OneSite) -> None:
    site.settings |= {"privacy.mode": mode, "round-timeout": 500.0}
    for seconds in (500.0, 501.0):
        site.rule(reply_after=seconds, allow_no_privacy=True)
        wanted = f"the site's policy has reply-after = {seconds:g}; the run asks for round-timeout = 500"
        assert site.refuse().reason == wanted
    site.rule(reply_after=499.0, allow_no_privacy=True)
    site.train()


def test_more_records_than_are_declared_decide_nothing_that_shows_and_are_said_at_the_site(
    site: OneSite, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    site.settings["training.local-steps"] = 1
    site.node["public-size"] = 39
    played = Played(site, timing(), monkeypatch)
    reply, _ = played.at_its_time(1.5)
    assert isinstance(reply, TrainResult), reply
    assert "there are more records than public-size says" in caplog.text
    caplog.clear()
    site.node["public-size"] = 40
    site.ask(site.task(2))
    assert "public-size" not in caplog.text


class Freed(dict[str, Any]):
    """A record that notes, as it goes, whether the time of the answer stood still."""

    def __init__(self, still: list[bool], noted: list[bool]) -> None:
        super().__init__()
        self.still, self.noted = still, noted

    def __del__(self) -> None:
        self.noted.append(bool(self.still))


@pytest.fixture
def still(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Not empty while the time of an answer stands still."""
    inside: list[bool] = []

    @contextmanager
    def extended(own: Deadline) -> Iterator[None]:
        inside.append(True)
        try:
            yield
        finally:
            inside.pop()

    monkeypatch.setattr(Deadline, "extended", extended)
    return inside


def freed_by_another_seed(site: OneSite, still: list[bool]) -> list[bool]:
    """Let a site build another model than the one whose records it holds; return when the records went."""
    site.train()
    noted: list[bool] = []
    app.process.cache.records["other"] = replace(app.process.cache.records["clinic"], records=[Freed(still, noted)])
    site.settings["seed"] = 2
    site.memory.clear()
    site.train(run="2")
    return noted


def test_records_are_freed_while_the_time_of_the_answer_runs(
    site: OneSite, still: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert freed_by_another_seed(site, still) == [False]

    class Nothing(list[object]):
        """The planted fault: what is dropped is not kept."""

        def __iadd__(self, dropped: Any) -> Any:
            return self

        def append(self, dropped: object) -> None:
            return

    site.settings["seed"] = 3
    site.memory.clear()
    monkeypatch.setattr(app.process.cache, "dropped", Nothing())
    assert freed_by_another_seed(site, still) == [True]


def test_what_was_dropped_goes_with_all_else_that_is_forgotten(site: OneSite, still: list[bool]) -> None:
    """A refusal may leave it there: nothing of a record outlives an idle time, a withdrawal or the end."""
    noted: list[bool] = []
    app.process.cache.dropped.append([Freed(still, noted)])
    app.process.forget()
    assert noted == [False]


def test_persons_are_counted_while_the_time_of_the_answer_runs(
    site: OneSite, still: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    counted: list[bool] = []
    unit = type(configure(site.settings).mechanism.unit)
    monkeypatch.setattr(unit, "count", lambda own, data: counted.append(bool(still)) or len(data.examples))
    site.settings["round-timeout"] = 4000.0
    site.rule(reply_after=3600.0)
    monkeypatch.setattr(Deadline, "allow", lambda *own: None)
    site.train()
    assert counted
    assert not any(counted)


def test_shapes_are_rehearsed_anew_where_the_process_gets_other_cores(
    site: OneSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    """How rows of a product round follows from how many threads there are."""
    seen: list[int] = []

    def counting(_: FederatedModel) -> Timing:
        seen.append(torch.get_num_threads())
        return Timing({8: 0.0}, {8: 1}, 0.0, 0.0)

    monkeypatch.setattr(rehearsals, "rehearse", counting)
    before = torch.get_num_threads()
    try:
        for round_number, threads in enumerate((1, 1, 2, 2), start=1):
            monkeypatch.setattr(device, "own_threads", lambda threads=threads: threads)
            if round_number == 1:
                app.process.rehearsals.forget()
            site.train(round_number)
    finally:
        torch.set_num_threads(before)
    assert seen == [1, 2]
