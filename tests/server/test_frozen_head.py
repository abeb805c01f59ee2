"""A frozen head of zeros lets no gradient through: it is refused before any site pays for sending noise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from audits.tiny_site import clinic
from fedveil.common.errors import ConfigError
from fedveil.common.messages.round import Refusal
from fedveil.server.model import ServerModel
from fedveil.strategies.job import configure

pytestmark = pytest.mark.rough_prices

# Neither word is in the tiny tokenizer's vocabulary, so both labels' features are those of an unknown word.
ALIKE = {"head.policy": "frozen", "head.start": "label-words", "head.phrases": "excellent;terrible"}


def test_the_server_refuses_labels_that_its_model_cannot_tell_apart(toy_settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"cannot tell the labels' phrases apart.*set head\.phrases") as refusal:
        ServerModel(configure({**toy_settings, **ALIKE}))
    assert "\n" not in str(refusal.value)
    told = ServerModel(configure({**toy_settings, **ALIKE, "head.phrases": "dull;bright"}))
    assert told.model.module.head.weight.abs().max() > 0
    trained = ServerModel(configure({**toy_settings, **ALIKE, "head.policy": "trained"}))
    assert not trained.model.module.head.weight.any(), "a trained head may start at zero"


def test_a_site_refuses_them_before_the_charge(toy_settings: dict[str, Any], tmp_path: Path) -> None:
    site = clinic(toy_settings, tmp_path)
    task = site.task(1)
    site.settings |= ALIKE
    reply = site.ask(task)
    assert isinstance(reply, Refusal), "the site took part"
    assert "cannot tell the labels' phrases apart" in reply.reason
    assert site.charges() == [], "the site paid for a round that could send only noise"
