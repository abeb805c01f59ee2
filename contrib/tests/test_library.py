"""A library of adapters: one basis, what it keeps of runs, and the starts of others at it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from libraries import NAMES, drawn_library
from merged_runs import fedveil
from torch import Tensor

from fedveil.common.errors import ConfigError, DataError
from fedveil.common.messages.state import OWN, AdapterState
from fedveil.common.run_lines import PrivacyLine, RoundLine, read_lines
from fedveil.contrib.library import describe
from fedveil.contrib.library.pairs import norms, overlap, read_pairs
from fedveil.contrib.library.shelf import Library, add, init, open_library
from fedveil.contrib.starts.library import FromLibrary
from fedveil.contrib.starts.vote import VOTES
from fedveil.experiments.evaluate import evaluate_run
from fedveil.experiments.in_process import run_in_process
from fedveil.server.model import ServerModel
from fedveil.strategies.job import Job, configure

Settings = dict[str, Any]
VECTORS = {"letters": (1.0, 0.0), "notes": (0.6, 0.8), "reports": (0.0, 1.0)}


@pytest.fixture
def world(toy_generation: Settings, tmp_path: Path) -> Settings:
    """Return settings of a language model's run that begins at a library of three drawn adapters."""
    return {**toy_generation, **drawn_library(tmp_path / "library", toy_generation), "adapter.start": "library"}


@pytest.fixture
def few_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """Embed a description by the one of three words that it has."""

    def embedded(texts: list[str]) -> Tensor:
        return torch.tensor([VECTORS[next(w for w in VECTORS if w in text)] for text in texts], dtype=torch.float64)

    monkeypatch.setattr(describe, "embedded", embedded)


def begun(settings: Settings, statistic: AdapterState | None = None) -> tuple[Job, ServerModel, AdapterState]:
    """Return a run's job, its server's model and the state before round 1."""
    job = configure(settings)
    server = ServerModel(job)
    found = server.public_statistic() if statistic is None else server.completed(statistic)
    return job, server, job.begin(server.start, found).adapter


def changes(job: Job, state: AdapterState) -> dict[str, Tensor]:
    """Return each layer's change, float64."""
    return {
        layer: job.adapter.delta({name: t.double() for name, t in factors.items()}, torch.zeros(1, 1))
        if "stack" not in factors
        else job.adapter.scaling
        * torch.einsum("j,jor->or", factors["w"].double(), factors["stack"].double())
        @ factors["A"].double()
        for layer, factors in state.items()
        if layer not in OWN
    }


def of_library(settings: Settings, weights: list[float]) -> dict[str, Tensor]:
    """Return the weighted sum of a library's changes from its files."""
    read = [read_pairs(Path(settings["start.library"]) / name / "adapter").layers for name in NAMES]
    return {
        layer: sum(
            (w * pairs[layer]["B"] @ pairs[layer]["A"] for w, pairs in zip(weights, read, strict=True)), torch.zeros(())
        )
        for layer in read[0]
    }


@pytest.mark.parametrize("adapter", ["lora", "lora-frozen-a", "lora-mixture"])
@pytest.mark.parametrize(
    ("begin_at", "counts", "weights"),
    [("best", [0.1, 0.3, 0.3], [0.0, 1.0, 0.0]), ("mean", [0.1, 0.3, -0.2], [0.25, 0.75, 0.0])],
)
def test_the_server_begins_at_the_winner_or_at_the_mean_by_shares(
    adapter: str, begin_at: str, counts: list[float], weights: list[float], world: Settings
) -> None:
    own = {"adapter.name": adapter, "strategy": "fedavg-lora", "start.begin-at": begin_at}
    job, _, state = begun({**world, **own}, {VOTES: {"counts": torch.tensor(counts)}})
    wanted, found = of_library(world, weights), changes(job, state)
    assert set(found) == set(wanted)
    assert max(float((found[layer] - wanted[layer]).abs().max()) for layer in wanted) < 1e-6


def test_another_order_of_the_library_changes_nothing_but_numbers(world: Settings) -> None:
    entries = world["start.adapters"].split(",")
    counts = {"letters": 0.2, "notes": 0.5, "reports": 0.3}
    found = []
    for order in (entries, entries[::-1], [entries[1], entries[2], entries[0]]):
        own = {**world, "start.adapters": ",".join(order), "start.begin-at": "mean"}
        shares = torch.tensor([counts[entry.partition("=")[0]] for entry in order])
        job, _, state = begun(own, {VOTES: {"counts": shares}})
        found.append(changes(job, state))
    for other in found[1:]:
        assert max(float((other[layer] - found[0][layer]).abs().max()) for layer in other) < 1e-6


