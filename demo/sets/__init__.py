"""Data sets of the demonstrations: one source's in a file, each a row of ``common.data.named.DATASETS``."""
