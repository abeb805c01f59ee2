"""Data sets and records: where they come from, which rows are records, and how they are divided."""
