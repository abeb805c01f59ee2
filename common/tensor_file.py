"""Read the tensors of a file of safetensors."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from fedveil.common.errors import DataError


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file in a run's folder, by name, on the CPU.

    Raises:
        DataError: it is not there, or is damaged.
    """
    try:
        return load_file(str(path))
    except FileNotFoundError as error:
        raise DataError(f"{path} is not there: take the whole folder of the run, or put that file back") from error
    except (OSError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{path} cannot be read ({reason}): copy the run's folder again, or that file") from error
