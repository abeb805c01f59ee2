"""The interface of an adapter made of PEFT's own linear maps, exported as a plain LoRA pair."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedveil.common.adapters.base import Adapter
from fedveil.common.adapters.layers import ADAPTER_NAME
from fedveil.common.later import nn
from fedveil.common.messages.state import Factors

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer
    from torch import Tensor


@dataclass(frozen=True)
class LowRank(Adapter):
    """A parameterisation whose branch is ``s B(A(x))`` of PEFT's layer, with any modules in place of A and B."""

    @abstractmethod
    def factor_modules(self, layer: LoraLayer) -> dict[str, nn.Module]:
        """Return the module that holds each factor as its parameter ``weight``."""

    @abstractmethod
    def as_lora(self, factors: Mapping[str, Tensor]) -> Factors:
        """Return ``{"A", "B"}`` with ``scaling * B @ A == delta(factors)``, for export to stock PEFT."""

    def places(self, layer: LoraLayer) -> dict[str, tuple[nn.Module, str]]:
        """Return each factor's module and ``weight``."""
        return {name: (module, "weight") for name, module in self.factor_modules(layer).items()}

    def exported(self, factors: Mapping[str, Tensor], base_weight: Tensor) -> dict[str, Tensor]:
        """Return the LoRA pair."""
        del base_weight
        lora = self.as_lora(factors)
        return {"lora_A.weight": lora["A"], "lora_B.weight": lora["B"]}


def lora_modules(layer: LoraLayer) -> dict[str, nn.Module]:
    """Return PEFT's two linear maps of a LoRA layer under the paper's letters."""
    return {"A": layer.lora_A[ADAPTER_NAME], "B": layer.lora_B[ADAPTER_NAME]}
