"""Orthonormal directions: random ones, and singular vectors with fixed signs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedveil.common.later import torch

if TYPE_CHECKING:
    from torch import Tensor


def orthonormal_rows(rank: int, columns: int, generator: torch.Generator) -> Tensor:
    """Return a random matrix with orthonormal rows, shape (rank, columns), Haar distributed, float32."""
    gaussian = torch.randn(columns, rank, generator=generator, dtype=torch.float64)
    q, r = torch.linalg.qr(gaussian)
    # A QR is unique up to signs; fixing them makes the result Haar distributed and reproducible.
    return (q * torch.sign(torch.diagonal(r))).T.contiguous().float()


def leading_singular_triple(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return U (out, rank), S (rank,), Vᵀ (rank, in) of the largest singular values, signs fixed.

    In each column of U the entry of largest magnitude is positive, so that server and sites, which compute
    this from the same matrix, get the same factors.
    """
    u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    u, s, vt = u[:, :rank], s[:rank], vt[:rank]
    signs = torch.sign(u.gather(0, u.abs().argmax(0, keepdim=True)))
    return (u * signs).contiguous(), s, (vt * signs.T).contiguous()


def with_fixed_signs(rows: Tensor) -> Tensor:
    """Return the rows, each times the sign that makes its entry of largest magnitude positive."""
    return rows * torch.sign(rows.gather(1, rows.abs().argmax(1, keepdim=True)))


def spanned_rows(matrix: Tensor) -> Tensor:
    """Return orthonormal rows, shape of ``matrix`` (rank, columns), whose first k span its first k; signs fixed."""
    return with_fixed_signs(torch.linalg.qr(matrix.T)[0].T)


def leading_rows(gram: Tensor, rank: int) -> Tensor:
    """Return eigenvectors of a symmetric matrix, shape (n, n), as rows (rank, n): of the largest first; signs fixed."""
    return with_fixed_signs(torch.linalg.eigh(gram).eigenvectors[:, -rank:].flip(1).T)
