"""FlyLoRA: each position of a record trains the k of r directions that answer it most; the last rounds train all.

FlyLoRA freezes a sparse random A (``adapter.start = "sparse"``) and lets a position through the k directions whose
``|A x|`` is largest, so that B's columns become experts without a router. What is kept, what differs, and why:

* The choice is made inside a record's own pass (``common.adapters.routed``), so it costs nothing and moves no
  sensitivity. Its bias that counts how often directions are taken is left out: it is a statistic of private records.
* For a given input the output is linear in B, and A is everywhere the same, so averages are exact in what the model
  does. The released tool for merging averages A and the bias too, which is not.
* A choice at every position is no change of a weight, so stock PEFT cannot load it. So the last ``dense-rounds`` have
  k = r, which is LoRA under the sparse A; the server scores every round, and exports, with all directions. A run
  without such a round is refused.
* Noise falls on all of B, and all of B travels: k saves neither.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from common.check import POSITIVE
from common.config.fields import Unit
from common.config.sections import RunConfig
from common.errors import ConfigError
from strategies.average import Average


@dataclass(frozen=True)
class FlyLoRA(Average):
    """Sites train B under one frozen A, each position through the directions that answer it most."""

    name: ClassVar[str] = "flylora"
    paper: ClassVar[str] = "FlyLoRA, ending with all directions"
    adapter: ClassVar[str] = "lora-frozen-a"
    trains: ClassVar[tuple[str, ...]] = ("B",)
    freezes: ClassVar[tuple[str, ...]] = ("A",)
    routed: ClassVar[bool] = True

    directions: Annotated[int, POSITIVE, Unit("directions")] = 2
    """How many a position passes through before the last rounds: k. FlyLoRA's is a quarter of the rank."""
    dense_rounds: Annotated[int, POSITIVE, Unit("rounds")] = 1
    """Last rounds of the run, in which all directions are trained: what is exported has all of them."""

    def check_run(self, config: RunConfig) -> None:
        """Refuse a k that leaves nothing to choose, and a run that is dense from its first round."""
        if self.directions >= config.adapter.rank:
            raise ConfigError(
                f"{self.name}.directions is {self.directions} and adapter.rank {config.adapter.rank}, so that all are "
                f"taken: lower {self.name}.directions, or set strategy to 'ffa-lora' with adapter.start 'sparse'"
            )
        if self.dense_rounds >= config.rounds:
            raise ConfigError(
                f"{self.name}.dense-rounds is {self.dense_rounds} of {config.rounds} rounds, so that no round chooses: "
                f"raise rounds, lower {self.name}.dense-rounds, or set strategy to 'ffa-lora'"
            )

    def active(self, round_number: int, rounds: int) -> int:
        """Return k before the last rounds.

        >>> [FlyLoRA(dense_rounds=2).active(number, 4) for number in (1, 2, 3, 4)]
        [2, 2, 0, 0]
        """
        return self.directions if round_number <= rounds - self.dense_rounds else 0
