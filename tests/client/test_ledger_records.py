"""A ledger knows records again under every name, and charges every name that holds them."""

from __future__ import annotations

import dataclasses
import re
import unicodedata
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import pytest
from ledgers import DELTA, ROUND, WHISPER, charge, charge_for, charged, cost_of, epsilon, texts

from fedveil.client.ledger import ledger as ledger_module
from fedveil.client.ledger import record_hashes as contents
from fedveil.client.ledger.ledger import Ledger
from fedveil.client.ledger.record_hashes import record_hashes
from fedveil.client.ledger.rows import Charge, Receipt
from fedveil.common.errors import BudgetExhausted, PolicyRefusal
from fedveil.common.tasks.chat import Conversation
from fedveil.common.tasks.examples import Dataset
from fedveil.common.tasks.image_classification import ImageExample
from fedveil.common.tasks.images import Picture
from fedveil.common.tasks.text import TextExample
from fedveil.privacy.accounting import gaussian_release

pytestmark = pytest.mark.rough_prices


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "site.sqlite"


def check_that_the_same_records_stay_on_one_budget(path: Path, again: Dataset) -> None:
    """Use twenty records as ``ward``, then ``again`` as ``clinic`` until it is refused."""
    budget = cost_of(2) + 1e-6
    with Ledger(path) as ledger:
        ledger.set_budget("ward", budget, DELTA)
    first = charge_for(path, "ward", texts(*range(20)), ROUND, max_epsilon=budget)
    second = charge_for(path, "clinic", again, ROUND, max_epsilon=budget)
    assert (second.epsilon_before, second.epsilon_after) == (first.epsilon_after, cost_of(2)), "a name is a new start"
    assert charged(path) == [("ward", "run-1", 1), ("clinic", "run-1", 1), ("ward", "run-1", 1)]
    before = path.read_bytes()
    with pytest.raises(BudgetExhausted, match="records that it shares with another data set") as refusal:
        charge_for(path, "clinic", again, ROUND, max_epsilon=budget)
    assert "\n" not in str(refusal.value)
    assert not re.search(r"ward|\d\.\d", str(refusal.value).split(";")[0]), "it tells of the other data set"
    assert path.read_bytes() == before, "a refused charge was written"


READINGS = {
    "the same": texts(*reversed(range(20))),
    "another column": texts(*range(20), column="second"),
    "a part": texts(*range(10)),
    "many more": texts(*range(200)),
    "one of them": texts(19, *range(100, 150)),
    "one, through another column": texts(19, *range(100, 150), column="second"),
}


@pytest.mark.parametrize("again", READINGS.values(), ids=READINGS.keys())
def test_the_same_records_under_another_name_are_charged_to_both(path: Path, again: Dataset) -> None:
    check_that_the_same_records_stay_on_one_budget(path, again)


def content_alone(data: Dataset, key: bytes) -> frozenset[int]:
    """The fault of old: what the run's columns made of a row is all that is known of it."""
    rowless = tuple(TextExample(example.text, label=example.label) for example in data.examples)
    return contents.record_hashes(Dataset(data.name, rowless, data.label_names), key)


def test_a_ledger_that_does_not_look_or_knows_the_read_columns_alone_is_found_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("ledgers.record_hashes", content_alone)
        check_that_the_same_records_stay_on_one_budget(tmp_path / "one", READINGS["the same"])
        with pytest.raises(AssertionError, match="a name is a new start"):
            check_that_the_same_records_stay_on_one_budget(tmp_path / "two", READINGS["another column"])
    monkeypatch.setattr(Ledger, "_recognise", lambda *_: [])
    with pytest.raises(AssertionError, match="a name is a new start"):
        check_that_the_same_records_stay_on_one_budget(tmp_path / "three", READINGS["the same"])


def visits(write: Callable[[str], str] = str, labels: tuple[str, ...] = ("no", "yes"), turned: int = 0) -> Dataset:
    """Return records of a table with a column more than the run reads, as one program or another writes it."""
    examples = tuple(
        TextExample(
            text=write(f"Caf\u00e9 au lait, visit {n}"), label=(n + turned) % 2, row=write(f"ward {n}").encode()
        )
        for n in range(5)
    )
    return Dataset("any", examples, labels)


