"""Starts from public text: EVA's moments, fingerprints, and what they cost."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file
from starts_world import RANK, TEXTS, Folder, each_family, moments, off_identity, tiny
from torch import Tensor, nn

from fedveil.common.adapters.layers import layers_of
from fedveil.common.errors import ConfigError, DataError
from fedveil.common.messages.state import HEAD
from fedveil.common.model.federated import FederatedModel
from fedveil.common.run_lines import PrivacyLine, RoundLine, read_lines
from fedveil.common.starts.directions import leading_rows, with_fixed_signs
from fedveil.common.starts.public_text import known_sha256, read_text
from fedveil.common.tasks import wording_of
from fedveil.contrib.starts.eva import EVA
from fedveil.experiments.evaluate import evaluate_run
from fedveil.experiments.in_process import run_in_process
from fedveil.server.model import ServerModel
from fedveil.strategies.job import configure

pytestmark = [pytest.mark.rough_prices, pytest.mark.one_length, pytest.mark.peft]


def inputs_of(model: FederatedModel, texts: list[str]) -> dict[str, Tensor]:
    """Return every token that reaches each layer, off hooks of its own, all texts in one padded batch."""
    kept: dict[str, Tensor] = {}
    records = model.prepare([wording_of(model.task).phrase(text) for text in texts])
    batch = model.batch(records)
    mask = batch["attention_mask"].bool()
    hooks = [
        cast(nn.Module, layer).register_forward_hook(
            lambda _, given, __, name=name: kept.__setitem__(name, given[0][mask].detach().double())
        )
        for name, layer in layers_of(model.peft_model).items()
    ]
    model.module.eval()
    with torch.no_grad():
        model.losses(batch)
    for hook in hooks:
        hook.remove()
    return kept


@each_family
def test_moments_are_those_of_all_tokens_but_padding_whatever_the_batches(model_folder: Folder, family: str) -> None:
    model = tiny(model_folder(family), family, EVA())
    found = moments(model, TEXTS)
    for name, X in inputs_of(model, TEXTS).items():
        assert (found[name]["M"] - X.T @ X / len(X)).abs().max() < 1e-5 * X.square().mean() * X.shape[1]
        assert (found[name]["m"] - X.mean(0)).abs().max() < 1e-5 * X.abs().max()
    turned = moments(model, TEXTS[::-1])
    assert all((turned[name]["M"] - held["M"]).abs().max() < 1e-12 for name, held in found.items())


@each_family
def test_eva_spans_the_principal_directions_of_the_inputs_and_layers_of_one_input_share_it(
    model_folder: Folder, family: str
) -> None:
    model = tiny(model_folder(family), family, EVA())
    found, inputs = moments(model, TEXTS), inputs_of(model, TEXTS)
    made = {name: EVA().from_statistic(held, RANK)["A"] for name, held in found.items()}
    shared = 0
    for name, A in made.items():
        top = torch.linalg.svd(inputs[name], full_matrices=False).Vh[:RANK]
        assert off_identity(A) < 1e-6
        assert (A.double().T @ A.double() - top.T @ top).abs().max() < 1e-3, f"{name}: another span than the inputs'"
        for other, B in made.items():
            if other < name and inputs[name].shape == inputs[other].shape and torch.equal(inputs[name], inputs[other]):
                assert torch.equal(A, B), f"{name} and {other} have one input and two A"
                shared += 1
    assert shared or family == "gpt2", "no two layers share an input, so nothing is proved"


def test_pooled_moments_are_those_of_all_texts_and_averaged_directions_are_not(model_folder: Folder) -> None:
    model = tiny(model_folder("bert"), "bert", EVA())
    parts = [TEXTS[:2], TEXTS[2:]]
    tokens = [
        sum(len(r["input_ids"]) for r in model.prepare([wording_of(model.task).phrase(t) for t in p])) for p in parts
    ]
    first, second, whole = moments(model, parts[0]), moments(model, parts[1]), moments(model, TEXTS)
    for name, held in whole.items():
        pooled = (tokens[0] * first[name]["M"] + tokens[1] * second[name]["M"]) / sum(tokens)
        assert (pooled - held["M"]).abs().max() < 1e-12 * held["M"].abs().max() + 1e-12
        mean = (tokens[1] * second[name]["m"] + tokens[0] * first[name]["m"]) / sum(tokens)
        assert (mean - held["m"]).abs().max() < 1e-12 * held["m"].abs().max() + 1e-12
        centred = EVA(centred=True).from_statistic({"M": pooled, "m": mean}, RANK)["A"]
        assert (centred - EVA(centred=True).from_statistic(held, RANK)["A"]).abs().max() < 1e-5
        mean = (leading_rows(first[name]["M"], RANK) + leading_rows(second[name]["M"], RANK)) / 2
        assert (mean - leading_rows(held["M"], RANK)).abs().max() > 1e-3, "averaging A would do: nothing is proved"


def test_centred_moments_give_what_pefts_incremental_pca_gives_of_one_batch(model_folder: Folder) -> None:
    from peft.utils.incremental_pca import IncrementalPCA

    model = tiny(model_folder("bert"), "bert", EVA(centred=True))
    for name, X in inputs_of(model, TEXTS).items():
        pca = IncrementalPCA(n_components=RANK, lowrank=False)
        pca.partial_fit(X)
        statistic = {"M": X.T @ X / len(X), "m": X.mean(0)}
        A = EVA(centred=True).from_statistic(statistic, RANK)["A"]
        same = with_fixed_signs(pca.components_)
        assert (A - same).abs().max() < 1e-5, f"{name}: other components than PEFT's"
        assert (A - EVA().from_statistic(statistic, RANK)["A"]).abs().max() > 1e-2


def test_the_text_is_known_by_its_fingerprint(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("one film\n\nanother film\n", encoding="utf-8")
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert read_text(str(file), digest) == ["one film", "another film"]
    with pytest.raises(DataError, match=rf"has the SHA-256 {digest}, start.text-sha256 is {'0' * 64}"):
        read_text(str(file), "0" * 64)
    assert len(read_text("phrases", known_sha256("phrases"))) == 48
    with pytest.raises(DataError, match="cannot be read"):
        read_text(str(tmp_path / "absent"), digest)
    file.write_bytes(b"\n")
    with pytest.raises(DataError, match="holds no text"):
        read_text(str(file), hashlib.sha256(b"\n").hexdigest())
    with pytest.raises(ConfigError, match=r"set start\.text-sha256 to what sha256sum prints"):
        configure({"adapter.start": "eva", "start.text": str(file)})
    with pytest.raises(ConfigError, match="64 hexadecimal digits"):
        configure({"adapter.start": "eva", "start.text-sha256": "abc"})


def test_server_and_site_that_start_from_other_texts_disagree(model_folder: Folder) -> None:
    model = tiny(model_folder("bert"), "bert", EVA())
    told = {
        configure({"adapter.start": "eva", "start.text": text, "start.text-sha256": digest}).start_fingerprint(
            model.start
        )
        for text, digest in (("phrases", ""), ("a.txt", "0" * 64), ("a.txt", "1" * 64))
    }
    assert len(told) == 3
    plain = configure({"adapter.start": "orthonormal"}).start_fingerprint(model.start)
    assert plain not in told


@pytest.mark.parametrize(
    ("strategy", "mode"), [("ffa-lora", "dp-sgd"), ("fed-svd", "none"), ("fed-sb", "dp-sgd"), ("fedavg-lora", "none")]
)
def test_a_run_from_public_text_costs_nothing_and_sends_a_once(
    strategy: str, mode: str, toy_settings: dict[str, Any]
) -> None:
    settings = {**toy_settings, "strategy": strategy, "adapter.start": "eva", "privacy.mode": mode, "rounds": 2}
    folder = run_in_process(settings, 2)
    lines = read_lines(RoundLine, folder)
    assert [line.round_number for line in lines] == [0, 1, 2]
    assert lines[0].participants == []
    spent = read_lines(PrivacyLine, folder)
    assert all(line.spent is None or line.spent.purpose == "training" for line in spent)
    once = lines[1].bytes_down - lines[2].bytes_down
    job = configure(settings)
    frozen = ServerModel(job).model.adapter.frozen
    start = ServerModel(job).start
    numbers = sum(t.numel() for layer, f in start.items() if layer != HEAD for n, t in f.items() if n in frozen)
    assert once == 2 * 4 * numbers, "frozen factors do not travel exactly once to each of two sites"
    assert evaluate_run(folder).accuracy == lines[-1].accuracy
    assert f"public text of SHA-256 {known_sha256('phrases')}" in (folder / "run.log").read_text()
    exported = load_file(str(folder / "adapter" / "adapter_model.safetensors"))
    if strategy == "ffa-lora":
        for name, held in ServerModel(job).public_statistic().items():
            A = exported[f"base_model.model.{name}.lora_A.weight"]
            assert torch.allclose(A, EVA().from_statistic(held, job.adapter.rank)["A"], atol=1e-5)
