"""Starts from weights, shards and public text: rows of the invariants, on layers that are not square."""

from __future__ import annotations

import copy
import dataclasses
import functools
import hashlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from peft import MissConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn

from audits.tiny_models import FILLER, GOOD, TARGETS, write_reviews
from fedveil.common.adapters import ADAPTERS, LoRAFrozenA, Place
from fedveil.common.adapters.base import base_weight, stored_transposed
from fedveil.common.config.sections import HeadConfig
from fedveil.common.errors import ConfigError, DataError, ModelError
from fedveil.common.messages.state import HEAD, AdapterState
from fedveil.common.messages.tensors import fingerprint, merge
from fedveil.common.model.base import BaseModel, load_base_model
from fedveil.common.model.federated import FederatedModel
from fedveil.common.run_lines import PrivacyLine, RoundLine, read_lines
from fedveil.common.starts import STARTS, Start
from fedveil.common.starts.calibration import calibrated
from fedveil.common.starts.directions import leading_rows, minor_rows, orthonormal_rows, spanned_rows, with_fixed_signs
from fedveil.common.starts.gradient import mean_gradient
from fedveil.common.starts.public_text import known_sha256, read_text
from fedveil.common.tasks import TASKS, wording_of
from fedveil.common.tasks.text import TextExample
from fedveil.contrib.starts.eva import EVA, input_moments
from fedveil.experiments.evaluate import evaluate_run
from fedveil.experiments.in_process import run_in_process
from fedveil.privacy import dpsgd
from fedveil.privacy.dpsgd import PrivateSteps
from fedveil.privacy.plan import gaussian_plan
from fedveil.server.model import ServerModel
from fedveil.strategies.job import configure

pytestmark = [pytest.mark.rough_prices, pytest.mark.one_length, pytest.mark.peft]

RANK = 3
SHAPES = [(7, 12), (13, 6), (8, 8)]
Folder = Callable[[str], str]
each_family = pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
each_shape = pytest.mark.parametrize(("out", "into"), SHAPES)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def place(W: Tensor, rank: int = RANK) -> Place:
    return Place("layer", W.shape[0], W.shape[1], rank, 1, W.clone)


def off_identity(rows: Tensor) -> float:
    return float((rows.double() @ rows.double().T - torch.eye(len(rows), dtype=torch.float64)).abs().max())


@functools.cache
def _read(folder: str, task: str) -> BaseModel:
    return load_base_model(folder, task)


def base_of(folder: str, task: str) -> BaseModel:
    """Return the folder's base model; a copy of one that is read from disk once."""
    read = _read(folder, task)
    return dataclasses.replace(read, module=copy.deepcopy(read.module))


def tiny(folder: str, family: str, start: Start, adapter: str = "lora-frozen-a", alpha: float = 3.0) -> FederatedModel:
    task = "classification" if family == "bert" else "causal-lm"
    return FederatedModel(
        base_of(folder, task),
        ADAPTERS[adapter](RANK, alpha, tuple(TARGETS[family].split(",")), start),
        TASKS[task],
        HeadConfig(policy="trained" if family == "bert" else "frozen", start="random"),
        seed=1,
        label_names=("bad", "good"),
        max_length=24,
        device="cpu",
        precision="float32",
    )


# --- from the weights -------------------------------------------------------------------------------------------------


@each_shape
def test_minor_of_weights_is_orthonormal_and_spans_what_the_weight_reaches_least(out: int, into: int) -> None:
    W = draw(out, into, seed=out)
    made = STARTS["minor-of-weights"]().factors(place(W), ("A", "B"))
    assert (made["A"].shape, made["B"].shape) == ((RANK, into), (out, RANK))
    for rows, gram in ((made["A"], W.T @ W), (made["B"].T, W @ W.T)):
        assert off_identity(rows) < 1e-6
        least = torch.linalg.eigvalsh(gram)[:RANK]
        assert (torch.diagonal(rows.double() @ gram @ rows.double().T) - least).abs().max() < 1e-5
        assert (rows.double() @ gram - least[:, None] * rows.double()).abs().max() < 1e-5, "no eigenvectors"
    # And before they are rounded to float32.
    for matrix in (W, W.T):
        rows, gram = minor_rows(matrix, RANK), matrix.T @ matrix
        least = torch.linalg.eigvalsh(gram)[:RANK]
        assert off_identity(rows) < 1e-10
        assert (rows @ gram - least[:, None] * rows).abs().max() < 1e-10


