"""Initialisations of adapters from the literature, one per file."""
