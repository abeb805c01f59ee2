"""Dividing records: a test part that shares no text, and sites that share no record."""

from __future__ import annotations

import dataclasses
import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
from dataset_files import write
from flwr_datasets.partitioner import DirichletPartitioner
from hypothesis import given, settings
from hypothesis import strategies as st

from fedveil.common.config.sections import DataConfig
from fedveil.common.data.named import DATASETS
from fedveil.common.data.partition import _dirichlet_parts, _shares, public_size_of_part, site_part
from fedveil.common.data.sources import load_dataset, public_test, train_and_test
from fedveil.common.data.split import public_split
from fedveil.common.errors import ConfigError, DataError
from fedveil.common.tasks.examples import Dataset
from fedveil.common.tasks.text import TextExample

# ---- the public test part ------------------------------------------------------------------------
labelled = st.lists(
    st.builds(TextExample, text=st.text("abAB \t", max_size=3), label=st.sampled_from([0, 1, 2])),
    min_size=3,
    max_size=60,
)


def dataset(examples: list[TextExample], labels: tuple[str, ...] = ("a", "b", "c")) -> Dataset:
    """A data set of these examples."""
    return Dataset("drawn", tuple(examples), labels)


def distinct(labels: list[int]) -> Dataset:
    """Records of different texts with these labels."""
    return dataset([TextExample(f"text {i}", label=label, key=f"author {i % 7}") for i, label in enumerate(labels)])


def split_or_none(whole: Dataset, test_size: int, seed: int) -> tuple[Dataset, Dataset] | None:
    """Split; None where only records of one text are left to choose from."""
    try:
        return public_split(whole, test_size, seed)
    except DataError as error:
        if "every text occurs more than" not in str(error):
            raise
        return None


@given(labelled, st.data())
@settings(deadline=None, max_examples=80)
def test_training_and_test_part_share_no_text_and_lose_no_record(
    examples: list[TextExample], data: st.DataObject
) -> None:
    test_size = data.draw(st.integers(1, len(examples) - 1))
    split = split_or_none(dataset(examples), test_size, 1)
    if split is None:
        return
    train, test = split
    assert Counter(train.examples) + Counter(test.examples) == Counter(examples), "records were lost or doubled"
    assert 1 <= len(test.examples) <= test_size, "the test part is empty or larger than asked for"
    plain = [{" ".join(e.text.split()).casefold() for e in part.examples} for part in split]
    assert not plain[0] & plain[1], f"duplicates cross from training to test: {plain[0] & plain[1]}"


@given(st.lists(st.sampled_from([0, 0, 0, 1, 2]), min_size=3, max_size=80), st.data())
@settings(deadline=None, max_examples=80)
def test_distinct_texts_give_a_test_part_of_the_asked_size_and_classes(labels: list[int], data: st.DataObject) -> None:
    test_size = data.draw(st.integers(1, len(labels) - 1))
    _, test = public_split(distinct(labels), test_size, 1)
    assert len(test.examples) == test_size, "the test part has another size than asked for"
    found = Counter(example.label for example in test.examples)
    for label, count in Counter(labels).items():
        fair = test_size * count / len(labels)
        assert abs(found[label] - fair) < 1, f"class {label} has {found[label]} test records, its share is {fair}"


@given(labelled, st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=40)
def test_the_test_part_does_not_depend_on_the_order_of_records(examples: list[TextExample], random: Random) -> None:
    shuffled = list(examples)
    random.shuffle(shuffled)
    test_size = len(examples) // 2
    one, other = (split_or_none(dataset(records), test_size, 3) for records in (examples, shuffled))
    chosen = [Counter(part[1].examples) if part else None for part in (one, other)]
    assert chosen[0] == chosen[1], "the same records in another order gave another test part"


def test_the_test_part_is_the_same_on_every_machine() -> None:
    # Golden: the two lowest sha256sum of "1/public-test/text N" among even N and among odd N, in a shell.
    _, test = public_split(distinct([0, 1] * 10), 4, 1)
    assert [example.text for example in test.examples] == ["text 12", "text 7", "text 5", "text 2"], (
        "the seeded test part changed"
    )


def test_another_seed_gives_another_test_part() -> None:
    whole = distinct([0, 1] * 50)
    assert public_split(whole, 20, 1) != public_split(whole, 20, 2), "the seed has no effect"


def test_a_premise_and_its_hypotheses_stay_together() -> None:
    whole = dataset([TextExample(f"premise {i // 3}", f"hypothesis {i}", label=i % 3) for i in range(90)])
    train, test = public_split(whole, 30, 1)
    assert not {e.text for e in train.examples} & {e.text for e in test.examples}, "a premise is on both sides"
    assert Counter(e.label for e in test.examples) == {0: 10, 1: 10, 2: 10}, "classes are uneven without need"


