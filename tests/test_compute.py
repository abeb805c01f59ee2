"""The training compute of a run: each kind of round against a count by hand, and the sentence in every form."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from made_run import MadeRun, adapter_told
from test_report import forms

from common.privacy.accounting import gaussian_release
from reports import ReportData, report_of
from reports.compute import CHEAP, PASS, PROBE, REFIT, START, STEPS, ComputeReport, compute_words
from reports.declared import declare
from strategies.job import configure

N, P, H, LABELS, TOKENS = 22_713_216, 4_608, 770, ["negative", "positive"], 128
SITES = {"north": 2000, "south": 1500}
MADE = 512
LINEAR: dict[str, Any] = {
    "adapter.name": "lora-metric",
    "adapter.start": "public-metric",
    "training.linearised": 2,
    "training.refit": 0,
}


def made(folder: Path, settings: dict[str, Any], rounds: list[int], *, start: bool = False, **about: Any) -> MadeRun:
    """Return a run whose sites joined these rounds, with what its adapter says of the model."""
    run = MadeRun(folder, settings, SITES).start()
    for site in SITES if start else ():
        run.release(0, site, gaussian_release(7.6, 1.0, 1, "initialisation"))
    run.round(rounds[0], 0.7)
    (line,) = run.lines("rounds.jsonl")
    for number in rounds[1:]:  # none of them is priced: that takes long, and says nothing of operations
        run.append("rounds.jsonl", {**line, "round": number})
    (folder / "adapter").mkdir()
    sizes = {"base_parameters": N, "adapter_parameters": P, "head_parameters": H, "label_names": LABELS}
    told = adapter_told(**sizes | about)
    (folder / "adapter" / "fedveil.json").write_text(json.dumps(told))
    return run.end()


def compute_of(run: MadeRun) -> ComputeReport:
    compute = report_of(run.folder).compute
    assert compute is not None
    assert compute.operations == pytest.approx(sum(compute.parts.values()))
    return compute


def by_hand(joined: int = 37) -> dict[str, float]:
    """Count the default recipe of 37 rounds, record by record, where each site joined so many of the first rounds."""
    forward = 2 * N * TOKENS
    parts = {PASS: 0.0, CHEAP: 0.0, REFIT: 0.0}
    for records in SITES.values():
        parts[REFIT] += records * forward  # features of the base model, once
        for _ in range(min(joined, 12)):  # steps on the head: forward, and twice for its gradient
            parts[REFIT] += records * 6 * H
        if joined > 12:
            parts[PASS] += records * 3 * forward  # the one label after the first, with its gradient
        for _ in range(min(joined, 32) - 12):
            parts[CHEAP] += records * (2 * P + 2 * P + 2 * H)  # logits, gradient; the head's logits
        if joined > 32:
            parts[REFIT] += records * forward  # features of the adapter as it is
        for _ in range(joined - 32):
            parts[REFIT] += records * 6 * H
    return {what: count for what, count in parts.items() if count}


def probe_by_hand() -> float:
    """Count the steps of the head in one round, before the others."""
    forward, count = 2 * N * TOKENS, 0.0
    for records in SITES.values():
        for _ in range(MADE):  # by which features are whitened
            count += forward
        count += records * forward
        for _ in range(40):
            count += records * 6 * H
    return count


def check(data: ReportData, probed: bool = False) -> None:
    assert data.compute is not None
    wanted = {PROBE: probe_by_hand()} if probed else {}
    assert data.compute.parts == pytest.approx({**by_hand(), **wanted})


@pytest.fixture(scope="module")
def default(tmp_path_factory: pytest.TempPathFactory) -> MadeRun:
    """A run of the default job whose sites joined every round."""
    settings = configure({}).settings()
    wanted: dict[str, Any] = {"rounds": 37, "training.head-first": 12, "training.linearised": 20, "training.refit": 5}
    wanted |= {"training.local-steps": 1, "training.sample-rate": 1.0, "model.max-length": TOKENS}
    assert {key: settings[key] for key in wanted} == wanted, "the default recipe is another: count it anew"
    return made(tmp_path_factory.mktemp("default") / "run", {}, list(range(1, 38)))


@pytest.fixture(scope="module")
def probed(tmp_path_factory: pytest.TempPathFactory) -> MadeRun:
    """The same with a head that is fitted in a paid round 0 as well."""
    own = {"recipe": "metric", "adapter.start": "probe", "start.sample-rate": 1.0}
    return made(tmp_path_factory.mktemp("probed") / "run", own, list(range(1, 38)), start=True)


def test_the_default_recipes_operations_are_those_counted_by_hand(default: MadeRun, probed: MadeRun) -> None:
    check(report_of(default.folder))
    check(report_of(probed.folder), probed=True)


@pytest.mark.parametrize("fault", ["FORWARD", "GRADIENT", "MADE"])
def test_a_wrong_count_is_found_out(probed: MadeRun, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    monkeypatch.setattr(f"reports.compute.{fault}", 3)
    with pytest.raises(AssertionError):
        check(report_of(probed.folder), probed=True)


def test_a_run_that_ended_before_the_refit_has_none(tmp_path: Path) -> None:
    for joined in (7, 19):
        run = made(tmp_path / str(joined), {}, list(range(1, joined + 1)))
        assert compute_of(run).parts == pytest.approx(by_hand(joined))


def test_a_second_linearisation_passes_over_all_records_again(tmp_path: Path) -> None:
    more = {
        "rounds": 6,
        "training.linearised": 2,
        "training.refit": 0,
        "adapter.start": "public-metric",
        "adapter.name": "lora-metric",
    }
    parts = compute_of(made(tmp_path / "run", more, [1, 3, 4])).parts
    assert parts[PASS] == pytest.approx(2 * 3500 * 6 * N * TOKENS), "rounds 1 and 2 have one, 3 and 4 the other"
    assert set(parts) == {PASS, CHEAP}


def test_a_head_that_is_fitted_first_has_its_own_features_and_the_adapter_passes_after_it(tmp_path: Path) -> None:
    own = {"training.head-first": 2, "training.linearised": 2, "training.refit": 1, "training.sample-rate": 1.0}
    more = {"rounds": 7, **own, "training.local-steps": 1}
    more |= {"adapter.start": "public-metric", "adapter.name": "lora-metric"}
    parts = compute_of(made(tmp_path / "run", more, [1, 2, 3, 4, 5, 7])).parts
    assert parts[PASS] == pytest.approx(2 * 3500 * 6 * N * TOKENS), "rounds 3 and 4 have one, 5 and 6 the other"
    head_step = parts[REFIT] / 3500 - 2 * 2 * N * TOKENS
    alone = compute_of(made(tmp_path / "last", {**more, "training.head-first": 0}, [1, 7])).parts
    assert alone[REFIT] / 3500 - 2 * N * TOKENS == pytest.approx(head_step / 3, rel=1e-6)


def test_more_labels_are_a_pass_each(tmp_path: Path) -> None:
    more = {
        "rounds": 2,
        "training.linearised": 2,
        "training.refit": 0,
        "adapter.start": "public-metric",
        "adapter.name": "lora-metric",
    }
    two, four = (
        compute_of(made(tmp_path / str(n), more, [1], label_names=list("abcd")[:n])).parts[PASS] for n in (2, 4)
    )
    assert four == pytest.approx(3 * two)


def test_steps_on_the_model_are_six_and_with_layers_computed_again_eight(tmp_path: Path) -> None:
    plain: dict[str, Any] = {"recipe": "plain", "rounds": 1}
    again = {**plain, "model.checkpointing": True}
    counts = [compute_of(made(tmp_path / str(i), more, [1])) for i, more in enumerate((plain, again))]
    assert [list(count.parts) for count in counts] == [[STEPS], [STEPS]]
    wanted = 3500 * 0.33 * 5 * N * TOKENS
    assert [count.operations for count in counts] == pytest.approx([6 * wanted, 8 * wanted])


def test_a_head_alone_passes_once_over_every_record(tmp_path: Path) -> None:
    run = made(tmp_path / "run", {"recipe": "head-only", "rounds": 3}, [1, 2, 3], adapter_parameters=0)
    settings = configure({"recipe": "head-only", "rounds": 3}).settings()
    steps = 3 * int(settings["training.local-steps"]) * float(settings["training.sample-rate"])
    assert compute_of(run).parts == pytest.approx({REFIT: 3500 * (2 * N * TOKENS + steps * 6 * H)})


def test_another_start_that_is_made_from_records_is_a_gradient_of_those_drawn(tmp_path: Path) -> None:
    more = {"recipe": "plain", "rounds": 1, "adapter.start": "dp-lora-ga", "start.sample-rate": 0.5}
    assert compute_of(made(tmp_path / "run", more, [1], start=True)).parts[START] == pytest.approx(
        0.5 * 3500 * 6 * N * TOKENS
    )


def test_what_an_earlier_fedveil_did_not_record_is_not_guessed(tmp_path: Path) -> None:
    for i, missing in enumerate(({"head_parameters": 0}, {"base_parameters": 0})):
        assert report_of(made(tmp_path / str(i), {}, [1], start=True, **missing).folder).compute is None
    assert compute_words(None) == []


def test_every_form_has_the_operations_and_their_share_where_the_bases_are_declared(default: MadeRun) -> None:
    whole = sum(by_hand().values())
    for share in ("", "8.5 %"):
        if share:
            declare(default.folder, {"base-training-flop": f"{whole / 0.085}"})
        made_forms = forms(default.folder)
        value = json.loads(made_forms["json"])["compute"]
        assert value["operations"] == pytest.approx(whole)
        assert (value["base_training"] is None) == (not share)
        for form in ("md", "html"):
            assert f"about {whole:.2g} floating-point operations" in made_forms[form]
            assert ("of the base model's training, as declared" in made_forms[form].replace("&#39;", "'")) == bool(
                share
            )
            assert not share or f"That is {share} of the" in made_forms[form]
