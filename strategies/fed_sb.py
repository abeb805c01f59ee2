"""Fed-SB: only the r × r matrix R between two frozen orthonormal factors is trained and sent.

Singhal, Ponkshe et al.: Fed-SB, on the parameterisation of LoRA-SB. W = W0 + B R A.

Exact: ``B (sum p_k R_k) A = sum p_k B R_k A``. Per layer and round r² numbers travel each way and
nothing else; noise on R enters the weights with norm ``sigma C r / b``, whatever the layer's size.

Where B and A come from (``fed-sb.init``):

* ``orthonormal``, ``svd-of-weights``: derived by every party, checked by fingerprint; R starts at 0;
  no record is used, so nothing is paid.
* ``public-gradient``: LoRA-SB's recipe on public records at the server; B and A travel once.
* ``dp-gradient``: every site sends one clipped, noised sum of per-record full gradients, charged
  to its ledger as an initialisation; the SVD is post-processing. Without LoRA-SB's sign(), because
  the sign of a noisy dense matrix is close to random, while a low-rank signal survives noise.
* ``private-gradient``: LoRA-SB's recipe as published, on raw private records; only without privacy.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from common.adapters.lora_sb import leading_singular_triple
from common.check import clip_norm, in_range, one_of, positive
from common.errors import ConfigError
from common.messages.state import AdapterState
from common.messages.tensors import merge, select
from strategies.average import Average
from strategies.base import GradientSource, ServerState

INITS = ("orthonormal", "svd-of-weights", "public-gradient", "dp-gradient", "private-gradient")


@dataclass(frozen=True)
class FedSB(Average):
    """Sites train R; the server averages it."""

    name: ClassVar[str] = "fed-sb"
    paper: ClassVar[str] = "Singhal et al. 2025"
    adapter: ClassVar[str] = "lora-sb"
    trains: ClassVar[tuple[str, ...]] = ("R",)
    freezes: ClassVar[tuple[str, ...]] = ("A", "B")
    privacy: ClassVar[str] = "dp-sgd, none (init 'private-gradient': only none)"

    init: str = "orthonormal"
    init_step: float = 1e-3
    """Length of the first sign step that LoRA-SB's recipe imitates: its eta."""
    init_data: str = ""
    """For ``public-gradient``: the public data set or file, read with the run's ``data`` columns."""
    init_records: int = 256
    """For ``public-gradient``: how many of its records are used."""
    init_sample_rate: float = 0.1
    """For the site-side recipes: chance of each record to be used."""
    init_noise_multiplier: float = 5.0
    """For ``dp-gradient``: noise std over clip norm of the one release."""
    init_clip_norm: float = 1.0
    """For ``dp-gradient``: L2 bound of a record's full gradient over all adapted layers together."""

    def __post_init__(self) -> None:
        one_of(INITS, fed_sb__init=self.init)
        in_range(0, 1, fed_sb__init_sample_rate=self.init_sample_rate)
        positive(
            fed_sb__init_step=self.init_step,
            fed_sb__init_records=self.init_records,
            fed_sb__init_noise_multiplier=self.init_noise_multiplier,
        )
        clip_norm(fed_sb__init_clip_norm=self.init_clip_norm)

    def check(self, *, private: bool) -> None:
        """Refuse an initialisation that would break the run's promise, or lacks its data."""
        if self.init == "private-gradient" and private:
            raise ConfigError(
                "fed-sb.init 'private-gradient' publishes raw gradients of private records, which no ε covers: "
                "use 'dp-gradient', 'public-gradient', 'svd-of-weights' or 'orthonormal', or set privacy.mode to 'none'"
            )
        if self.init == "dp-gradient" and not private:
            raise ConfigError("fed-sb.init 'dp-gradient' is for a private run: without privacy use 'private-gradient'")
        if self.init == "public-gradient" and not self.init_data:
            raise ConfigError("fed-sb.init 'public-gradient' needs fed-sb.init-data: name a public data set or file")

    def adapter_init(self, configured: str) -> str:
        """Return how the adapter starts before any gradient is seen.

        Raises:
            ConfigError: ``adapter.init`` asks for another start than an orthonormal one, which all of Fed-SB's are.
        """
        if configured != "orthonormal":
            raise ConfigError(
                f"adapter.init {configured!r} has no effect on 'fed-sb', whose B and A are always orthonormal: "
                f"leave it at 'orthonormal' and choose fed-sb.init from {', '.join(INITS)}"
            )
        return "svd-of-weights" if self.init == "svd-of-weights" else "orthonormal"

    @property
    def gradient(self) -> GradientSource | None:
        """Where round 0 takes a full gradient from, if the initialisation wants one."""
        if self.init == "public-gradient":
            return GradientSource(public_data=self.init_data, public_records=self.init_records)
        if self.init == "dp-gradient":
            return GradientSource(
                sample_rate=self.init_sample_rate,
                clip_norm=self.init_clip_norm,
                noise_multiplier=self.init_noise_multiplier,
            )
        return GradientSource(sample_rate=self.init_sample_rate) if self.init == "private-gradient" else None

    def initialise(self, state: ServerState, gradient: AdapterState) -> ServerState:
        """Set B, A and R from the mean full gradient G of every layer (factor ``G``, shape (out, in))."""
        noisy = self.init == "dp-gradient"
        factors = {
            layer: gradient_basis(held["G"], state.adapter[layer]["R"].shape[0], self.init_step, sign=not noisy)
            for layer, held in gradient.items()
        }
        return replace(state, adapter=merge(state.adapter, factors))

    def basis(self, state: ServerState) -> AdapterState:
        """Return B and A, which travel once when they come from a gradient; else every party derives them."""
        return select(state.adapter, ("A", "B")) if self.gradient else {}


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
