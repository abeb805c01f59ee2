"""What ε means: bounds on attacks and the ε of several records, equal to a second method, and reported with it."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from composed_losses import Floats, composed_losses, delta_at, epsilon_at
from made_run import DELTA, MadeRun
from scipy.stats import norm

from fedveil.cli.summary import print_summary
from fedveil.common.errors import ConfigError
from fedveil.privacy import meaning
from fedveil.privacy.accounting import Release, epsilon, gaussian_release
from fedveil.privacy.events import Event, SampledGaussian
from fedveil.privacy.figures import bound_text, epsilon_text
from fedveil.privacy.meaning import FALSE_POSITIVES, UNITS, meaning_of
from fedveil.reports import markdown_report, report_of
from fedveil.reports import meaning as told
from fedveil.reports.meaning import NO_BOUND, THIS_RUN
from fedveil.reports.page import to_html

CASES = [
    *((1.0, 2.0, 1), (1.0, 5.0, 10), (1.0, 20.0, 100)),
    *((0.33, 0.838, 6), (0.33, 1.562, 6), (0.33, 3.484, 6)),
    *((0.05, 1.2, 15), (0.1, 1.0, 50), (0.5, 2.0, 3), (0.02, 0.8, 100)),
]
"""Sample rate, noise multiplier, releases."""


@pytest.fixture
def made(tmp_path: Path) -> MadeRun:
    """A finished run in which the site in the north has less noise."""
    return MadeRun(tmp_path / "run", {"rounds": 2}, noise={"north": 0.8}).start().round(1, 0.7).round(2, 0.72).end()


def losses(rate: float, noise: float, count: int, units: int) -> list[tuple[Floats, Floats]]:
    """Return for either direction the losses of ``count`` releases and their chances; see ``composed_losses``."""
    return composed_losses([(rate, noise, count)], units)


def best_attack(made: list[tuple[Floats, Floats]], false_positives: float) -> float:
    """Return the true-positive rate of the likelihood-ratio test, which no test is better than."""
    found = []
    for loss, chance in made:
        right = np.cumsum(chance[::-1])
        wrong = np.cumsum((chance * np.exp(-loss.clip(-700)))[::-1])
        found.append(float(np.interp(false_positives, wrong, right)))
    return max(found)


@pytest.mark.parametrize(("rate", "noise", "count"), CASES)
def test_bounds_are_those_of_a_second_method(rate: float, noise: float, count: int) -> None:
    found = meaning_of([gaussian_release(noise, rate, count)], DELTA)
    assert found is not None
    made = losses(rate, noise, count, 1)
    assert found.advantage == pytest.approx(delta_at(made, 0.0), rel=0.01)
    assert found.advantage >= delta_at(made, 0.0) - 1e-5
    for attack in found.attacks:
        best = best_attack(made, attack.false_positives)
        assert attack.true_positives >= best - 1e-5, "an attack is better than the bound says"
        # Two directions have one bound, so it may be a little above the better of both.
        assert attack.true_positives <= 1.05 * best
    for several in found.several:
        second = epsilon_at(losses(rate, noise, count, several.units), DELTA)
        assert second - 2e-3 <= several.epsilon <= 1.03 * second + 0.02
    assert [several.units for several in found.several] == list(UNITS)


@pytest.mark.parametrize(("noise", "count"), [(noise, count) for rate, noise, count in CASES if rate == 1])
def test_without_sampling_bounds_are_those_of_the_closed_form(noise: float, count: int) -> None:
    """A Gaussian mechanism: true positives Φ(Φ⁻¹(α) + μ), advantage 2 Φ(μ/2) - 1, with μ = √count / noise."""
    found, mu = meaning_of([gaussian_release(noise, 1.0, count)], DELTA), math.sqrt(count) / noise
    assert found is not None
    assert found.advantage == pytest.approx(2 * norm.cdf(mu / 2) - 1, rel=2e-3)
    assert [attack.true_positives for attack in found.attacks] == pytest.approx(
        [norm.cdf(norm.ppf(rate) + mu) for rate in FALSE_POSITIVES], rel=5e-3
    )
    for several in found.several:
        assert several.epsilon == pytest.approx(
            epsilon([gaussian_release(noise / several.units, 1.0, count)], DELTA), 0.01
        )


def test_groups_are_cheaper_than_group_privacy_and_dearer_than_one() -> None:
    releases = [gaussian_release(0.838, 0.33, 6)]
    one, found = epsilon(releases, 1e-5), meaning_of(releases, 1e-5)
    assert found is not None
    assert [round(several.epsilon, 1) for several in found.several] == [18.7, 46.3, 122.2]
    assert one < found.several[0].epsilon < found.several[1].epsilon < found.several[2].epsilon


def test_a_price_that_takes_several_records_for_one_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison sees a group that is sampled as one record is: with its whole weight or not at all."""
    from dp_accounting.dp_event import MixtureOfGaussiansDpEvent

    def wrong(self: SampledGaussian, event: Event, units: int) -> Any:
        if units == 1:
            return self.dp_event(event)
        rate = event.sample_rate
        return MixtureOfGaussiansDpEvent(
            event.noise_multiplier, [0.0, 1.0], [(1 - rate) ** units, 1 - (1 - rate) ** units]
        )

    monkeypatch.setattr(SampledGaussian, "dp_event_of", wrong)
    meaning._meaning.cache_clear()
    try:
        with pytest.raises(AssertionError):
            test_bounds_are_those_of_a_second_method(0.33, 1.562, 6)
    finally:
        meaning._meaning.cache_clear()


