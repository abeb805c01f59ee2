"""LoRA-GA's A from the sites' records, paid for: one clipped, noised release of a sketch of every record's gradient.

Wang, Yu, Li: LoRA-GA: Low-Rank Adaptation with Gradient Approximation. A noised gradient of a whole layer is m n
numbers of noise, in which a singular direction is lost unless it is above τ (m n)^(1/4). A site releases Ωᵀ G in its
place, with Ω a public m × k matrix of orthonormal columns: k n numbers, whose leading right singular vectors the noise
leaves alone where they are above τ (k n)^(1/4). That is the gradient of A with B = Ω frozen, so it is one ordinary
step, and no record ever has an m × n gradient. Ω sees a random part of the outputs, k of m directions, so a mean
gradient of rank above k is seen in part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, cast

import torch.nn.functional as F
from torch import Tensor, nn

from fedveil.common.adapters.layers import layer_shape, layers_of
from fedveil.common.check import NOT_NEGATIVE
from fedveil.common.config.fields import Unit
from fedveil.common.messages.blocks import Layout
from fedveil.common.messages.state import AdapterState, Factors
from fedveil.common.model.federated import FederatedModel
from fedveil.common.starts.directions import leading_singular_triple, orthonormal_rows
from fedveil.common.starts.gradient import drawn, released
from fedveil.common.starts.paid import PaidGradient
from fedveil.common.tasks import Record
from fedveil.privacy.plan import PrivacyPlan
from fedveil.privacy.randomness import stream


@dataclass(frozen=True)
class DPLoRAGA(PaidGradient):
    """A spans the leading right singular vectors of a sketch of the sites' noised gradient; B is random."""

    name: ClassVar[str] = "dp-lora-ga"
    from_seed: ClassVar[tuple[str, ...]] = ("B",)

    oversampling: Annotated[int, NOT_NEGATIVE, Unit("rows")] = 0
    """Rows that the sketch of a layer has beyond the adapter's rank."""

    def layout(self, model: FederatedModel) -> Layout:
        """Return ``S``, shape (rank + oversampling, in), of every adapted layer; no more rows than it has outputs."""
        shapes = {name: layer_shape(layer) for name, layer in layers_of(model.peft_model).items()}
        return {name: {"S": (self._rows(model, out), into)} for name, (out, into) in shapes.items()}

    def opened(self, model: FederatedModel) -> AbstractContextManager[Any]:
        """Return the context in which the sketches take a gradient."""
        return self._sketches(model)

    def privatise(
        self,
        model: FederatedModel,
        records: Sequence[Record],
        plan: PrivacyPlan,
        before_pass: Callable[[], None] = lambda: None,
    ) -> AdapterState:
        """Return the sketches of the records' gradients by the mechanism of a training step."""
        parts = drawn(model, records, plan)
        with self._sketches(model) as sketches:
            found = released(model, sketches, parts, plan, before_pass)
        return {name: {"S": S.detach().float().cpu()} for name, S in found.items()}

    def from_statistic(self, statistic: Factors, rank: int) -> Factors:
        """Return A from a singular value decomposition in float64, signs fixed."""
        return {"A": leading_singular_triple(statistic["S"].double(), rank)[2].float()}

    def _rows(self, model: FederatedModel, out: int) -> int:
        return min(model.adapter.rank + self.oversampling, out)

    @contextmanager
    def _sketches(self, model: FederatedModel) -> Iterator[dict[str, nn.Parameter]]:
        """Add Ω P x to each adapted layer's output, with P = 0 and trained, and train nothing else; put all back."""
        layers = layers_of(model.peft_model)
        shapes = {name: layer_shape(layer) for name, layer in layers.items()}
        maps = {
            name: nn.Linear(into, self._rows(model, out), bias=False, device=model.device)
            for name, (out, into) in shapes.items()
        }
        before = [(p, p.requires_grad) for p in model.module.parameters()]

        def beside(name: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]:
            omega = sketching(name, shapes[name][0], self._rows(model, shapes[name][0])).to(model.device)

            def add(_: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
                return output + F.linear(maps[name](inputs[0]), omega).to(output.dtype)

            return add

        model.module.requires_grad_(False)
        for linear in maps.values():
            nn.init.zeros_(linear.weight)
        model.module.add_module("sketches", nn.ModuleList(maps.values()))
        hooks = [cast(nn.Module, layer).register_forward_hook(beside(name)) for name, layer in layers.items()]
        try:
            yield {name: cast(nn.Parameter, linear.weight) for name, linear in maps.items()}
        finally:
            for hook in hooks:
                hook.remove()
            del model.module.sketches
            for parameter, wanted in before:
                parameter.requires_grad_(wanted)
                parameter.grad = None


def sketching(layer: str, out: int, rows: int) -> Tensor:
    """Return Ω of a layer, shape (out, rows), orthonormal columns, float32: the same for everyone and every run."""
    return orthonormal_rows(rows, out, stream(0, "lora-ga", layer)).T.contiguous()
