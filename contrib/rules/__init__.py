"""Rules around the optimiser of the server from the literature, one per file."""
