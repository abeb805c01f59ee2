"""Kinds of task from the literature, one per file."""
