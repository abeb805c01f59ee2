"""Singular values and vectors of a weight plus a change of low rank, from those of the weight alone.

With W0 = U0 S0 V0ᵀ, and W = W0 + B A, every product with W costs O(min(m, n) r) in the basis of U0 and V0: there W is
diag(S0) + P Qᵀ, with r more rows or columns where B or A leave the span of U0 or V0. Vectors found there have as their
coordinates the cosines with U0. It is exact: nothing is cut off.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

SMALL = 64
"""Smaller side up to which all singular vectors are computed, since a few are not faster."""
NEGLIGIBLE = 1e-12
"""Length of what leaves a span, over the whole, that is rounding."""


@dataclass(frozen=True)
class Spectrum:
    """The thin singular value decomposition of a weight, float64."""

    left: Tensor
    """U0, shape (out, q) with q the smaller side."""
    values: Tensor
    """S0, shape (q,), descending."""
    right: Tensor
    """V0, shape (in, q)."""


@dataclass(frozen=True)
class Top:
    """The largest singular values of a changed weight."""

    values: Tensor
    """Shape (k,), descending."""
    cosines: Tensor
    """Shape (k,): of each left singular vector, the largest absolute cosine with one of the weight before."""


def spectrum_of(weight: Tensor) -> Spectrum:
    """Return the decomposition of a weight of shape (out, in)."""
    left, values, right = torch.linalg.svd(weight.double(), full_matrices=False)
    return Spectrum(left, values, right.T)


def top_of(before: Spectrum, B: Tensor, A: Tensor, count: int) -> Top:
    """Return the ``count`` largest singular values of ``W0 + B A``, and how old their left vectors are.

    Args:
        before: of W0.
        B: shape (out, r), with the scale in it. A: shape (r, in).
        count: at most the smaller side of W0.
    """
    import numpy as np
    from scipy.sparse.linalg import LinearOperator, svds

    left, right = _coordinates(before.left, B.double()), _coordinates(before.right, A.double().T)
    size = len(before.values)
    shape = (len(left), len(right))
    if size <= SMALL or count >= size - 1:
        core = left @ right.T
        core.diagonal()[:size] += before.values
        vectors, values, _ = torch.linalg.svd(core, full_matrices=False)
        vectors, values = vectors[:, :count], values[:count]
    else:
        own, out, into = before.values.numpy(), left.numpy(), right.numpy()

        def product(x: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
            """Return (diag(S0) + first secondᵀ) x."""
            made = first @ (second.T @ x.reshape(-1))
            made[:size] += own * x.reshape(-1)[:size]
            return made

        operator = LinearOperator(
            shape, matvec=lambda x: product(x, out, into), rmatvec=lambda x: product(x, into, out), dtype=np.float64
        )
        begun = np.random.default_rng(0).standard_normal(min(shape))
        found, numbers, _ = svds(operator, k=count, v0=begun, return_singular_vectors="u", maxiter=20 * size)
        order = np.argsort(-numbers)
        values, vectors = torch.from_numpy(numbers[order].copy()), torch.from_numpy(found[:, order].copy())
    return Top(values, vectors[:size].abs().amax(0))


def count_above(before: Spectrum, B: Tensor, A: Tensor, bound: float) -> int:
    """Return how many singular values of ``W0 + B A`` are above ``bound``, by the inertia of a matrix of 2 r rows.

    #{σ > t} = #{S0 > t} + n₊(-J - Eᵀ (H0 - t)⁻¹ E) - n₊(-J), where H0 = [[0, W0], [W0ᵀ, 0]], E = diag(B, Aᵀ) and
    J = [[0, I], [I, 0]] (Sylvester, by Schur complements of [[H0 - t, E], [Eᵀ, -J]]).
    """
    out, into = _coordinates(before.left, B.double()), _coordinates(before.right, A.double().T)
    size, rank = len(before.values), out.shape[1]
    denominator = bound**2 - before.values**2
    same, across = -bound / denominator, -before.values / denominator
    first, second = out[:size], into[:size]
    beyond = (out[size:].T @ out[size:], into[size:].T @ into[size:])
    upper = first.T @ (same[:, None] * first) - beyond[0] / bound
    lower = second.T @ (same[:, None] * second) - beyond[1] / bound
    mixed = first.T @ (across[:, None] * second)
    identity = torch.eye(rank, dtype=torch.float64)
    small = torch.cat([torch.cat([-upper, -identity - mixed], 1), torch.cat([-identity - mixed.T, -lower], 1)])
    return int((before.values > bound).sum()) + int((torch.linalg.eigvalsh(small) > 0).sum()) - rank


def _coordinates(basis: Tensor, columns: Tensor) -> Tensor:
    """Return columns in an orthonormal basis, with rows more for what leaves its span, if anything does."""
    inside = basis.T @ columns
    rest = columns - basis @ inside
    again = basis.T @ rest
    inside, rest = inside + again, rest - basis @ again
    if float(rest.norm()) <= NEGLIGIBLE * float(columns.norm()):
        return inside
    return torch.cat([inside, torch.linalg.qr(rest)[1]])
