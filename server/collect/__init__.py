"""Collectors of a round's contributions: one each for plain updates, masked sums and a trusted server."""
