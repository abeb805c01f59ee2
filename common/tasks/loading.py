"""Rules for every loader of a stock model, and for what of its configuration counts."""

from __future__ import annotations

UNCOUNTED = ("transformers_version", "dtype", "torch_dtype", "architectures", "name_or_path")
"""Parts of a configuration that change nothing of what a model computes as it is loaded here."""
OWN_CODE = {"trust_remote_code": False}
"""For every loader: code that comes with a model never runs; unset, transformers asks at the terminal."""
