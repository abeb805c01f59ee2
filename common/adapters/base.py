"""The interface of a parameterisation, on top of PEFT's injection.

PEFT finds the layers in the base model and names them (also GPT-2's transposed Conv1D), so an adapter
states only its factors: their shapes, where a layer holds each, what a start gives them, and which are
trained. Bytes on the wire, tables, the planner and the exactness of averaging follow from that.
What a layer computes is PEFT's (``common.adapters.low_rank``) or the adapter's own map
(``common.adapters.mapped``). Where factors begin is another axis (``common.starts``): an adapter asks its start for
directions, layer by layer.
"""

from __future__ import annotations

import math
import re
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Protocol, Self, cast

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fedveil.common.adapters.targets import is_named, targets_in
from fedveil.common.config.fields import TARGET_KINDS
from fedveil.common.errors import ConfigError, ModelError, ProtocolError
from fedveil.common.messages.state import AdapterState, Factors

if TYPE_CHECKING:  # PEFT takes seconds to import, and to check settings nobody needs it.
    from peft import LoraConfig, PeftConfig, PeftModel
    from peft.tuners.lora import LoraLayer

    from fedveil.common.config.sections import RunConfig

PEFT_PREFIX = "base_model.model."
ADAPTER_NAME = "default"


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
    """Returns a copy of the base weight W0, shape (out, into), float64, on the CPU."""


class Origin(Protocol):
    """What an adapter asks of a start (``common.starts.Start``)."""

    def factors(self, place: Place, wanted: Collection[str]) -> Factors:
        """Return ``A``, shape (rank, into), and ``B``, shape (out, rank), as far as ``wanted``; float32, CPU."""


