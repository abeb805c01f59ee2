"""Starts from weights, shards and public text: rows of the invariants, on layers that are not square."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from forked_python import Run
from peft import MissConfig, PeftModel, get_peft_model
from starts_world import RANK, Folder, _read, off_identity, tiny
from torch import Tensor, nn

from fedveil.common.adapters import ADAPTERS, LoRAFrozenA, Place
from fedveil.common.adapters.attach import attach, read_factors, write_factors
from fedveil.common.adapters.layers import base_weight, layers_of
from fedveil.common.messages.tensors import fingerprint
from fedveil.common.model.base import load_base_model
from fedveil.common.starts import STARTS
from fedveil.common.starts.directions import spanned_rows
from fedveil.contrib.starts.minor_of_weights import minor_rows
from fedveil.privacy import dpsgd
from fedveil.privacy.dpsgd import PrivateSteps
from fedveil.privacy.plan import gaussian_plan

pytestmark = [pytest.mark.rough_prices, pytest.mark.one_length, pytest.mark.peft]


SHAPES = [(7, 12), (13, 6), (8, 8)]


each_shape = pytest.mark.parametrize(("out", "into"), SHAPES)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def place(W: Tensor, rank: int = RANK) -> Place:
    return Place("layer", W.shape[0], W.shape[1], rank, 1, W.clone)


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
    assert "R" not in adapter.begin(made, {}), "the core begins elsewhere than at 0, where the model is the base"
    released = W[:, :RANK] @ W[:RANK, :RANK] @ W[:RANK]
    # It is a start that this adapter could hold, in the same directions.
    theirs = adapter.delta({**made, "R": made["B"].T @ released @ made["A"].T}, W)
    assert (theirs - released).abs().max() < 1e-6 * float(released.abs().max())
    assert float(theirs.norm()) > 0.001 * float(W.norm())


DERIVED = [name for name, start in STARTS.items() if start().asked == "nobody"]


@pytest.mark.parametrize(
    ("name", "adapter", "family"),
    [
        (name, adapter, ("bert", "gpt2", "llama")[(i + k) % 3])
        for i, name in enumerate(DERIVED)
        for k, adapter in enumerate(
            other
            for other in ADAPTERS
            if {*ADAPTERS[other].directions} <= {*STARTS[name].gives} and not ADAPTERS[other].traits.shared
        )
    ],
)
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
    weights = {layer: base_weight(module) for layer, module in layers_of(model.peft_model).items()}
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
from fedveil.common.adapters.attach import attach, read_factors
from fedveil.common.messages.tensors import fingerprint
from fedveil.common.model.base import BaseModel, load_base_model
from fedveil.common.starts import STARTS
for words in sys.argv[2:]:
    kind, name = words.split()
    adapter = ADAPTERS[kind](3, 6.0, ("query", "dense"), STARTS[name]())
    start = read_factors(adapter, attach(adapter, load_base_model(sys.argv[1], "classification").module, 1))
    print(words, fingerprint(start), sep="/")
"""


@pytest.fixture(scope="module")
def derived_elsewhere(model_folder: Folder, fresh_python: Run) -> dict[str, str]:
    """Return the fingerprint of every start as another process derives it, whose hashes and random numbers differ."""
    there = fresh_python(PRINT_FINGERPRINTS, model_folder("bert"), *DERIVED_BY.values(), OF_A)
    return dict(line.split("/") for line in there.stdout.splitlines() if "/" in line)


def derived_here(folder: str, kind: str, start: str) -> str:
    torch.manual_seed(2)
    adapter = ADAPTERS[kind](3, 6.0, ("query", "dense"), STARTS[start]())
    return fingerprint(read_factors(adapter, attach(adapter, load_base_model(folder, "classification").module, 1)))


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
    ours = attach(adapter, again(), 1)
    state = read_factors(adapter, ours)
    for name, factors in state.items():
        B = draw(*factors["B"].shape, seed=len(name)).float()
        state[name] = {"A": factors["A"], "B": B}
        block = miss.base_model.model.get_submodule(name).miss_block["default"]
        block.data.copy_(B.T)
    write_factors(adapter, ours, state)
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
    ours = attach(adapter, again(), 1)
    state = read_factors(adapter, ours)
    for name, factors in state.items():
        # Two sites' mean, of unequal shares, and one of them without full rank.
        cores = [draw(RANK, RANK, seed=len(name)), draw(RANK, 1, seed=1) @ draw(1, RANK, seed=2)]
        factors["R"] = (0.7 * cores[0] + 0.3 * cores[1]).float()
        mini.base_model.model.get_submodule(name).miss_block["default"].data.copy_(factors["R"].T)
    write_factors(adapter, ours, state)
    wanted = mini(x)
    assert torch.allclose(ours(x), wanted, rtol=1e-6, atol=1e-6)
    adapter.export(ours, state, tmp_path, "base")
    assert torch.allclose(PeftModel.from_pretrained(again(), tmp_path)(x), wanted, rtol=1e-6, atol=1e-6)
    turned = {name: {**factors, "R": factors["R"].T.contiguous()} for name, factors in state.items()}
    write_factors(adapter, ours, turned)
    assert (ours(x) - wanted).abs().max() > 1e-2, "a core the wrong way round would do: nothing is proved"
    unit = ADAPTERS["lora-sb"](RANK, 1.0, ("wide", "tall"), STARTS["shards"]())
    other = attach(unit, again(), 1)
    write_factors(unit, other, {name: {"R": factors["R"]} for name, factors in state.items()})
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
    # Another clip is another grid of the sums, with steps of 2⁻³⁶ clips where no noise is that matters.
    assert (published - slower).abs().max() < max(near, 1e-9), "the scale rule does not hold"
    assert (published - train_privately(unit, rank, 0.05, 0.6, noise)).abs().max() > 1e-3, "the check has no teeth"
