"""Observers that pass a run's figures to an experiment tracker, one per file."""
