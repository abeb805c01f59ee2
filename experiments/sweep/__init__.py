"""Sweeps: variants × ε × seeds with their baselines, one table of results, means with intervals, pictures."""