@dataclass(frozen=True)
class Adapter(ABC):
    """A parameterisation of the change of chosen layers; frozen, holds no tensor."""

    rank: int
    alpha: float
    target_modules: tuple[str, ...]
    """Last parts of the adapted layers' names, or ``auto`` alone (``common.adapters.targets``)."""
    origin: Origin | None = None
    """Where the factors begin; None for computing with factors that are there, without a model."""
    scale: str = "rank"

    name: ClassVar[str]
    trained: ClassVar[tuple[str, ...]]
    """Factors that a site trains: exactly these carry per-record gradients and are clipped."""
    frozen: ClassVar[tuple[str, ...]]
    """Factors that stay as the adapter's start or the server set them."""
    linear: ClassVar[bool]
    """Whether the weights are linear in what is trained, the frozen factors being what they are: then the weights of
    averaged factors are the average of the weights."""
    noise: ClassVar[str]
    """How noise x on what is trained enters a layer's weights (m outputs, n inputs), and the norm of that per step."""
    scales: ClassVar[tuple[str, ...]] = ("rank", "sqrt-rank")
    """What ``scale`` may be."""
    directions: ClassVar[tuple[str, ...]] = ("A",)
    """What it asks of a start: ``A``, rows among a layer's inputs, ``B``, columns among its outputs."""

    free_scale: ClassVar[tuple[str, ...]] = ()
    """The frozen factors that one number may lengthen together: the change and its gradients, where what is trained is
    at 0, are then as many times as long (``common.starts.calibration``). Empty: there are none."""
    no_free_scale: ClassVar[str] = "has no frozen factor that is free in length"
    """Why there are none, as the end of a sentence about the adapter."""
    scale_factor: ClassVar[str] = ""
    """The frozen factor that is a scale itself, one number in place of ``scaling``: a rehearsal puts 1 there, as in
    place of any scale. Empty: there is none."""
    divisors: ClassVar[tuple[str, ...]] = ()
    """The frozen factors that the change is divided by: a rehearsal puts 1 there. Numbers around 0 would have a model
    of many layers overflow."""

    @classmethod
    def check(cls, config: RunConfig) -> None:
        """Raise ConfigError, saying what to do, if a run of this configuration cannot have the adapter."""
        del config

    @property
    def scaling(self) -> float:
        """Factor ``s`` in front of the product, by ``scale``.

        ``rank``: alpha / rank (Hu et al. 2022, sec. 4.1). ``sqrt-rank``: alpha / √rank, rsLoRA (Kalajdzievski 2023,
        arXiv 2312.03732), under which a record's gradient and the noise in the weights keep their size over ranks.
        """
        return self.alpha / (math.sqrt(self.rank) if self.scale == "sqrt-rank" else self.rank)

    @abstractmethod
    def shapes(self, out: int, into: int) -> dict[str, tuple[int, ...]]:
        """Return the shape of every factor, trained or frozen, in a layer with ``into`` inputs and ``out`` outputs."""

    @abstractmethod
    def factors_of(self, layer: LoraLayer) -> dict[str, nn.Parameter]:
        """Return every factor of one layer as the live parameter."""

    @abstractmethod
    def hold(self, layer: LoraLayer, factor: str, tensor: nn.Parameter) -> None:
        """Make ``tensor`` the layer's factor of this name."""

    @abstractmethod
    def begin(self, given: Factors) -> Factors:
        """Return the factors that follow from what a start gives; those it leaves out begin at 0, or where they are.

        Args:
            given: ``directions``; also ``R``, shape (rank, rank), from a start that moves the weights by ``B R A``.
        """

    def start(self, layer_name: str, layer: LoraLayer, seed: int) -> Factors:
        """Return the factors of one layer as server and sites derive them, before anything is measured (float32, CPU).

        Raises:
            ModelError: the adapter was made without a start.
        """
        if self.origin is None:
            raise ModelError(
                f"the {self.name} adapter was made without a start: give it a row of fedveil.common.starts.STARTS"
            )
        out, into = layer_shape(layer)
        place = Place(layer_name, out, into, self.rank, seed, lambda: base_weight(layer).double().cpu().clone())
        zeros = {factor: torch.zeros(shape) for factor, shape in self.shapes(out, into).items()}
        return {**zeros, **self.begin(self.origin.factors(place, self.directions))}

    def fitted(self, factors: Factors) -> Factors:
        """Return every factor of one layer; what hangs on a factor that a statistic has moved is made to fit it."""
        return factors

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

    def attach(self, base: nn.Module, seed: int) -> PeftModel:
        """Put the adapter into ``base`` (in place), freeze everything else, and set the start.

        Raises:
            ModelError: no layer of ``base`` is called by one of ``target_modules``, or ``auto`` finds no attention.
            ConfigError: the rank is larger than the smaller side of an adapted layer.
        """
        from peft import get_peft_model

        named = self._naming(targets_in(base, self.target_modules))
        fan_in_fan_out = any(
            type(module).__name__ == "Conv1D" and is_named(name, named.target_modules)
            for name, module in base.named_modules()
        )
        config = named.peft_config(fan_in_fan_out=fan_in_fan_out)
        self.route(config)
        try:
            with pefts_old_names():
                model = get_peft_model(base, config)
        except ValueError as error:
            raise ModelError(
                f"adapter.targets {','.join(named.target_modules)!r} do not fit {type(base).__name__}: "
                f"{str(error).partition(chr(10))[0]}"
            ) from error
        for name, layer in self.layers(model).items():
            out_features, in_features = layer_shape(layer)
            if self.rank > min(out_features, in_features):
                raise ConfigError(
                    f"adapter.rank is {self.rank}, but {name} is {out_features} × {in_features}: "
                    f"choose a rank of at most {min(out_features, in_features)}"
                )
            self.prepare(layer)
            device = cast(Tensor, layer.get_base_layer().weight).device
            for factor, tensor in self.start(name, layer, seed).items():
                held = nn.Parameter(tensor.to(device, torch.float32), requires_grad=factor in self.trained)
                self.hold(layer, factor, held)
        return model

    def _naming(self, targets: Collection[str]) -> Self:
        return replace(self, target_modules=tuple(targets))

    def route(self, config: LoraConfig) -> None:  # noqa: B027  (a step that most adapters do not need)
        """Say in the configuration of the injection which layers are PEFT's and which are not; all are by default."""

    def prepare(self, layer: LoraLayer) -> None:  # noqa: B027  (a step that most adapters do not need)
        """Change the injected layer before its factors are set; plain LoRA needs nothing."""

    def layers(self, model: nn.Module) -> dict[str, LoraLayer]:
        """Return the adapted layers by their name in the stock base model."""
        from peft.tuners.lora import LoraLayer

        return {
            name.split(PEFT_PREFIX, 1)[-1]: module
            for name, module in model.named_modules()
            if isinstance(module, LoraLayer)
        }

    def parameters(self, model: nn.Module) -> dict[str, dict[str, nn.Parameter]]:
        """Return every factor as the live parameter, by layer and factor name."""
        return {name: self.factors_of(layer) for name, layer in self.layers(model).items()}

    def read(self, model: nn.Module) -> AdapterState:
        """Return a copy of all factors (float32, CPU)."""
        return {
            name: {factor: weight.detach().float().cpu().clone() for factor, weight in factors.items()}
            for name, factors in self.parameters(model).items()
        }

    def write(self, model: nn.Module, state: AdapterState) -> None:
        """Copy ``state`` (any part of the factors) into the model.

        Raises:
            ProtocolError: a layer or factor is unknown, or a shape differs; nothing is written then.
        """
        places = self.parameters(model)
        for layer, factors in state.items():
            for factor, tensor in factors.items():
                if factor not in places.get(layer, {}):
                    raise ProtocolError(f"the {self.name} adapter has no factor {factor!r} in layer {layer!r}")
                if places[layer][factor].shape != tensor.shape:
                    raise ProtocolError(
                        f"{layer}.{factor} has shape {tuple(tensor.shape)}, "
                        f"the model wants {tuple(places[layer][factor].shape)}"
                    )
        with torch.no_grad():
            for layer, factors in state.items():
                for factor, tensor in factors.items():
                    places[layer][factor].copy_(tensor)

    def seen(self, factors: Factors, gradient: Tensor) -> Factors:
        """Return the gradient of every trained factor, at 0 and without ``scaling``, of an adapter with a free scale.

        Args:
            factors: of one layer, float64.
            gradient: G of the layer's weight, shape (out, in), float64.
        """
        del factors, gradient
        raise TypeError(f"the {self.name} adapter has no scale that a start may choose")

    def share_seen(self, out: int, into: int) -> float:
        """Return the mean of ‖``seen``‖² / ‖G‖² under random orthonormal directions."""
        del out, into
        raise TypeError(f"the {self.name} adapter has no scale that a start may choose")

    def peft_config(self, *, fan_in_fan_out: bool = False) -> LoraConfig:
        """Return the PEFT configuration by which layers are found and the exported adapter is read."""
        from peft import LoraConfig

        return LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,  # type: ignore[arg-type]
            target_modules=list(self.target_modules),
            use_rslora=self.scale == "sqrt-rank",
            lora_dropout=0.0,
            bias="none",
            fan_in_fan_out=fan_in_fan_out,
        )

    def stock_config(self, *, fan_in_fan_out: bool = False) -> PeftConfig:
        """Return the configuration of the exported adapter, where it is another than that of the injection."""
        return self.peft_config(fan_in_fan_out=fan_in_fan_out)

    def shared(self, state: AdapterState, shapes: Sequence[tuple[int, int]]) -> dict[str, Tensor]:
        """Return what a stock reader needs once for all layers, by the name it has there; most need nothing.

        Args:
            state: every factor of every layer.
            shapes: (out, in) of the adapted layers.
        """
        del state, shapes
        return {}

    def reduced(self, state: AdapterState) -> AdapterState:
        """Return the state to export, in a basis in which what says nothing is a column of 0, where there is such."""
        return state

    def used(self, state: AdapterState) -> dict[str, Tensor]:
        """Return the columns of each layer to export, where some of the adapter's say nothing; empty: all of them."""
        del state
        return {}

    def of_columns(self, factors: Factors, columns: Tensor) -> Factors:
        """Return the factors of a layer with these columns alone, for an adapter that has columns to leave out."""
        del columns
        return factors

    def at_rank(self, rank: int) -> Self:
        """Return the adapter with so many directions and the same factor in front of the product."""
        of_rank = math.sqrt(rank) if self.scale == "sqrt-rank" else rank
        return replace(self, rank=rank, alpha=self.scaling * of_rank)

    def export(self, model: PeftModel, state: AdapterState, folder: Path, base_name: str) -> None:
        """Write ``state`` as a stock PEFT adapter that ``PeftModel.from_pretrained`` loads.

        Files: ``adapter_config.json`` and ``adapter_model.safetensors`` (float32).
        """
        folder.mkdir(parents=True, exist_ok=True)
        tensors: dict[str, Tensor] = {}
        state = self.reduced(state)
        used = self.used(state)
        kept = {name: layer for name, layer in self.layers(model).items() if name not in used or len(used[name])}
        for name, layer in kept.items():
            factors = self.of_columns(state[name], used[name]) if name in used else state[name]
            for suffix, tensor in self.exported(factors, base_weight(layer).float().cpu()).items():
                tensors[f"{PEFT_PREFIX}{name}.{suffix}"] = tensor.float().contiguous()
        shapes = [layer_shape(layer) for layer in self.layers(model).values()]
        for suffix, tensor in self.shared(state, shapes).items():
            # PEFT writes what layers share beside each of them as well, and warns where a copy is missing.
            for owner in ("base_model", *(f"{PEFT_PREFIX}{name}" for name in self.layers(model))):
                tensors[f"{owner}.{suffix}"] = tensor.float().clone()
        injected = model.peft_config[ADAPTER_NAME]
        # A stock reader is told the names that a word such as ``auto`` stood for.
        found = sorted(cast("LoraConfig", injected).target_modules or ())
        named = self._naming(found) if self.target_modules[0] in TARGET_KINDS else self
        if len(kept) < len(self.layers(model)):
            # PEFT refuses a layer of rank 0, so the others are named in full.
            named = self._naming(sorted(kept))
        config = named.stock_config(fan_in_fan_out=getattr(injected, "fan_in_fan_out", False))
        config.base_model_name_or_path = base_name
        config.inference_mode = True
        # PEFT takes the keys for regular expressions.
        cut = {re.escape(name): self.at_rank(len(used[name])) for name in kept if name in used}
        if cut:
            lora = cast("LoraConfig", config)  # what has columns to leave out is exported as LoRA
            lora.rank_pattern = {name: adapter.rank for name, adapter in cut.items()}
            lora.alpha_pattern = {name: adapter.alpha for name, adapter in cut.items()}
        config.task_type = injected.task_type
        config.save_pretrained(str(folder))
        save_file(tensors, str(folder / "adapter_model.safetensors"), metadata={"format": "pt"})


