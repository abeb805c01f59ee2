"""The model of a run: the frozen base, its shapes and precision, and the adapter and head on it."""
