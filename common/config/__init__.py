"""Settings: what exists, how people write them, and what they resolve to."""
