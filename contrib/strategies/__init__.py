"""Strategies from the literature, one per file."""
