"""The public test part: seeded, stratified, and without near-duplicates across the two sides."""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter
from functools import lru_cache

from fedveil.common.check import POSITIVE
from fedveil.common.errors import DataError
from fedveil.common.tasks.examples import Dataset
from fedveil.common.words import counted


def public_split(dataset: Dataset, test_size: int, seed: int) -> tuple[Dataset, Dataset]:
    """Divide a data set into a training part and a public test part.

    The parts are disjoint and together are the data set. Near-duplicates (``Example.likeness``: texts that
    differ in case and blanks alone) are on the same side, so a premise with several hypotheses is never split; so are
    the records of one person (``Example.person``), and whatever is tied to them by either. The
    test part follows from what records hold and the seed alone, not from the order of records, the platform or a
    library. Its classes are in the proportions of the whole, as far as near-duplicates allow.

    Args:
        dataset: records.
        test_size: records of the test part; it has fewer only where near-duplicates leave no other choice.
        seed: picks the test part.

    Returns:
        The training part in the data set's order, the test part in a mixed order.

    Raises:
        DataError: no training record would be left, or no test record can be set apart.
        ConfigError: ``test_size`` is not positive.
    """
    POSITIVE.check("data.test-size", test_size)
    total = len(dataset.examples)
    if test_size >= total:
        raise DataError(
            f"data.test-size is {test_size}, but {dataset.name} has only {counted(total, 'record')}: "
            f"{f'set it to at most {total - 1}, or ' * (total > 1)}name a file as data.test"
        )
    chosen = _test_records(dataset, test_size, seed)
    if not chosen:
        raise DataError(
            f"no public test part of {test_size} records can be taken from {dataset.name}, because every text "
            f"{'and person ' * any(example.person for example in dataset.examples)}occurs more than {test_size} times: "
            "name a file as data.test"
        )
    held_out = set(chosen)
    train = tuple(example for i, example in enumerate(dataset.examples) if i not in held_out)
    test = tuple(dataset.examples[i] for i in chosen)
    return dataclasses.replace(dataset, examples=train), dataclasses.replace(dataset, examples=test)


@lru_cache(maxsize=8)
def _test_records(dataset: Dataset, test_size: int, seed: int) -> tuple[int, ...]:
    """Return the indices of the test part, in its order."""
    groups: dict[str, list[int]] = {}
    for i, name in enumerate(tied(dataset)):
        groups.setdefault(name, []).append(i)
    # Sorting by a keyed hash is a shuffle that no library version can change.
    mixed = sorted(groups, key=lambda text: hashlib.sha256(f"{seed}/public-test/{text}".encode()).digest())
    places = _quotas(Counter(example.stratum for example in dataset.examples), test_size)
    chosen: dict[int, None] = {}
    for stratified in (True, False):  # the second time fills the places that a class's groups did not fit into
        for members in (groups[text] for text in mixed):
            if members[0] in chosen or len(members) > test_size - len(chosen):
                continue
            classes = Counter(dataset.examples[i].stratum for i in members)
            if not stratified or classes <= places:
                places.subtract(classes)
                chosen.update(dict.fromkeys(members))
    return tuple(chosen)


def tied(dataset: Dataset) -> list[str]:
    """Return for each record a text that is equal for those which must be on one side."""
    texts = [example.likeness() for example in dataset.examples]
    if not any(example.person for example in dataset.examples):
        return texts
    # Union of sets: a text and a person are tied by a record that has both.
    above: dict[tuple[str, str], tuple[str, str]] = {}

    def top(name: tuple[str, str]) -> tuple[str, str]:
        while above.setdefault(name, name) != name:
            above[name] = above[above[name]]
            name = above[name]
        return name

    for example, text in zip(dataset.examples, texts, strict=True):
        first, second = sorted((top(("text", text)), top(("person", example.person or text))))
        above[second] = first
    return ["/".join(top(("text", text))) for text in texts]


def _quotas(counts: Counter[int | None], places: int) -> Counter[int | None]:
    """Divide ``places`` in proportion to ``counts`` by largest remainder; ties go to the lower label."""
    total = counts.total()
    quotas = Counter({label: places * count // total for label, count in counts.items()})
    by_remainder = sorted(counts, key=lambda label: (-(places * counts[label] % total), label or 0))
    quotas.update(by_remainder[: places - quotas.total()])
    return quotas
