"""One full gradient of the adapted layers' own weights, for starts that are made from it.

The base weights are opened for the gradient only inside ``open_weights``; nothing is updated. At a
site under privacy each record's gradient over all adapted layers together is clipped, the sum is
noised and divided by a public constant: one release, by the same mechanism as a training step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, cast

from fedveil.common.adapters.layers import layer_shape, layers_of, stored_transposed
from fedveil.common.errors import ModelError
from fedveil.common.later import nn, torch
from fedveil.common.messages.state import AdapterState
from fedveil.common.starts.directions import leading_singular_triple
from fedveil.common.tasks import Batch, Record
from fedveil.privacy.plan import PrivacyPlan
from fedveil.privacy.together import Together

if TYPE_CHECKING:
    from torch import Tensor

    from fedveil.common.messages.blocks import Layout
    from fedveil.common.model.federated import FederatedModel
    from fedveil.common.model.shapes import Shapes

BATCH_TOKENS = 1024
"""Tokens of one forward pass, which is one batch of the run: small parts cost it little time."""
BATCH_BYTES = 2**30
"""Of the records' gradients of one such pass. A record's is as large as the adapted layers (RoBERTa-large, query and
value: 201 MB), however short it is; a site that runs out of memory has paid, and pays again in the next attempt."""


def initial_shapes(model: FederatedModel) -> Shapes:
    """Return the shapes in which records' gradients of the adapted layers' weights are computed."""
    return model.initial_shapes or shapes_of(model, record_bytes(model))


def shapes_of(model: FederatedModel, size: int) -> Shapes:
    """Return the shapes in which statistics of round 0 are computed that take ``size`` bytes a record."""
    return model.collator.shapes(model.base, model.max_length, BATCH_TOKENS, max(1, BATCH_BYTES // size))


def mean_gradient(model: FederatedModel, parts: Iterable[Batch]) -> AdapterState:
    """Return the mean of per-record gradients, factor ``G`` of shape (out, in) per layer. No privacy.

    Raises:
        ModelError: there is no record, or the gradient vanishes because the head starts at zero.
    """
    with open_weights(model) as weights:
        model.module.train()
        seen = 0
        for part in parts:
            losses = model.losses(part)
            losses.sum().backward()
            seen += len(losses)
        if not seen:
            raise ModelError("the initial gradient needs at least one record: raise start.sample-rate")
        gradients = {name: cast("Tensor", weight.grad) / seen for name, weight in weights.items()}
        return _oriented(model, gradients)


def private_gradient(
    model: FederatedModel,
    parts: Iterable[Batch | Together],
    plan: PrivacyPlan,
    before_pass: Callable[[], None] = lambda: None,
) -> AdapterState:
    """Return the clipped, noised, publicly scaled sum of the units' gradients, factor ``G`` per layer.

    ``before_pass`` is called before each pass, and may raise.
    """
    with open_weights(model) as weights:
        return _oriented(model, released(model, weights, parts, plan, before_pass))


def drawn(model: FederatedModel, records: Sequence[Record], plan: PrivacyPlan) -> Iterable[Batch | Together]:
    """Return one sample of the records, in the shapes in which a start's gradients pass."""
    return plan.parts(model, [records[i] for i in next(plan.draws(records))], initial_shapes(model))


def released(
    model: FederatedModel,
    opened: Mapping[str, nn.Parameter],
    parts: Iterable[Batch | Together],
    plan: PrivacyPlan,
    before_pass: Callable[[], None],
) -> dict[str, Tensor]:
    """Return one release of the gradients of ``opened``, which alone take one, by their names."""
    optimizer = torch.optim.SGD(opened.values(), lr=0.0)
    with plan.steps(model, optimizer, before_pass) as steps:
        gradients = dict(zip(steps.trained, steps.release(parts, model.losses), strict=True))
    return {name: gradients[parameter] for name, parameter in opened.items()}


def gradient_layout(model: FederatedModel) -> Layout:
    """Return ``G``, shape (out, in), of every adapted layer."""
    return {name: {"G": layer_shape(layer)} for name, layer in layers_of(model.peft_model).items()}


def gradient_basis(G: Tensor, rank: int, step: float, *, sign: bool) -> dict[str, Tensor]:
    """Return B, A and R from a full gradient G of shape (out, in).

    With ``sign`` this is LoRA-SB's Algorithm 1 at s = 1: D = -step · sign(G), and B R A is D's best
    rank-r approximation (Eckart-Young), so the model starts one sign step down. Without it B and A
    span G's leading singular vectors and R starts at 0.
    """
    D = -step * torch.sign(G.double()) if sign else -G.double()
    U, S, Vt = leading_singular_triple(D, rank)
    R = torch.diag(S) if sign else torch.zeros(rank, rank, dtype=torch.float64)
    return {"B": U.to(G.dtype), "R": R.to(G.dtype), "A": Vt.to(G.dtype)}


