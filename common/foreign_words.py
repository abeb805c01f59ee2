"""Words of other packages that code must match, because nothing else tells what happened. All of them are here.

Each says whose it is; a new version of that package may change it.
"""

from __future__ import annotations

ABSL_UNCONVERGED = "failed to converge"
"""Warning of dp_accounting, through absl, about one Renyi order."""
BITSANDBYTES_UNLOADED = "Failed to load CPU gemm_4bit_forward from kernels-community"
"""Log line at the import, which PEFT makes whether or not a run quantises. No layer here uses that kernel."""
CSV_UNCLOSED = "unexpected end"
"""Error of csv: a quote that is never closed took the rest of the file."""
FLOWER_KEY_IN_USE, FLOWER_NO_NODE, FLOWER_NO_RUN = "already in use", "Node ID not found", "Run ID not found"
"""Errors of the SuperLink's control interface."""
PEFT_MISSING_KEYS = "Found missing adapter keys"
"""Warning of PEFT, as a regular expression: tensors that an adapter's file lacks."""
PEFT_OLD_NAME = ".*is_gradient_checkpointing"
"""Warning of transformers, as a regular expression, about an old name that PEFT uses."""
TORCH_GROUPED = "grouped"
"""Part of the name of every product of rows in groups, whose sizes are numbers in a tensor and no shape."""
TORCH_HOOK = "Full backward hook is firing"
"""Warning of torch, as a regular expression: a layer's inputs take no gradient. Opacus needs its outputs' alone."""
TRANSFORMERS_REPORT = " LOAD REPORT"
"""Log line of transformers: a table of weights that did not find their place, each with its status."""
TRANSFORMERS_AMISS = ("MISSING", "MISMATCH", "CONVERSION")
"""Statuses in that table that a person must read: the model is not the one in the files."""
