"""Parameterisations of a layer's change from the literature, one per file."""