WRITTEN = {
    "another normal form": visits(lambda text: unicodedata.normalize("NFD", f"{text} ")),
    "other blanks": visits(lambda text: text.replace(" ", "\u00a0 ") + "\r\n"),
    "capitals": visits(str.upper),
    "characters that nobody sees": visits(lambda text: f"\ufeff{text[:2]}\u00ad{text[2:]}\u200b"),
    "characters that nobody sees either": visits(
        lambda text: f"\u2068{text[:4]}\ufe0f\u2069{text[4:9]}\u034f\x00{text[9:]}\U000e0001\u061c\x9f"
    ),
    "Turkish capitals": visits(lambda text: text.replace("i", "\u0130").upper()),
    "Turkish small letters": visits(lambda text: text.upper().replace("I", "\u0131").lower() + " "),
    "other names of labels": visits(lambda text: f"{text} ", labels=("0", "1")),
    "other labels": visits(lambda text: f"{text} ", turned=1),
}


@pytest.mark.parametrize("again", WRITTEN.values(), ids=WRITTEN.keys())
def test_records_that_say_the_same_are_the_same_however_they_are_written(
    again: Dataset, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def before_under_another_name(path: Path) -> float:
        charge_for(path, "ward", visits())
        return charge_for(path, "clinic", again).epsilon_before

    assert before_under_another_name(path) > 0, "another way of writing is a new start"
    monkeypatch.setattr(contents, "said", lambda example: example.canonical(str(example.label)))
    assert before_under_another_name(tmp_path / "planted") == 0


def test_no_case_and_no_form_of_a_character_is_another_record() -> None:
    def said(text: str) -> str:
        return contents.said(TextExample(text=f"a{text}"))

    for char in map(chr, (*range(0x3000), *range(0xFB00, 0x10000))):
        written = {unicodedata.normalize(form, char) for form in ("NFD", "NFKC", "NFKD")}
        written |= {other for text in (char, *written) for other in (text.upper(), text.lower())}
        assert {said(text) for text in written} == {said(char)}, f"U+{ord(char):04X}"


def test_what_is_withdrawn_stays_so_however_it_is_written(path: Path) -> None:
    with Ledger(path) as ledger:
        ledger.remember("ward", record_hashes(visits(), ledger.key))
        ledger.holds.withdraw("ward", "asked for")
    for again in WRITTEN.values():
        with pytest.raises(BudgetExhausted, match="records that it shares with another data set"):
            charge_for(path, "clinic", again)


def test_other_words_are_another_record(path: Path) -> None:
    charge_for(path, "ward", visits())
    assert charge_for(path, "clinic", visits(lambda text: f"{text} again")).epsilon_before == 0
    asked = (("user", "hello"), ("assistant", "good day"))
    two = [Conversation(turns=(*asked, ("user", "and now?"), ("assistant", end))) for end in ("rest", "walk")]
    assert contents.said(two[0]) != contents.said(two[1]), "a conversation is known by how it begins"
    shown = [ImageExample(image=Picture(pixels, b""), label=n % 2) for n, pixels in enumerate(("a", "a", "b"))]
    assert contents.said(shown[0]) == contents.said(shown[1]) != contents.said(shown[2])


def check_that_units_do_not_mix(path: Path) -> None:
    """Charge records for one unit, and then, under their own name and another, for another."""
    charge_for(path, "ward", texts(1, 2))
    for name, records in (("ward", texts(1, 2)), ("ward", texts(7, 8)), ("clinic", texts(2, 3))):
        with pytest.raises(PolicyRefusal, match="charged for another unit than one site") as refusal:
            charge_for(path, name, records, unit="site")
        assert "\n" not in str(refusal.value)
    assert charge_for(path, "lab", texts(20, 21), unit="site").epsilon_before == 0.0
    with pytest.raises(PolicyRefusal, match="another unit than one record"):
        charge_for(path, "lab", texts(20, 21))
    with Ledger(path) as ledger:
        assert [(entry.dataset, entry.unit) for entry in ledger.entries()] == [("ward", "record"), ("lab", "site")]


def test_charges_of_two_units_never_compose(path: Path) -> None:
    check_that_units_do_not_mix(path)


def test_a_ledger_that_adds_units_up_is_found_out(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger_module, "hold_to_unit", lambda *_: None)
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        check_that_units_do_not_mix(path)


def test_data_sets_that_share_no_record_have_budgets_of_their_own(path: Path) -> None:
    charge_for(path, "ward", texts(*range(20)))
    assert charge_for(path, "clinic", texts(*range(20, 40))).epsilon_before == 0.0
    assert charged(path) == [("ward", "run-1", 1), ("clinic", "run-1", 1)]


def test_the_other_names_own_budget_holds_and_its_smaller_delta(path: Path) -> None:
    with Ledger(path) as ledger:
        ledger.set_budget("ward", cost_of(1) + 1e-6, DELTA / 10)
    charge_for(path, "ward", texts(1, 2), WHISPER)
    with pytest.raises(BudgetExhausted, match="shares with another data set"):
        charge_for(path, "clinic", texts(2, 3), ROUND)
    shared = charge_for(path, "clinic", texts(2, 3), WHISPER)
    assert shared.delta == DELTA, "the other's delta is none of the caller's"
    assert (shared.steps_total, shared.max_epsilon) == (1, 8.0), "figures that are not of the data set asked for"
    assert shared.epsilon_after == epsilon([gaussian_release(20.0, 0.01, 2)], DELTA / 10)
    assert shared.epsilon_remaining == 8.0 - shared.epsilon_after


@pytest.mark.parametrize("factor", [1e-3, 1e3], ids=["a smaller delta", "a larger delta"])
def test_no_delta_of_a_caller_moves_another_names_limit_or_its_delta(tmp_path: Path, factor: float) -> None:
    # At the caller's smaller delta the second round would cost "ward" more than its budget.
    path = tmp_path / "ledger.sqlite"
    with Ledger(path) as ledger:
        ledger.set_budget("ward", cost_of(2) * 1.01, DELTA)
    charge_for(path, "ward", texts(1, 2), ROUND, max_epsilon=100.0)
    receipt = charge_for(path, "clinic", texts(2, 3), ROUND, delta=DELTA * factor, max_epsilon=100.0)
    assert receipt.delta == DELTA * factor
    assert receipt.epsilon_after == epsilon([gaussian_release(1.0, 0.1, 10)], min(DELTA, DELTA * factor))
    with Ledger(path) as ledger:
        assert ledger.terms("ward").delta == DELTA, "a run on another name made every later round dearer"
        assert [entry.delta for entry in ledger.entries() if entry.dataset == "ward"] == [DELTA, DELTA]


def check_that_no_threshold_of_a_caller_asks_for_a_shared_record(folder: Path) -> None:
    """Ask at budgets below and above what another name has spent, with a record of it and without."""
    for number, budget in enumerate((cost_of(1), (cost_of(1) + cost_of(2)) / 2, cost_of(2))):
        answers = []
        for records in (texts(2, 3), texts(3, 4)):
            path = folder / f"{number}-{len(answers)}.sqlite"
            charge_for(path, "ward", texts(1, 2), ROUND, delta=DELTA / 10)
            receipt = charge_for(path, "clinic", records, ROUND, max_epsilon=budget)
            answers.append(receipt.delta)
            if records == texts(2, 3):
                assert (
                    receipt.epsilon_after == epsilon([gaussian_release(1.0, 0.1, 10)], DELTA / 10) > receipt.max_epsilon
                )
                assert receipt.epsilon_remaining == 0.0
        assert answers == [DELTA, DELTA]


def test_no_threshold_of_a_caller_asks_for_a_shared_record(tmp_path: Path) -> None:
    check_that_no_threshold_of_a_caller_asks_for_a_shared_record(tmp_path)


def test_a_callers_budget_that_holds_for_other_names_is_found_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sound = Ledger._prices

    def everyones(self: Ledger, names: Any, charge: Charge) -> dict[str, Receipt]:
        return {
            name: dataclasses.replace(priced, max_epsilon=min(priced.max_epsilon, charge.max_epsilon))
            for name, priced in sound(self, names, charge).items()
        }

    monkeypatch.setattr(Ledger, "_prices", everyones)
    with pytest.raises(BudgetExhausted, match="shares with another"):
        check_that_no_threshold_of_a_caller_asks_for_a_shared_record(tmp_path)


def check_that_every_record_is_within_the_largest_figure(path: Path) -> None:
    """Charge three names in turn, with records that come and go, and follow each record's own history."""
    held = {"ward": {0, 1, 2}, "clinic": {2, 3}, "lab": {3, 4}}
    turns = [("ward", set()), ("clinic", set()), ("lab", set()), ("ward", {4}), ("clinic", set()), ("lab", {0})]
    uses: dict[int, int] = {}
    for dataset, more in turns:
        held[dataset] |= more
        receipt = charge_for(path, dataset, texts(*held[dataset]), ROUND, max_epsilon=100.0)
        for number in held[dataset]:
            uses[number] = uses.get(number, 0) + 1
        worst = max(uses[number] for number in held[dataset])
        assert receipt.epsilon_after >= cost_of(worst), f"a record of {dataset} has spent more than is said"


def test_no_record_has_spent_more_than_is_said_however_names_share_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_that_every_record_is_within_the_largest_figure(tmp_path / "sound")
    monkeypatch.setattr("fedveil.client.ledger.ledger.of_all", lambda charge, prices: charge)
    with pytest.raises(AssertionError, match="has spent more than is said"):
        check_that_every_record_is_within_the_largest_figure(tmp_path / "its own history alone")


def test_changed_records_under_one_name_stay_on_one_budget_and_old_ones_stay_known(path: Path) -> None:
    first = charge_for(path, "ward", texts(*range(20)))
    second = charge_for(path, "ward", texts(*range(100, 120)))
    assert second.epsilon_before == first.epsilon_after
    assert charge_for(path, "clinic", texts(*range(20))).epsilon_before == second.epsilon_after


def test_what_is_known_of_records_is_not_written_again_under_the_lock(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others wait for that lock, and would see how many records there are."""
    written: list[int] = []
    real = ledger_module._remember

    def remember(db: Any, dataset: str, records: Collection[int]) -> None:
        written.append(len(records))
        real(db, dataset, records)

    monkeypatch.setattr(ledger_module, "_remember", remember)
    for numbers in (range(20), range(20), range(21), range(20)):
        charge_for(path, "ward", texts(*numbers))
    each = written[0] // 20
    assert written == [20 * each, 0, each, 0]
    charge_for(path, "clinic", texts(*range(20)))
    assert written[4] == 20 * each, "what is known of one data set is not known of another"


def test_a_ledger_that_knows_records_by_what_was_read_of_them_still_knows_them(path: Path) -> None:
    with Ledger(path) as ledger:
        charge(ledger, 1, WHISPER, records=content_alone(texts(*range(20)), ledger.key))
    assert charge_for(path, "clinic", texts(*range(20))).epsilon_before > 0


def test_a_charge_for_no_record_at_all_is_a_charge(path: Path) -> None:
    assert charge_for(path, "ward", texts()).epsilon_after > 0
    assert charged(path) == [("ward", "run-1", 1)]


def test_hashes_follow_the_records_and_the_ledgers_own_key(path: Path, tmp_path: Path) -> None:
    with Ledger(path) as here, Ledger(tmp_path / "other.sqlite") as there:
        assert here.key != there.key
        one, other = texts(1, 2), texts(2, 1, 1)
        assert record_hashes(one, here.key) == record_hashes(other, here.key)
        assert not record_hashes(one, here.key) & record_hashes(one, there.key)
        turned = tuple(dataclasses.replace(example, label=1 - (example.label or 0)) for example in one.examples)
        renumbered = Dataset("x", turned, ("yes", "no"))
        assert record_hashes(renumbered, here.key) == record_hashes(one, here.key), "label numbers count"
