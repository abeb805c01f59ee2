"""Shared words, shapes and rules. Imports nothing of ``strategies``, ``client``, ``server``."""
