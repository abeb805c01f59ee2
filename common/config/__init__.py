"""Settings: which exist, how users write them, and what they resolve to."""