def test_sites_vote_pay_for_it_and_train_on(world: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = run_in_process({**world, "rounds": 1, "start.noise-multiplier": 4.0}, 2)
    rounds = read_lines(RoundLine, folder)
    assert [line.round_number for line in rounds] == [0, 1]
    assert not any(line.refusals or line.failures for line in rounds)
    assert rounds[0].bytes_down > rounds[0].bytes_up, "the adapters went down, and their counts came up"
    paid = [line.spent for line in read_lines(PrivacyLine, folder) if line.round_number == 0]
    assert len(paid) == 2
    for spent in paid:
        assert spent is not None
        assert (spent.event.kind, spent.event.sample_rate, spent.event.noise_multiplier) == (
            "sampled-gaussian",
            1.0,
            4.0,
        )
    scored = evaluate_run(folder)
    assert scored.loss == pytest.approx(rounds[-1].loss, rel=1e-4)
    assert fedveil("report", folder)[0] == 0
    report = (folder / "report.md").read_text(encoding="utf-8")
    assert all(f"| 0 | site-{number} | initialisation | 1 | 4 | 1 | 1 |" in report for number in range(2))


def test_a_site_refuses_a_vote_without_what_is_voted_on(world: Settings) -> None:
    job = configure(world)
    server = ServerModel(job)
    state = job.start(server.start)
    shown = job.brought(state, 0)
    layout = job.brought_layout(server.model.start, state, 0)
    assert {layer: tuple(held["B"].shape) for layer, held in shown.items()} == {
        layer: shapes["B"] for layer, shapes in layout.items()
    }
    assert job.brought(state, 1) == job.frozen_for(state, 1)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"start.library": ""}, "needs start.library"),
        ({"start.adapters": "letters"}, "must be NAME=FINGERPRINT"),
        ({"adapter.name": "lora-diagonal", "strategy": "fedavg-lora"}, "set adapter.name to one of"),
        ({"adapter.alpha": 0.0, "strategy": "ffa-lora"}, "adapter.alpha above 0"),
        ({"privacy.mode": "none"}, "use 'described', by public words"),
        ({"adapter.start": "described"}, "needs start.about"),
        ({"adapter.name": "lora-mixture", "strategy": "fedavg-lora", "adapter.start": "orthonormal"}, "gives no stack"),
    ],
    ids=str,
)
def test_a_run_that_cannot_begin_at_a_library_is_refused_in_one_line(
    settings: Settings, words: str, world: Settings
) -> None:
    own = {**world, **settings}
    if own["adapter.start"] == "orthonormal":
        own = {key: value for key, value in own.items() if not key.startswith("start.")}
    with pytest.raises(ConfigError) as refusal:
        configure(own)
    assert words in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_library_of_another_basis_or_with_other_adapters_is_refused_before_a_site_is_asked(world: Settings) -> None:
    for own, words in (
        ({"seed": 7}, "on another basis than the run's"),
        ({"adapter.rank": 2}, "on another basis than the run's"),
        ({"start.adapters": "letters=0000000000000000"}, "has another: set start.adapters"),
        ({"start.adapters": "nowhere=0000000000000000"}, "has no adapter 'nowhere'"),
        ({"start.library": "/nowhere"}, "holds no library.toml"),
    ):
        job = configure({**world, **own})
        server = ServerModel(job, scores=False)
        with pytest.raises(DataError, match=words):
            job.brought(job.start(server.start), 0)


# --- described --------------------------------------------------------------------------------------------------------


def test_an_equal_description_gives_nearly_that_adapter_as_the_temperature_falls(
    world: Settings, few_words: None
) -> None:
    own = {**world, "adapter.start": "described", "start.about": "notes"}
    for temperature, gap in ((0.01, 1e-6), (10.0, None)):
        job, server, state = begun({**own, "start.temperature": temperature})
        wanted, found = of_library(world, [0.0, 1.0, 0.0]), changes(job, state)
        apart = max(float((found[layer] - wanted[layer]).abs().max()) for layer in wanted)
        assert apart < gap if gap else apart > 1e-2
        assert "letters 0." in server.public_words or temperature < 1
    assert FromLibrary().shares([0.0, 0.0]) == [1.0, 0.0]
    weights = describe.weights([0.3, 0.9, 0.5, 0.1], 2, 0.1)
    assert weights == pytest.approx([0.0, 1 / (1 + 2.718281828**-4), 1 / (1 + 2.718281828**4), 0.0])


