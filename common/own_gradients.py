"""Layers that compute the gradient of each record themselves."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

from torch import Tensor, nn


class OwnGradients(nn.Module):
    """A layer with a formula for its per-record gradients, which DP-SGD takes in place of a general one."""

    @abstractmethod
    def gradients(self, activations: Sequence[Tensor], backprops: Tensor) -> dict[nn.Parameter, Tensor]:
        """Return the gradient of each record by trained parameter, shape (records, *parameter's).

        Args:
            activations: what ``forward`` was called with, each of shape (records, ...).
            backprops: gradient of the loss with respect to what it returned, shape (records, ...).
        """
