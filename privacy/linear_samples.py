"""Trained layers that compute the gradient of each record in their own backward pass.

These are linear layers, and those that state their gradients (``common.own_gradients``), as an adapter's maps do.

Opacus' hooks make the same numbers, after autograd has also made the gradient of the whole batch, which nothing reads,
and with three calls of Python a layer and pass. Of a small pass that was a fifth of the time
(``experiments/log/2026-11-30-time-beside-the-products.md``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from opacus.grad_sample import GradSampleHooks
from torch import Tensor, nn
from torch.nn import functional

from fedveil.common.own_gradients import OwnGradients


class SampleHooks(GradSampleHooks):
    """Opacus' hooks, but on linear layers and those that state their gradients, which compute what hooks would."""

    def __init__(self, module: nn.Module) -> None:
        self._own: list[nn.Module] = []
        self.hooked: list[nn.Module] = []
        """The layers that have hooks, on which a pass hangs its activations."""
        others = (child for child in module.modules() if not _computes(child))
        # What a layer of another type uses as well has one sum of both, which Opacus makes.
        self._shared = {id(p) for child in others for p in child.parameters(recurse=False)}
        super().__init__(module, loss_reduction="sum")
        for layer in self._own:
            own = partial(_forward, layer) if isinstance(layer, nn.Linear) else partial(_stating, self, layer)
            layer.forward = own

    def iterate_submodules(self, module: nn.Module) -> Iterable[nn.Module]:
        """Yield what has hooks, and note the layers that need none."""
        for child in super().iterate_submodules(module):
            if self._is_own(child):
                self._own.append(child)
            else:
                self.hooked.append(child)
                yield child

    def remove_hooks(self) -> None:
        """Take away the hooks, and make the layers those that they were."""
        super().remove_hooks()
        for layer in self._own:
            vars(layer).pop("forward", None)

    def _is_own(self, layer: nn.Module) -> bool:
        replaced = "forward" in vars(layer)  # by some other library
        return _computes(layer) and not replaced and not any(id(p) in self._shared for p in layer.parameters())


def _computes(layer: nn.Module) -> bool:
    return type(layer) is nn.Linear or isinstance(layer, OwnGradients)


def _stating(hooks: SampleHooks, layer: nn.Module, *inputs: Tensor) -> Tensor:
    """Return what the layer returns, so that its backward pass leaves the gradients of records that it states."""
    trained = [parameter for parameter in layer.parameters() if parameter.requires_grad]
    for parameter in trained:  # autograd would make the whole batch's gradient
        parameter.requires_grad_(False)
    try:
        output = type(layer).forward(layer, *inputs)
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
    # A parameter among the arguments has the backward pass come here where nothing below is trained.
    sampler = partial(hooks.GRAD_SAMPLERS[type(layer)], layer)
    found: Tensor = _Stated.apply(output, trained[0], sampler, *(part.detach() for part in inputs))
    return found


class _Stated(torch.autograd.Function):
    """What a layer returns; the gradient of each record, as the layer states it, is hung on what is trained."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, trained: Tensor, sampler: Callable[..., Any], *inputs: Tensor) -> Tensor:
        """Return ``output``; ``inputs`` are what the layer was called with."""
        del trained
        ctx.sampler = sampler
        ctx.save_for_backward(*inputs)
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradient with respect to the output as it is."""
        inputs = ctx.saved_tensors  # once: what computes layers again has them once
        for parameter, sample in ctx.sampler(inputs, outputs[0]).items():
            if parameter.requires_grad:
                _add(parameter, sample)
        return outputs[0], None, None, *(None for _ in inputs)


def _forward(layer: nn.Linear, inputs: Tensor) -> Tensor:
    """Return what the layer returns, so that its backward pass leaves a gradient of each record."""
    found: Tensor = _Linear.apply(inputs, layer.weight, layer.bias)
    return found


class _Linear(torch.autograd.Function):
    """A linear layer; the gradient of each record is hung on what is trained, and autograd is given none of it."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: nn.Parameter, bias: nn.Parameter | None) -> Tensor:
        """Return the product, in autocast's precision inside it; of a layer's ``weight`` and ``bias``."""
        device = inputs.device.type
        if torch.is_autocast_enabled(device) and torch.float64 not in (inputs.dtype, weight.dtype):
            dtype = torch.get_autocast_dtype(device)
        else:
            dtype = inputs.dtype
        x, w = inputs.to(dtype), weight.detach().to(dtype)
        ctx.save_for_backward(x, w)
        ctx.weight, ctx.bias, ctx.dtype = weight, bias, inputs.dtype
        return functional.linear(x, w, None if bias is None else bias.detach().to(dtype))

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, None, None]:
        """Return the gradient with respect to the input; of shape (records, ..., in)."""
        (upstream,) = outputs
        x, w = ctx.saved_tensors
        for parameter, sample in _samples(ctx.weight, ctx.bias, x, upstream):
            _add(parameter, sample)
        if not ctx.needs_input_grad[0]:
            return None, None, None
        rows = upstream.reshape(-1, upstream.shape[-1])
        return rows.mm(w).view(x.shape).to(ctx.dtype), None, None


def _samples(weight: Any, bias: Any, x: Tensor, upstream: Tensor) -> Iterator[tuple[Any, Tensor]]:
    """Yield what is trained with its gradient of each record, shape (records, *parameter's)."""
    if weight.requires_grad:
        if x.dim() == 2:
            yield weight, upstream[:, :, None] * x[:, None, :]
        else:
            yield weight, upstream.flatten(1, -2).mT.bmm(x.flatten(1, -2))
    if bias is not None and bias.requires_grad:
        yield bias, upstream if x.dim() == 2 else upstream.flatten(1, -2).sum(1)


def _add(parameter: Any, sample: Tensor) -> None:
    """Hang gradients of records on a parameter; a layer that a pass calls again adds to them.

    A call with fewer rows is on what records share. As Opacus does, it adds to the first rows; the rehearsal finds that
    no record's gradient is its own then, and names the layer.
    """
    before = getattr(parameter, "grad_sample", None)
    if before is None or len(before) == len(sample):
        parameter.grad_sample = sample if before is None else before + sample
        return
    shorter, longer = sorted((before, sample), key=len)
    parameter.grad_sample = longer.clone()
    parameter.grad_sample[: len(shorter)] += shorter
