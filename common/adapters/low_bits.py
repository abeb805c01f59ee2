"""A linear layer whose frozen weight is held in 4 or 8 bits, by bitsandbytes, and is a matrix of numbers in use.

4 bits are NF4 in blocks of 64 numbers (Dettmers et al. 2023, arXiv 2305.14314), with a scale of 32 bits a block: 4.5
bits a number. 8 bits are whole numbers with one scale an output (the weights of Dettmers et al. 2022, arXiv
2208.07339). Inputs stay as they are: the product of LLM.int8() takes apart those columns in which any row of the batch
has an outlier, so that a record would move the bits of others.

A weight is quantised on the CPU, whatever device it is used on, so that server and sites hold the same bits.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from types import ModuleType
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedveil.common.errors import ModelError

BLOCK = 64
"""Numbers of a block of 4 bits."""


class LowBits(nn.Linear, ABC):
    """A linear layer without a gradient of its own; reading ``weight`` computes it from the bits.

    Args:
        linear: the layer in full, on any device; only its bias is kept.

    Raises:
        ModelError: bitsandbytes is not installed.
    """

    packed: Tensor
    scales: Tensor
    bits: ClassVar[str]
    """What ``model.quantise`` calls it."""

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)  # nn.Linear's own makes a weight
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = linear.bias
        packed, scales = self.pack(linear.weight.detach().float().cpu())
        self.register_buffer("packed", packed.to(linear.weight.device))
        self.register_buffer("scales", scales.to(linear.weight.device))

    @classmethod
    @abstractmethod
    def pack(cls, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return the bits and the scales of a weight, shape (out, in), float32, CPU."""

    @abstractmethod
    def numbers(self, dtype: torch.dtype) -> Tensor:
        """Return the weight that the bits stand for, shape (out, in)."""

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The weight that the bits stand for, shape (out, in), float32; writing to it changes nothing."""
        return self.numbers(torch.float32)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  (torch's own name)
        """Return the layer's output, shape (..., out), in the precision of the pass."""
        device = input.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else input.dtype
        product: Tensor = _Product.apply(input.to(dtype), self)
        return product if self.bias is None else product + self.bias.to(dtype)

    def in_full(self) -> nn.Linear:
        """Return the layer as a linear layer in float32."""
        linear = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device=self.packed.device)
        linear.weight = nn.Parameter(self.weight, requires_grad=False)
        linear.bias = self.bias
        return linear


class FourBits(LowBits):
    """NF4."""

    bits: ClassVar[str] = "4bit"

    @classmethod
    def pack(cls, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return two numbers a byte, shape (numbers / 2, 1), and the largest of each block, float32."""
        packed, state = bitsandbytes().quantize_4bit(weight, blocksize=BLOCK, quant_type="nf4")
        return packed, state.absmax

    def numbers(self, dtype: torch.dtype) -> Tensor:
        """Return the weight that the bits stand for, shape (out, in)."""
        library = bitsandbytes()
        state = library.QuantState(
            absmax=self.scales,
            shape=torch.Size((self.out_features, self.in_features)),
            code=library.get_4bit_type("nf4", device=self.packed.device),
            blocksize=BLOCK,
            quant_type="nf4",
            dtype=dtype,
        )
        weight: Tensor = library.dequantize_4bit(self.packed, state)
        return weight


class EightBits(LowBits):
    """Whole numbers from -127 to 127 and a scale for each output."""

    bits: ClassVar[str] = "8bit"

    @classmethod
    def pack(cls, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return whole numbers, shape (out, in), int8, and the largest of each row, shape (out,), float32."""
        packed, scales, _ = bitsandbytes().int8_vectorwise_quant(weight)
        return packed, scales

    def numbers(self, dtype: torch.dtype) -> Tensor:
        """Return the weight that the bits stand for, shape (out, in)."""
        return (self.packed.float() * (self.scales / 127.0)[:, None]).to(dtype)


LOW_BITS: dict[str, type[LowBits]] = {kind.bits: kind for kind in (EightBits, FourBits)}
"""By the value of ``model.quantise``."""


class _Product(torch.autograd.Function):
    """``x Wᵀ`` of a weight that the backward pass computes again in place of keeping it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: LowBits) -> Tensor:
        ctx.layer = layer
        return F.linear(x, layer.numbers(x.dtype))

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, None]:
        return (upstream @ ctx.layer.numbers(upstream.dtype) if ctx.needs_input_grad[0] else None), None


def bitsandbytes() -> ModuleType:
    """Return the functions of bitsandbytes.

    Raises:
        ModelError: it is not installed.
    """
    try:
        from bitsandbytes import functional
    except ImportError as error:
        raise ModelError(
            "model.quantise needs bitsandbytes, which is not installed: pip install 'fedveil[quantised]', "
            "or set model.quantise to 'none'"
        ) from error
    return functional


def quantise(module: nn.Module, bits: str, name: str) -> None:
    """Hold the frozen linear layers of a stock model in low bits, in place.

    An output layer, and a weight that something else uses as well, stay in full.

    Args:
        module: the model.
        bits: a key of ``LOW_BITS``.
        name: the model's, for errors.

    Raises:
        ModelError: bitsandbytes is not installed, or the model has no such layer.
    """
    bitsandbytes()
    stock: Any = module
    outputs = stock.get_output_embeddings() if hasattr(module, "get_output_embeddings") else None
    users: dict[int, int] = {}
    for child in module.modules():
        for parameter in child.parameters(recurse=False):
            users[id(parameter)] = users.get(id(parameter), 0) + 1
    chosen = {
        path: child
        for path, child in module.named_modules()
        if type(child) is nn.Linear and child is not outputs and users[id(child.weight)] == 1
    }
    if not chosen:
        raise ModelError(
            f"model.quantise is {bits!r}, but {name!r} has no linear layers to hold in low bits: "
            "set model.quantise to 'none'"
        )
    for path, child in chosen.items():
        _put(module, path, LOW_BITS[bits](child))


def in_full(module: nn.Module) -> None:
    """Make every layer of low bits one of float32, in place, as what its bits stand for."""
    for path, child in list(module.named_modules()):
        if isinstance(child, LowBits):
            _put(module, path, child.in_full())


def _put(module: nn.Module, path: str, child: nn.Module) -> None:
    parent, _, last = path.rpartition(".")
    setattr(module.get_submodule(parent), last, child)
