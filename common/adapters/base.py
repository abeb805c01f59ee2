"""The interface of a parameterisation, on top of PEFT's injection.

PEFT finds the layers in the base model and names them (also GPT-2's transposed Conv1D), so an adapter
states only its factors: their shapes, where a layer holds each, what a start gives them, and which are
trained. Bytes on the wire, tables, the planner and the exactness of averaging follow from that.
What a layer computes is PEFT's (``common.adapters.low_rank``) or the adapter's own map
(``common.adapters.mapped``). The initialisation of the factors is another axis (``common.starts``): an adapter gets
directions from its start, layer by layer.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from fedveil.common.adapters.export import write_stock
from fedveil.common.adapters.layers import base_weight, layers_of
from fedveil.common.later import nn
from fedveil.common.messages.state import AdapterState, Factors

if TYPE_CHECKING:
    from torch import Tensor

if TYPE_CHECKING:  # PEFT takes seconds to import, and to check settings nobody needs it.
    from peft import LoraConfig, PeftConfig, PeftModel
    from peft.tuners.lora import LoraLayer


@dataclass(frozen=True)
class Place:
    """One layer, as far as a start may look at it; server and sites see the same."""

    layer: str
    """Its name in the stock base model."""
    out: int
    into: int
    rank: int
    seed: int
    """The run's public seed."""
    weight: Callable[[], Tensor]
    """Returns a copy of the base weight W0, shape (out, in), float64, on the CPU."""


class Origin(Protocol):
    """What an adapter needs of a start (``common.starts.Start``)."""

    def factors(self, place: Place, wanted: Collection[str]) -> Factors:
        """Return ``A``, shape (rank, into), and ``B``, shape (out, rank), as far as ``wanted``; float32, CPU."""


@dataclass(frozen=True)
class FreeScale:
    """Frozen factors whose common length the server may choose (``common.starts.calibration``).

    The change, and its gradients where the trained factors are 0, grow by the same factor as their length.
    """

    factors: tuple[str, ...]
    gradients: Callable[[Factors, Tensor], Factors]
    """Returns the gradient of every trained factor, at 0 and without ``scaling``, from one layer's factors and the
    gradient of its weight, shape (out, in), all float64."""
    share: Callable[[int, int, int], float]
    """Returns the mean of ‖``gradients``‖² / ‖G‖² under random orthonormal directions, from rank, out and in."""


@dataclass(frozen=True)
class Traits:
    """What a row declares of the map from its factors to a layer's weights."""

    linear: bool
    """Whether the weights are linear in the trained factors while the frozen ones stay: then the weights of averaged
    factors are the average of the weights."""
    noise: str
    """How noise x on what is trained enters a layer's weights (m outputs, n inputs), and the norm of that per step."""
    scales: tuple[str, ...] = ("rank", "sqrt-rank")
    """The values that ``scale`` may have."""
    free_scale: FreeScale | str = "has no frozen factor that is free in length"
    """Or the reason why the length is fixed, as the end of a sentence about the adapter."""
    shared: tuple[str, ...] = ()
    """Factors that all layers of one shape have in common: the first of them has the parameter and the state."""
    ones: tuple[str, ...] = ()
    """Frozen factors that multiply or divide the change, in place of which a rehearsal puts 1. Numbers around 0 would
    make the outputs of a deep model overflow."""