def test_minor_directions_that_a_weight_does_not_reach_are_the_same_whatever_basis_an_svd_gives(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    W, real = draw(4, 9, seed=2), torch.linalg.svd
    here = minor_rows(W, 6)

    def elsewhere(matrix: Tensor, full_matrices: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        u, s, vt = real(matrix, full_matrices=full_matrices)
        return -u, s, -vt

    monkeypatch.setattr(torch.linalg, "svd", elsewhere)
    assert (minor_rows(W, 6) - here).abs().max() < 1e-12
    assert (W @ here[:5].T).abs().max() < 1e-12, "the first five are not in the weight's null space"
    assert off_identity(here) < 1e-12


@each_shape
def test_nystrom_spans_the_first_rows_and_columns_and_leaves_the_model_as_it_was(out: int, into: int) -> None:
    W = draw(out, into, seed=out)
    made = {name: t.double() for name, t in STARTS["nystrom"]().factors(place(W), ("A", "B")).items()}
    assert max(off_identity(made["A"]), off_identity(made["B"].T)) < 1e-6
    rows, columns = W[:RANK], W[:, :RANK]
    assert (rows @ made["A"].T @ made["A"] - rows).abs().max() < 1e-5
    assert (made["B"] @ made["B"].T @ columns - columns).abs().max() < 1e-5
    # The interpolation: W's first rows and columns are those of C U⁻¹ R, whose directions these are.
    interpolated = columns @ torch.linalg.solve(W[:RANK, :RANK], rows)
    assert (interpolated[:RANK] - rows).abs().max() < 1e-9
    assert (interpolated[:, :RANK] - columns).abs().max() < 1e-9
    # And before they are rounded to float32: the same spans, orthonormal.
    A, B = spanned_rows(rows), spanned_rows(columns.T).T
    assert max(off_identity(A), off_identity(B.T)) < 1e-10
    assert (rows @ A.T @ A - rows).abs().max() < 1e-10
    assert (B @ B.T @ columns - columns).abs().max() < 1e-10
    assert (made["A"] - A).abs().max() < 1e-6
    assert (made["B"] - B).abs().max() < 1e-6
    core = made["B"].T @ interpolated @ made["A"].T
    assert (made["B"] @ core @ made["A"] - interpolated).abs().max() < 1e-5, "the core does not reach the Nyström form"


@each_shape
def test_the_published_nystrom_start_is_another_model(out: int, into: int) -> None:
    """As released: the first columns, core and rows of W, of which nothing is inverted and nothing taken from W."""
    W = 0.1 * draw(out, into, seed=out)
    start = STARTS["nystrom"]()
    adapter = ADAPTERS["lora-sb"](RANK, float(RANK), ("layer",), start)
    made = {name: t.double() for name, t in start.factors(place(W), ("A", "B")).items()}
    assert "R" not in adapter.begin(made), "the core begins elsewhere than at 0, where the model is the base"
    released = W[:, :RANK] @ W[:RANK, :RANK] @ W[:RANK]
    # It is a start that this adapter could hold, in the same directions.
    theirs = adapter.delta({**made, "R": made["B"].T @ released @ made["A"].T}, W)
    assert (theirs - released).abs().max() < 1e-6 * float(released.abs().max())
    assert float(theirs.norm()) > 0.001 * float(W.norm())


DERIVED = [name for name, start in STARTS.items() if start().asked == "nobody"]


@pytest.mark.parametrize(
    ("name", "adapter"),
    [
        (name, other)
        for name in DERIVED
        for other, kind in ADAPTERS.items()
        if {*kind.directions} <= {*STARTS[name].gives}
    ],
)
@each_family
def test_a_start_that_every_party_derives_leaves_base_and_outputs_bit_for_bit(
    model_folder: Folder, family: str, name: str, adapter: str
) -> None:
    folder = model_folder(family)
    model = tiny(folder, family, STARTS[name](), adapter)
    stock = _read(folder, model.task.name).module.state_dict()
    live = {
        key.removeprefix("base_model.model.").replace(".base_layer.", "."): tensor
        for key, tensor in model.peft_model.state_dict().items()
        if "lora_" not in key
    }
    assert all(torch.equal(live[key], tensor) for key, tensor in stock.items()), "the base moved"
    weights = {layer: base_weight(module) for layer, module in model.adapter.layers(model.peft_model).items()}
    for layer, weight in weights.items():
        change = model.adapter.delta(model.start[layer], weight)
        assert change.abs().max() <= 1e-6 * weight.abs().max(), "the start is not the base model"


DERIVED_OURS = [name for name in DERIVED if STARTS[name].__module__.startswith("fedveil.common.starts.")]
"""Rows that another process has without being told."""
DERIVED_BY = {name: f"{'lora-sb' if 'B' in STARTS[name].gives else 'lora-frozen-a'} {name}" for name in DERIVED_OURS}
"""Adapter and start, of an adapter that asks for all that the start gives."""
OF_A = "lora-frozen-a orthonormal"
"""Adapter and start of FFA-LoRA, whose sites share A."""
PRINT_FINGERPRINTS = """
import sys
import torch
torch.manual_seed(1)
from fedveil.common.adapters import ADAPTERS
from fedveil.common.messages.tensors import fingerprint
from fedveil.common.model.base import BaseModel, load_base_model
from fedveil.common.starts import STARTS
for words in sys.argv[2:]:
    kind, name = words.split()
    adapter = ADAPTERS[kind](3, 6.0, ("query", "dense"), STARTS[name]())
    start = adapter.read(adapter.attach(load_base_model(sys.argv[1], "classification").module, 1))
    print(words, fingerprint(start), sep="/")
"""


@pytest.fixture(scope="module")
def derived_elsewhere(model_folder: Folder) -> dict[str, str]:
    """Return the fingerprint of every start as another process derives it; one process, as libraries load slowly.

    Hashes and random numbers of this process are not those of the other one.
    """
    wanted = [*DERIVED_BY.values(), OF_A]
    there = subprocess.run(
        [sys.executable, "-c", PRINT_FINGERPRINTS, model_folder("bert"), *wanted],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "PYTHONHASHSEED": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    return dict(line.split("/") for line in there.stdout.splitlines() if "/" in line)


def derived_here(folder: str, kind: str, start: str) -> str:
    torch.manual_seed(2)
    adapter = ADAPTERS[kind](3, 6.0, ("query", "dense"), STARTS[start]())
    return fingerprint(adapter.read(adapter.attach(load_base_model(folder, "classification").module, 1)))


@pytest.mark.parametrize("name", DERIVED_OURS)
def test_two_processes_derive_the_same_start(
    model_folder: Folder, derived_elsewhere: dict[str, str], name: str
) -> None:
    assert derived_elsewhere[DERIVED_BY[name]] == derived_here(model_folder("bert"), *DERIVED_BY[name].split())


def test_every_process_derives_the_same_a_from_the_seed(
    model_folder: Folder, derived_elsewhere: dict[str, str]
) -> None:
    here = derived_here(model_folder("bert"), *OF_A.split())
    assert derived_elsewhere[OF_A] == here, "processes disagree on the shared A"


# --- shards -----------------------------------------------------------------------------------------------------------


@each_shape
def test_shards_sum_every_rth_input(out: int, into: int) -> None:
    W = draw(out, into)
    plain = STARTS["shards"](normalised=False).factors(place(W), ("A", "B"))  # type: ignore[call-arg]
    gram = plain["A"] @ plain["A"].T
    assert torch.equal(gram, torch.diag(torch.diagonal(gram)))
    assert set(torch.diagonal(gram).tolist()) <= {float(into // RANK), float(-(-into // RANK))}
    x = draw(into, seed=3).float()
    assert torch.allclose(plain["A"] @ x, torch.stack([x[k::RANK].sum() for k in range(RANK)]))
    normalised = STARTS["shards"]().factors(place(W), ("A", "B"))
    assert off_identity(normalised["A"]) < 1e-6
    assert off_identity(normalised["B"].T) < 1e-6


class Two(nn.Module):
    """Two layers that are not square, of the same weights whenever it is made."""

    def __init__(self, into: int, between: int, out: int) -> None:
        super().__init__()
        self.config: dict[str, Any] = {"model_type": "custom"}
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.wide, self.tall = nn.Linear(into, between), nn.Linear(between, out)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.tall(torch.tanh(self.wide(x))))


@pytest.mark.parametrize("rank", [3, 4])
def test_shards_are_pefts_miss_also_when_exported(rank: int, tmp_path: Path) -> None:
    again = functools.partial(Two, 12, 7, 10)
    # PEFT's MiSS cuts what is left where r does not divide the inputs.
    miss = get_peft_model(again(), MissConfig(r=rank, target_modules=["wide", "tall"], init_weights=True))
    adapter = LoRAFrozenA(rank, float(rank), ("wide", "tall"), STARTS["shards"](normalised=False))  # type: ignore[call-arg]
    ours = adapter.attach(again(), 1)
    state = adapter.read(ours)
    for name, factors in state.items():
        B = draw(*factors["B"].shape, seed=len(name)).float()
        state[name] = {"A": factors["A"], "B": B}
        block = miss.base_model.model.get_submodule(name).miss_block["default"]
        block.data.copy_(B.T)
    adapter.write(ours, state)
    x = draw(5, 12, seed=8).float()
    wanted = miss(x)
    assert torch.allclose(ours(x), wanted, rtol=1e-6, atol=1e-6)
    adapter.export(ours, state, tmp_path / "lora", "base")
    miss.save_pretrained(str(tmp_path / "miss"))
    exported = [PeftModel.from_pretrained(again(), tmp_path / kind)(x) for kind in ("lora", "miss")]
    assert torch.equal(exported[1], wanted)
    assert torch.allclose(exported[0], exported[1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("into", [12, 10], ids=["in whole shards", "with a rest"])
def test_a_core_between_shards_is_pefts_miss_mini_also_when_exported(into: int, tmp_path: Path) -> None:
    """PEFT repeats a block of rank × mini_r along the outputs: LoRA-SB's core, transposed, where mini_r is the rank."""
    again, x = functools.partial(Two, into, 9, 6), draw(5, into, seed=8).float()
    config = MissConfig(r=RANK, mini_r=RANK, target_modules=["wide", "tall"], init_weights="mini")
    mini = get_peft_model(again(), config)
    adapter = ADAPTERS["lora-sb"](RANK, 1.0, ("wide", "tall"), STARTS["shards"](normalised=False))  # type: ignore[call-arg]
    ours = adapter.attach(again(), 1)
    state = adapter.read(ours)
    for name, factors in state.items():
        # Two sites' mean, of unequal shares, and one of them without full rank.
        cores = [draw(RANK, RANK, seed=len(name)), draw(RANK, 1, seed=1) @ draw(1, RANK, seed=2)]
        factors["R"] = (0.7 * cores[0] + 0.3 * cores[1]).float()
        mini.base_model.model.get_submodule(name).miss_block["default"].data.copy_(factors["R"].T)
    adapter.write(ours, state)
    wanted = mini(x)
    assert torch.allclose(ours(x), wanted, rtol=1e-6, atol=1e-6)
    adapter.export(ours, state, tmp_path, "base")
    assert torch.allclose(PeftModel.from_pretrained(again(), tmp_path)(x), wanted, rtol=1e-6, atol=1e-6)
    turned = {name: {**factors, "R": factors["R"].T.contiguous()} for name, factors in state.items()}
    adapter.write(ours, turned)
    assert (ours(x) - wanted).abs().max() > 1e-2, "a core the wrong way round would do: nothing is proved"
    unit = ADAPTERS["lora-sb"](RANK, 1.0, ("wide", "tall"), STARTS["shards"]())
    other = unit.attach(again(), 1)
    unit.write(other, {name: {"R": factors["R"]} for name, factors in state.items()})
    assert (other(x) - wanted).abs().max() > 1e-2, "shards of length 1 would do: nothing is proved"


def train_privately(A: Tensor, alpha: float, rate: float, clip: float, noise: list[Tensor]) -> Tensor:
    """Return the change of the weight after DP-SGD on B under a frozen A, all in float64."""
    x, y, rank = draw(6, 12, seed=4), draw(6, 7, seed=5), A.shape[0]
    model = nn.Sequential(nn.Linear(12, rank, bias=False), nn.Linear(rank, 7, bias=False)).double()
    model[0].weight = nn.Parameter(A, requires_grad=False)
    nn.init.zeros_(model[1].weight)
    drawn = iter(noise)
    scale = alpha / rank

    def losses(batch: dict[str, Tensor]) -> Tensor:
        return (scale * model(batch["x"]) - batch["y"]).square().sum(1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dpsgd, "add_private_noise", lambda total, std: total.double() + std * next(drawn))
        plan = gaussian_plan(clip, 1.0, 1.0, 6.0, 1e-5, 50.0)
        optimizer = torch.optim.SGD([model[1].weight], lr=rate)
        with PrivateSteps(model, optimizer, plan) as steps:
            for _ in noise:
                steps.step([{"x": x, "y": y}], losses)
    return scale * model[1].weight.detach() @ A


def test_miss_trains_as_normalised_shards_do_under_the_scale_rule(kept: torch.dtype) -> None:
    near = {torch.float32: 1e-7, torch.float64: 1e-12}[kept]
    W, rank = draw(7, 12), 4
    plain, unit = (
        STARTS["shards"](normalised=n).factors(place(W, rank), ("A",))["A"].double()  # type: ignore[call-arg]
        for n in (False, True)
    )
    noise = [draw(7, rank, seed=50 + k) for k in range(3)]
    c = (12 / rank) ** 0.5
    published = train_privately(plain, rank, 0.05, 0.6, noise)
    ours = train_privately(unit, c * rank, 0.05, 0.6, noise)
    assert (published - ours).abs().max() < near
    slower = train_privately(unit, rank, 0.05 * c**2, 0.6 / c, noise)
    assert (published - slower).abs().max() < near, "the scale rule does not hold"
    assert (published - train_privately(unit, rank, 0.05, 0.6, noise)).abs().max() > 1e-3, "the check has no teeth"


# --- EVA --------------------------------------------------------------------------------------------------------------

TEXTS = ["the film was bright", " ".join(FILLER[:7]), " ".join(GOOD), "dull", "a cold story and an awful actor"]


def moments(model: FederatedModel, texts: list[str]) -> AdapterState:
    return input_moments(model, model.prepare([wording_of(model.task).phrase(text) for text in texts]))


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
        for name, layer in model.adapter.layers(model.peft_model).items()
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
    examples = [[wording_of(model.task).phrase(text) for text in part] for part in parts]
    tokens = [sum(len(record["input_ids"]) for record in model.prepare(part)) for part in examples]
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


@pytest.mark.parametrize("strategy", ["ffa-lora", "fed-svd", "fed-sb", "fedavg-lora"])
@pytest.mark.parametrize("mode", ["dp-sgd", "none"])
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


# --- calibration ------------------------------------------------------------------------------------------------------


def gradients(model: FederatedModel, state: AdapterState, records: list[Any]) -> list[float]:
    """Return the length of each record's gradient of all B, taken off the model as it trains."""
    model.write(state)
    model.module.eval()
    factors = [p for layer, own in model.trained().items() if layer != HEAD for p in own.values()]
    found = [torch.autograd.grad(model.losses(model.batch([record])).sum(), factors) for record in records]
    return [float(torch.stack([g.norm() for g in one]).norm()) for one in found]


def random_rows(state: AdapterState, generator: torch.Generator) -> AdapterState:
    return {
        layer: {"A": orthonormal_rows(RANK, factors["A"].shape[1], generator)}
        for layer, factors in state.items()
        if layer != HEAD
    }


@pytest.fixture(scope="module")
def with_random_rows(model_folder: Folder) -> tuple[AdapterState, float]:
    """Return what is beside the rows of A, and of a hundred models with random ones the length that is wanted.

    That is each record's root mean square, as it trains, and the median over records.
    """
    model = tiny(model_folder("bert"), "bert", STARTS["orthonormal"]())
    records = model.prepare([TextExample(text=text, label=i % 2) for i, text in enumerate(TEXTS)])
    squares = torch.zeros(len(records), dtype=torch.float64)
    generator = torch.Generator().manual_seed(4)
    for _ in range(100):
        drawn = random_rows(model.start, generator)
        squares += torch.tensor(gradients(model, merge(model.start, drawn), records)).square() / 100
    beside = {layer: {n: t.clone() for n, t in f.items() if n != "A"} for layer, f in model.start.items()}
    return beside, float(squares.sqrt().median())


@pytest.mark.parametrize("name", ["eva", "shards", "svd-of-weights", "kaiming", "minor-of-weights", "nystrom"])
def test_after_calibration_gradients_are_as_long_as_with_random_rows(
    model_folder: Folder, with_random_rows: tuple[AdapterState, float], name: str
) -> None:
    model = tiny(model_folder("bert"), "bert", STARTS[name]())
    records = model.prepare([TextExample(text=text, label=i % 2) for i, text in enumerate(TEXTS)])
    state = model.start
    if name == "eva":
        found = moments(model, TEXTS)
        given = {layer: model.adapter.begin(EVA().from_statistic(held, RANK)) for layer, held in found.items()}
        state = merge(state, given)
    beside, wanted = with_random_rows
    for layer, factors in beside.items():
        assert all(torch.equal(state[layer][n], tensor) for n, tensor in factors.items()), "more than A is another"
    after = torch.tensor(gradients(model, calibrated(model, state, records), records)).median()
    assert float(after) == pytest.approx(wanted, rel=0.03)  # a hundred draws know it to 1 %


@pytest.mark.parametrize("name", ["lora-frozen-b", "lora-diagonal", "lora-increments", "salt"])
def test_so_are_those_of_an_adapter_that_trains_something_else_than_b(model_folder: Folder, name: str) -> None:
    """Factors of a free scale alone are scaled; the median is that of a hundred models of random directions."""
    model = tiny(model_folder("bert"), "bert", STARTS["svd-of-weights"](), name)
    records = model.prepare([TextExample(text=text, label=i % 2) for i, text in enumerate(TEXTS)])
    squares, generator = torch.zeros(len(records), dtype=torch.float64), torch.Generator().manual_seed(4)
    for _ in range(100):
        drawn: AdapterState = {}
        for layer, factors in model.start.items():
            if layer != HEAD:
                letters = [n for n in ("A", "B", "C") if n in model.adapter.frozen]
                rows = {n: orthonormal_rows(RANK, max(factors[n].shape), generator) for n in letters}
                sides = {n: made.T if n == "B" else made for n, made in rows.items()}
                drawn[layer] = model.adapter.fitted({**factors, **sides})
        squares += torch.tensor(gradients(model, merge(model.start, drawn), records)).square() / 100
    free = model.adapter.free_scale
    long = {
        layer: {n: 7 * t if n in free else t for n, t in f.items()} if layer != HEAD else f
        for layer, f in model.start.items()
    }
    for state in (model.start, long):
        made = calibrated(model, state, records)
        after = float(torch.tensor(gradients(model, made, records)).median())
        assert after == pytest.approx(float(squares.sqrt().median()), rel=0.08)
        for layer, factors in made.items():
            for factor, tensor in factors.items():
                if layer == HEAD or factor not in free:
                    assert torch.equal(tensor, model.start[layer][factor])


def test_calibration_is_the_ratio_of_medians_and_moves_a_alone(model_folder: Folder) -> None:
    model = tiny(model_folder("bert"), "bert", STARTS["shards"](normalised=False))  # type: ignore[call-arg]
    records = model.prepare([TextExample(text=text, label=i % 2) for i, text in enumerate(TEXTS)])
    thrice = {
        layer: {n: 3 * t if n == "A" else t for n, t in f.items()} if layer != HEAD else f
        for layer, f in model.start.items()
    }
    made, again = (calibrated(model, state, records) for state in (model.start, thrice))
    for layer, factors in made.items():
        for name, tensor in factors.items():
            assert torch.allclose(tensor, again[layer][name], rtol=1e-5), f"{layer}.{name} depends on A's length before"
            if name != "A":
                assert torch.equal(tensor, model.start[layer][name])
    assert max(gradients(model, thrice, records)) > 2 * max(gradients(model, made, records))


def test_a_calibrated_run_sends_its_a_once_and_a_head_of_zeros_is_refused(toy_settings: dict[str, Any]) -> None:
    own = {"strategy": "ffa-lora", "adapter.start": "svd-of-weights", "adapter.alpha": 0.0, "rounds": 2}
    lines = read_lines(RoundLine, run_in_process({**toy_settings, **own}, 2))
    assert [line.round_number for line in lines] == [0, 1, 2]
    assert lines[1].bytes_down > lines[2].bytes_down
    server = ServerModel(configure({**toy_settings, **own, "head.start": "zeros"}))
    with pytest.raises(ModelError, match=r"adapter\.alpha cannot be calibrated"):
        server.calibrated(server.start)


@pytest.mark.parametrize("start", ["svd-of-weights", "lora-ga"])
def test_calibration_of_both_factors_scales_the_change_and_leaves_the_start_and_the_model(
    model_folder: Folder, toy_settings: dict[str, Any], start: str, tmp_path: Path
) -> None:
    """PiSSA and LoRA-GA: one scale in every layer, so that the model begins as its base and is exported as it is."""
    own = {"strategy": "fedavg-lora", "adapter.name": "lora-increments", "adapter.start": start, "adapter.alpha": 0.0}
    if start == "lora-ga":
        own["start.data"] = str(write_reviews(tmp_path / "public.csv", 40, seed=1))
    else:
        own["start.singular-values"] = True
    server = ServerModel(configure({**toy_settings, **own}))
    state = server.start
    if start == "lora-ga":
        state = server.job.begin(state, server.public_statistic()).adapter
    made = server.calibrated(state)
    scales = {float(factors["s"]) for layer, factors in made.items() if layer != HEAD}
    assert len(scales) == 1
    assert scales != {1.0}
    for layer, factors in made.items():
        for name, tensor in factors.items():
            assert name == "s" or torch.equal(tensor, state[layer][name]), (
                f"{layer}.{name} is not as the start gives it"
            )
    before, after = server.score(state), server.score(made)
    assert after == before, "the model begins as another one"
    # What came out of training, and what stock PEFT makes of its export, are one model.
    folder = run_in_process({**toy_settings, **own, "rounds": 2}, 2)
    lines = read_lines(RoundLine, folder)
    assert [line.round_number for line in lines] == [0, 1, 2]
    assert lines[1].bytes_down > lines[2].bytes_down, "the scale does not travel once"
    scored = evaluate_run(folder)
    assert scored.loss == pytest.approx(lines[-1].loss, rel=1e-5)


def test_a_scale_is_calibrated_of_both_factors_gradients_by_the_formula(model_folder: Folder) -> None:
    """The median over records of √Σ (r/m + r/n)‖G‖², over that of √Σ ‖Bᵀ G‖² + ‖G Aᵀ‖², from gradients of weights."""
    model = tiny(model_folder("bert"), "bert", STARTS["svd-of-weights"](), "lora-increments")
    records = model.prepare([TextExample(text=text, label=i % 2) for i, text in enumerate(TEXTS)])
    squares = torch.zeros(3, len(records), dtype=torch.float64)
    for i, record in enumerate(records):
        for layer, held in mean_gradient(model, [model.batch([record])]).items():
            G, f = held["G"].double(), {n: t.double() for n, t in model.start[layer].items()}
            of_b, of_a = (G @ f["A"].T).square().sum(), (f["B"].T @ G).square().sum()
            squares[0, i] += (RANK / G.shape[0] + RANK / G.shape[1]) * G.square().sum()
            squares[1, i] += of_a + of_b
            squares[2, i] += of_b
    want, have, one = squares.sqrt().median(1).values.tolist()
    made = calibrated(model, model.start, records)
    for layer, factors in made.items():
        if layer != HEAD:
            assert float(factors["s"]) == pytest.approx(want / have, rel=1e-4)
            assert float(factors["s"]) != pytest.approx(want / one, rel=0.02), "one half would do: nothing is proved"


def test_a_square_layer_that_is_stored_transposed_is_calibrated_as_it_computes(
    model_folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(TARGETS, "gpt2", "attn.c_proj")
    model = tiny(model_folder("gpt2"), "gpt2", STARTS["svd-of-weights"]())
    assert all(stored_transposed(layer) for layer in model.adapter.layers(model.peft_model).values())
    records = model.prepare([wording_of(model.task).text(text) for text in TEXTS])
    squares = torch.zeros(2, len(records), dtype=torch.float64)
    for i, record in enumerate(records):
        for layer, held in mean_gradient(model, [model.batch([record])]).items():
            G, A = held["G"].double(), model.start[layer]["A"].double()
            assert G.shape[0] == G.shape[1], "another shape would be an error, and no wrong length"
            squares[0, i] += RANK / G.shape[1] * G.square().sum()
            squares[1, i] += (G.T @ A.T).square().sum()
    wanted, turned = squares.sqrt().median(1).values.tolist()
    found = gradients(model, calibrated(model, model.start, records), records)
    assert float(torch.tensor(found).median()) == pytest.approx(wanted, rel=1e-3)
    plain = float(torch.tensor(gradients(model, model.start, records)).median())
    assert plain / turned != pytest.approx(1.0, rel=0.02), "either orientation is as long: nothing is proved"


def test_an_adapter_has_a_scale_that_a_start_may_choose_or_says_why_not() -> None:
    for adapter in ADAPTERS.values():
        assert bool(adapter.free_scale) or bool(adapter.no_free_scale), adapter.name
        assert {*adapter.free_scale} <= {*adapter.frozen}, adapter.name


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"strategy": "fed-sb"}, "'lora-sb' has orthonormal factors"),
        ({"strategy": "fedavg-lora"}, "'lora' trains A, so that a length given to it does not last: give it a number"),
        ({"strategy": "fedex-lora"}, "'lora-merged' trains A"),
        ({"strategy": "fedavg-lora", "adapter.name": "dora"}, "'dora' trains A, .* magnitudes, which have no scale"),
        ({"strategy": "fedavg-lora", "adapter.name": "dora-magnitude"}, "'dora-magnitude' trains magnitudes alone"),
        ({"strategy": "fedavg-lora", "adapter.name": "dora-frozen-norm"}, "trains magnitudes beside B"),
        ({"strategy": "fedavg-lora", "adapter.name": "randlora"}, "'randlora' has random bases of length 1"),
        ({"strategy": "fedavg-lora", "adapter.name": "none"}, "'none' has no factor: give it a number"),
        ({"strategy": "fed-svd"}, "gives A another length"),
        (
            {"strategy": "ffa-lora", "adapter.start": "public-gradient", "start.data": "a.csv"},
            "'public-gradient' moves the weights by start.step",
        ),
        (
            {"strategy": "fedavg-lora", "adapter.name": "lora-frozen-b", "adapter.start": "public-metric"},
            "'public-metric' has a length of its own",
        ),
        (
            {"strategy": "ffa-lora", "model.task": "image-classification", "head.start": "random"},
            "public phrases, but model.task 'image-classification' holds no words",
        ),
    ],
)
def test_alpha_is_calibrated_only_where_the_scale_is_free(values: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=f"adapter.alpha is 0, .*{named}"):
        configure({"adapter.alpha": 0.0, **values})
