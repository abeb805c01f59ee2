"""A library's adapters by public descriptions: SG-LoRA's semantic choice, at no price.

The server compares what the run's records are about, in public words, with what the library says of each adapter
(``contrib.library.describe``), and begins at the weighted mean of the nearest: B₀ = Σ α_k B_k, exact on one basis.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from fedveil.common.adapters import Adapter
from fedveil.common.check import POSITIVE
from fedveil.common.config.fields import RATIO, Unit
from fedveil.common.config.run import RunConfig
from fedveil.common.errors import ConfigError
from fedveil.common.messages.state import AdapterState
from fedveil.common.model.federated import FederatedModel
from fedveil.common.starts.base import Labels, Needs
from fedveil.common.words import decimal_text
from fedveil.contrib.starts.of_library import OfLibrary


@dataclass(frozen=True)
class Described(OfLibrary):
    """B of the library's adapters whose descriptions are nearest to the run's own, by their nearness."""

    name: ClassVar[str] = "described"
    needs: ClassVar[Needs] = "public records"

    about: str = ""
    """What the run's records are, in public words, to be compared with the library's."""
    top: Annotated[int, POSITIVE, Unit("adapters")] = 4
    """How many of the nearest adapters make the start."""
    temperature: Annotated[float, POSITIVE, RATIO] = 0.1
    """Weights are softmax(cosine / temperature): below 0.05 nearly the nearest one alone."""

    def check(self, config: RunConfig, adapter: type[Adapter]) -> None:
        """Refuse a run that does not say what its records are."""
        super().check(config, adapter)
        if not self.about.strip():
            raise ConfigError("adapter.start 'described' needs start.about: say in public words what the records are")

    def check_public(self, config: RunConfig) -> str:
        """Return which adapters make the start."""
        del config
        parts = zip(self.names, self.weights(), strict=True)
        said = ", ".join(f"{name} {decimal_text(weight, 2)}" for name, weight in parts if weight)
        return f"begun at adapters of a library, by public descriptions: {said}"

    def from_public(self, model: FederatedModel, config: RunConfig, labels: Labels) -> AdapterState:
        """Return the weighted sum."""
        del config, labels
        return self.combined(model, self.weights())

    def weights(self) -> list[float]:
        """Return the weight of each adapter, which sum to 1."""
        from fedveil.contrib.library.describe import nearness, weights
        from fedveil.contrib.library.shelf import open_library

        library = open_library(self.library)
        cosines = nearness(self.about, [library.member(name).about for name in self.names])
        return weights(cosines, self.top, self.temperature)
