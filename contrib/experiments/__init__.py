"""Experiments beside the product: pruned base models, and counts of intruder dimensions. ``python -m`` this package."""
