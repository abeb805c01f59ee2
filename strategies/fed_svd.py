"""FedSVD: sites train B under a frozen A; the server averages B and re-factorises the product.

Lee, Park, Lee et al.: FedSVD, NeurIPS 2025 (arXiv 2505.12805), alg. 1. After averaging,
``U S Vᵀ = svd(B A)``, then ``A ← Vᵀ`` (orthonormal rows) and ``B ← U S``; the product, hence the
model, does not change. Under privacy the SVD acts on noised factors only: post-processing.

The product is never formed. With thin QRs ``B = Q_B R_B`` and ``Aᵀ = Q_A R_A`` the SVD of the r × r
core ``R_B R_Aᵀ`` gives the same factors in O((m + n) r²). Because the core is square its V is a
full orthogonal matrix whatever the rank of B, so rows of A that B does not use stay inside A's
own row space: nothing arbitrary enters, also at B = 0.

A only ever changes by an r × r matrix, ``A = M A₀``, so B and M travel down and every site, also
one that joins late, rebuilds A from the seeded A₀.

Worth knowing: under plain SGD or DP-SGD this equals FFA-LoRA with one orthonormalised A
(``strategy = "ffa-lora"``, ``adapter.start = "orthonormal"``): rotating A changes neither
the step in weight space, nor the clip, nor the law of the noise. Under Adam it is a different
algorithm. Tests prove both.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, ClassVar

from fedveil.common.check import POSITIVE
from fedveil.common.config.fields import Unit
from fedveil.common.later import torch
from fedveil.common.messages.state import AdapterState
from fedveil.common.messages.tensors import merge, select
from fedveil.strategies.average import Average
from fedveil.strategies.base import Facts, Takes
from fedveil.strategies.state import ServerState

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class FedSVD(Average):
    """Sites train B; the server averages it, re-factorises, and sends B and the rotation M."""

    name: ClassVar[str] = "fed-svd"
    facts: ClassVar[Facts] = Facts(
        "Lee et al. 2025",
        noise="s x_B A, A orthonormal after round 1: norm s σC/b √(m r)",
        exact="linear",
        moves_frozen=True,
    )
    adapters: ClassVar[Takes] = Takes("lora-frozen-a", trains=("B",), freezes=("A",))

    period: Annotated[int, POSITIVE, Unit("rounds")] = 1
    """From one re-factorisation to the next."""

    def start(self, adapter: AdapterState, trained: tuple[str, ...]) -> ServerState:
        """Return A₀ and B₀ with M = I in every layer."""
        rotations = {
            layer: {"M": torch.eye(factors["A"].shape[0], dtype=factors["A"].dtype)}
            for layer, factors in adapter.items()
            if "A" in factors
        }
        start = {layer: {"A0": factors["A"]} for layer, factors in adapter.items() if "A" in factors}
        return ServerState(0, adapter, trained, merge(rotations, start))

    def basis(self, state: ServerState) -> AdapterState:
        """Return A₀, which every site rebuilds A from."""
        return {layer: {"A": own["A0"]} for layer, own in state.memory.items() if "A0" in own}

    def downlink(self, state: ServerState) -> AdapterState:
        """Return B and M of every layer, and the head."""
        return merge(super().downlink(state), select(state.memory, ("M",)))

    def install(self, start: AdapterState, received: AdapterState) -> AdapterState:
        """Return A = M A₀ and the received B and head."""
        rotated = {
            layer: {"A": rotate(factors["M"], start[layer]["A"])} for layer, factors in select(received, ("M",)).items()
        }
        rest = {layer: {n: t for n, t in factors.items() if n != "M"} for layer, factors in received.items()}
        return merge(merge(start, rest), rotated)

    def settle(self, state: ServerState) -> ServerState:
        """Return the state re-factorised when it is due: A and M turn with B.

        The server optimiser's moments of B do not: a second moment per coordinate says nothing about the
        coordinates that B is turned to, so these layers start without moments.
        """
        if state.round_number % self.period:
            return state
        changes: AdapterState = {}
        for layer, own in ((layer, own) for layer, own in state.memory.items() if "M" in own):
            A, B = state.adapter[layer]["A"], state.adapter[layer]["B"]
            new_b, change = refactor(B, A)
            rotation = (change @ own["M"].double()).to(A.dtype)
            changes[layer] = {"B": new_b, "A": rotate(rotation, own["A0"]), "M": rotation}
        return replace(
            state,
            adapter=merge(state.adapter, select(changes, ("A", "B"))),
            memory=merge(state.memory, select(changes, ("M",))),
            optimizer=state.optimizer.without(changes),
        )


def rotate(M: Tensor, start: Tensor) -> Tensor:
    """Return ``M @ A₀`` in A₀'s dtype, computed in float64 so that server and sites agree."""
    return (M.double() @ start.double()).to(start.dtype)


def refactor(B: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    """Re-factorise ``B @ A`` without forming it.

    Args:
        B: shape (out, r). A: shape (r, in), of full row rank.

    Returns:
        The new B (out, r) in B's dtype, and C (r, r) in float64, such that the new A is ``C @ A`` and
        ``new_B @ C @ A == B @ A``. Rows of ``C @ A`` are orthonormal, columns of new_B orthogonal, in
        descending order of length. In each row of C the entry of largest magnitude is positive, which fixes the
        SVD's free signs.
    """
    q_b, r_b = torch.linalg.qr(B.double())
    _, r_a = torch.linalg.qr(A.double().T)
    u, s, vt = torch.linalg.svd(r_b @ r_a.T)
    # Aᵀ = Q_A R_A gives Vᵀ Q_Aᵀ = (Vᵀ R_A⁻ᵀ) A, so C is Vᵀ R_A⁻ᵀ: a change of basis inside A's row space.
    change = torch.linalg.solve_triangular(r_a, vt.T, upper=True).T
    signs = torch.sign(change.gather(1, change.abs().argmax(1, keepdim=True)))
    change, u = change * signs, u * signs.T
    return (q_b @ (u * s)).to(B.dtype), change
