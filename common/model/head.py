"""The start of the classification head; it uses no record, so it costs no privacy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedveil.common.config.sections import HeadConfig
from fedveil.common.errors import ConfigError
from fedveil.common.tasks import wording_of
from fedveil.common.tasks.featured import FEATURES, labelled_rows
from fedveil.common.tasks.module import Metric
from fedveil.privacy.randomness import stream

if TYPE_CHECKING:
    from fedveil.common.model.federated import FederatedModel


@torch.no_grad()
def set_up_head(
    model: FederatedModel,
    head: HeadConfig,
    seed: int,
    label_names: Sequence[str],
    label_phrases: Sequence[Sequence[str]],
) -> None:
    """Start a new model's head, and put the public map before it; nothing happens where the task has no head.

    Raises:
        ConfigError: see ``phrases_of`` and ``start_from_phrases``.
    """
    linear = model.module.head
    if linear is None:
        return
    phrases = phrases_of(head, label_names, label_phrases)
    start_head(linear, head, seed)
    if head.start == "label-words":
        model.module.eval()
        means = torch.stack([_mean_features(model, of_label) for of_label in phrases])
        start_from_phrases(linear, head, means, model.base.name)
    if model.module.prior:
        linear.bias.add_(model.module.prior)
    linear.requires_grad_(model.head_trained)
    if head.metric == "public":
        model.module.metric = Metric(model.module.width).to(model.device)


def _mean_features(model: FederatedModel, phrases: Sequence[str]) -> Tensor:
    records = model.prepare([wording_of(model.task).phrase(phrase) for phrase in phrases])
    # One phrase at a time and in float32: the start must not depend on batching or on the device's precision.
    made = ({**record, FEATURES: model.module.features(model.batch([record]))[0]} for record in records)
    return torch.cat([labelled_rows(record) for record in made]).mean(0)


@torch.no_grad()
def start_head(linear: nn.Linear, head: HeadConfig, seed: int) -> None:
    """Set a head to zeros, or to random rows of length 1 (``head.start``)."""
    linear.bias.zero_()
    linear.weight.zero_()
    if head.start == "random":
        rows = torch.randn(linear.weight.shape, generator=stream(seed, "head"))
        linear.weight.copy_(F.normalize(rows, dim=-1))


@torch.no_grad()
def start_from_phrases(linear: nn.Linear, head: HeadConfig, means: Tensor, base_model: str) -> None:
    """Set a head to what the base model's features of public phrases say about each label (``label-words``).

    Each row is how the features of the phrases about that label differ from their mean over labels, scaled to
    ``HeadConfig.margin``; the bias makes a record whose features are that mean equally likely for all labels.

    Args:
        linear: the head.
        head: its settings.
        means: mean features of the phrases about each label, shape (labels, width).
        base_model: the base model's name, for errors.

    Raises:
        ConfigError: the base model cannot tell the labels' phrases apart, and the head is frozen.
    """
    centred = means - means.mean(0)
    # A label's logit on its own features leads the mean of the others by |row|² C / (C - 1).
    lead = centred.pow(2).sum(1).mean() * len(means) / max(1, len(means) - 1)
    distinct = bool(lead > 1e-12)
    if head.policy == "frozen" and not distinct:
        # Through a head that stays zero every adapter gradient is zero: sites would pay for sending noise.
        raise ConfigError(
            f"{base_model!r} cannot tell the labels' phrases apart, so the head starts at zero, and a frozen "
            "one trains no adapter: set head.phrases to other words, head.start to 'random' or head.policy to "
            "'trained'"
        )
    linear.weight.copy_(centred * (head.margin / lead) if distinct else torch.zeros_like(centred))
    linear.bias.copy_(-linear.weight @ means.mean(0))


def phrases_of(
    head: HeadConfig, label_names: Sequence[str], label_phrases: Sequence[Sequence[str]]
) -> list[Sequence[str]]:
    """Return the phrases about each label: those configured, else the data set's own, else the names.

    Raises:
        ConfigError: there are phrases for another number of labels than the data have.
    """
    if not head.phrases:
        return list(label_phrases) or [[name] for name in label_names]
    phrases: list[Sequence[str]] = [part.split("|") for part in head.phrases.split(";")]
    if len(phrases) != len(label_names):
        raise ConfigError(
            f"head.phrases speaks of {len(phrases)} labels, the data have {len(label_names)} "
            f"({', '.join(label_names)}): separate labels by ';' and phrases of one label by '|'"
        )
    return phrases
