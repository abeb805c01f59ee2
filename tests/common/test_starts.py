"""Starts: one table, one road through round 0, and what each start promises."""

from __future__ import annotations

import dataclasses

import pytest

from fedveil.common.config.flat import Scalar, defaults
from fedveil.common.errors import ConfigError
from fedveil.common.starts import STARTS, PaidStart, Start, UnpaidStart
from fedveil.privacy import MECHANISMS
from fedveil.strategies.job import configure
from fedveil.strategies.options import declared_settings

each_start = pytest.mark.parametrize("name", STARTS)


def needed(name: str) -> dict[str, Scalar]:
    """Return the settings that a run needs besides to have a start."""
    own: dict[str, Scalar] = {"adapter.start": name}
    if "A" not in STARTS[name].gives:
        own["adapter.name"] = "lora-frozen-b"
    if "data" in defaults(STARTS[name]):
        own["start.data"] = "public.csv"
    if "library" in defaults(STARTS[name]):
        own |= {"strategy": "ffa-lora", "start.library": "library", "start.adapters": "letters=1,notes=2"}
    if "about" in defaults(STARTS[name]):
        own["start.about"] = "letters"
    if STARTS[name].needs == "records, without privacy":
        own["privacy.mode"] = "none"
    return own


# --- the table --------------------------------------------------------------------------------------------------------


@each_start
def test_options_of_one_name_have_one_default_in_all_starts(name: str) -> None:
    known = {**declared_settings({"adapter.start": name}), **declared_settings()}
    for key, value in defaults(STARTS[name]).items():
        assert known[f"start.{key}"] == value, f"start.{key} has another default in {name!r} than in another start"


@each_start
def test_a_start_is_called_by_its_own_name_and_its_job_comes_back_from_its_settings(name: str) -> None:
    job = configure(needed(name))
    assert (job.origin.name, job.adapter.origin) == (name, job.origin)
    assert configure(job.settings()) == job
    assert (
        isinstance(job.origin, PaidStart) == (job.origin.release() is not None) == (job.origin.needs == "paid release")
    )


@each_start
def test_records_are_used_by_no_start_that_a_private_run_does_not_pay_for(name: str) -> None:
    start = STARTS[name]()
    private = {key: value for key, value in needed(name).items() if key != "privacy.mode"}
    if start.asked == "sites" and start.release() is None:
        assert isinstance(start, UnpaidStart)
        with pytest.raises(ConfigError, match="privacy"):
            configure(private)
    else:
        configure(private)


@each_start
def test_a_start_that_sends_what_records_hold_says_so_in_its_name_and_no_refusal_points_to_it(name: str) -> None:
    assert name.startswith("nonprivate-") == (STARTS[name].needs == "records, without privacy")
    for mode in MECHANISMS:
        try:
            configure({**needed(name), "privacy.mode": mode})
        except ConfigError as error:
            advice = str(error).replace(repr(name), "")
            assert "nonprivate-" not in advice
            assert "privacy.mode to 'none'" not in advice


def test_what_needs_records_without_privacy_is_refused_whatever_its_row_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    careless = dataclasses.make_dataclass("Careless", [], bases=(STARTS["nonprivate-gradient"],), frozen=True)
    careless.name, careless.check, careless.unfit = "careless", Start.check, Start.unfit  # type: ignore[attr-defined]
    monkeypatch.setitem(STARTS, "careless", careless)
    with pytest.raises(ConfigError, match="'careless' sends what private records hold"):
        configure({"adapter.start": "careless"})