def record_bytes(model: FederatedModel) -> int:
    """Return what one record's gradient takes while records' gradients are apart, as under privacy."""
    layers = layers_of(model.peft_model).values()
    return sum(math.prod(layer_shape(layer)) for layer in layers) * torch.float32.itemsize


def _own_weights(model: FederatedModel) -> dict[str, nn.Parameter]:
    weights = {}
    for name, layer in sorted(layers_of(model.peft_model).items()):
        weight = layer.get_base_layer().weight
        if not isinstance(weight, nn.Parameter):
            raise ModelError(
                f"the adapted layers' own weights must have a gradient here, and model.quantise holds that of {name!r} "
                "in low bits: set it to 'none', or adapter.start to 'orthonormal' and adapter.alpha to a number"
            )
        weights[name] = weight
    return weights


@contextmanager
def open_weights(model: FederatedModel) -> Iterator[dict[str, nn.Parameter]]:
    """Let exactly the adapted layers' own weights take a gradient; put everything back afterwards."""
    before = [(p, p.requires_grad) for p in model.module.parameters()]
    model.module.requires_grad_(False)
    weights = _own_weights(model)
    for weight in weights.values():
        weight.requires_grad_(True)
    try:
        yield weights
    finally:
        for parameter, wanted in before:
            parameter.requires_grad_(wanted)
            parameter.grad = None


def record_gradients(
    model: FederatedModel, records: Sequence[Record], only: Collection[str] = ()
) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """Yield each record's gradient of every adapted layer's own weight, in factors and a batch at a time.

    The gradient of record i is ``left[i].T @ right[i]``, shape (out, in). Records of like length pass together.

    Args:
        model: the run's, in any mode.
        records: public ones.
        only: the layers that are wanted; empty: all.

    Yields:
        By layer ``left``, shape (records, positions, out), and ``right``, shape (records, positions, in), on the
        model's device and in the precision of the pass. Padding has zeros on the left.

    Raises:
        ModelError: the model's forward pass does not use one of the layers.
    """
    from fedveil.common.model.batching import length_batches

    layers = layers_of(model.peft_model)
    bases: dict[str, nn.Module] = {n: layer.get_base_layer() for n, layer in layers.items() if not only or n in only}
    was_training = model.module.training
    model.module.eval()
    try:
        with open_weights(model), model.many_passes():
            for group in length_batches([model.collator.size(record) for record in records], BATCH_TOKENS):
                yield from _factored(model, bases, [records[i] for i in group])
    finally:
        model.module.train(was_training)


def _factored(
    model: FederatedModel, bases: Mapping[str, nn.Module], records: Sequence[Record]
) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """Yield what ``record_gradients`` does, in one batch, or one by one where a layer does not take rows of records."""
    passed: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in bases}

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        return lambda _, inputs, output: passed[name].append((inputs[0].detach(), output))

    hooks = [base.register_forward_hook(hook(name)) for name, base in bases.items()]
    try:
        losses = model.losses(model.batch(records))
    finally:
        for one in hooks:
            one.remove()
    if len(records) > 1 and any(len(inputs) != len(records) for calls in passed.values() for inputs, _ in calls):
        for record in records:
            yield from _factored(model, bases, [record])
        return
    outputs = [output for calls in passed.values() for _, output in calls if output.requires_grad]
    upstream = dict(zip(map(id, outputs), torch.autograd.grad(losses.sum(), outputs, allow_unused=True), strict=True))
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for name, calls in passed.items():
        left = [gradient for _, output in calls if (gradient := upstream.get(id(output))) is not None]
        if not calls or len(left) < len(calls):
            raise ModelError(f"the model does not use the layer {name!r}: name others in adapter.targets")
        found[name] = (_rows(left, len(records)), _rows([inputs for inputs, _ in calls], len(records)))
    yield found


def _rows(calls: Sequence[Tensor], records: int) -> Tensor:
    """Return what a layer took or gave in its calls of one pass, shape (records, positions, width)."""
    return torch.cat([tensor.reshape(records, -1, tensor.shape[-1]) for tensor in calls], dim=1)


def _oriented(model: FederatedModel, gradients: dict[str, Tensor]) -> AdapterState:
    layers = layers_of(model.peft_model)
    if not any(bool(gradient.abs().max() > 0) for gradient in gradients.values()):
        raise ModelError("the initial gradient is zero everywhere: set head.start to 'label-words' or 'random'")
    return {
        name: {"G": (gradient.T if stored_transposed(layers[name]) else gradient).detach().float().cpu().contiguous()}
        for name, gradient in gradients.items()
    }
