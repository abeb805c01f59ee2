"""Suppression of lines that other packages print and no user needs, matched by their own words."""

from __future__ import annotations

import logging
import warnings

from fedveil.common.foreign_words import BITSANDBYTES_UNLOADED, TORCH_HOOK, TRANSFORMERS_AMISS, TRANSFORMERS_REPORT


def leave_out() -> None:
    """Leave such lines out of the packages' loggers and warnings; called once, before a package is imported."""
    bitsandbytes = logging.getLogger("bitsandbytes.backends.cpu.ops")
    bitsandbytes.addFilter(lambda record: BITSANDBYTES_UNLOADED not in record.getMessage())
    logging.getLogger("transformers.modeling_utils").addFilter(_is_needed)
    warnings.filterwarnings("ignore", TORCH_HOOK, UserWarning)


def _is_needed(record: logging.LogRecord) -> bool:
    """Return whether a line is more than a report of weights which the files have, and this kind of model has not."""
    text = record.getMessage()
    return TRANSFORMERS_REPORT not in text or any(status in text for status in TRANSFORMERS_AMISS)