def test_a_coarser_curve_is_looser_and_never_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    releases = [gaussian_release(1.562, 0.33, 6)]
    fine = meaning_of(releases, DELTA)
    monkeypatch.setattr(meaning, "GRID", (20.0, 11))
    monkeypatch.setattr(meaning, "POINTS", 50)
    meaning._meaning.cache_clear()
    coarse = meaning_of(releases, DELTA)
    meaning._meaning.cache_clear()
    assert fine is not None
    assert coarse is not None
    for of_fine, of_coarse in zip(fine.attacks, coarse.attacks, strict=True):
        assert of_coarse.true_positives >= of_fine.true_positives
    for one, other in zip(fine.several, coarse.several, strict=True):
        assert other.epsilon >= one.epsilon - 1e-6


def test_releases_without_a_pld_have_no_bounds_and_other_figures_are_errors() -> None:
    assert meaning_of([gaussian_release(0.05, 0.5, 3)], DELTA) is None
    assert meaning_of([], DELTA) is None
    with pytest.raises(ConfigError, match="delta"):
        meaning_of([gaussian_release(1.0, 0.5, 3)], 0.0)


def test_every_form_and_the_terminal_say_what_epsilon_means(made: MadeRun, capsys: pytest.CaptureFixture[str]) -> None:
    found = report_of(made.folder).meaning
    assert found is not None
    assert (found.site, found.delta, found.caution) == ("north", DELTA, "")
    assert found.bounds == meaning_of([gaussian_release(0.8, 0.05, 10)], DELTA)
    print_summary(made.folder)
    attack, said = found.bounds.attacks[0], capsys.readouterr().out
    assert f"finds at most {bound_text(attack.true_positives)} of the records" in said
    assert f"{100 * attack.false_positives:g} % false alarms" in said
    texts = (markdown_report(made.folder), to_html(report_of(made.folder)))
    for text in texts:
        assert "false alarms finds at most" in text
        assert "A person with several records at one site has a larger ε at δ 1e-05" in text
    for several in found.bounds.several:
        assert all(f"{epsilon_text(several.epsilon)} with {several.units}" in text for text in texts)