@dataclass(frozen=True)
class Adapter(ABC):
    """A parameterisation of the change of chosen layers; frozen, holds no tensor."""

    rank: int
    alpha: float
    target_modules: tuple[str, ...]
    """Last parts of the adapted layers' names, or ``auto`` alone (``common.adapters.targets``)."""
    origin: Origin | None = None
    """The initialisation of the factors; None for computing with factors that are there, without a model."""
    scale: str = "rank"

    name: ClassVar[str]
    trained: ClassVar[tuple[str, ...]]
    """Factors that a site trains: exactly these have per-example gradients, which are clipped."""
    frozen: ClassVar[tuple[str, ...]]
    """Factors that stay as the adapter's start or the server set them."""
    directions: ClassVar[tuple[str, ...]] = ("A",)
    """What it needs of a start: ``A``, rows among a layer's inputs, ``B``, columns among its outputs."""
    traits: ClassVar[Traits]

    @property
    def scaling(self) -> float:
        """Factor ``s`` in front of the product, by ``scale``.

        ``rank``: alpha / rank (Hu et al. 2022, sec. 4.1). ``sqrt-rank``: alpha / √rank, rsLoRA (Kalajdzievski 2023,
        arXiv 2312.03732), under which the norm of a per-example gradient and of the noise in the weights does not
        depend on the rank.
        """
        return self.alpha / (math.sqrt(self.rank) if self.scale == "sqrt-rank" else self.rank)

    @abstractmethod
    def shapes(self, out: int, into: int) -> dict[str, tuple[int, ...]]:
        """Return the shape of every factor, trained or frozen, in a layer with ``into`` inputs and ``out`` outputs."""

    @abstractmethod
    def places(self, layer: LoraLayer) -> dict[str, tuple[nn.Module, str]]:
        """Return the module, and the name of its parameter, in which one layer holds each factor."""

    def prepare(self, model: PeftModel) -> None:  # noqa: B027  (a step that most adapters do not need)
        """Change the injected layers before their factors are set; plain LoRA needs nothing."""

    def constants(self, place: Place) -> Factors:
        """Return the factors that follow from the seed and the base weight alone; the others begin at 0.

        Raises:
            ConfigError, ModelError: the layer cannot have them.
        """
        del place
        return {}

    @abstractmethod
    def begin(self, given: Factors, factors: Factors) -> Factors:
        """Return the factors of one layer that follow from what a start gives; the others stay as they are.

        Args:
            given: ``directions``; also ``R``, shape (rank, rank), from a start that moves the weights by ``B R A``.
            factors: every factor of the layer without them.
        """

    @abstractmethod
    def delta(self, factors: Mapping[str, Tensor], base_weight: Tensor | None = None) -> Tensor:
        """Return the change of the layer's weight, shape (out, in), in the factors' dtype.

        Args:
            factors: every factor of a layer.
            base_weight: W0, shape (out, in), for an adapter whose change depends on it.
        """

    @abstractmethod
    def exported(self, factors: Mapping[str, Tensor], base_weight: Tensor) -> dict[str, Tensor]:
        """Return what stock PEFT loads for one layer, by the name it has there (``lora_A.weight``).

        Args:
            factors: every factor of the layer, float32.
            base_weight: W0, shape (out, in).
        """

    def peft_config(self, *, fan_in_fan_out: bool = False) -> PeftConfig:
        """Return the configuration by which stock PEFT reads the exported adapter."""
        return lora_config(self, fan_in_fan_out=fan_in_fan_out)

    def export(self, model: PeftModel, state: AdapterState, folder: Path, base_name: str) -> None:
        """Write ``state`` as a stock PEFT adapter that ``PeftModel.from_pretrained`` loads.

        Files: ``adapter_config.json`` and ``adapter_model.safetensors`` (float32).
        """
        layers = {
            name: self.exported(state[name], base_weight(layer).float().cpu())
            for name, layer in layers_of(model).items()
        }
        write_stock(self, model, layers, folder, base_name)


def lora_config(adapter: Adapter, *, fan_in_fan_out: bool = False, **changes: Any) -> LoraConfig:
    """Return PEFT's LoRA of an adapter's rank, alpha and layers, with other values where ``changes`` has some."""
    from peft import LoraConfig

    settings = {
        "r": adapter.rank,
        "lora_alpha": adapter.alpha,
        "target_modules": list(adapter.target_modules),
        "use_rslora": adapter.scale == "sqrt-rank",
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": fan_in_fan_out,
    }
    return LoraConfig(**{**settings, **changes})


def factors_of(adapter: Adapter, layer: LoraLayer) -> dict[str, nn.Parameter]:
    """Return every factor of one layer as the live parameter."""
    return {factor: getattr(module, name) for factor, (module, name) in adapter.places(layer).items()}


def parameters_of(adapter: Adapter, model: nn.Module) -> dict[str, dict[str, nn.Parameter]]:
    """Return every factor as the live parameter, by layer and factor name."""
    return {name: factors_of(adapter, layer) for name, layer in layers_of(model).items()}
