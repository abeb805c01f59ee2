"""The line that an adapter must beat: a head that is fitted to all records on the frozen encoder, without privacy.

Multinomial logistic regression on the encoder's features, in float64 to the end of an exact optimiser. With n records,
rows w_c and offsets b_c of the labels, and the features x less their mean, scaled to a mean square length of 1::

    minimise  1/n Σ_i -log softmax(W x_i + b)[y_i]  +  λ/2 ‖W‖²

Where a record has several labels it is one such regression a label against the rest, with sigmoids, and one λ for all.

The penalty λ is chosen by five-fold cross-validation on the training records: that of the most right answers, of equal
ones that of the least loss. Equal records, and those of one person, are in one fold. The test part is scored once, by
what was chosen without it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedveil.common.data.sources import train_and_test
from fedveil.common.data.split import tied
from fedveil.common.errors import ModelError
from fedveil.common.model.score import f1
from fedveil.common.tasks.examples import Dataset
from fedveil.common.tasks.featured import FEATURES
from fedveil.strategies.job import Job

Array = NDArray[np.float64]
Labels = NDArray[np.int64]
"""Numbers of labels, shape (records,); or 0 and 1 where a record has several, shape (records, labels)."""
FOLDS = 5
PENALTIES = tuple(10.0 ** (-half / 2) for half in range(13))
"""λ from 1 to 10⁻⁶, in half decades: the largest first, each fit begins where the last one ended."""
GRADIENT = 1e-7
"""Largest entry of the gradient at which a fit has ended."""
MOST_STEPS = 5_000


@dataclass(frozen=True)
class Judged:
    """How a head does on records."""

    accuracy: float
    """Share of right labels; of several a record, micro F1."""
    loss: float
    """Mean cross-entropy, in nats; of several labels, over the labels too."""


@dataclass(frozen=True)
class Fitted:
    """A fitted head, judged on the public test part."""

    before: Judged
    """Of the head as it starts."""
    after: Judged
    penalty: float
    """λ."""
    test_records: int


def fitted(job: Job) -> Fitted:
    """Return the head that is fitted to all training records of a job, which has no adapter.

    Raises:
        ModelError: the task has no head, or some record cannot be computed.
        DataError, ConfigError: the records cannot be read.
    """
    from fedveil.server.model import ServerModel

    config = job.config
    server = ServerModel(job)
    model = server.model
    if model.module.head is None or model.task.by_token:
        raise ModelError(f"model.task is {config.model.task!r}, which has no head with one label a record to be fitted")
    start = server.score(server.start)
    train = train_and_test(config.data, config.model.task)[0]
    records = model.featurise(model.prepare(train.examples))
    if len(records) < len(train.examples):
        raise ModelError(f"{model.base.name!r} cannot compute some of the records: the log says where")
    # Shape (records, width), and as ``Labels``.
    x, y = (np.stack([r[FEATURES].double().numpy() for r in records]), np.array([r["labels"] for r in records]))
    test = np.stack([r[FEATURES].double().numpy() for r in server.records])
    right = np.array([r["labels"] for r in server.records])
    centre = x.mean(0)  # the offsets take it up, so no minimum moves, and the optimiser has a tenth of the steps
    scale = np.sqrt(((x - centre) ** 2).sum(1).mean())
    x, test = (x - centre) / scale, (test - centre) / scale
    penalty = choose_penalty(x, y, model.classes, folds_of(train, config.seed))
    weights = path(x, y, model.classes, [p for p in PENALTIES if p >= penalty])[-1]
    return Fitted(Judged(start.accuracy, start.loss), judge(weights, test, right), penalty, len(right))


def folds_of(train: Dataset, seed: int) -> list[int]:
    """Return the fold of each record, from 0: groups of records that belong together are dealt out in a mixed order."""
    names = tied(train)
    mixed = sorted(set(names), key=lambda name: hashlib.sha256(f"{seed}/folds/{name}".encode()).digest())
    fold = {name: position % FOLDS for position, name in enumerate(mixed)}
    return [fold[name] for name in names]


def choose_penalty(x: Array, y: Labels, classes: int, folds: Sequence[int]) -> float:
    """Return the λ of ``PENALTIES`` whose heads do best on the folds that they were not fitted to.

    Args:
        x: features, shape (records, width).
        y: labels from 0.
        classes: labels that there are.
        folds: of each record.
    """
    of, right, loss = np.asarray(folds), np.zeros(len(PENALTIES)), np.zeros(len(PENALTIES))
    for fold in sorted(set(folds)):
        out = of == fold
        for place, weights in enumerate(path(x[~out], y[~out], classes, PENALTIES)):
            judged = judge(weights, x[out], y[out])
            right[place] += round(judged.accuracy * out.sum())
            loss[place] += judged.loss * out.sum()
    return min(zip(-right, loss, PENALTIES, strict=True))[2]


def path(x: Array, y: Labels, classes: int, penalties: Sequence[float]) -> list[Array]:
    """Return the head of each λ, shape (width + 1, labels), the offsets in the last row; arguments as above."""
    found: list[Array] = []
    weights = np.zeros((x.shape[1] + 1, classes))
    for penalty in penalties:
        weights = fit(x, y, weights, penalty)
        found.append(weights)
    return found


def fit(x: Array, y: Labels, start: Array, penalty: float) -> Array:
    """Return the head that minimises the mean loss with the penalty, by L-BFGS from ``start``.

    Raises:
        ModelError: the optimiser found no end.
    """
    from scipy.optimize import minimize

    def value_and_gradient(flat: Array) -> tuple[float, Array]:
        weights = flat.reshape(start.shape)
        loss, errors = _loss_and_errors(weights, x, y)
        value = loss + penalty / 2 * (weights[:-1] ** 2).sum()
        return float(value), np.vstack([x.T @ errors + penalty * weights[:-1], errors.sum(0)]).ravel()

    limits = {"maxiter": MOST_STEPS, "maxfun": 2 * MOST_STEPS, "gtol": GRADIENT, "ftol": 0.0}
    found = minimize(value_and_gradient, start.ravel(), jac=True, method="L-BFGS-B", options=limits)
    if not np.isfinite(found.x).all() or found.nit >= MOST_STEPS:
        raise ModelError(f"logistic regression with the penalty {penalty:g} did not end after {found.nit} steps")
    return np.asarray(found.x).reshape(start.shape)


def judge(weights: Array, x: Array, y: Labels) -> Judged:
    """Return how a head does on records."""
    loss, _ = _loss_and_errors(weights, x, y)
    if y.ndim == 2:
        given = x @ weights[:-1] + weights[-1] >= 0
        return Judged(f1(float((given & (y == 1)).sum()), float(given.sum() + y.sum())), loss)
    return Judged(float((_log_chances(weights, x).argmax(1) == y).mean()), loss)


def _loss_and_errors(weights: Array, x: Array, y: Labels) -> tuple[float, Array]:
    """Return the mean loss of a head, and its derivatives by the logits, shape (records, labels)."""
    if y.ndim == 2:
        logits = x @ weights[:-1] + weights[-1]
        errors = 1 / (1 + np.exp(-logits)) - y
        return float((np.logaddexp(0, logits) - y * logits).mean()), errors / y.size
    rows, chances = np.arange(len(y)), _log_chances(weights, x)
    errors = np.exp(chances)
    errors[rows, y] -= 1
    return float(-chances[rows, y].mean()), errors / len(y)


def _log_chances(weights: Array, x: Array) -> Array:
    logits = x @ weights[:-1] + weights[-1]
    logits -= logits.max(1, keepdims=True)
    return np.asarray(logits - np.log(np.exp(logits).sum(1, keepdims=True)))
