"""A private vote for public texts: each record is for the nearest, and a transfer takes those with clear counts."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from exact import draw

from audits.tiny_models import BAD, FILLER, GOOD, save_tiny_model
from fedveil.common.derived import DerivedFile, VotesFile
from fedveil.common.errors import ConfigError, DataError
from fedveil.common.run_lines import PrivacyLine, read_file, read_lines
from fedveil.contrib.starts.text_votes import LONGEST, _bytes, _text, clear_texts, nearest
from fedveil.contrib.starts.vote import SPOILT
from fedveil.contrib.transfer import texts as reading
from fedveil.contrib.transfer.transfer import Wanted, transfer
from fedveil.experiments.in_process import run_in_process
from fedveil.strategies.job import configure

pytestmark = [pytest.mark.rough_prices, pytest.mark.one_length]

NEAR = [f"{FILLER[i % 12]} {GOOD[i % 4] if i % 2 else BAD[i % 4]} {FILLER[(i * 5 + 1) % 12]}" for i in range(12)]
TEXTS = [text for near in NEAR for text in (near, f"question {near} two")]


@pytest.fixture
def asking(toy_settings: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """Return settings of a run in which 200 records vote for 24 texts."""
    file = tmp_path / "public.txt"
    file.write_text("".join(f"{text}\n" for text in TEXTS), encoding="utf-8")
    votes = {"adapter.start": "text-votes", "start.text": str(file), "start.records": len(TEXTS)}
    own = {"start.text-sha256": hashlib.sha256(file.read_bytes()).hexdigest(), "start.noise-multiplier": 0.4}
    return {**toy_settings, **votes, **own, "rounds": 1, "privacy.epsilon": 200.0}


def test_a_record_is_for_the_nearest_text_of_equal_ones_for_the_first() -> None:
    texts = torch.nn.functional.normalize(draw(5, 6, seed=1), dim=-1)
    own = torch.nn.functional.normalize(draw(40, 6, seed=2), dim=-1)
    slow = [max(range(5), key=lambda i: (float(row @ texts[i]), -i)) for row in own]
    assert nearest(own, texts) == slow
    twice = torch.cat([texts, texts])
    assert nearest(own, twice) == slow
    own[3], texts[0] = math.nan, math.nan
    found = nearest(own, texts)
    assert found[3] == SPOILT
    assert 0 not in found
    assert nearest(own[:7], texts) == found[:7], "a neighbour moves a vote"


def test_texts_are_shown_as_bytes_and_read_back() -> None:
    for text in ("a warm film", "Grüße aus Köln", "x" * 400, "é" * 200):
        assert text.startswith(_text(_bytes(text)))
        assert len(_text(_bytes(text)).encode()) >= min(len(text.encode()), LONGEST - 1)
    assert _text(torch.full((LONGEST,), 700.0)) == ""


def test_clear_counts_are_above_what_noise_gives_one_of_all() -> None:
    assert clear_texts([0.5, 0.0, 0.2, 0.019, -0.4], 0.01) == [0, 2]
    noise = draw(2000, 40, seed=4).tolist()
    assert sum(bool(clear_texts(row, 1.0)) for row in noise) / 2000 == pytest.approx(0.05, abs=0.02)


def test_a_run_without_rounds_is_a_vote_alone_and_charges_one_release(asking: dict[str, Any]) -> None:
    own = {key: value for key, value in asking.items() if not key.endswith("noise-multiplier")}
    run = run_in_process({**own, "rounds": 0, "privacy.epsilon": 8.0}, 2)
    lines = read_lines(PrivacyLine, run)
    assert [(line.round_number, line.spent.event.figures["sample_rate"]) for line in lines if line.spent] == [
        (0, 1.0)
    ] * 2
    assert read_file(VotesFile, run).noise_std is not None
    assert "Everything that the sites sent is" in (run / "report.md").read_text(encoding="utf-8")
    with pytest.raises(ConfigError, match="rounds is 0"):
        configure({"rounds": 0})


def test_sites_pay_one_release_and_a_transfer_keeps_the_clear_texts(asking: dict[str, Any], tmp_path: Path) -> None:
    run = run_in_process(asking, 2)
    votes = read_file(VotesFile, run)
    assert votes.noise_std is not None
    assert sum(votes.shares) == pytest.approx(1, abs=0.2)
    lines = [line for line in read_lines(PrivacyLine, run) if not line.round_number]
    assert {line.spent.event.figures["sample_rate"] for line in lines if line.spent} == {1.0}
    assert len(lines) == 2, "a site released more than once before round 1"
    kept = clear_texts(votes.shares, votes.noise_std)
    file, wider = str(tmp_path / "public.txt"), save_tiny_model("bert", tmp_path / "wider", hidden=24)
    with pytest.raises(DataError, match="clear votes"):
        transfer(run, tmp_path / "new", Wanted(wider, file, votes=run))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "FEWEST", 2)
        made = transfer(run, tmp_path / "new", Wanted(wider, file, 3, run))
    assert made.public[0].texts == min(3, len(kept))
    assert len(made.sources) == 1, "the run that voted counts twice"
    other = run_in_process({**asking, "seed": 2}, 2, "other")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "FEWEST", 2)
        made = transfer(run, tmp_path / "again", Wanted(wider, file, 3, other))
    assert len(read_file(DerivedFile, tmp_path / "again").sources) == 2
    assert made.epsilon == pytest.approx(sum(source.epsilon or 0 for source in made.sources))
    (tmp_path / "public.txt").write_text("other texts\n", encoding="utf-8")
    with pytest.raises(DataError, match="SHA-256"):
        transfer(run, tmp_path / "third", Wanted(wider, file, votes=run))
    assert json.loads((run / "votes.json").read_text())["shares"] == votes.shares


def test_what_cannot_be_voted_on_is_refused(asking: dict[str, Any], toy_generation: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="needs texts to vote for"):
        configure({**asking, "start.text": "made-up", "start.text-sha256": ""})
    votes = {key: asking[key] for key in asking if key.startswith(("start.", "adapter.start"))}
    with pytest.raises(ConfigError, match="below a head"):
        configure({**toy_generation, **votes})
    with pytest.raises(ConfigError, match="text-votes"):
        configure({**asking, "privacy.mode": "none"})
    with pytest.raises(DataError, match="lower it"):
        run_in_process({**asking, "start.records": 30}, 2)