def test_where_no_bound_is_known_every_form_and_the_terminal_say_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The site in the north has so little noise that ε is in the hundreds."""
    loud = MadeRun(tmp_path / "run", {"rounds": 1}, noise={"north": 0.05}).start().round(1, 0.7).end()
    data = report_of(loud.folder)
    assert (data.meaning, data.headline.epsilon is None) == (None, False)
    print_summary(loud.folder)
    texts = {"Markdown": markdown_report(loud.folder), "page": to_html(data), "terminal": capsys.readouterr().out}
    assert {name for name, text in texts.items() if NO_BOUND not in text} == set()
    assert "nan" not in texts["page"]


def test_earlier_runs_on_the_ledger_are_no_part_of_the_bounds_and_that_is_said(tmp_path: Path) -> None:
    earlier: dict[str, list[Release]] = {"north": [gaussian_release(1.0, 0.05, 20)]}
    run = MadeRun(tmp_path / "run", sites={"north": 2000}, earlier=earlier).start().round(1, 0.7).end()
    found = report_of(run.folder).meaning
    assert found is not None
    assert found.caution == THIS_RUN.format("A site's")
    assert "holds more" in markdown_report(run.folder)


def test_every_bound_is_the_largest_of_all_sites(tmp_path: Path) -> None:
    """The site in the north has the largest ε, at a δ of its own; attacks find more at the other one."""
    noise = {"north": 0.99, "south": 0.97}
    run = (
        MadeRun(tmp_path / "run", {"rounds": 1}, noise=noise, delta={"north": DELTA / 100}).start().round(1, 0.7).end()
    )
    data = report_of(run.folder)
    found, own = data.meaning, {name: [gaussian_release(value, 0.05, 5)] for name, value in noise.items()}
    assert found is not None
    assert (found.site, found.delta) == (data.headline.worst_site, data.headline.delta) == ("north", DELTA)
    assert found.epsilon == data.headline.epsilon
    north, south = (meaning_of(own[name], DELTA) for name in ("north", "south"))
    assert north is not None
    assert south is not None
    assert found.bounds == south
    assert all(a.true_positives < b.true_positives for a, b in zip(north.attacks, south.attacks, strict=True))
    assert all(a.epsilon < b.epsilon for a, b in zip(north.several, south.several, strict=True))


def test_the_bounds_of_the_site_with_the_largest_epsilon_alone_are_found_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(told, "_dearest", lambda released: released[:1])
    with pytest.raises(AssertionError):
        test_every_bound_is_the_largest_of_all_sites(tmp_path)


def test_sites_whose_releases_are_within_anothers_are_not_computed() -> None:
    first, more = gaussian_release(1.0, 0.05, 5), gaussian_release(1.0, 0.05, 6)
    count, louder = gaussian_release(20.0, 1.0, 1, "evaluation"), gaussian_release(0.9, 0.05, 5)
    parted = [first, replace(more, count=1)]
    assert told._dearest([[first], [more], parted, [first]]) == [[more]]
    assert told._dearest([[first], [louder]]) == [[louder]]
    several: list[list[Release]] = [[more, count], [louder]]
    assert {len(held) for held in told._dearest(several)} == {1, 2}, "neither is within the other"
    assert len(told._dearest([[more], [louder]])) == 2


def test_what_another_sites_ledger_holds_is_said_whichever_site_has_the_largest_epsilon(tmp_path: Path) -> None:
    earlier: dict[str, list[Release]] = {"south": [gaussian_release(1.0, 0.05, 20)]}
    run = MadeRun(tmp_path / "run", {"rounds": 1}, noise={"north": 1.0}, earlier=earlier).start().round(1, 0.7).end()
    found = report_of(run.folder).meaning
    assert found is not None
    assert (found.site, found.caution) == ("north", THIS_RUN.format("A site's"))


def test_sites_that_could_not_be_computed_again_are_named_as_left_out(tmp_path: Path) -> None:
    run = MadeRun(tmp_path / "run", {"rounds": 1}).start().round(1, 0.7).end()
    lines = run.lines("privacy.jsonl")
    (run.folder / "privacy.jsonl").unlink()
    for line in lines:
        if line["site"] == "south":
            line["event"]["kind"] = "of another version"
        run.append("privacy.jsonl", line)
    found = report_of(run.folder).meaning
    assert found is not None
    assert (found.site, found.caution) == ("north", "They leave out sites whose ε could not be recomputed: south.")


def test_a_run_without_a_claim_has_no_bounds(tmp_path: Path) -> None:
    run = MadeRun(tmp_path / "run", {"privacy.mode": "none"}).start().round(1, 0.7).end()
    assert report_of(run.folder).meaning is None
    assert "What ε means" not in markdown_report(run.folder)
    assert NO_BOUND not in to_html(report_of(run.folder))
