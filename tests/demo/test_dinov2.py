"""DINOV2-small's plain copy computes what the packaged file does, strictly from that file's backbone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator

from fedveil.common.model.base import load_base_model
from fedveil.demo import dinov2
from fedveil.demo.dinov2 import DINOV2_SMALL, PLAIN_DINOV2_SMALL, weights_of, write
from fedveil.demo.packaged import packaged_folder

SIDE = 224
OUTPUT = "/backbone/layernorm/Add_1_output_0"
"""What the packaged graph calls the backbone's last hidden states."""


@pytest.fixture(scope="module")
def package() -> Iterator[Path]:
    """Yield the packaged file's own copy; refused unless it is the known one."""
    (name,) = DINOV2_SMALL.files
    with packaged_folder(DINOV2_SMALL) as folder:
        yield folder / name


@pytest.fixture(scope="module")
def packaged_states(package: Path) -> Callable[[np.ndarray], np.ndarray]:
    """Return the backbone as the packaged graph computes it, by ONNX's own reference implementation."""
    model = onnx.load(str(package))
    needed, nodes = {OUTPUT}, []
    for node in reversed(model.graph.node):
        if needed & set(node.output):
            nodes.append(node)
            needed |= set(node.input)
    graph = onnx.helper.make_graph(
        nodes[::-1],
        "backbone",
        list(model.graph.input),
        [onnx.helper.make_tensor_value_info(OUTPUT, onnx.TensorProto.FLOAT, None)],
        [tensor for tensor in model.graph.initializer if tensor.name in needed],
    )
    evaluator = ReferenceEvaluator(onnx.helper.make_model(graph, opset_imports=model.opset_import))
    return lambda pixels: evaluator.run(None, {"input_image": pixels})[0]


def worst(module: torch.nn.Module, packaged: Callable[[np.ndarray], np.ndarray]) -> float:
    pixels = np.random.default_rng(0).standard_normal((1, 3, SIDE, SIDE)).astype(np.float32)
    with torch.no_grad():
        states = module(torch.from_numpy(pixels)).last_hidden_state.numpy()
    return float(np.abs(states - packaged(pixels)).max())


def test_the_plain_copy_computes_what_the_packaged_file_does(
    packaged_states: Callable[[np.ndarray], np.ndarray],
) -> None:
    base = load_base_model("dinov2-small", "image-classification")
    assert worst(base.module, packaged_states) < 1e-3
    assert not any("mask_token" in name or "decoder" in name for name in base.module.state_dict())


def test_the_copy_that_is_made_is_the_known_one(tmp_path: Path, package: Path) -> None:
    write(package.parent, tmp_path / "model")
    made = load_folder(tmp_path / "model")
    with PLAIN_DINOV2_SMALL.folder() as folder:
        assert PLAIN_DINOV2_SMALL.is_known(folder), "the libraries write the plain copy differently: hash it anew"
        known = load_folder(folder)
    assert made.keys() == known.keys()
    assert all(torch.equal(made[name], known[name]) for name in known)


def test_swapped_parts_are_found(
    tmp_path: Path,
    package: Path,
    packaged_states: Callable[[np.ndarray], np.ndarray],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The fault: query and value change places; all names and shapes are right."""
    from transformers import Dinov2Model

    ours = dict(dinov2.NAMES)
    ours[".attention.attention.query."], ours[".attention.attention.value."] = (
        ".attention.v_proj.",
        ".attention.q_proj.",
    )
    monkeypatch.setattr(dinov2, "NAMES", ours)
    write(package.parent, tmp_path / "model")
    assert worst(Dinov2Model.from_pretrained(tmp_path / "model").eval(), packaged_states) > 0.1


def test_every_weight_of_the_backbone_is_used_and_none_is_missing(package: Path) -> None:
    from transformers import Dinov2Model

    weights, graph = weights_of(package), onnx.load(str(package)).graph
    held = sum(1 for tensor in graph.initializer if not tensor.name.startswith("decoder."))
    assert len(weights) == held - 1, "two constants are the table of positions, every other one is a weight of its own"
    with PLAIN_DINOV2_SMALL.folder() as folder:
        loaded, told = Dinov2Model.from_pretrained(folder, output_loading_info=True)
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    assert loaded.state_dict().keys() == weights.keys()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in loaded.state_dict().items())


@pytest.mark.parametrize("change", ["lose", "add"])
def test_a_weight_more_or_less_is_refused(
    change: str, tmp_path: Path, package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = weights_of(package)
    if change == "lose":
        weights.pop("layernorm.bias")
    else:
        weights["decoder.weight"] = torch.zeros(1)
    monkeypatch.setattr(dinov2, "weights_of", lambda _: weights)
    with pytest.raises(RuntimeError, match=r"layernorm\.bias|decoder\.weight"):
        write(package.parent, tmp_path / "model")


def load_folder(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(str(folder / "model.safetensors"))
