"""Data sets and records: where they come from, which rows count, and how simulated sites divide them."""