@contextmanager
def pefts_old_names() -> Iterator[None]:
    """Keep from people what PEFT is warned of for asking transformers by an old name: nobody here can change it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
        yield


def target_shapes(base: nn.Module, target_modules: Sequence[str]) -> list[tuple[int, int]]:
    """Return (out, in) of every layer of a stock base model that an adapter on ``target_modules`` would change.

    None if these fit no layer.
    """
    try:
        names = targets_in(base, target_modules)
    except ModelError:
        return []
    shapes = []
    for name, module in base.named_modules():
        if not is_named(name, names):
            continue
        if isinstance(module, nn.Linear):
            shapes.append((module.out_features, module.in_features))
        elif type(module).__name__ == "Conv1D":
            into, out = cast(Tensor, module.weight).shape
            shapes.append((out, into))
    return shapes


def stored_transposed(layer: LoraLayer) -> bool:
    """Return whether the layer keeps its weight as (in, out), as GPT-2's Conv1D does."""
    return bool(getattr(layer, "fan_in_fan_out", False))


def base_weight(layer: LoraLayer) -> Tensor:
    """Return W0 of an adapted layer as (out, in), whichever way it is stored: the live weight, detached."""
    weight = cast(Tensor, layer.get_base_layer().weight).detach()
    return weight.T if stored_transposed(layer) else weight


def layer_shape(layer: LoraLayer) -> tuple[int, int]:
    """Return (out, in) of an adapted layer, whichever way its weight is stored."""
    return cast(int, layer.out_features), cast(int, layer.in_features)
