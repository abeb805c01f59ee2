"""Collectors of a round's contributions: one for each way of collecting."""
