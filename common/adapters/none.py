"""No adapter: the base model stays as it is, and sites train the head alone.

Then what the head sees of a record is the same in every round, and is computed once (``common.tasks.featured``): a step
costs a product of the size of the head. The logits are linear in what is trained, so averages are exact.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from fedveil.common.adapters.base import Adapter, Traits
from fedveil.common.later import nn
from fedveil.common.messages.state import Factors

if TYPE_CHECKING:
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer
    from torch import Tensor


@dataclass(frozen=True)
class NoAdapter(Adapter):
    """No factors in no layer."""

    name: ClassVar[str] = "none"
    trained: ClassVar[tuple[str, ...]] = ()
    frozen: ClassVar[tuple[str, ...]] = ()
    traits: ClassVar[Traits] = Traits(linear=True, noise="none: the head's alone", free_scale="has no factor")
    directions: ClassVar[tuple[str, ...]] = ()

    def shapes(self, out: int, into: int) -> dict[str, tuple[int, ...]]:
        """Return none."""
        del out, into
        return {}

    def places(self, layer: LoraLayer) -> dict[str, tuple[nn.Module, str]]:
        """Return none."""
        del layer
        return {}

    def begin(self, given: Factors, factors: Factors) -> Factors:
        """Return none."""
        del given, factors
        return {}

    def delta(self, factors: Mapping[str, Tensor], base_weight: Tensor | None = None) -> Tensor:
        """Return zero, of the base weight's shape."""
        del factors
        if base_weight is None:
            raise TypeError("the change of no adapter has the shape of the base weight: give it")
        return base_weight.new_zeros(base_weight.shape)

    def exported(self, factors: Mapping[str, Tensor], base_weight: Tensor) -> dict[str, Tensor]:
        """Return none."""
        del factors, base_weight
        return {}

    def export(self, model: PeftModel, state: dict[str, Factors], folder: Path, base_name: str) -> None:
        """Make the folder; there is nothing for PEFT, and the head is written beside."""
        del model, state, base_name
        folder.mkdir(parents=True, exist_ok=True)