def test_descriptions_are_embedded_each_by_itself() -> None:
    texts = ["discharge letters of a hospital", "pathology reports, three grades", "letters of discharge from a clinic"]
    rows = describe.embedded(texts)
    assert torch.equal(rows[1], describe.embedded([texts[1]])[0])
    assert torch.allclose(rows.norm(dim=1), torch.ones(3, dtype=torch.float64))
    near = describe.nearness(texts[0], texts[1:])
    assert near[1] > near[0] + 0.2


# --- the commands -----------------------------------------------------------------------------------------------------


@pytest.fixture
def runs(toy_generation: Settings, tmp_path: Path) -> dict[str, Path]:
    """Return folders of runs: two on one basis, one without a claim and one private, and one of another seed."""
    own = {**toy_generation, "rounds": 1}
    return {
        "open": run_in_process({**own, "privacy.mode": "none"}, 2),
        "private": run_in_process({**own, "privacy.noise-multiplier": 1.0, "privacy.epsilon": 30.0}, 2),
        "other": run_in_process({**own, "privacy.mode": "none", "seed": 2}, 2),
    }


def test_a_library_is_made_filled_and_listed(runs: dict[str, Path], tmp_path: Path, few_words: None) -> None:
    place = tmp_path / "own library"
    code, said = fedveil("library", "init", place, "--like", runs["open"])
    assert code == 0, said
    for name in ("open", "private"):
        code, said = fedveil("library", "add", place, runs[name], "--name", name, "--about", f"{name} letters")
        assert code == 0, said
        assert ("Privacy was OFF" in said) == (name == "open")
    code, said = fedveil("library", "add", place, runs["other"], "--name", "other", "--about", "letters")
    assert code == 1
    assert "is on another basis than" in said
    assert fedveil("library", "add", place, runs["open"], "--name", "open", "--about", "letters")[0] == 1
    assert fedveil("library", "add", place, runs["open"], "--name", "new", "--about", " ")[0] == 1
    code, said = fedveil("library", "list", place)
    assert code == 0, said
    assert "no claim" in said
    assert "+1.00" in said
    assert open_library(place).setting in said.replace("\n", "")
    code, said = fedveil("library", "suggest", place, "letters", "--top", "1")
    assert code == 0, said
    assert 'adapter.start = "described"' in said
    assert [source.epsilon for source in open_library(place).sources("open")] == [None]
    (source,) = open_library(place).sources("private")
    assert source.epsilon
    assert source.run == runs["private"].name.rpartition("-")[2]


def test_an_adapter_that_was_changed_afterwards_is_refused(world: Settings) -> None:
    library = open_library(world["start.library"])
    read = read_pairs(library.folder / "notes" / "adapter")
    assert read.fingerprint == library.member("notes").fingerprint
    other = library.folder / "letters" / "adapter" / "adapter_model.safetensors"
    (library.folder / "notes" / "adapter" / "adapter_model.safetensors").write_bytes(other.read_bytes())
    with pytest.raises(DataError, match="is not the adapter that was added"):
        library.pairs("notes")


def test_norms_and_overlaps_are_those_of_the_whole_changes(world: Settings) -> None:
    library: Library = open_library(world["start.library"])
    read = [library.pairs(name).layers for name in NAMES]
    whole = [torch.cat([(f["B"] @ f["A"]).flatten() for f in pairs.values()]) for pairs in read]
    for i, one in enumerate(whole):
        assert sum(n**2 for n in norms(read[i]).values()) ** 0.5 == pytest.approx(float(one.norm()), rel=1e-12)
        for j, other in enumerate(whole):
            wanted = float(one @ other / one.norm() / other.norm())
            assert overlap(read[i], read[j]) == pytest.approx(wanted, abs=1e-12)


def test_a_run_whose_a_is_its_own_makes_no_library(toy_generation: Settings, tmp_path: Path) -> None:
    own = {**toy_generation, "rounds": 1, "privacy.mode": "none", "adapter.start": "kaiming"}
    folder = run_in_process(own, 2)
    with pytest.raises(DataError, match="whose A is the run's own"):
        init(tmp_path / "library", folder)
    with pytest.raises(DataError, match="holds no library"):
        add(tmp_path / "nowhere", folder, "one", "letters")
