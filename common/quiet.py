"""Lines that other packages print and nobody needs: each left out by its own words, and nothing else."""

from __future__ import annotations

import logging
import warnings

UNLOADED = "Failed to load CPU gemm_4bit_forward from kernels-community"
"""Of bitsandbytes, which PEFT imports whether or not a run quantises. No layer here computes by that kernel."""
REPORT = " LOAD REPORT"
"""Of transformers: a table of weights that did not find their place, each with its status."""
AMISS = ("MISSING", "MISMATCH", "CONVERSION")
"""Statuses that a person must read: the model is not the one in the files."""
HOOKED = "Full backward hook is firing"
"""Of torch, where a layer's inputs take no gradient, as features under a head do. Opacus asks its outputs' alone."""


def leave_out() -> None:
    """Leave such lines out of the packages' loggers and warnings; called once, before a package is imported."""
    logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(lambda record: UNLOADED not in record.getMessage())
    logging.getLogger("transformers.modeling_utils").addFilter(_is_needed)
    warnings.filterwarnings("ignore", HOOKED, UserWarning)


def _is_needed(record: logging.LogRecord) -> bool:
    """Return whether a line is more than a report of weights which the files have, and this kind of model has not."""
    text = record.getMessage()
    return REPORT not in text or any(status in text for status in AMISS)
