"""FlyLoRA: each position of a record trains the k of r directions that answer it most.

FlyLoRA freezes a sparse random A (``adapter.start = "sparse"``) and lets a position through the k directions whose
``|A x|`` is largest, so that B's columns become experts without a router. What is kept, what differs, and why:

* The choice is made inside a record's own pass (``contrib.adapters.lora_routed``), so it costs nothing and moves no
  sensitivity. Its bias that counts how often directions are taken is left out: it is a statistic of private records.
* For a given input the output is linear in B, and A is everywhere the same, so averages are exact in what the model
  does. The released tool for merging averages A and the bias too, which is not.
* What is scored and exported has all directions, for stock PEFT has no choice.
* Noise falls on all of B, and all of B travels: k saves neither.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fedveil.strategies.average import Average
from fedveil.strategies.base import Facts, Takes


@dataclass(frozen=True)
class FlyLoRA(Average):
    """Sites train B under one frozen A, each position through the directions that answer it most."""

    name: ClassVar[str] = "flylora"
    facts: ClassVar[Facts] = Facts("FlyLoRA", exact="linear")
    adapters: ClassVar[Takes] = Takes("lora-routed", trains=("B",), freezes=("A",))