def test_doubled_texts_may_bend_the_class_shares_but_not_empty_the_test_part() -> None:
    whole = dataset([TextExample(f"text {i // 2}", label=i // 10) for i in range(20)])
    _, test = public_split(whole, 2, 1)  # a fair share is one record of each class, but texts come in twos
    assert len(test.examples) == 2, "places that no class's texts fit into stayed empty"


def test_records_without_labels_are_split_too() -> None:
    whole = dataset([TextExample(f"prompt {i}", completion="x") for i in range(10)], ())
    assert [len(part.examples) for part in public_split(whole, 3, 1)] == [7, 3], "unlabelled records split wrongly"


def test_a_test_part_that_leaves_no_training_record_is_refused() -> None:
    with pytest.raises(DataError, match=r"data\.test-size is 4, but drawn has only 4 records: set it to at most 3"):
        public_split(distinct([0, 1, 0, 1]), 4, 1)


def test_a_test_part_of_no_records_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"data\.test-size must be above 0"):
        public_split(distinct([0, 1]), 0, 1)


def test_one_text_only_cannot_be_split() -> None:
    with pytest.raises(DataError, match="every text occurs more than 2 times: name a file as"):
        public_split(dataset([TextExample("same", label=0)] * 5), 2, 1)


def division(partition: str, seed: int = 1, alpha: float = 1.0) -> DataConfig:
    """Settings of a simulated division."""
    return DataConfig(partition=partition, key="author", seed=seed, dirichlet_alpha=alpha)


@pytest.mark.parametrize("partition", ["iid", "dirichlet", "natural"])
@given(labels=st.lists(st.integers(0, 2), min_size=30, max_size=80), sites=st.integers(1, 5), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=15)
def test_sites_share_no_record_and_have_them_all(partition: str, labels: list[int], sites: int, seed: int) -> None:
    train, config = distinct(labels), division(partition, seed, alpha=5.0)
    parts = [site_part(train, config, i, sites) for i in range(sites)]
    together = Counter(example for part in parts for example in part.examples)
    assert together == Counter(train.examples), f"{partition}: a record is at no site or at two"
    assert all(part.examples for part in parts), f"{partition}: a site has no record"
    assert len({part.name for part in parts}) == sites, "two sites' parts have the same name"
    _shares.cache_clear()
    again = [site_part(train, config, i, sites) for i in reversed(range(sites))][::-1]
    assert again == parts, f"{partition}: another process would divide the records differently"


def test_iid_sites_have_equal_sizes_and_mixed_classes() -> None:
    train = distinct([0] * 50 + [1] * 50)
    parts = [site_part(train, division("iid"), i, 3) for i in range(3)]
    assert sorted(len(part.examples) for part in parts) == [33, 33, 34], "iid parts differ by more than one record"
    for part in parts:
        zeros = sum(example.label == 0 for example in part.examples)
        assert 8 <= zeros <= 26, f"iid part has {zeros} of 33 records of class 0: it is a run of the sorted file"


def test_a_smaller_alpha_is_more_uneven() -> None:
    train = distinct([0, 1] * 200)

    def spread(alpha: float) -> float:
        sizes = [
            sum(example.label == 0 for example in site_part(train, division("dirichlet", seed, alpha), 0, 2).examples)
            for seed in range(8)
        ]
        return sum(abs(size - 100) for size in sizes) / len(sizes)

    assert spread(0.3) > 2 * spread(100.0), "data.dirichlet-alpha does not set how uneven the sites are"


def test_dirichlet_sites_do_not_follow_the_order_of_the_file() -> None:
    train = distinct([0] * 100 + [1] * 100)
    part = site_part(train, division("dirichlet", alpha=50.0), 0, 2)
    zeros = [int(example.text.split()[1]) for example in part.examples if example.label == 0]
    assert max(zeros) - min(zeros) > 80, "a site has a run of the file instead of a mixed sample of the label"


def test_dirichlet_parts_are_those_of_flwr_datasets() -> None:
    """Which no simulation imports; the same draws, also where the first one leaves a site without a record."""
    labels, texts = [i % 3 for i in range(40)], [f"record {i}" for i in range(40)]
    for seed, alpha, sites in ((1, 1.0, 4), (2, 0.3, 5), (3, 10.0, 2), (4, 0.1, 3)):
        options: dict[str, Any] = {"min_partition_size": 1, "self_balancing": False, "seed": seed}
        theirs = DirichletPartitioner(sites, "label", alpha, **options)
        theirs.dataset = datasets.Dataset.from_dict({"row": texts, "label": labels})
        ours = _dirichlet_parts(np.array(labels), sites, division("dirichlet", seed, alpha))
        with warnings.catch_warnings(action="ignore"):  # of a draw that is repeated
            wanted = [theirs.load_partition(site)["row"] for site in range(sites)]
        assert ours is not None
        assert [[texts[i] for i in part] for part in ours] == [list(part) for part in wanted]


def test_natural_sites_keep_keys_whole_and_are_of_like_size(capfd: pytest.CaptureFixture[str]) -> None:
    sizes = {"ann": 6, "bo": 4, "cy": 3, "di": 2, "ed": 1}
    train = dataset([TextExample(f"{key} {i}", label=0, key=key) for key, size in sizes.items() for i in range(size)])
    _shares.cache_clear()
    parts = [site_part(train, division("natural"), i, 2) for i in range(2)]
    keys = [{example.key for example in part.examples} for part in parts]
    assert keys == [{"ann", "di"}, {"bo", "cy", "ed"}], "keys are not dealt largest first to the emptiest site"
    assert capfd.readouterr().err == "", "dividing the records draws a progress bar"


def test_fewer_keys_than_sites_are_refused() -> None:
    with pytest.raises(
        DataError, match=r"7 different values of data\.key 'author', too few for 8 sites: use at most 7"
    ):
        site_part(distinct([0] * 20), division("natural"), 0, 8)


def test_fewer_records_than_sites_are_refused() -> None:
    with pytest.raises(DataError, match="drawn has 3 training records, too few for 4 sites"):
        site_part(distinct([0, 1, 0]), division("iid"), 0, 4)


def test_a_hopeless_dirichlet_draw_says_what_to_change() -> None:
    with pytest.raises(
        DataError, match=r"data\.dirichlet-alpha 0\.001 gave each of 20 sites a record: raise alpha, or"
    ):
        site_part(distinct([0, 1] * 20), division("dirichlet", alpha=0.001), 0, 20)


def test_a_column_that_is_no_label_is_guessed_where_every_record_has_another() -> None:
    numbers = replace(distinct(list(range(21))), label_names=tuple(map(str, range(21))))
    with pytest.raises(DataError, match=r"there are 21 labels, so data\.label may name a column that is none"):
        site_part(numbers, division("dirichlet", alpha=0.001), 0, 20)


def test_records_without_labels_cannot_be_divided_by_label() -> None:
    train = dataset([TextExample(f"prompt {i}", completion="x") for i in range(10)], ())
    with pytest.raises(ConfigError, match="the records have no label: set it to 'iid', or to 'natural'"):
        site_part(train, division("dirichlet"), 0, 2)
    assert len(site_part(train, division("iid"), 0, 2).examples) == 5, "iid does not need labels"


@pytest.mark.parametrize("partition_id", [-1, 3])
def test_a_site_outside_the_federation_is_refused(partition_id: int) -> None:
    with pytest.raises(ConfigError, match=f"partition-id must be from 0 to 2, not {partition_id}"):
        site_part(distinct([0, 1] * 5), division("iid"), partition_id, 3)


def test_the_division_is_computed_once_in_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    train = distinct([0, 1] * 10)
    first = site_part(train, division("iid"), 0, 2)
    monkeypatch.setattr("torch.randperm", SimpleNamespace())  # a second division would need it
    assert site_part(distinct([0, 1] * 10), division("iid"), 0, 2) == first, "the kept division is another one"


@given(st.integers(1, 10**9))
def test_the_public_size_of_a_part_is_never_above_the_count_and_keeps_two_digits(count: int) -> None:
    declared = public_size_of_part(count)
    assert 0.9 * count < declared <= count, f"{count} records are declared as {declared}"
    assert len(str(declared).rstrip("0")) <= 2, f"{declared} gives away more than two digits of {count}"


@pytest.mark.parametrize(("count", "declared"), [(0, 1), (1, 1), (57, 57), (100, 100), (109, 100), (1883, 1800)])
def test_public_sizes_of_parts(count: int, declared: int) -> None:
    assert public_size_of_part(count) == declared, f"{count} records must be declared as {declared}"


LABELLED: list[tuple[object, ...]] = [("a film", "positive"), ("a scene", "negative")]


def test_phrases_about_labels_follow_from_the_run_and_not_from_where_a_party_reads_its_records(tmp_path: Path) -> None:
    own = str(write(tmp_path / "own.csv", LABELLED))
    config = DataConfig(name="rotten-tomatoes", labels="negative,positive", test=own)
    read = [load_dataset(config, "classification", source) for source in (own, "rotten-tomatoes", "imdb")]
    read += [*train_and_test(config, "classification"), public_test(config, "classification")]
    assert {each.label_phrases for each in read} == {DATASETS["rotten-tomatoes"].label_phrases}
    file = dataclasses.replace(config, name=own, test="rotten-tomatoes")
    assert {load_dataset(file, "classification", source).label_phrases for source in (own, file.test)} == {()}
    other = dataclasses.replace(config, labels="positive,negative")
    assert load_dataset(other, "classification", own).label_phrases == (), "phrases stand at the wrong labels"
