"""The strategy's own rule on a step's gradient, after clip and noise.

The rule gets copies of the released gradient, of the weights that released gradients have made, and
of what the server sent. All three are public to the server or follow from what is, so the rule is
post-processing. No parameter, model or record is handed to it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from common.errors import ProtocolError
from common.messages.state import AdapterState
from common.messages.wire import layout_of
from common.model.federated import FederatedModel
from strategies import Strategy


def correction(
    strategy: Strategy, model: FederatedModel, received: AdapterState
) -> Callable[[Sequence[Tensor]], list[Tensor]]:
    """Return the rule as a function of gradients in the order of the model's trained parameters.

    Args:
        strategy: whose ``correct`` is the rule.
        model: what is trained; its weights are read anew at every call.
        received: what the round started from, the complete adapter and the head.

    Raises (the function):
        ProtocolError: the rule returned other layers, factors or shapes than it was given.
    """
    trained = model.trained()
    places = {id(p): (layer, name) for layer, factors in trained.items() for name, p in factors.items()}
    order = [places[id(p)] for p in model.module.parameters() if p.requires_grad]
    held = {layer: {name: t.to(model.device) for name, t in factors.items()} for layer, factors in received.items()}

    def corrected(gradients: Sequence[Tensor]) -> list[Tensor]:
        released: AdapterState = {}
        for (layer, name), gradient in zip(order, gradients, strict=True):
            released.setdefault(layer, {})[name] = gradient.detach().clone()
        weights = {
            layer: {name: p.detach().clone() for name, p in factors.items()} for layer, factors in trained.items()
        }
        new = strategy.correct(released, weights, held)
        if layout_of(new) != layout_of(released):
            raise ProtocolError(f"strategy {strategy.name!r} corrects gradients to other layers, factors or shapes")
        return [new[layer][name] for layer, name in order]

    return corrected
