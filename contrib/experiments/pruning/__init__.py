"""Small base models to train on, and their adapters on the large ones (``contrib.experiments.pruning.units``)."""
